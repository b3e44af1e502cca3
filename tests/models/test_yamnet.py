import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from uss_jax.audio.resampling import resample
from uss_jax.bundles.model import Model
from uss_jax.models.yamnet import YAMNet
from uss_jax.ontology import load_ontology

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "yamnet.npz"
SOUNDS = ("noise", "chirp", "short", "silence", "recording")
UNKNOWN = [1, 2, 12, 32, 33, 277]


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.fixture(scope="module")
def net():
    return Model("yamnet").tagger


@pytest.fixture(scope="module")
def dog(golden):
    return (golden["recording/int16"] / np.float32(32768))[None]


@pytest.fixture(scope="module")
def tiny_yamnet():
    module = YAMNet(channels=14 * (8,))
    return module, module.init(jax.random.key(0), jnp.zeros((1, 16000)))


def clip(golden, name):
    return (golden[f"{name}/int16"] / np.float32(32768))[None]


@pytest.mark.parametrize("name", SOUNDS)
def test_the_front_end_and_every_patch_equal_the_golden_numbers(golden, net, name):
    mel = net(clip(golden, name), method="log_mel")
    np.testing.assert_allclose(mel[0], golden[f"{name}/log_mel"], atol=1e-5)
    embedding = net(mel, method="embed")
    wanted = golden[f"{name}/embedding"]
    np.testing.assert_allclose(embedding[0], wanted, atol=2e-6 * np.abs(wanted).max())
    probability = np.asarray(net(embedding, method="classify"))[0]
    known = np.delete(probability, UNKNOWN, axis=1)
    wanted = 1 / (1 + np.exp(-golden[f"{name}/logits"].astype(np.float64)))
    np.testing.assert_allclose(known, wanted, atol=2e-6)
    assert not probability[:, UNKNOWN].any()


def test_a_clip_is_the_maximum_and_the_mean_of_its_patches(golden, net, dog):
    outputs = net(dog)
    probability = 1 / (1 + np.exp(-golden["recording/logits"].astype(np.float64)))
    np.testing.assert_allclose(
        np.delete(outputs["clipwise"][0], UNKNOWN), probability.max(axis=0), atol=2e-6
    )
    embedding = golden["recording/embedding"]
    np.testing.assert_allclose(
        outputs["embedding"][0], embedding.mean(axis=0), atol=2e-6 * embedding.max()
    )


@pytest.mark.parametrize("hop", [12, 24, 48])
def test_frames_have_the_probability_of_the_patch_around_them(net, dog, hop):
    """Frames of 10 ms; patch p covers 0.975 s from p hops on, and so is centred 0.4875 s later."""
    module = net.module.clone(patch_hop_frames=hop)
    outputs = jax.jit(module.apply)(net.variables, dog)
    patches = jax.jit(
        lambda v, x: module.apply(v, module.apply(v, x, method="log_mel"), method="embed")
    )
    patchwise = np.asarray(net(patches(net.variables, dog), method="classify"))[0]
    framewise = np.asarray(outputs["framewise"])[0]
    assert framewise.shape == (401, 527)
    centres = 0.4875 + 0.01 * hop * np.arange(len(patchwise))
    assert len(patchwise) == (398 - 96) // hop + 1
    wanted = np.stack(
        [np.interp(0.01 * np.arange(401), centres, of_class) for of_class in patchwise.T], axis=1
    )
    np.testing.assert_allclose(framewise, wanted, atol=1e-6)


def test_a_finer_hop_has_the_patches_of_a_coarser_one(net, dog):
    mel = net(dog, method="log_mel")
    fine, coarse = (
        np.asarray(net.module.clone(patch_hop_frames=hop).apply(net.variables, mel, method="embed"))
        for hop in (12, 48)
    )
    np.testing.assert_allclose(fine[:, ::4], coarse, atol=1e-5)


def test_the_classes_are_audioset_s_but_six(net):
    ontology = load_ontology()
    names = [ontology.class_names[k] for k in net.module.unknown_classes]
    assert names == [
        "Male speech, man speaking",
        "Female speech, woman speaking",
        "Battle cry",
        "Male singing",
        "Female singing",
        "Funny music",
    ]


