"""The parameter update shared by all training steps, and the types of steps."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from uss_jax.training import guard
from uss_jax.training.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Array]
# (state, frozen variables, batch, random key of the run) -> (next state, metrics)
Step = Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]]


def streams(key: Array, names: Sequence[str]) -> dict[str, Array]:
    """Derives an independent key for each name; appending a name leaves the others unchanged.

    Do not also split `key` elsewhere: `split(key)[i]` equals `fold_in(key, i)`.
    """
    return {name: jax.random.fold_in(key, place) for place, name in enumerate(names)}


def update(
    state: TrainState,
    grads: Any,
    batch_stats: Any,
    metrics: Metrics,
    optimizer: optax.GradientTransformation,
    max_norm_ratio: float,
    ema_decay: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """Returns the next state, and `metrics` with those of the update added.

    If the loss or gradient is NaN or infinite, or the gradient norm is a spike (training/guard.py),
    only the counters of the state change.

    The decay of the moving average is at most (1 + step) / (10 + step), so that the average soon
    forgets the initial parameters.
    """
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = state.ema and optax.incremental_update(params, state.ema, 1 - decay)

    median = guard.median_norm(state.norms)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    spike = finite & guard.is_spike(norm, median, max_norm_ratio)
    good = finite & ~spike
    params, batch_stats, opt_state, ema = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, batch_stats, opt_state, ema),
        (state.params, state.batch_stats, state.opt_state, state.ema),
    )
    done = state.step - state.skipped["total"] - state.norms["spikes"]
    norms = guard.record(state.norms, norm, done, good, spike)
    skipped = {
        "total": state.skipped["total"] + (~finite).astype(jnp.int32),
        "in_a_row": (~good).astype(jnp.int32) * (state.skipped["in_a_row"] + 1),
    }
    metrics = {
        **metrics,
        "grad_norm": norm,
        "grad_norm_median": median,
        "param_norm": optax.tree.norm(state.params),
        "skipped_steps": skipped["total"],
        "skipped_spikes": norms["spikes"],
        "spike": spike,
        "skipped_in_a_row": skipped["in_a_row"],
    }
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema, skipped, norms), metrics
