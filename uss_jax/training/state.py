"""The state of a training run."""

import dataclasses
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
      step: number of steps done, int32 scalar.
      params: trained parameters, one entry per net.
      batch_stats: running statistics, one entry per net.
      opt_state: state of the optimiser.
      ema: moving average of `params`, or an empty tree.
      skipped: numbers of skipped updates, int32 scalars: `total`, those with a NaN or infinite loss
        or gradient; `in_a_row`, those skipped for any reason since the last update.
      norms: recent gradient norms and number of updates skipped as spikes, see training/guard.py.
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
        """Parameters for evaluation and inference: the moving average if there is one."""
        return self.ema or self.params

    def parts(self) -> dict[str, Any]:
        """Returns the non-empty trees by name, as a checkpoint stores them; without `step`."""
        trees = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del trees["step"]
        return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def create_state(
    params: Any, batch_stats: Any, optimizer: optax.GradientTransformation, ema: bool = False
) -> TrainState:
    """Returns the initial state, with a moving average of the parameters if `ema` is set."""
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
    """Counts the scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
