"""HTS-AT with the recipe's weights computes what the original computes, block by block."""

import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import ways
from tests.golden.compare import relative_error
from tests.golden.inputs import make_batch, make_signal
from tests.golden.ways import limit
from tests.golden.weights import build_state_dict
from uss_jax.models.htsat import HTSAT, cut_views, fold
from uss_jax.models.tagging import front_end
from uss_jax.weights.htsat import convert_htsat

pytestmark = [pytest.mark.long, pytest.mark.golden]

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
# What the golden README aims at where clips are stretched at the reference's positions.
TOLERANCES = {
    "logmel": 2e-6,
    "bn0": 2e-6,
    "image": 5e-6,
    "patch_embed": 1e-5,
    "stage0": 2e-5,
    "stage1": 2e-5,
    "attention_probs": 1e-4,
    "latent_output": 3e-5,
    "clipwise_output": 3e-5,
}
TOKENS = 5e-5  # all others: tokens, logits, framewise probabilities, statistics
UNSTRETCHED_OUTPUTS = 5e-6


class Golden:
    """A net with the recipe's weights, and the reference's numbers."""

    def __init__(self, layout: str):
        self.layout = layout
        converted = convert_htsat(build_state_dict(layout))
        self.variables = jax.tree.map(jnp.asarray, converted.variables)
        with np.load(GOLDEN / f"{layout}.npz") as fixture:
            self.fixture = dict(fixture)
        self.runs = {
            run["tag"]: run for run in json.loads((GOLDEN / f"{layout}.json").read_text())["runs"]
        }
        self.nets = {
            repeats: HTSAT(**converted.fields, repeat_short=repeats, dtype=ways.chosen.dtype)
            for repeats in (False, True)
        }
        kept = dict(capture_intermediates=True, mutable=["intermediates"])
        # Few runs of each shape: optimising the compiled code takes longer than it saves.
        self._run = jax.jit(
            lambda net, v, x: net.apply(v, x, **kept),
            static_argnums=0,
            compiler_options={"xla_backend_optimization_level": 0},
        )

    def run(self, waveform: np.ndarray, repeats: bool) -> tuple[dict, dict]:
        """Outputs, and what every module gave."""
        outputs, state = self._run(self.nets[repeats], self.variables, jnp.asarray(waveform))
        return outputs, state["intermediates"]


@pytest.fixture(scope="module")
def htsat() -> Golden:
    return Golden("htsat")


def check_run(golden: Golden, tag: str) -> None:
    """Holds a run to all numbers that the fixtures have of it."""
    run, fixture = golden.runs[tag], golden.fixture
    net = golden.nets[run["infer_mode"]]
    waveform = make_batch(f"dev/{golden.layout}/{tag}", run["batch"], run["samples"])
    outputs, modules = golden.run(waveform, run["infer_mode"])
    tensors = dict(front_end_tensors(net, waveform, modules))
    tensors |= dict(block_tensors(net, modules))
    tensors |= dict(output_tensors(len(waveform), outputs, modules))

    worst = {}
    for name, tensor in tensors.items():
        for key, aim, value in compared(name, tensor):
            if f"{tag}/{key}" in fixture:
                worst[key] = relative_error(fixture, f"{tag}/{key}", value)
                if name.endswith("_output") and run["frames_into_image"] == [1024]:
                    aim = UNSTRETCHED_OUTPUTS
                assert worst[key] < limit("tokens", aim), key
    print({key: f"{error:.1e}" for key, error in worst.items()})  # with pytest -s
    stored = {key for key in fixture if key.startswith(f"{tag}/") and "@" not in key}
    others = ("input_sumsq", "framewise_classes_output", "/shape")
    others += ("crop_clipwise_output", "crop_latent_output")
    unchecked = {key for key in stored if not key.endswith(others)}
    assert unchecked == {f"{tag}/{key}" for key in worst}

    frames = tensors["framewise_output"][:, :, fixture["framewise_classes"]]
    framewise = fixture[f"{tag}/framewise_classes_output"]
    np.testing.assert_allclose(frames, framewise, atol=limit("tags, absolute", 2e-4))
    clipwise, atol = fixture[f"{tag}/clipwise_output"], limit("tags, absolute", 1e-4)
    np.testing.assert_allclose(outputs["clipwise"], clipwise, atol=atol)
    logmel = tensors["logmel"].ravel()[:: int(fixture.get(f"{tag}/logmel@stride", 1))]
    if f"{tag}/logmel" in fixture:
        np.testing.assert_allclose(logmel, fixture[f"{tag}/logmel"], atol=5e-3)


