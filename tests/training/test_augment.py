import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uss_jax.training.augment import at_other_speed, mixup, mixup_weights, spec_augment

STRIPES = dict(time_width=8, time_stripes=2, mel_width=3, mel_stripes=2)


def _masks(seed=0, items=200, frames=50, bands=16, **changed):
    """Which frames [b, n] and bands [b, m] are zeroed."""
    ones = jnp.ones((items, frames, bands))
    zeroed = np.asarray(spec_augment(jax.random.key(seed), ones, **{**STRIPES, **changed}) == 0)
    return zeroed.all(axis=2), zeroed.all(axis=1), zeroed


def test_only_whole_frames_and_bands_are_zeroed():
    frames, bands, zeroed = _masks()
    np.testing.assert_array_equal(zeroed, frames[:, :, None] | bands[:, None, :])
    mel = jax.random.normal(jax.random.key(1), (4, 50, 16))
    kept = np.asarray(spec_augment(jax.random.key(0), mel, **STRIPES))
    assert set(np.unique(np.asarray(kept == mel) | (kept == 0))) == {True}


@pytest.mark.parametrize(("axis", "width", "stripes"), [(0, 8, 2), (1, 3, 2)])
def test_stripes_are_narrower_than_the_width_and_no_more_than_said(axis, width, stripes):
    masks = _masks()[axis]
    assert masks.sum(axis=1).max() <= stripes * (width - 1)
    edges = np.diff(masks.astype(int), prepend=0, axis=1) == 1
    assert 1 < edges.sum(axis=1).max() <= stripes
    single = _masks(time_stripes=1, mel_stripes=1)[axis].sum(axis=1)
    assert set(single.tolist()) == set(range(width))  # uniform from 0 to width - 1
    assert masks[:, :-1].any(axis=0).all()  # the paper begins them before the last place


def test_items_and_keys_differ():
    frames, _, _ = _masks()
    assert len(np.unique(frames, axis=0)) > 100
    assert not np.array_equal(frames, _masks(seed=1)[0])
    np.testing.assert_array_equal(frames, _masks()[0])


def test_widths_of_one_leave_everything_and_wide_ones_fit():
    assert not _masks(time_width=1, mel_width=1)[2].any()
    frames, _, _ = _masks(frames=5, time_width=64)
    assert frames.sum(axis=1).max() <= 5


def test_mixup_blends_neighbours():
    x = jnp.arange(24.0).reshape(6, 2, 2)
    weight = jnp.array([1.0, 0.25, 0.0])
    blended = mixup(x, weight)
    for i in range(3):
        expected = weight[i] * x[2 * i] + (1 - weight[i]) * x[2 * i + 1]
        np.testing.assert_allclose(blended[i], expected, rtol=1e-6)
    assert blended.shape == (3, 2, 2)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_weights_are_beta(alpha):
    weights = np.asarray(mixup_weights(jax.random.key(0), 20000, alpha))
    assert weights.min() >= 0
    assert weights.max() <= 1
    # Five standard errors of 20000 draws, at most 0.02.
    assert weights.mean() == pytest.approx(0.5, abs=0.02)
    assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.01)


def _at_speed(speed, **batch):
    """The batch at one speed, as numpy arrays, of anchors of 100 samples."""
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    changed = at_other_speed(batch, jax.random.key(0), {"least": speed, "most": speed}, 100)
    return np.asarray(changed["audio"]), np.asarray(changed["samples"])


@pytest.mark.parametrize("speed", [0.5, 0.8, 1.0, 1.25])
def test_a_clip_at_another_speed_is_read_from_its_beginning(speed):
    ramp = np.arange(1.0, 201.0, dtype=np.float32)[None]
    audio, samples = _at_speed(speed, audio=ramp, samples=np.array([200]))
    kept = min(200, int(np.ceil(200 / speed)))
    assert samples == [kept]
    inside = kept - 2  # after the last sample, the interpolation falls to zero
    np.testing.assert_allclose(audio[0, :inside], 1 + speed * np.arange(inside), rtol=1e-5)
    assert (audio[0, kept:] == 0).all()


# Rows of 180 samples around anchors of 100: in the middle, at the clip's two ends, and in a clip of
# 120 samples.
@pytest.mark.parametrize("speed", [0.7, 1.0, 1.4, 1.8])
def test_an_anchor_at_another_speed_keeps_its_middle_and_is_full(speed):
    begin, length = np.array([40, 0, 80, 10]), np.array([180, 180, 180, 120])
    rows = np.arange(1.0, 181.0, dtype=np.float32)[None].repeat(4, axis=0)
    rows[3, 120:] = 0
    audio, samples = _at_speed(speed, audio=rows, samples=length, anchor_sample=begin)
    assert audio.shape == (4, 100)
    source = 100 * speed
    first = np.clip(begin + 50 - source / 2, 0, np.maximum(length - source, 0))
    expected = 1 + first[:, None] + speed * np.arange(100)
    np.testing.assert_allclose(audio[:3], expected[:3], rtol=1e-4)
    assert (samples[:3] == 100).all()
    kept = int(min(100, np.ceil(120 / speed - 1e-4)))
    assert samples[3] == kept
    np.testing.assert_allclose(audio[3, : kept - 2], expected[3, : kept - 2], rtol=1e-4)
    assert (audio[3, kept:] == 0).all()


def test_speeds_are_log_uniform_and_differ_between_items():
    ramp = jnp.arange(300.0)[None].repeat(2000, axis=0)
    batch = {"audio": ramp, "samples": jnp.full(2000, 300)}
    changed = at_other_speed(batch, jax.random.key(0), {"least": 0.5, "most": 2.0})["audio"]
    drawn = np.log2(np.asarray(changed[:, 100]) / 100)
    np.testing.assert_allclose(
        np.quantile(drawn, [0, 0.25, 0.5, 0.75, 1]), [-1, -0.5, 0, 0.5, 1], atol=0.08
    )