@pytest.mark.parametrize("rate", [32000, 44100, 48000, 22050])
def test_other_rates_are_resampled_in_the_front_end(net, dog, rate):
    """Within 1e-3 of the probabilities at 16 kHz, and of silence where nothing above it sounds."""
    at_rate = resample(dog, 16000, rate)
    other = Model("yamnet", sample_rate=rate)
    assert other.sample_rate == other.tagger.module.sample_rate == rate
    found, wanted = other.tagger(at_rate), net(dog)
    np.testing.assert_allclose(found["clipwise"], wanted["clipwise"], atol=1e-3)
    assert found["framewise"].shape[1] == at_rate.shape[1] // round(rate / 100) + 1


def test_nothing_above_8_khz_is_heard_at_32_khz():
    other = Model("yamnet", sample_rate=32000).tagger
    time = np.arange(64000) / 32000
    high = (0.3 * np.sin(2 * np.pi * 9000 * time) * np.hanning(64000)).astype(np.float32)[None]
    mel = np.asarray(other(high, method="log_mel"))
    np.testing.assert_allclose(mel, np.log(1e-3), atol=0.2)  # an alias 100 dB below it


def test_rates_without_a_common_divisor_are_refused():
    with pytest.raises(ValueError, match="16001 Hz cannot be resampled to 16000 Hz"):
        YAMNet(sample_rate=16001).init(jax.random.key(0), jnp.zeros((1, 16001)))


def test_in_bfloat16_the_probabilities_stay_near(net, dog):
    half = net.module.clone(dtype="bfloat16")
    outputs = jax.jit(half.apply)(net.variables, dog)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(outputs))
    np.testing.assert_allclose(outputs["clipwise"], net(dog)["clipwise"], atol=0.03)


def test_vmap_over_the_batch_equals_the_batch(tiny_yamnet):
    module, variables = tiny_yamnet
    clips = jnp.asarray(0.1 * np.random.default_rng(0).standard_normal((3, 20000)), jnp.float32)
    together = module.apply(variables, clips)
    apart = jax.vmap(lambda x: module.apply(variables, x[None]))(clips)
    for name, value in together.items():
        np.testing.assert_allclose(apart[name][:, 0], value, atol=1e-6)


def test_a_sharded_batch_is_computed_where_it_lies(tiny_yamnet):
    module, variables = tiny_yamnet
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    clips = 0.1 * np.random.default_rng(0).standard_normal((8, 20000)).astype(np.float32)
    everywhere = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    compiled = (
        jax.jit(module.apply, out_shardings=rows)
        .lower(everywhere, jax.device_put(clips, rows))
        .compile()
    )
    text = compiled.as_text()
    for gathering in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert gathering not in text
    sharded = compiled(everywhere, jax.device_put(clips, rows))
    for name, value in jax.jit(module.apply)(variables, jnp.asarray(clips)).items():
        np.testing.assert_allclose(sharded[name], value, atol=1e-6)


def test_it_exports_to_stablehlo_for_any_batch(tiny_yamnet):
    module, variables = tiny_yamnet
    (b,) = jax.export.symbolic_shape("b")
    function = jax.jit(lambda x: module.apply(variables, x)["clipwise"])
    exported = jax.export.export(function, platforms=("cpu", "cuda", "tpu"))(
        jax.ShapeDtypeStruct((b, 20000), np.float32)
    )
    clips = 0.1 * np.random.default_rng(0).standard_normal((3, 20000)).astype(np.float32)
    np.testing.assert_allclose(exported.call(clips), function(jnp.asarray(clips)), atol=1e-6)


def test_augmentations_see_the_log_mel_less_that_of_silence(tiny_yamnet):
    module, variables = tiny_yamnet
    seen = []
    module.apply(variables, jnp.zeros((2, 20000)), augment=lambda mel: seen.append(mel) or mel)
    np.testing.assert_allclose(seen[0], 0, atol=1e-6)
    silent = module.apply(variables, jnp.zeros((2, 20000)))
    noise = 0.1 * jax.random.normal(jax.random.key(0), (2, 20000))
    masked = module.apply(variables, noise, augment=jnp.zeros_like)
    np.testing.assert_allclose(masked["clipwise"], silent["clipwise"], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"channels": (8, 8)}, "channels must be 14 widths"),
        ({"classes": 100, "unknown_classes": (100,)}, "unknown_classes must be class indices"),
    ],
)
def test_fields_that_make_no_net_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        YAMNet(**fields).init(jax.random.key(0), jnp.zeros((1, 16000)))
