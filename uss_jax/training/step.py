"""One training step as a pure function of state and batch.

Letters: `b` batch, `t` samples of a clip, `k` classes, `i` frames of a detector's image.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from uss_jax.anchors.detect import Anchors, choose_anchor, cut, random_begin, segment_loudness
from uss_jax.anchors.mix import energy, mix, mix_sets
from uss_jax.models.query import QueryNet
from uss_jax.models.separator import SeparatorNet
from uss_jax.models.tagging import TaggingNet, detect
from uss_jax.training import guard
from uss_jax.training.augment import add_noise, change_speed, mixup, mixup_weights, spec_augment
from uss_jax.training.losses import binary_cross_entropy
from uss_jax.training.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Array]
Step = Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]]


def to_float(audio: Array) -> Array:
    """int16 samples to float32 in [-1, 1); floats stay as they are."""
    return audio / jnp.float32(32768) if audio.dtype == jnp.int16 else audio


def find_anchors(
    sed: TaggingNet | None,
    sed_variables: Any,
    batch: Batch,
    key: Array,
    *,
    segment_samples: int,
    min_dbfs: float | None,
    image: Int[Array | np.ndarray, "i"] | None = None,
) -> Anchors:
    """Cuts each clip's anchor, found by the detector or, without one, at random.

    Args:
      sed: the sound event detector, or None.
      sed_variables: its parameters and statistics.
      batch: `audio` [b, t], `samples` [b], `class_index` [b]; with `begin_sample` and `score` [b]
        the host has looked the anchors up in a table, and `audio` holds nothing else.
      key: for random anchors.
      segment_samples: samples of an anchor.
      min_dbfs: pass over segments below this level; None to keep them, as the reference does.
      image: for HTS-AT's own rule, see `choose_anchors`.
    """
    clip, samples = to_float(batch["audio"]), batch["samples"]
    if "begin_sample" in batch:
        return Anchors(clip, batch["begin_sample"], samples, batch["score"])
    if sed is None:
        begin = random_begin(key, samples, segment_samples=segment_samples)
        score = jnp.zeros(begin.shape, clip.dtype)
    else:
        framewise = detect(sed, sed_variables, clip)["framewise"]
        index = batch["class_index"][:, None, None]
        loudness = None
        if min_dbfs is not None:
            loudness = segment_loudness(
                clip, samples, segment_samples=segment_samples, hop_samples=sed.frame_hop_samples
            )
        begin, score = choose_anchor(
            jnp.take_along_axis(framewise, index, axis=2)[:, :, 0],
            samples,
            clip_samples=clip.shape[1],
            segment_samples=segment_samples,
            hop_samples=sed.frame_hop_samples,
            loudness=loudness,
            min_dbfs=0.0 if min_dbfs is None else min_dbfs,
            image=image,
        )
    return Anchors(
        segment=cut(clip, begin, segment_samples),
        begin_sample=begin,
        samples=jnp.clip(samples - begin, 0, segment_samples),
        score=score,
    )


def query_variables(frozen: Any, params: Any, batch_stats: Any) -> Any:
    """The query net's variables, frozen and trained ones together."""
    fixed = frozen.get("query", {"params": {}, "batch_stats": {}})
    return {
        "params": {**fixed["params"], **params["query"]},
        "batch_stats": {**fixed["batch_stats"], **batch_stats["query"]},
    }


