import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uss_jax.training.augment import mixup, mixup_weights, spec_augment

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
