import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_separation_step import _batch, _made, _run
from uss_jax.training.guard import ENOUGH, WINDOW, is_spike, median_norm, no_norms, record

LOUD = 1e5


def recorded(values):
    """The record of updates of these norms, None for those left out."""
    norms, updates = no_norms(), 0
    step = jax.jit(record)
    for value in values:
        good = value is not None
        norms = step(norms, jnp.float32(value or 1e9), updates, good, not good)
        updates += good
    return norms


@pytest.mark.parametrize("count", [1, ENOUGH - 1, ENOUGH, 100, WINDOW, WINDOW + 1, 3 * WINDOW + 5])
def test_the_median_is_that_of_the_last_updates(count):
    values = np.random.default_rng(count).lognormal(size=count).astype(np.float32)
    median = median_norm(recorded(values.tolist()))
    if count < ENOUGH:
        assert np.isnan(median)
    else:
        assert median == np.median(values[-WINDOW:])


def test_norms_left_out_are_counted_and_not_recorded():
    norms = recorded([1.0, None, 2.0, None, None, *range(3, 10)])
    assert norms["spikes"] == 3
    assert median_norm(norms) == 5.0


@pytest.mark.parametrize(
    ("norm", "median", "ratio", "expected"),
    [
        (99.0, 1.0, 100.0, False),
        (101.0, 1.0, 100.0, True),
        (1e30, 1.0, 0.0, False),
        (np.inf, 1.0, 100.0, False),
        (np.nan, 1.0, 100.0, False),
        (1.0, 0.0, 100.0, False),
        (1.0, np.nan, 100.0, False),
    ],
)
def test_what_is_a_spike(norm, median, ratio, expected):
    assert is_spike(jnp.float32(norm), jnp.float32(median), ratio) == expected


@functools.cache
def spiked(ratio):
    """States and metrics of 12 ordinary steps, one on an absurdly loud batch, and 2 more."""
    loud = _batch(50)
    loud["audio"] *= LOUD
    batches = [*map(_batch, range(12)), loud, *map(_batch, range(20, 22))]
    return _run(_made(max_norm_ratio=ratio, ema=True, ema_decay=0.9), *batches)


def test_an_absurd_gradient_is_left_out_and_counted_apart():
    states, metrics = spiked(100.0)
    norms = [float(m["grad_norm"]) for m in metrics]
    median = np.median(np.float32(norms[:12]))
    assert norms[12] > 100 * median
    assert metrics[12]["grad_norm_median"] == median
    assert [bool(m["spike"]) for m in metrics] == [False] * 12 + [True] + [False] * 2
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0] * 12 + [1, 0, 0]
    assert [int(m["skipped_steps"]) for m in metrics] == [0] * 15
    assert int(metrics[-1]["skipped_spikes"]) == 1
    before, after, last = states[12], states[13], states[-1]
    assert int(after.step) == 13
    for name in ("params", "batch_stats", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    np.testing.assert_array_equal(after.norms["window"], before.norms["window"])
    np.testing.assert_array_equal(last.norms["window"][:14], np.float32(norms[:12] + norms[13:]))


def test_without_a_limit_every_finite_gradient_is_taken():
    states, metrics = spiked(0.0)
    assert not any(m["spike"] or m["skipped_in_a_row"] for m in metrics)
    changed = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), states[13].params, states[12].params
    )
    assert all(jax.tree.leaves(changed))


def test_a_limit_changes_nothing_where_no_gradient_is_absurd():
    before_the_spike = [spiked(ratio)[0][12] for ratio in (0.0, 100.0)]
    jax.tree.map(np.testing.assert_array_equal, *before_the_spike)