def make_separation_step(
    separator: SeparatorNet,
    query: QueryNet,
    sed: TaggingNet | None,
    optimizer: optax.GradientTransformation,
    loss: Callable[[Array, Array], Float[Array, "b"]],
    *,
    segment_samples: int,
    sources: int,
    group_size: int,
    match_energy: bool,
    min_dbfs: float | None,
    image: Int[Array | np.ndarray, "i"] | None = None,
    speed: dict[str, float] | None = None,
    all_targets: bool = False,
    silent_share: float = 0.0,
    gain_db: float = 0.0,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    max_norm_ratio: float = 0.0,
    gather: Callable[[Any], Any] = lambda params: params,
) -> Step:
    """The whole chain of one step: anchors, mixtures, conditions, separation, loss, update.

    The step is `(state, frozen, batch, key) -> (state, metrics)`: `frozen` holds the variables of
    the nets that do not train (`sed`, and `query` where it is frozen), `key` is the run's key.

    Args:
      separator, query, sed: the nets; without `sed` anchors are drawn at random or looked up.
      optimizer: of all that trains.
      loss: of (estimate, target) [b, 1, t], one value an item.
      segment_samples: samples of an anchor.
      sources: of a mixture.
      group_size: items that are mixed with each other, see `mix`.
      match_energy: see `mix`.
      min_dbfs, image: see `find_anchors`.
      speed: arguments of `change_speed` for the clips; None to leave them.
      all_targets: every `sources` items share one mixture, see `mix_sets`.
      silent_share: chance that an item asks for what its mixture does not hold, its target silence.
        The condition is that of the item `sources` further in the group, the nearest that is not in
        the mixture, where `batch["absent"]` [b] says that its class is related to no label of the
        mixture; other items are left as they are.
      gain_db: with `match_energy`, an added sound is louder or quieter than the target by up to so
        much.
      accumulate: the batch is done in so many parts, one after the other, of whole groups each;
        batch norms see one part at a time, and the gradient is the mean.
      ema_decay: of the moving average of parameters, if the state has one.
      max_norm_ratio: updates whose gradient is longer than this many times the running median are
        left out, see training/guard.py; 0 for none.
      gather: makes parameters whole, where the state's are split over devices.
    """

    def gradient(params: Any, batch_stats: Any, frozen: Any, batch: Batch, key: Array):
        """Gradient, new statistics and metrics of a batch or a part of it."""
        anchor_key, adaptor_key = jax.random.split(key)
        batch = _at_other_speed(batch, key, speed)
        anchors = find_anchors(
            sed,
            frozen.get("sed"),
            batch,
            anchor_key,
            segment_samples=segment_samples,
            min_dbfs=min_dbfs,
            image=image,
        )
        sound = anchors.segment
        level = energy(sound, anchors.samples)
        if gain_db:
            # Sounds are matched by levels that are off by up to half as much each.
            off = jax.random.uniform(jax.random.fold_in(key, 3), level.shape) - 0.5
            level = level * 10 ** (gain_db * off / 10)
        if all_targets:
            mixture, target = mix_sets(sound, level, sources=sources, match_energy=match_energy)
        else:
            target = sound
            mixture = mix(
                sound, level, sources=sources, group_size=group_size, match_energy=match_energy
            )
        silent = None
        if silent_share:
            drawn = jax.random.uniform(jax.random.fold_in(key, 2), level.shape) < silent_share
            silent = drawn & (batch["absent"] != 0)
            target = jnp.where(silent[:, None], 0, target)

        def objective(params):
            params = gather(params)
            condition, query_updates = query.apply(
                query_variables(frozen, params, batch_stats),
                sound,
                batch["class_index"],
                train=True,
                rngs={"augment": adaptor_key},
                mutable=["batch_stats"],
            )
            if silent is not None:
                other = _further(condition, sources, group_size)
                condition = jnp.where(silent[:, None], other, condition)
            estimate, updates = separator.apply(
                {"params": params["separator"], "batch_stats": batch_stats["separator"]},
                mixture[:, None],
                condition,
                train=True,
                mutable=["batch_stats"],
            )
            per_item = loss(estimate, target[:, None])
            statistics = {
                "separator": updates.get("batch_stats", {}),
                "query": {k: query_updates["batch_stats"][k] for k in batch_stats["query"]},
            }
            improvement = _sdr_improvement(estimate[:, 0], target, mixture)
            return jnp.mean(per_item), (per_item, improvement, statistics)

        (_, (per_item, improvement, statistics)), grads = jax.value_and_grad(
            objective, has_aux=True
        )(params)
        rows = [per_item, improvement, anchors.score]
        if silent is not None:  # whose improvement says how quiet the estimate is, in its own row
            rows += [jnp.where(silent, 0, improvement), silent.astype(per_item.dtype)]
        loss_mean, sdri, score, *rest = jnp.mean(jnp.stack(rows), axis=1)
        metrics = {"loss": loss_mean, "sdri": sdri, "anchor_score": score}
        if rest:
            heard, share = rest
            metrics["sdri"] = heard / jnp.maximum(1 - share, 1e-6)
            metrics["silent_share"] = share
            metrics["silent_db"] = (sdri - heard) / jnp.maximum(share, 1e-6)
        if "conflict" in batch:
            metrics["conflict_share"] = jnp.mean(batch["conflict"].astype(jnp.float32))
        return grads, statistics, metrics

    def step(state: TrainState, frozen: Any, batch: Batch, key: Array):
        key = jax.random.fold_in(key, state.step)
        arguments = state.params, state.batch_stats, frozen, batch, key
        if accumulate == 1:
            grads, statistics, metrics = gradient(*arguments)
        else:
            grads, statistics, metrics = _in_parts(gradient, accumulate, group_size, *arguments)
        return _update(state, grads, statistics, metrics, optimizer, max_norm_ratio, ema_decay)

    return step


