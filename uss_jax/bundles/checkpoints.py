"""Trees of arrays on disk: checkpoints and parts of bundles. Only this module imports orbax."""

import asyncio
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from uss_jax.bundles.failures import DamagedCheckpoint, readable, require_room, room_for
from uss_jax.bundles.fingerprint import by_path, fingerprint, path_of
from uss_jax.bundles.layout import require_same_layout
from uss_jax.disk.atomic import flush, flush_below, move, replacing
from uss_jax.disk.checked_json import (
    Rule,
    anything,
    either,
    mapping_of,
    nothing,
    parse_json,
    text,
    whole,
)
from uss_jax.errors import UserError

# Parts of the state of a run.
ITEMS = ("params", "batch_stats", "opt_state", "ema", "skipped", "norms")
_FINGERPRINTS = mapping_of(text())
_METRICS = "metrics/metrics"
# Files that orbax reads from every checkpoint when it opens their folder. A malformed one makes
# opening fail for all checkpoints; a checkpoint without these files is usable.
_READ_AT_ONCE = {
    "_CHECKPOINT_METADATA": mapping_of(
        either(nothing(), text(), whole(0, 2**63), mapping_of(anything()))
    ),
    _METRICS: mapping_of(anything()),
}


class _FlushedThenNamed(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Flushes a checkpoint before renaming it, so that a power cut leaves no incomplete one."""

    async def finalize(self) -> None:
        await asyncio.to_thread(flush_below, self.get())
        await super().finalize()  # also writes the commit time, which reading does not need
        await asyncio.to_thread(flush, self.get_final().parent)


@dataclasses.dataclass
class _NewestAndBest:
    """Policy that orbax applies after each save: keep the newest and the best checkpoints."""

    newest: int | None
    best: int
    best_by: str

    def value(self, figures: Mapping[str, float] | None) -> float:
        """Returns the metric by which checkpoints are compared; -inf if there is none, or NaN."""
        found = (figures or {}).get(self.best_by, np.nan)
        return found if np.isfinite(found) else -np.inf

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps if self.newest is None else steps[-self.newest :])
        evaluated = [c for c in checkpoints if self.value(c.metrics) > -np.inf]
        evaluated.sort(key=lambda checkpoint: self.value(checkpoint.metrics), reverse=True)
        kept |= {checkpoint.step for checkpoint in evaluated[: self.best]}
        return [step in kept for step in steps]


class _Manager(ocp.CheckpointManager):
    """Leaves it to training to ask whether a host is to stop (devices/hosts.py).

    Orbax asks too, from a thread and at earlier steps. JAX then may choose a step to stop after
    that some host has passed: the others stop, and that one waits for them forever.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """Checkpoints of a run, written in the background and atomically.

    Each holds the parts of the state; `position`, a dict that together with the records determines
    the data to come, without any iterator state; and `fingerprints`, one per part, which are
    verified on reading. Checkpoints of older versions have no fingerprints and are not verified.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int | None,
        keep_best: int = 0,
        best_by: str = "sdri",
    ):
        """Opens the folder; for writing, creates it if needed and removes unfinished checkpoints.

        Args:
          directory: folder of the checkpoints.
          keep: number of newest checkpoints to keep; None to open read-only.
          keep_best: number of best checkpoints to keep as well.
          best_by: metric of evaluations whose highest values are the best.
        """
        self._directory = pathlib.Path(directory).absolute()
        writing = keep is not None
        policy = _NewestAndBest(keep, keep_best, best_by)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            # Without best_fn, orbax neither writes nor reads metrics.
            best_fn=policy.value if writing else None,
            create=writing,
            cleanup_tmp_directories=writing,
            temporary_path_class=_FlushedThenNamed,
        )
        self._leave_out_wrong_notes(writing)
        # Without handlers, a manager cannot tell the shapes of arrays before its first save.
        self._arrays = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        notes = {name: ocp.JsonCheckpointHandler() for name in ("position", "fingerprints")}
        self._manager = _Manager(
            self._directory, options=options, item_handlers=self._arrays | notes
        )

    def _leave_out_wrong_notes(self, writing: bool) -> None:
        for name, rule in _READ_AT_ONCE.items():
            if name == _METRICS and not writing:  # orbax then reads none
                continue
            for path in self._directory.glob(f"*/{name}"):
                step = self._directory / path.relative_to(self._directory).parts[0]
                try:
                    parse_json(path.read_bytes(), rule)
                except FileNotFoundError:  # another process has just removed it
                    continue
                except OSError as error:
                    why = f"{name} cannot be read: {error.strerror}"
                    raise DamagedCheckpoint(step, why) from error
                except ValueError as error:
                    if not writing:
                        raise DamagedCheckpoint(step, f"{name} {error}") from error
                    path.unlink(missing_ok=True)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        parts: Mapping[str, Any],
        position: dict[str, Any],
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Copies arrays to the host and returns; files are written in the background.

        Args:
          step: number of steps done.
          parts: non-empty trees of arrays, by names in ITEMS.
          position: data position.
          figures: metrics of an evaluation, if any, see `best_by`.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in parts.items()}
        about = {
            "position": position,
            "fingerprints": {name: fingerprint(tree) for name, tree in parts.items()},
        }
        items |= {name: ocp.args.JsonSave(content) for name, content in about.items()}
        with room_for(self._directory):
            self._manager.wait_until_finished()  # the previous save
            require_room(self._directory, parts)
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=dict(figures or {}))

    def figures(self, step: int) -> dict[str, float]:
        """Returns the metrics of the evaluation at a step; empty if none can be read."""
        path = self._directory / str(step) / _METRICS
        try:
            return parse_json(path.read_bytes(), _READ_AT_ONCE[_METRICS])
        except (OSError, ValueError):
            return {}

    def add_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the metrics of an evaluation that a checkpoint lacks. Call on all hosts."""
        if jax.process_index() == 0:
            place = self._directory / str(step) / _METRICS
            place.parent.mkdir(exist_ok=True)
            with room_for(self._directory), replacing(place) as temporary:
                temporary.write_text(json.dumps(dict(figures)))
        multihost_utils.sync_global_devices("the figures of a checkpoint are written")
        self._manager.reload()

    def position(self, step: int, rule: Rule | None = None) -> dict[str, Any]:
        """Reads the data position saved at a step.

        Args:
          step: step of the checkpoint.
          rule: schema to check the position against; None accepts any dict.

        Raises:
          DamagedCheckpoint: the position cannot be read or violates the schema.
        """
        return self._json(step, "position", rule or mapping_of(anything()))

    def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Restores parts of the state saved at a step, with the shardings of `like`.

        Args:
          step: step of the checkpoint.
          like: arrays or `jax.ShapeDtypeStruct`s of each part to restore.

        Raises:
          UserError: the checkpoint is of another model; names the first differing entry.
          DamagedCheckpoint: it cannot be read, or its arrays differ from those saved.
        """
        for name, tree in like.items():
            require_same_layout(tree, self.shapes(step, name), name, f"step {step}")
        abstract = {name: jax.tree.map(_abstract, tree) for name, tree in like.items()}
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = dict(self._restore(step, **items))
        self._verify(step, restored)
        return restored

    def read(self, step: int, item: str, like: Any = None) -> Any:
        """Reads one item of a step, such as `params`, without the others.

        Args:
          step: step of the checkpoint.
          item: name of the item.
          like: arrays or `jax.ShapeDtypeStruct`s that give the expected layout, shardings and
            dtypes; None returns host arrays with whatever layout was saved.

        Raises:
          UserError: the item is of another model than `like`; names the first differing entry.
          DamagedCheckpoint: it cannot be read, or its arrays differ from those saved.
        """
        found = self.shapes(step, item)
        if like is None:
            items = {item: ocp.args.StandardRestore(_on_host(found))}
            tree = jax.tree.map(np.asarray, self._restore(step, **items)[item])
            self._verify(step, {item: tree})
            return tree
        require_same_layout(like, found, item, f"step {step}")
        dtypes = by_path(found)
        as_saved = jax.tree_util.tree_map_with_path(
            lambda key, x: jax.ShapeDtypeStruct(
                x.shape,
                dtypes[path_of(key)].dtype,
                sharding=x.sharding,
            ),
            like,
        )
        tree = self._restore(step, **{item: ocp.args.StandardRestore(as_saved)})[item]
        self._verify(step, {item: tree})
        return jax.tree.map(lambda x, wanted: x.astype(wanted.dtype), tree, like)

    def items(self, step: int) -> set[str]:
        """Returns the names of the state's parts that a step holds, such as `ema`."""
        return {name for name in ITEMS if (self._directory / str(step) / name).is_dir()}

    def shapes(self, step: int, item: str) -> Any:
        """Returns the shapes and dtypes of an item."""
        with readable(self._damaged(step, f"{item} cannot be read")):
            # The manager would look at every array of every item.
            return self._arrays[item].metadata(self._directory / str(step) / item).tree

    def _restore(self, step: int, **items: Any) -> Any:
        folder = self._directory / str(step)
        with readable(self._damaged(step, f"{' or '.join(items)} cannot be read")):
            # Check first: orbax would fail amid the arrays and leave its other reads running.
            for path in [x for name in items for x in folder.glob(f"{name}/array_metadatas/*")]:
                parse_json(path.read_bytes(), mapping_of(anything()))
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _json(self, step: int, item: str, rule: Rule) -> Any:
        content = self._restore(step, **{item: ocp.args.JsonRestore()})[item]
        try:
            rule(content, item)
        except ValueError as error:
            raise self._damaged(step, str(error)) from error
        return content

    def _verify(self, step: int, trees: Mapping[str, Any]) -> None:
        """Checks arrays against the fingerprints in the checkpoint."""
        if not (self._directory / str(step) / "fingerprints").exists():
            return
        saved = self._json(step, "fingerprints", _FINGERPRINTS)
        for name, tree in trees.items():
            if saved.get(name) != fingerprint(tree):
                raise self._damaged(step, f"{name} does not match its saved fingerprint")

    def _damaged(self, step: int, why: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(self._directory / str(step), why)

    def set_aside(self, step: int) -> pathlib.Path:
        """Moves a checkpoint to `<folder>-damaged`; returns its new path. Call on all hosts."""
        aside = self._directory.with_name(f"{self._directory.name}-damaged")
        number = 0
        while (place := aside / (f"{step}-{number}" if number else str(step))).exists():
            number += 1
        multihost_utils.sync_global_devices("a damaged checkpoint is read no more")
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            move(self._directory / str(step), place)
        multihost_utils.sync_global_devices("a damaged checkpoint is set aside")
        self._manager.reload()
        return place

    def wait(self) -> None:
        """Waits until the save in progress is complete."""
        with room_for(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in progress and closes the manager."""
        with room_for(self._directory):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def latest_step(directory: str | os.PathLike) -> int | None:
    """Returns the step of the newest checkpoint in a folder; None if there is none."""
    return max(saved_steps(directory), default=None)


def saved_steps(directory: str | os.PathLike) -> list[int]:
    """Returns the steps of complete checkpoints; unlike opening them, contacts no other host."""
    directory = pathlib.Path(directory)
    return ocp.utils.checkpoint_steps(directory) if directory.is_dir() else []


def save_tree(path: str | os.PathLike, tree: Any) -> None:
    """Writes a tree of arrays as one orbax checkpoint, replacing any existing one."""
    path = pathlib.Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    require_room(path.parent, tree)
    with room_for(path), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)


def load_tree(path: str | os.PathLike) -> Any:
    """Reads a tree of arrays as host arrays; contacts no other host, so that one may read alone.

    Raises:
      UserError: there is no readable tree.
    """
    path = pathlib.Path(path).absolute()
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"host_{here}"
    )
    with (
        ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer,
        readable(UserError(f"{path} is not a readable set of parameters; copy or make it again")),
    ):
        tree = checkpointer.metadata(path).item_metadata.tree
        return jax.tree.map(np.asarray, checkpointer.restore(path, _on_host(tree)))


def _abstract(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _on_host(metadata: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata)
