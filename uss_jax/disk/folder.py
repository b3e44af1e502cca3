"""Makes output folders."""

import os
import pathlib

from uss_jax.errors import UserError


def make_folder(path: pathlib.Path, remedy: str, name: str | os.PathLike | None = None) -> None:
    """Creates a folder and those above it, unless they exist.

    Args:
      path: the folder.
      remedy: what to do if it cannot be created, for the message.
      name: its name in the message; None: the path.

    Raises:
      UserError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{name or path} cannot be created ({error.strerror or error}); {remedy}"
        ) from error
