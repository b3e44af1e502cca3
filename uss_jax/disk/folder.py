"""Makes output folders, and reads the headers of those that hold arrays."""

import hashlib
import os
import pathlib
from typing import Any

from uss_jax.disk.checked_json import Rule, read_json
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError

HEADER = "header.json"


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


def read_header(path: pathlib.Path, rule: Rule, what: str, remedy: str) -> dict[str, Any]:
    """Reads and checks the `header.json` of a folder.

    Args:
      path: the folder.
      rule: what the header must be.
      what: what the folder should be, for the message.
      remedy: what to do if it is not.

    Raises:
      UserError: it cannot be read, or breaks the rule.
    """
    try:
        with open(path / HEADER, "rb", opener=at_once) as file:
            return read_json(file, rule)
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise UserError(f"{path} is not {what} ({words}); {remedy}") from error


def stamp_of(path: pathlib.Path) -> tuple[int, ...]:
    """Returns what tells the header of a folder from that of one which replaces the folder."""
    try:
        about = os.stat(path / HEADER)
    except OSError:  # who reads the header says why
        return ()
    return about.st_ino, about.st_size, about.st_mtime_ns


def require_stamp(path: pathlib.Path, stamp: tuple[int, ...], reading: str) -> None:
    """Raises a UserError if a folder was replaced since its stamp.

    `reading` is what was read meanwhile, with its verb, for the message.
    """
    if stamp_of(path) != stamp:
        raise UserError(
            f"{path} was replaced while {reading} being read; put back what was there, or start in "
            "a new workdir"
        )


def sha256_of(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb", opener=at_once) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
