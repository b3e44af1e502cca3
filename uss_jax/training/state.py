"""What a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold besides the data position.

    Its fields are arrays or, in a tree of the same structure, whatever is said of each array.

    Attributes:
      step: steps done, int32 scalar.
      params: trained parameters, one entry a net.
      batch_stats: running statistics, likewise.
      opt_state: the optimiser's.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: optax.OptState


def create_state(
    params: Any, batch_stats: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
