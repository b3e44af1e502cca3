"""One training step of a tagging net as a pure function of state and batch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from uss_jax.models.tagging import TaggingNet
from uss_jax.training.augment import add_noise, at_other_speed, mixup, mixup_weights, spec_augment
from uss_jax.training.losses import binary_cross_entropy
from uss_jax.training.state import TrainState
from uss_jax.training.step import Batch, Step, streams, update

_STREAMS = ("mixup", "spec_augment", "dropout", "noise", "speed")


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
    """Makes the training step of a tagging net on weak labels, as in PANNs.

    Args:
      tagger: the tagging net.
      optimizer: optimiser of its parameters.
      outputs: names of the clip probabilities to train; their losses are averaged.
      mixup_alpha: alpha of mixup's Beta(alpha, alpha); None for no mixup.
      spec_augment_stripes: arguments of `spec_augment`; None for none.
      speed: range of `change_speed`; None for no change.
      noise: arguments of `add_noise`; None for none.
      max_norm_ratio: updates are skipped if their gradient norm exceeds this many times the running
        median, see training/guard.py; 0 for no limit.
    """

    def step(state: TrainState, frozen: Any, batch: Batch, key: Array):
        del frozen
        keys = streams(jax.random.fold_in(key, state.step), _STREAMS)
        labels = batch["labels"].astype(jnp.float32)
        weight = None
        if mixup_alpha is not None:
            weight = mixup_weights(keys["mixup"], labels.shape[0] // 2, mixup_alpha)
            labels = mixup(labels, weight)

        audio = at_other_speed(batch, keys["speed"], speed)["audio"]
        if noise is not None:
            audio = add_noise(keys["noise"], audio, **noise)

        def augment(mel: Array) -> Array:
            if spec_augment_stripes is not None:
                mel = spec_augment(keys["spec_augment"], mel, **spec_augment_stripes)
            return mel if weight is None else mixup(mel, weight)

        def objective(params):
            probabilities, updates = tagger.apply(
                {"params": params["tagger"], "batch_stats": state.batch_stats["tagger"]},
                audio,
                train=True,
                augment=augment,
                rngs={"augment": keys["dropout"]},
                mutable=["batch_stats"],
            )
            losses = [binary_cross_entropy(probabilities[name], labels) for name in outputs]
            per_item = sum(losses) / len(losses)
            return jnp.mean(per_item), (per_item, {"tagger": updates["batch_stats"]})

        (_, (per_item, statistics)), grads = jax.value_and_grad(objective, has_aux=True)(
            state.params
        )
        metrics = {"loss": jnp.mean(per_item)}
        return update(state, grads, statistics, metrics, optimizer, max_norm_ratio)

    return step
