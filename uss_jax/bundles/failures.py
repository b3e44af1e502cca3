"""Turns a full disk and damaged files, as orbax reports them, into errors for people."""

import contextlib
import gc
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax

from uss_jax.disk.atomic import full, is_full
from uss_jax.errors import UserError

# Exceptions that orbax raises for missing, truncated or overwritten files.
_DAMAGE = (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError)
# Upper bound on the bytes of a checkpoint besides its arrays.
_ROOM_FOR_NOTES = 2_000_000


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be read, or whose arrays differ from those saved.

    Attributes:
      where: folder of the checkpoint.
      why: description of the damage.
    """

    def __init__(self, where: pathlib.Path, why: str):
        super().__init__(
            f"{where} is damaged ({why}); move it away to use the checkpoint before it"
        )
        self.where, self.why = where, why


def require_room(folder: pathlib.Path, tree: Any) -> None:
    """Raises a UserError if a tree does not fit on the disk; orbax would fail in many threads."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + _ROOM_FOR_NOTES
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder} has {free / 1e6:.1f} MB free, but {size / 1e6:.1f} MB are needed; "
            "free some space and run the same command again"
        )


@contextlib.contextmanager
def room_for(path: str | os.PathLike) -> Iterator[None]:
    """Converts any exception of orbax about a full disk to a UserError."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise UserError(full(path)) from error
        raise


@contextlib.contextmanager
def readable(or_else: UserError) -> Iterator[None]:
    """Raises `or_else` in place of the exceptions of orbax about missing or damaged files."""
    failed = False
    try:
        yield
    except Exception as error:
        # For arrays that it cannot decode, orbax raises a bare Exception.
        if type(error) is not Exception and not isinstance(error, _DAMAGE):
            raise
        failed = True
    if failed:
        # Orbax abandons its other failed reads. Collect them now, with the hook that would print
        # their tracebacks disabled.
        hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
        try:
            gc.collect()
        finally:
            sys.unraisablehook = hook
        raise or_else
