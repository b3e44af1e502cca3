"""One training step of a separator as a pure function of state and batch.

Letters: `b` batch, `a` audio channels, `s` samples of an anchor, `i` frames of a detector's image.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from uss_jax.anchors.find import find_anchors
from uss_jax.models.query import QueryNet
from uss_jax.models.separator import SeparatorNet, train_separate
from uss_jax.models.tagging import TaggingNet
from uss_jax.training.augment import at_other_speed
from uss_jax.training.examples import Examples, Mixing, asked_conditions, make_examples
from uss_jax.training.state import TrainState
from uss_jax.training.step import Batch, Metrics, Step, streams, update

# Random streams of a step, and of each part of it when gradients are accumulated.
_STREAMS = ("anchor", "query", "silent", "gain", "speed", "parts", "pan")


@dataclasses.dataclass(frozen=True)
class Nets:
    """Nets of a separation step.

    Attributes:
      separator: net to train.
      query: computes conditions; its trained variables are in the state, the others frozen.
      sed: finds anchors; None if anchors are drawn at random or looked up in a table.
    """

    separator: SeparatorNet
    query: QueryNet
    sed: TaggingNet | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Anchoring:
    """How anchors are found: arguments of `find_anchors` and of a change of speed before it.

    Attributes:
      segment_samples, min_dbfs, image: see `find_anchors`.
      speed: range of `change_speed`, applied to the clips; None for no change.
    """

    segment_samples: int
    min_dbfs: float | None
    image: Int[Array | np.ndarray, "i"] | None = None
    speed: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Updating:
    """How a gradient becomes an update.

    Attributes:
      accumulate: number of sequential parts, each of whole groups, into which the batch is split;
        batch norm sees one part at a time, and the gradients are averaged.
      ema_decay: decay of the moving average of the parameters, if the state has one.
      max_norm_ratio: updates whose gradient norm exceeds this multiple of the running median are
        skipped, see training/guard.py; 0 for no limit.
      gather: all-gathers parameters that the state holds sharded over devices.
    """

    accumulate: int = 1
    ema_decay: float = 0.0
    max_norm_ratio: float = 0.0
    gather: Callable[[Any], Any] = lambda params: params


def query_variables(frozen: Any, params: Any, batch_stats: Any) -> Any:
    """Merges the frozen and the trained variables of the query net."""
    fixed = frozen.get("query", {"params": {}, "batch_stats": {}})
    return {
        "params": {**fixed["params"], **params["query"]},
        "batch_stats": {**fixed["batch_stats"], **batch_stats["query"]},
    }


def make_separation_step(
    nets: Nets,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Array, Array], Float[Array, "b"]],
    anchoring: Anchoring,
    mixing: Mixing,
    updating: Updating = Updating(),
) -> Step:
    """Builds a training step: anchors, mixtures, conditions, estimates, loss, update.

    The step is `(state, frozen, batch, key) -> (state, metrics)`: `frozen` holds the variables of
    the nets that are not trained (`sed`, and `query` if frozen), `key` is the run's random key.

    Args:
      nets: separator, query net and detector.
      optimizer: optimiser of all trained parameters.
      loss: maps estimate and target [b, a, s] to one value per item.
      anchoring, mixing, updating: options of the parts of the step.
    """

    def gradient(params: Any, batch_stats: Any, frozen: Any, batch: Batch, key: Array):
        """Returns gradients, new batch statistics and metrics of a batch or a part of it."""
        keys = streams(key, _STREAMS)
        batch = at_other_speed(batch, keys["speed"], anchoring.speed, anchoring.segment_samples)
        anchors = find_anchors(
            nets.sed,
            frozen.get("sed"),
            batch,
            keys["anchor"],
            segment_samples=anchoring.segment_samples,
            min_dbfs=anchoring.min_dbfs,
            image=anchoring.image,
        )
        examples = make_examples(anchors, batch, mixing, keys)

        def objective(params):
            params = updating.gather(params)
            condition, query_updates = nets.query.apply(
                query_variables(frozen, params, batch_stats),
                examples.anchor,
                batch["class_index"],
                train=True,
                vector=batch.get("vector"),
                masked=_masked(batch, examples),
                text=(batch["by_text"] != 0, batch["text"]) if "text" in batch else None,
                rngs={"augment": keys["query"]},
                mutable=["batch_stats"],
            )
            condition = asked_conditions(condition, examples.silent, mixing)
            variables = {"params": params["separator"], "batch_stats": batch_stats["separator"]}
            estimate, updates = train_separate(
                nets.separator, variables, examples.mixture, condition
            )
            statistics = {
                "separator": updates,
                "query": {k: query_updates["batch_stats"][k] for k in batch_stats["query"]},
            }
            per_item = loss(estimate, examples.target)
            return jnp.mean(per_item), (per_item, estimate, statistics)

        (_, (per_item, estimate, statistics)), grads = jax.value_and_grad(objective, has_aux=True)(
            params
        )
        metrics = _metrics(examples, estimate, per_item, anchors.score)
        if "conflict" in batch:
            metrics["conflict_share"] = jnp.mean(batch["conflict"].astype(jnp.float32))
        return grads, statistics, metrics

    def step(state: TrainState, frozen: Any, batch: Batch, key: Array):
        key = jax.random.fold_in(key, state.step)
        arguments = state.params, state.batch_stats, frozen, batch, key
        if updating.accumulate == 1:
            found = gradient(*arguments)
        else:
            found = _in_parts(gradient, updating.accumulate, mixing.group_size, *arguments)
        grads, statistics, metrics = found
        found = grads, statistics, _shown(metrics)
        return update(state, *found, optimizer, updating.max_norm_ratio, updating.ema_decay)

    return step


def _masked(batch: Batch, examples: Examples) -> tuple[Array, Array] | None:
    """Returns which items are asked with the tags of their mixture, and the mono mixtures."""
    if "masked" not in batch:
        return None
    return batch["masked"] != 0, jnp.mean(examples.mixture, axis=1)


def _metrics(
    examples: Examples,
    estimate: Float[Array, "b a s"],
    per_item: Float[Array, "b"],
    score: Float[Array, "b"],
) -> Metrics:
    """Averages metrics over the batch, or a part of it; `_shown` makes of the means what is told.

    With silent targets, for which SDRi measures only how quiet the estimate is, `heard` is the sum
    of SDRi over the others, divided by the number of all items.
    """
    improvement = _sdr_improvement(estimate, examples.target, examples.mixture)
    rows = [per_item, improvement, score]
    silent = examples.silent
    if silent is not None:
        rows += [jnp.where(silent, 0, improvement), silent.astype(per_item.dtype)]
    loss_mean, sdri, score_mean, *rest = jnp.mean(jnp.stack(rows), axis=1)  # one all-reduce
    metrics = {"loss": loss_mean, "sdri": sdri, "anchor_score": score_mean}
    if rest:
        metrics["heard"], metrics["silent_share"] = rest
    return metrics


def _shown(metrics: Metrics) -> Metrics:
    """Tells SDRi of silent targets (`silent_db`) and of others apart; NaN where there are none."""
    if "heard" not in metrics:
        return metrics
    every, heard, share = metrics["sdri"], metrics.pop("heard"), metrics["silent_share"]
    return metrics | {"sdri": heard / (1 - share), "silent_db": (every - heard) / share}


def _sdr_improvement(
    estimate: Float[Array, "b a s"], target: Float[Array, "b a s"], mixture: Float[Array, "b a s"]
) -> Float[Array, "b"]:
    """Returns the SDRi in dB: error of the mixture over that of the estimate (target cancels)."""
    before, now = (jnp.mean(jnp.square(x - target), axis=(1, 2)) for x in (mixture, estimate))
    return 10 * jnp.log10(jnp.maximum(before, 1e-10) / jnp.maximum(now, 1e-10))


def _in_parts(
    gradient: Callable,
    parts: int,
    group_size: int,
    params: Any,
    batch_stats: Any,
    frozen: Any,
    batch: Batch,
    key: Array,
) -> tuple[Any, Any, Metrics]:
    """Accumulates the gradients of a batch part by part.

    Part m holds groups m, m + parts, m + 2 parts, ...: if each device holds whole groups of every
    part, no group moves to another device.
    """

    def split(x: Array) -> Array:
        groups = x.reshape(-1, parts, group_size, *x.shape[1:])
        return jnp.swapaxes(groups, 0, 1).reshape(parts, -1, *x.shape[1:])

    def add(carry: tuple[Any, Any], part: tuple[Batch, Array]):
        total, statistics = carry
        grads, statistics, metrics = gradient(params, statistics, frozen, *part)
        return (jax.tree.map(jnp.add, total, grads), statistics), metrics

    keys = jax.random.split(streams(key, _STREAMS)["parts"], parts)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (total, statistics), metrics = jax.lax.scan(
        add, (zeros, batch_stats), ({name: split(x) for name, x in batch.items()}, keys)
    )
    grads = jax.tree.map(lambda x: x / parts, total)
    return grads, statistics, {name: jnp.mean(x) for name, x in metrics.items()}
