"""What a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from uss_jax.training.guard import no_norms


@struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold besides the data position.

    Its fields are trees of arrays, or parallel trees of per-array metadata such as shardings.

    Attributes:
      step: steps done, int32 scalar.
      params: trained parameters, one entry a net.
      batch_stats: running statistics, likewise.
      opt_state: the optimiser's.
      ema: moving average of `params`, or an empty tree.
      skipped: updates left out: `total`, those whose loss or gradient was NaN or infinite, and
        `in_a_row`, those left out for any reason since the last update; int32 scalars.
      norms: what tells an absurd gradient from a large one, see training/guard.py.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any = struct.field(default_factory=dict)
    skipped: Any = struct.field(default_factory=dict)
    norms: Any = struct.field(default_factory=dict)

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
        norms=no_norms(),
    )


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
