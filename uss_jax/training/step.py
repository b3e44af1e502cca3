"""One training step as a pure function of state and batch.

Letters: `b` batch, `t` samples of a clip, `k` classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from uss_jax.anchors.detect import Anchors, choose_anchor, cut, random_begin, segment_loudness
from uss_jax.anchors.mix import energy, mix
from uss_jax.models.query import QueryNet
from uss_jax.models.resunet import ResUNet
from uss_jax.models.tagging import TaggingNet
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
    """
    clip, samples = to_float(batch["audio"]), batch["samples"]
    if "begin_sample" in batch:
        return Anchors(clip, batch["begin_sample"], samples, batch["score"])
    if sed is None:
        begin = random_begin(key, samples, segment_samples=segment_samples)
        score = jnp.zeros(begin.shape, clip.dtype)
    else:
        framewise = sed.apply(sed_variables, clip)["framewise"]
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
    separator: ResUNet,
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
    speed: dict[str, float] | None = None,
) -> Step:
    """The whole chain of one step: anchors, mixtures, conditions, separation, loss, update.

    The step is `(state, frozen, batch, key) -> (state, metrics)`: `frozen` holds the variables of
    the nets that do not train (`sed`, and `query` where it is frozen), `key` is the run's key.
    `speed` holds the arguments of `change_speed` for the clips; None to leave them.
    """

    def step(state: TrainState, frozen: Any, batch: Batch, key: Array):
        key = jax.random.fold_in(key, state.step)
        anchor_key, adaptor_key = jax.random.split(key)
        batch = _at_other_speed(batch, key, speed)
        anchors = find_anchors(
            sed,
            frozen.get("sed"),
            batch,
            anchor_key,
            segment_samples=segment_samples,
            min_dbfs=min_dbfs,
        )
        target = anchors.segment
        mixture = mix(
            target,
            energy(target, anchors.samples),
            sources=sources,
            group_size=group_size,
            match_energy=match_energy,
        )

        def objective(params):
            condition, query_updates = query.apply(
                query_variables(frozen, params, state.batch_stats),
                target,
                batch["class_index"],
                train=True,
                rngs={"augment": adaptor_key},
                mutable=["batch_stats"],
            )
            estimate, updates = separator.apply(
                {"params": params["separator"], "batch_stats": state.batch_stats["separator"]},
                mixture[:, None],
                condition,
                train=True,
                mutable=["batch_stats"],
            )
            per_item = loss(estimate, target[:, None])
            trained = state.batch_stats["query"].keys()
            statistics = {
                "separator": updates["batch_stats"],
                "query": {k: query_updates["batch_stats"][k] for k in trained},
            }
            improvement = _sdr_improvement(estimate[:, 0], target, mixture)
            return jnp.mean(per_item), (per_item, improvement, statistics)

        (_, (per_item, improvement, statistics)), grads = jax.value_and_grad(
            objective, has_aux=True
        )(state.params)
        per_item = jnp.stack([per_item, improvement, anchors.score])
        loss_mean, sdri, score = jnp.mean(per_item, axis=1)
        metrics = {
            "loss": loss_mean,
            "sdri": sdri,
            "anchor_score": score,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(state.params),
        }
        if "conflict" in batch:
            metrics["conflict_share"] = jnp.mean(batch["conflict"].astype(jnp.float32))
        return _update(state, grads, statistics, optimizer), metrics

    return step


def make_tagging_step(
    tagger: TaggingNet,
    optimizer: optax.GradientTransformation,
    *,
    outputs: tuple[str, ...],
    mixup_alpha: float | None,
    spec_augment_stripes: dict[str, int] | None,
    speed: dict[str, float] | None = None,
    noise: dict[str, float] | None = None,
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
        metrics = {
            "loss": jnp.mean(per_item),
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(state.params),
        }
        return _update(state, grads, statistics, optimizer), metrics

    return step


def _sdr_improvement(
    estimate: Float[Array, "b t"], target: Float[Array, "b t"], mixture: Float[Array, "b t"]
) -> Float[Array, "b"]:
    """SDR of the estimate less that of the mixture, in dB; the target's energy cancels."""
    before, now = (jnp.mean(jnp.square(x - target), axis=1) for x in (mixture, estimate))
    return 10 * jnp.log10(jnp.maximum(before, 1e-10) / jnp.maximum(now, 1e-10))


def _at_other_speed(batch: Batch, key: Array, speed: dict[str, float] | None) -> Batch:
    """The batch with float audio and, if asked for, each clip faster or slower."""
    audio = to_float(batch["audio"])
    if speed is None:
        return {**batch, "audio": audio}
    audio, samples = change_speed(jax.random.fold_in(key, 0), audio, batch["samples"], **speed)
    return {**batch, "audio": audio, "samples": samples}


def _update(
    state: TrainState,
    grads: Any,
    batch_stats: Any,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