def compared(name: str, tensor: np.ndarray) -> Iterator[tuple[str, float, np.ndarray]]:
    """(key, tolerance, value) of a tensor and of its statistics by channel."""
    last = name.split("/")[-1].removesuffix("_last_window")
    yield name, TOLERANCES.get(last, TOKENS), tensor
    statistics = f"{name}_stats"
    if name == "image":
        quarters = tensor.reshape(len(tensor), 4, -1)
        tensor, statistics = quarters.swapaxes(1, 2), "image_quarters"
    others = tuple(range(tensor.ndim - 1))
    yield f"{statistics}/mean", TOKENS, tensor.mean(others, np.float64)
    yield f"{statistics}/std", TOKENS, tensor.std(others, np.float64)


def front_end_tensors(net, waveform, modules):
    normalised = given(modules["bn0"])
    views = cut_views(jnp.asarray(normalised), net.image_frames, net.repeat_short)
    image = fold(views.reshape(-1, *views.shape[2:]), net.image_size)
    yield "logmel", np.asarray(front_end(net, jnp.asarray(waveform)))[:, None]
    yield "bn0", normalised[:, None]
    yield "image", np.asarray(image)[:, None]


def block_tensors(net, modules):
    yield "patch_embed", by_token(modules["patch_embedding"])
    for i, depth in enumerate(net.depths):
        stage = modules[f"stage{i + 1}"]
        for j in range(depth):
            block, name = stage[f"block{j + 1}"], f"block{i}.{j}"
            windows = given(block["attention"])
            probabilities = np.asarray(block["attention"]["probabilities"][0])
            yield name, by_token(block)
            yield f"{name}/norm1", by_token(block["norm1"])
            yield f"{name}/attention_windows", merged(windows)
            yield f"{name}/attention_windows_last_window", windows[0, -1, ::7, ::5]
            yield f"{name}/attention_probs", merged(probabilities)
            yield f"{name}/attention_probs_last_window", probabilities[0, -1, 0, ::7]
        if i < len(net.depths) - 1:
            yield f"merge_norm{i}", by_token(stage["merge_norm"])
        yield f"stage{i}", by_token(stage)
    yield "norm", by_token(modules["norm"])


def output_tensors(batch, outputs, modules):
    logits = given(modules["token_semantic"]).transpose(0, 3, 1, 2)
    yield "tscam_conv", logits
    yield "clipwise_output", np.asarray(outputs["clipwise"])
    yield "latent_output", np.asarray(outputs["embedding"])
    yield "framewise_output", reference_framewise(logits, batch)


def reference_framewise(logits: np.ndarray, batch: int) -> np.ndarray:
    """[b, 1024, k] in the reference's frames: every step 32 times, views averaged."""
    steps = 1 / (1 + np.exp(-logits[:, :, 0].astype(np.float64)))
    steps = steps.reshape(batch, -1, *steps.shape[1:]).mean(axis=1)
    return np.repeat(steps.swapaxes(1, 2), 32, axis=1)


def given(module: dict) -> np.ndarray:
    return np.asarray(module["__call__"][0])


def by_token(module: dict) -> np.ndarray:
    x = given(module)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def merged(x: np.ndarray) -> np.ndarray:
    """Batch and windows as one axis."""
    return x.reshape(-1, *x.shape[2:])


@pytest.mark.parametrize("tag", ["exact1024", "clip10s", "infer2s", "plain2s"])
def test_every_block_equals_the_reference(htsat, tag):
    check_run(htsat, tag)