def _further(condition: Float[Array, "b d"], places: int, group_size: int) -> Array:
    """The condition of the item so many places further in the group."""
    groups = condition.reshape(-1, group_size, condition.shape[1])
    return jnp.roll(groups, -places, axis=1).reshape(condition.shape)


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
    """The gradient of a batch done part by part.

    Part m holds the groups m, m + parts, m + 2 parts ...: where each device has whole groups of
    every part, none moves to another device.
    """

    def split(x: Array) -> Array:
        groups = x.reshape(-1, parts, group_size, *x.shape[1:])
        return jnp.swapaxes(groups, 0, 1).reshape(parts, -1, *x.shape[1:])

    def add(carry: tuple[Any, Any], part: tuple[Batch, Array]):
        total, statistics = carry
        grads, statistics, metrics = gradient(params, statistics, frozen, *part)
        return (jax.tree.map(jnp.add, total, grads), statistics), metrics

    keys = jax.random.split(jax.random.fold_in(key, 3), parts)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (total, statistics), metrics = jax.lax.scan(
        add, (zeros, batch_stats), ({name: split(x) for name, x in batch.items()}, keys)
    )
    grads = jax.tree.map(lambda x: x / parts, total)
    return grads, statistics, {name: jnp.mean(x) for name, x in metrics.items()}


def make_tagging_step(
    tagger: TaggingNet,
    optimizer: optax.GradientTransformation,
    *,
    outputs: tuple[str, ...],
    mixup_alpha: float | None,
    spec_augment_stripes: dict[str, int] | None,
    speed: dict[str, float] | None = None,
    noise: dict[str, float] | None = None,
    max_norm_ratio: float = 0.0,
) -> Step:
    """One step of a tagging net on weak labels, as PANNs does it.

    Args:
      tagger: the net.
      optimizer: its optimiser.
      outputs: which of the net's probabilities of a clip to train; the loss is their mean.
      mixup_alpha: blend pairs of the batch; None to leave them.
      spec_augment_stripes: arguments of `spec_augment`; None for none.
      speed: arguments of `change_speed`; None to leave the clips.
      noise: arguments of `add_noise`; None for none.
      max_norm_ratio: see `make_separation_step`.
    """

    def step(state: TrainState, frozen: Any, batch: Batch, key: Array):
        del frozen
        keys = jax.random.split(jax.random.fold_in(key, state.step), 4)
        labels = batch["labels"].astype(jnp.float32)
        weight = None
        if mixup_alpha is not None:
            weight = mixup_weights(keys[0], labels.shape[0] // 2, mixup_alpha)
            labels = mixup(labels, weight)

        audio = _at_other_speed(batch, keys[0], speed)["audio"]
        if noise is not None:
            audio = add_noise(keys[3], audio, **noise)

        def augment(mel: Array) -> Array:
            if spec_augment_stripes is not None:
                mel = spec_augment(keys[1], mel, **spec_augment_stripes)
            return mel if weight is None else mixup(mel, weight)

        def objective(params):
            probabilities, updates = tagger.apply(
                {"params": params["tagger"], "batch_stats": state.batch_stats["tagger"]},
                audio,
                train=True,
                augment=augment,
                rngs={"augment": keys[2]},
                mutable=["batch_stats"],
            )
            losses = [binary_cross_entropy(probabilities[name], labels) for name in outputs]
            per_item = sum(losses) / len(losses)
            return jnp.mean(per_item), (per_item, {"tagger": updates["batch_stats"]})

        (_, (per_item, statistics)), grads = jax.value_and_grad(objective, has_aux=True)(
            state.params
        )
        metrics = {"loss": jnp.mean(per_item)}
        return _update(state, grads, statistics, metrics, optimizer, max_norm_ratio)

    return step


def _at_other_speed(batch: Batch, key: Array, speed: dict[str, float] | None) -> Batch:
    """The batch with float audio and, if asked for, each clip faster or slower."""
    audio = to_float(batch["audio"])
    if speed is None:
        return {**batch, "audio": audio}
    audio, samples = change_speed(jax.random.fold_in(key, 0), audio, batch["samples"], **speed)
    return {**batch, "audio": audio, "samples": samples}


def _sdr_improvement(
    estimate: Float[Array, "b t"], target: Float[Array, "b t"], mixture: Float[Array, "b t"]
) -> Float[Array, "b"]:
    """SDR of the estimate less that of the mixture, in dB; the target's energy cancels."""
    before, now = (jnp.mean(jnp.square(x - target), axis=1) for x in (mixture, estimate))
    return 10 * jnp.log10(jnp.maximum(before, 1e-10) / jnp.maximum(now, 1e-10))


def _update(
    state: TrainState,
    grads: Any,
    batch_stats: Any,
    metrics: Metrics,
    optimizer: optax.GradientTransformation,
    max_norm_ratio: float,
    ema_decay: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """Returns the next state and all metrics.

    Where loss or gradient is NaN or infinite, or the gradient's norm absurd (training/guard.py),
    the state stays as it was but for its counters.

    The moving average begins with a shorter memory, (1 + step) / (10 + step), so that it does not
    hold on to the parameters before the first step.
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
