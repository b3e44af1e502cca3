"""Whole recordings: separated as `uss-jax separate` does, measured by a data set's own figures.

Letters: `c` channels, `t` samples, `d` width of the condition.
"""

import hashlib
import importlib
import json
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from uss_jax.errors import UserError
from uss_jax.evaluation.averages import Averages
from uss_jax.evaluation.scoring import AVERAGE, HALF, MIXTURE, ORACLE
from uss_jax.separation.queries import Vectors, recording_vector
from uss_jax.separation.recordings import Separator
from uss_jax.training.bundle import net_hash
from uss_jax.training.model import Model

Values = dict[str, float]
ROWS = (ORACLE, AVERAGE, HALF, MIXTURE)


def answers(
    model: Model,
    mixture: Float32[np.ndarray, "c t"],
    sources: Mapping[str, Float32[np.ndarray, "c t"]],
    sample_rate: int,
    averages: Averages,
    oracles: Mapping[str, Float32[np.ndarray, "t"]],
) -> dict[tuple[str, str], Float32[np.ndarray, "c t"]]:
    """(row, label) -> what each way of asking gives for a recording.

    Args:
      model: separates.
      mixture: the recording.
      sources: label -> what is in it.
      sample_rate: of both, in Hz.
      averages: label -> condition.
      oracles: label -> the source as one channel at the model's rate.
    """
    vectors = {}
    if model.query.module.kind == "one_hot":
        raise UserError(
            f"{model.path} knows AudioSet's classes only; this data set asks by recordings"
        )
    for label in sources:
        vectors[f"{ORACLE}/{label}"] = recording_vector(model, oracles[label])
        if label in averages:
            vectors[f"{AVERAGE}/{label}"] = averages[label]
    separated = Separator(model).separate(mixture, sample_rate, Vectors(vectors))
    found = {tuple(name.split("/", 1)): estimate for name, estimate in separated.items()}
    for label in sources:
        found[HALF, label] = mixture / 2
        found[MIXTURE, label] = mixture
    return found


class Finished:
    """The figures of finished recordings, in a file, so that a run that was stopped goes on."""

    def __init__(self, path: pathlib.Path, model: Model, averages: Averages, names: Sequence[str]):
        """Reads what a run of the same model, conditions and recordings has left."""
        digest = hashlib.sha256(net_hash(model.separator.variables).encode())
        digest.update(json.dumps([list(names), sorted(averages)]).encode())
        for _, vector in sorted(averages.items()):
            digest.update(np.asarray(vector, np.float32).tobytes())
        self._header, self._path = {"run": digest.hexdigest()}, path
        self.done: dict[str, Any] = {}
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        if lines and json.loads(lines[0]) == self._header:
            self.done = dict(json.loads(line) for line in lines[1:])
        self._write()

    def _write(self) -> None:
        lines = [json.dumps(self._header), *(json.dumps(one) for one in self.done.items())]
        self._path.write_text("\n".join(lines) + "\n")

    def add(self, name: str, found: Any) -> None:
        """Keeps a recording's figures."""
        self.done[name] = found
        with self._path.open("a") as file:
            file.write(json.dumps([name, found]) + "\n")

    def remove(self) -> None:
        """The run has come to its end."""
        self._path.unlink(missing_ok=True)


def require_package(name: str, what: str) -> types.ModuleType:
    """A package of the extra `suites`, or a UserError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{what} needs the package {name}: pip install 'uss-jax[suites]'"
        ) from error