def test_long_clip_is_the_mean_of_its_views(htsat):
    waveform = make_batch("dev/htsat/long12s", 1, 400000)
    outputs, modules = htsat.run(waveform, False)
    logits = given(modules["token_semantic"])[:, 0]
    framewise = reference_framewise(logits.transpose(0, 2, 1)[:, :, None], 1)
    of_views = 1 / (1 + np.exp(-logits.mean(axis=1)))
    tokens = given(modules["norm"]).mean(axis=(1, 2))
    found = {
        "clipwise_output": np.asarray(outputs["clipwise"]),
        "framewise_output": framewise,
        "crop_clipwise_output": of_views[:, None],
        "crop_latent_output": tokens[:, None],
    }
    for name, tensor in found.items():
        aim = TOLERANCES.get(name.removeprefix("crop_"), TOKENS)
        error = relative_error(htsat.fixture, f"long12s/{name}", tensor)
        assert error < limit("tokens", aim), name
    np.testing.assert_allclose(outputs["embedding"][0], tokens.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_query_of_a_recording_is_the_reference_s(htsat):
    x = make_signal("dev/htsat/query", int(htsat.fixture["query/samples"]))
    x[64000:128000] = np.round(x[64000:128000] * 0.002 * 32768) / 32768
    segments = x[: len(x) // 64000 * 64000].reshape(-1, 64000)
    energy = (segments.astype(np.float64) ** 2).sum(axis=1)
    np.testing.assert_allclose(energy, htsat.fixture["query/segment_energy"], rtol=1e-6)
    latents = [htsat.run(s[None], True)[0]["embedding"][0] for s in segments[energy > 0.1]]
    error = relative_error(htsat.fixture, "query/avg_latent", np.mean(latents, axis=0))
    assert error < limit("tokens", TOLERANCES["latent_output"])


@ways.at_highest_only
def test_anchors_by_the_reference_s_rule_are_the_reference_s(htsat):
    fixture = htsat.fixture
    clips, classes = make_batch("dev/htsat/anchor", 3, 320000), fixture["anchor/class_id"]
    curves, framewise = [], []
    for pair in (clips[:2], clips[1:]):  # two at a time, the shape that another test compiles
        outputs, modules = htsat.run(pair, False)
        logits = given(modules["token_semantic"]).transpose(0, 3, 1, 2)
        curves.append(reference_framewise(logits, 2))
        framewise.append(np.asarray(outputs["framewise"]))
    curves = np.concatenate([curves[0], curves[1][1:]])
    framewise = np.concatenate([framewise[0], framewise[1][1:]])
    for i, label in enumerate(classes):
        curve = curves[i, :, label]
        score = np.convolve(curve, np.ones(200), "same")
        assert int(np.argmax(score)) == fixture["anchor/score_argmax"][i]
        begin = np.clip((np.argmax(score) * 1000 // 1024 - 100) * 320, 0, 320000 - 64000)
        assert begin == fixture["anchor/bgn_sample"][i]
        # The curve by our frames is the same one, sampled 1001 times instead of 1024.
        at = np.round(np.arange(1001) * 1023 / 1000).astype(int)
        assert np.mean(np.abs(framewise[i, :, label] - curve[at]) < 1e-6) > 0.99
    stacked = {"curve": [curves[i, ::32, label] for i, label in enumerate(classes)]}
    error = relative_error(fixture, "anchor/curve", np.stack(stacked["curve"]))
    assert error < limit("tokens", TOKENS)
    segments = [
        clip[begin : begin + 64000]
        for clip, begin in zip(clips, fixture["anchor/bgn_sample"], strict=True)
    ]
    latents = np.concatenate([htsat.run(s[None], True)[0]["embedding"] for s in segments])
    error = relative_error(fixture, "anchor/latent", latents)
    assert error < limit("tokens", TOLERANCES["latent_output"])


@pytest.mark.parametrize("tag", ["infer10s", "infer2s"])
def test_net_of_2048_latents_equals_the_reference(wide, tag):
    check_run(wide, tag)


@pytest.fixture(scope="module")
def wide() -> Golden:
    return Golden("htsat_2048d")
