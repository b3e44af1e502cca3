import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import TINY_HTSAT, quick_jit, random_variables
from uss_jax.models import htsat
from uss_jax.models.htsat import (
    HTSAT,
    bicubic_matrix,
    fold,
    random_frames,
    steps_of_frames,
    view_frames,
)

TINY = TINY_HTSAT.clone(classes=5)
CAPACITY = 256  # frames of its image


@pytest.fixture(scope="module")
def variables():
    variables = random_variables(TINY, (1, 8000))
    variables["batch_stats"]["bn0"]["mean"][:] = -40.0  # dB, as log-mel is
    variables["batch_stats"]["bn0"]["var"][:] = 400.0
    return jax.tree.map(jnp.asarray, variables)


def noise(samples, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(0.1 * rng.standard_normal((batch, samples)), jnp.float32)


def quickly(net):
    return quick_jit(net.apply)


def test_published_size_is_the_default():
    variables = jax.eval_shape(HTSAT().init, jax.random.key(0), np.zeros((1, 32000), np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 29_963_431
    assert HTSAT().embedding_width == 768
    assert HTSAT(token_width=256).embedding_width == 2048
    assert HTSAT().image_frames == 1024


@pytest.mark.parametrize("frames", [40, CAPACITY + 45, 2 * CAPACITY + 70])
def test_clips_of_any_length_are_tagged(variables, frames):
    outputs = quickly(TINY)(variables, noise((frames - 1) * TINY.hop_samples, batch=2))
    assert outputs["framewise"].shape == (2, frames, TINY.classes)
    assert outputs["embedding"].shape == (2, TINY.embedding_width)
    probabilities = np.asarray(outputs["framewise"])
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1 + 1e-6
    assert np.asarray(outputs["clipwise"]).std() > 1e-3


def test_a_clip_and_its_repetition_are_the_same_image():
    twice = view_frames(100, CAPACITY, True)[0]
    np.testing.assert_array_equal(twice, np.tile(np.arange(100), 2))
    np.testing.assert_array_equal(view_frames(100, CAPACITY, False)[0], np.arange(100))


@pytest.mark.parametrize("frames", [1025, 1251, 1501, 2047, 2049])
def test_long_clips_are_seen_in_three_views_that_reach_the_end(frames):
    views = view_frames(frames, 1024, True)
    length, step = (frames - 1) // 2, (frames - 1) // 4
    assert [view[0] for view in views] == [0, step, 2 * step]
    assert {len(view) for view in views} == {length}
    assert frames - 1 - views[-1][-1] <= 4


def test_training_cuts_the_image_s_frames_out_of_a_longer_clip():
    # The reference draws from all but the last possible beginning, for each item apart.
    mel = jnp.tile(jnp.arange(12.0)[None, :, None], (64, 1, 2))
    cuts = random_frames(jax.random.key(0), mel, 8)
    begins = cuts[:, 0, 0]
    frames = (begins[:, None] + np.arange(8))[:, :, None]
    np.testing.assert_array_equal(cuts, np.tile(frames, (1, 1, 2)))
    assert set(np.asarray(begins).tolist()) == {0, 1, 2, 3}


def test_a_longer_clip_is_seen_once_in_training(variables, monkeypatch):
    net = TINY.clone(stochastic_depth=0.0)
    waveform = noise((CAPACITY + 9) * net.hop_samples, batch=2)
    begins = np.array([2, 7])

    def cut(key, mel, count):
        return jnp.stack([row[b : b + count] for row, b in zip(mel, begins, strict=True)])

    monkeypatch.setattr(htsat, "random_frames", cut)
    outputs, statistics = net.apply(
        variables,
        waveform,
        train=True,
        rngs={"augment": jax.random.key(0)},
        mutable=["batch_stats"],
    )
    assert outputs["framewise"].shape == (2, CAPACITY, net.classes)
    # The statistics are of the whole clip, in training as in the reference.
    mel = htsat.front_end(net, waveform)
    moved = 0.9 * variables["batch_stats"]["bn0"]["mean"] + 0.1 * mel.mean(axis=(0, 1))
    np.testing.assert_allclose(statistics["batch_stats"]["bn0"]["mean"], moved, rtol=1e-5)
    normalised = (mel - mel.mean(axis=(0, 1))) / jnp.sqrt(mel.var(axis=(0, 1)) + 1e-5)
    normalised = (
        normalised * variables["params"]["bn0"]["scale"] + variables["params"]["bn0"]["bias"]
    )
    shown = cut(None, normalised, CAPACITY)
    tokens = net.apply(variables, shown, True, method=HTSAT.tokens, rngs={})
    logits = net.apply(variables, tokens, method=HTSAT.logits)
    expected = jax.nn.sigmoid(logits[:, 0].mean(axis=1))
    np.testing.assert_allclose(outputs["clipwise"], expected, atol=1e-4)


def test_longer_clips_are_seen_whole():
    views = view_frames(7001, 1024, True)
    assert {len(view) for view in views} == {1024}
    np.testing.assert_array_equal(np.unique(np.concatenate(views)), np.arange(7001))


@pytest.mark.parametrize("frames", [201, 1001, 1024, 1251, 1501, 3001])
def test_every_frame_has_the_steps_that_show_it(frames):
    shares = steps_of_frames(frames, 1024, 32, True)
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-6)
    if frames > 1024 or frames <= 512:
        return
    step = shares.argmax(axis=1)
    assert set(shares.ravel()) == {0.0, 1.0}
    assert step[0] == 0
    assert step[-1] == 31
    assert set(np.diff(step)) == {0, 1}


@pytest.mark.parametrize("frames", [CAPACITY // 2 + 1, 200, CAPACITY])
def test_the_image_s_curve_is_had_from_the_framewise_one(variables, frames):
    waveform = noise((frames - 1) * TINY.hop_samples, batch=2)

    def logits(net, waveform):
        mel = net.bn0(htsat.front_end(net, waveform), False)
        return net.logits(net.tokens(mel, False))[:, 0]

    steps = jax.nn.sigmoid(TINY.apply(variables, waveform, method=logits))
    framewise = TINY.apply(variables, waveform)["framewise"]
    np.testing.assert_allclose(
        framewise[:, TINY.frames_of_image(frames)],
        np.repeat(steps, TINY.token_pixels, axis=1),
        atol=1e-6,
    )


@pytest.mark.parametrize("frames", [CAPACITY // 2, CAPACITY + 1])
def test_a_clip_that_the_image_does_not_hold_once_has_no_such_curve(frames):
    with pytest.raises(ValueError, match=f"clips of {frames} frames, expected 129 to 256"):
        TINY.frames_of_image(frames)


@pytest.mark.parametrize("length", [201, 625, 1001, 1005, 1023])
def test_stretch_is_torch_s_bicubic_interpolation(length):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(length).standard_normal((1, 1, length, 4)).astype(np.float32)
    stretched = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=(1024, 4), mode="bicubic", align_corners=True
    )
    ours = bicubic_matrix(length, 1024) @ x[0, 0]
    np.testing.assert_allclose(ours, stretched.numpy()[0, 0], atol=2e-6)


def test_image_has_quarters_of_the_clip_below_each_other():
    frames = np.arange(CAPACITY * 16).reshape(1, CAPACITY, 16).astype(np.float32)
    image = np.asarray(fold(jnp.asarray(frames), 64))[0]
    for quarter in range(4):
        of_quarter = frames[0, 64 * quarter : 64 * (quarter + 1)]
        np.testing.assert_array_equal(image[16 * quarter : 16 * (quarter + 1)], of_quarter.T)


def test_nothing_is_gathered_but_each_block_s_bias(variables):
    lowered = jax.jit(TINY.apply).lower(variables, noise(8000)).as_text()
    assert lowered.count('"stablehlo.gather"') == sum(TINY.depths)
    assert "stablehlo.while" not in lowered


def test_bfloat16_stays_near_float32(variables):
    exact = quickly(TINY)(variables, noise(20000, batch=3))
    rounded = quickly(TINY.clone(dtype="bfloat16"))(variables, noise(20000, batch=3))
    for name, value in exact.items():
        assert rounded[name].dtype == jnp.float32
        error = np.linalg.norm(rounded[name] - value) / np.linalg.norm(value)
        assert 0 < error < 0.02, name  # a bfloat16 has 8 bits


def test_float64_variables_compute_in_float64(variables):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float64), variables)
        waveform = jax.ShapeDtypeStruct((1, 20000), jnp.float64)
        outputs = jax.eval_shape(TINY.apply, wide, waveform)
        assert {str(value.dtype) for value in outputs.values()} == {"float64"}


def test_training_drops_blocks_at_random_and_updates_statistics(variables):
    net = TINY.clone(stochastic_depth=0.5)

    def run(seed):
        return net.apply(
            variables,
            noise(20000, batch=2),
            train=True,
            rngs={"augment": jax.random.key(seed)},
            mutable=["batch_stats"],
        )

    run = quick_jit(run)
    (first, updates), (again, _), (other, _) = run(0), run(0), run(1)
    np.testing.assert_array_equal(first["embedding"], again["embedding"])
    assert np.abs(first["embedding"] - other["embedding"]).max() > 1e-3
    mean = variables["batch_stats"]["bn0"]["mean"]
    assert np.abs(updates["batch_stats"]["bn0"]["mean"] - mean).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(heads=(2,)), "heads has 1 values for 2 stages"),
        (dict(image_size=80), "20 tokens"),
        (dict(heads=(3, 4)), "8 channels, not a multiple of 3 heads"),
        (dict(mel_bins=24), "mel_bins 24"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(TINY.clone(**fields).init, jax.random.key(0), noise(8000))
