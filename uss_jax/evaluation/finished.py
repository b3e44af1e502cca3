"""What a long evaluation has done so far, in a file, so that one that was stopped goes on there."""

import hashlib
import json
import os
import pathlib
from collections.abc import Hashable, Iterable
from typing import Any

import jax

from uss_jax.errors import UserError


class Finished:
    """Figures by the number or name of what was measured, kept as lines of JSON.

    Attributes:
      done: what was found before and since.
    """

    def __init__(self, path: str | os.PathLike | None, identity: Iterable[bytes]):
        """Reads what a stopped run has left.

        Args:
          path: the file; None keeps nothing.
          identity: of the model, what it is measured on and how: what another run has left does
            not count.
        """
        self.done: dict[Hashable, Any] = {}
        self._path = None if path is None else pathlib.Path(path)
        if self._path is None:
            return
        digest = hashlib.sha256()
        for part in identity:
            digest.update(part)
        lines = self._path.read_text().split("\n") if self._path.is_file() else []
        lines = lines[:-1]  # what follows the last newline was cut off
        header = json.dumps({"run": digest.hexdigest()})
        if lines[:1] != [header]:
            lines = [header]
        self.done = dict(json.loads(line) for line in lines[1:])
        try:
            self._path.write_text("\n".join(lines) + "\n")
        except OSError as error:
            raise UserError(f"{self._path} could not be written ({error.strerror})") from error

    def add(self, key: Hashable, found: Any) -> None:
        """Keeps figures: numbers and arrays in dictionaries."""
        self.done[key] = found
        if self._path is not None and jax.process_index() == 0:
            with self._path.open("a") as file:
                file.write(json.dumps([key, found], default=lambda array: array.tolist()) + "\n")

    def remove(self) -> None:
        """The run has come to its end."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
