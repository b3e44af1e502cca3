"""Trees of arrays on disk: checkpoints and the parts of bundles. The only importer of orbax."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from uss_jax.errors import UserError
from uss_jax.training.guard import no_norms
from uss_jax.training.state import TrainState

_ITEMS = ("params", "batch_stats", "opt_state", "ema", "skipped", "norms")
# What orbax raises where files are missing or cut short.
_DAMAGE = (OSError, ValueError, KeyError, AttributeError)


def _sdri(figures: Mapping[str, float] | None) -> float:
    return (figures or {}).get("sdri", -np.inf)


@dataclasses.dataclass
class _NewestAndBest:
    """Which checkpoints stay: orbax asks it after each save."""

    newest: int | None
    best: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps if self.newest is None else steps[-self.newest :])
        evaluated = [c for c in checkpoints if _sdri(c.metrics) > -np.inf]
        evaluated.sort(key=lambda checkpoint: _sdri(checkpoint.metrics), reverse=True)
        kept |= {checkpoint.step for checkpoint in evaluated[: self.best]}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of a run, written in the background, whole or not at all.

    Each holds the state's parts and `position`, a dict that says which data comes next: a pure
    function of it and the records, never an iterator's state.
    """

    def __init__(self, directory: str | os.PathLike, keep: int | None, keep_best: int = 0):
        """Opens the folder; to write, makes it if needed and clears what a kill left half done.

        Args:
          directory: the checkpoints' folder.
          keep: how many of the newest to keep; None to read only.
          keep_best: how many of the highest SDRi to keep besides.
        """
        self._directory = pathlib.Path(directory).absolute()
        writing = keep is not None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(keep, keep_best),
            best_fn=_sdri,  # without it no figures are written
            create=writing,
            cleanup_tmp_directories=writing,
        )
        # Without handlers a manager that has not yet written knows no shapes.
        handlers = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
        handlers["position"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(
            self._directory, options=options, item_handlers=handlers
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None when there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        position: dict[str, Any],
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Copies the state to the host and returns; files are written meanwhile.

        Args:
          step: steps done.
          state: of the run.
          position: of the data.
          figures: of an evaluation, if there was one; `sdri` decides which checkpoints are best.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in _parts(state).items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(**items, position=ocp.args.JsonSave(position)),
            metrics=dict(figures or {}),
        )

    def figures(self, step: int) -> dict[str, float]:
        """Those of the evaluation at a step; empty where there was none."""
        return dict(self._manager.metrics(step) or {})

    def position(self, step: int) -> dict[str, Any]:
        """The data position saved at a step."""
        return self._restore(step, position=ocp.args.JsonRestore())["position"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at a step, laid out over devices as `like` is.

        Raises:
          UserError: the checkpoint is of another model; names the first differing entry.
        """
        saved = self.items(step)
        # A moving average that begins now begins at the parameters. Runs of older versions have no
        # record of norms: theirs begins now.
        source = {"ema": "params"} if "ema" not in saved else {}
        begun = {} if "norms" in saved or not like.norms else {"norms": no_norms()}
        behind = "opt_state" in saved and _stands_behind(
            like.opt_state, self._tree(step, "opt_state")
        )
        abstract = {}
        for name, tree in _parts(like).items():
            if name in begun:
                continue
            found = self._tree(step, source.get(name, name))
            if name == "opt_state" and behind:
                tree = (optax.EmptyState(), tree)
            require_same_layout(tree, found, name, f"step {step}")
            if name not in source:
                abstract[name] = jax.tree.map(_abstract, tree)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = dict(self._restore(step, **items))
        if like.ema and "ema" in source:
            restored["ema"] = jax.tree.map(jnp.copy, restored["params"])
        for name, tree in begun.items():
            place = lambda x, wanted: jax.device_put(x, wanted.sharding)  # noqa: E731
            restored[name] = jax.tree.map(place, tree, getattr(like, name))
        if behind:
            restored["opt_state"] = restored["opt_state"][1]
        count = jax.device_put(np.int32(step), like.step.sharding)
        return like.replace(step=count, **{name: restored[name] for name in _parts(like)})

    def read(self, step: int, item: str, like: Any = None) -> Any:
        """One item of a step, such as `params`, without the others.

        Args:
          step: of the checkpoint.
          item: its name.
          like: arrays or `jax.ShapeDtypeStruct`s that say how to lay it out over devices, and in
            which dtypes; without, it comes as host arrays, whatever its structure.

        Raises:
          UserError: the item is of another model than `like`; names the first differing entry.
        """
        found = self._tree(step, item)
        if like is None:
            items = {item: ocp.args.StandardRestore(_on_host(found))}
            return jax.tree.map(np.asarray, self._restore(step, **items)[item])
        require_same_layout(like, found, item, f"step {step}")
        items = {item: ocp.args.StandardRestore(jax.tree.map(_abstract, like))}
        return self._restore(step, **items)[item]

    def items(self, step: int) -> set[str]:
        """Names of what a step holds, of the parts of a state: `ema` for one."""
        return {name for name in _ITEMS if (self._directory / str(step) / name).is_dir()}

    def _tree(self, step: int, item: str) -> Any:
        """Shapes of an item."""
        try:
            return self._manager.item_metadata(step)[item].tree
        except _DAMAGE as error:
            raise self._damaged(step) from error

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except _DAMAGE as error:
            raise self._damaged(step) from error

    def _damaged(self, step: int) -> UserError:
        return UserError(
            f"{self._directory / str(step)} is damaged; move it away to use the checkpoint before"
        )

    def wait(self) -> None:
        """Until what is being written is whole."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def latest_step(directory: str | os.PathLike) -> int | None:
    """Step of a folder's newest checkpoint, None when there is none."""
    if not pathlib.Path(directory).is_dir():
        return None
    with Checkpoints(directory, keep=None) as checkpoints:
        return checkpoints.latest_step


def saved_steps(directory: str | os.PathLike) -> list[int]:
    """Returns the steps of a folder's whole checkpoints; asks no other host, as opening it does."""
    directory = pathlib.Path(directory)
    return ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []


def save_tree(path: str | os.PathLike, tree: Any) -> None:
    """Writes a tree of arrays as one orbax checkpoint, in place of one that is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(path).absolute(), tree, force=True)


def load_tree(path: str | os.PathLike) -> Any:
    """Reads a tree of arrays as host arrays.

    Raises:
      UserError: nothing readable is there.
    """
    path = pathlib.Path(path).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            tree = checkpointer.metadata(path).item_metadata.tree
            return jax.tree.map(np.asarray, checkpointer.restore(path, _on_host(tree)))
        except _DAMAGE as error:
            raise UserError(
                f"{path} is not a readable set of parameters; copy or make it again"
            ) from error


def _parts(state: TrainState) -> dict[str, Any]:
    """The parts of a state that have arrays, by name, besides the step."""
    trees = {name: getattr(state, name) for name in _ITEMS}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def _abstract(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _on_host(metadata: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata)


def require_same_layout(expected: Any, found: Any, what: str, where: str) -> None:
    """Raises a UserError naming the first entry that differs in presence or shape.

    Args:
      expected: tree of arrays or shapes, as the configured model has it.
      found: tree of arrays or shapes, as read.
      what: name of the tree, for the message.
      where: what was read, for the message.
    """
    wanted, present = _shapes(expected), _shapes(found)
    for key in sorted(wanted.keys() | present.keys()):
        if wanted.get(key) != present.get(key):
            raise UserError(
                f"{where} is of another model: {what}/{key} is {present.get(key, 'missing')}, "
                f"the config's model has {wanted.get(key, 'no such entry')}; "
                "use the config it was made with, or another workdir"
            )


def _stands_behind(state: Any, found: Any) -> bool:
    """Whether an optimiser's state was saved behind the empty one of clipping, as it once was."""
    return {f"1/{key}" for key in _shapes(state)} == _shapes(found).keys()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each array."""
    return {
        jax.tree_util.keystr(key, simple=True, separator="/"): tuple(leaf.shape)
        for key, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
