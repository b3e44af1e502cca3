"""The folder of a run: created, locked against other runs, and described by its config.json."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from uss_jax.disk.atomic import replacing
from uss_jax.disk.folder import make_folder
from uss_jax.disk.lock import only_one
from uss_jax.errors import UserError


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Creates the workdir if needed and locks it against other runs, on all hosts together.

    Raises:
      UserError: the workdir cannot be created or written to, or is in use by another run.
    """
    workdir = pathlib.Path(workdir)
    make_folder(workdir, "choose another", name=f"--workdir {workdir}")
    if not os.access(workdir, os.W_OK):
        raise UserError(f"--workdir {workdir} cannot be written to; choose another")
    with contextlib.ExitStack() as stack:
        refusal = None
        if jax.process_index() == 0:  # one lock for all hosts of a run
            try:
                remedy = "wait until it has ended, or choose another --workdir"
                stack.enter_context(only_one(workdir, remedy))
            except UserError as error:
                refusal = error
        if multihost_utils.broadcast_one_to_all(np.bool(refusal is not None)):
            raise refusal or UserError(f"{workdir} is in use by another run")
        yield workdir


def write_config(workdir: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes config.json, which makes the workdir readable as a bundle; on the first host only."""
    if jax.process_index() == 0:
        with replacing(workdir / "config.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
