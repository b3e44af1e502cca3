"""Keeps the partial results of a long evaluation in a file, so that it can be resumed."""

import hashlib
import json
import os
import pathlib
from collections.abc import Hashable, Iterable
from typing import Any

import jax

import uss_jax
from uss_jax.disk.atomic import replacing


def unfinished_beside(out: str) -> pathlib.Path:
    """Returns the hidden file that holds partial results until `out` is written."""
    path = pathlib.Path(out)
    return path.with_name(f".{path.name}.unfinished")


def stamps(files: Iterable[str | os.PathLike]) -> bytes:
    """Returns sizes and times of files, which change when the files do."""
    found = [os.stat(file) for file in files]
    return json.dumps([(about.st_size, about.st_mtime_ns) for about in found]).encode()


class Finished:
    """Metrics by batch number or recording name, stored as lines of JSON.

    Attributes:
      done: all metrics so far, including those of an interrupted run.
    """

    def __init__(self, path: str | os.PathLike | None, identity: Iterable[bytes]):
        """Reads the metrics an interrupted run has stored.

        Args:
          path: the file; None stores nothing.
          identity: bytes that identify model, data and options; a file with another identity is
            overwritten.

        Raises:
          UserError: the file cannot be written.
        """
        self.done: dict[Hashable, Any] = {}
        self._path = None if path is None else pathlib.Path(path)
        if self._path is None:
            return
        digest = hashlib.sha256(uss_jax.__version__.encode())
        for part in identity:
            digest.update(part)
        self._run = digest.hexdigest()
        header = json.dumps({"run": self._run})
        lines = _lines(self._path)
        if lines[:1] != [header]:
            lines = []
        kept = [header]
        for line in lines[1:]:
            try:
                key, found, *run = json.loads(line)
                if run not in ([], [self._run]):  # of another evaluation that has this `out`
                    continue
                self.done[key] = found
            except (ValueError, TypeError):  # no such line: a power cut has damaged the rest
                break
            kept.append(line)
        if jax.process_index() == 0:  # other hosts read the old file or the new one, both whole
            with replacing(self._path, flush=False) as temporary:
                temporary.write_text("\n".join(kept) + "\n")

    def add(self, key: Hashable, found: Any) -> None:
        """Stores the metrics of one key: nested dictionaries of numbers and arrays."""
        self.done[key] = found
        if self._path is not None and jax.process_index() == 0:
            with self._path.open("a") as file:
                line = [key, found, self._run]
                file.write(json.dumps(line, default=lambda array: array.tolist()) + "\n")


def _lines(path: pathlib.Path) -> list[str]:
    """Returns the lines of a file without an incomplete last one; none if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    except UnicodeDecodeError:
        return []
