"""The state of a training run."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from uss_jax.bundles.checkpoints import ITEMS, Checkpoints
from uss_jax.bundles.fingerprint import by_path
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
        trees = {name: getattr(self, name) for name in ITEMS}
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


def restore_state(checkpoints: Checkpoints, step: int, like: TrainState) -> TrainState:
    """Restores the state saved at a step, with the shardings of `like`.

    Checkpoints of older versions differ as follows:

    | they have | it becomes |
    |---|---|
    | no `ema`, though the run now keeps one | a copy of the parameters |
    | no `norms` | an empty record |
    | `opt_state` behind the empty state of gradient clipping | itself |

    Raises:
      UserError: the checkpoint is of another model.
      DamagedCheckpoint: it cannot be read, or its arrays differ from those saved.
    """
    saved, wanted = checkpoints.items(step), like.parts()
    absent = [name for name in ("ema", "norms") if name in wanted and name not in saved]
    asked = {name: tree for name, tree in wanted.items() if name not in absent}
    behind = "opt_state" in saved and _stands_behind(
        like.opt_state, checkpoints.shapes(step, "opt_state")
    )
    if behind:
        asked["opt_state"] = (optax.EmptyState(), like.opt_state)
    restored = checkpoints.restore(step, asked)
    if behind:
        restored["opt_state"] = restored["opt_state"][1]
    if "ema" in absent:
        restored["ema"] = jax.tree.map(jnp.copy, restored["params"])
    if "norms" in absent:
        place = lambda x, wanted: jax.device_put(x, wanted.sharding)  # noqa: E731
        restored["norms"] = jax.tree.map(place, no_norms(), like.norms)
    count = jax.device_put(jnp.int32(step), like.step.sharding)
    return like.replace(step=count, **restored)


def _stands_behind(state: Any, found: Any) -> bool:
    """Detects an optimiser state that was saved as the second of a chain."""
    shapes, saved = (
        {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()} for tree in (state, found)
    )
    return {f"1/{path}" for path in shapes} == saved.keys()


def parameter_count(params: Any) -> int:
    """Counts the scalars in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
