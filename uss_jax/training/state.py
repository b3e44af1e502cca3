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
      ema: moving average of `params`, or an empty tree.
      skipped: updates left out because loss or gradient were no numbers: in `total`, and
        `in_a_row` up to now; int32 scalars.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any = struct.field(default_factory=dict)
    skipped: Any = struct.field(default_factory=dict)

    @property
    def averaged(self) -> Any:
        """The parameters to evaluate and to use: their moving average where there is one."""
        return self.ema or self.params


def create_state(
    params: Any, batch_stats: Any, optimizer: optax.GradientTransformation, ema: bool = False
) -> TrainState:
    """The state before the first step, with or without a moving average of the parameters."""
    zero = lambda: jnp.zeros((), jnp.int32)  # noqa: E731 (a donated buffer may not appear twice)
    return TrainState(
        step=zero(),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        skipped={"total": zero(), "in_a_row": zero()},
    )


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
