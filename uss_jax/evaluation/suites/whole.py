"""Separates whole recordings as `uss-jax separate` does, for data sets with metrics of their own.

Letters: `c` channels, `t` samples, `d` width of the condition.
"""

import importlib
import json
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from uss_jax.bundles.model import Model
from uss_jax.devices.mesh import make_mesh
from uss_jax.disk.atomic import replacing
from uss_jax.errors import UserError
from uss_jax.evaluation.averages import Averages
from uss_jax.evaluation.finished import stamps
from uss_jax.evaluation.rows import AVERAGE, HALF, MIXTURE, ORACLE
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.text_table import (
    format_table,
    markdown_table,
    sibling,
    silent_note,
    write_text,
)
from uss_jax.separation.example_vectors import recording_vector
from uss_jax.separation.queries import Vectors
from uss_jax.separation.recordings import Separator, Settings

Values = dict[str, float]


def answers(
    model: Model,
    mixture: Float32[np.ndarray, "c t"],
    sources: Mapping[str, Float32[np.ndarray, "c t"]],
    sample_rate: int,
    averages: Averages,
    oracles: Mapping[str, Float32[np.ndarray, "_"]],
    *,
    reference_blocks: bool = False,
) -> dict[tuple[str, str], Float32[np.ndarray, "c t"]]:
    """Separates a recording with every query; returns (row, label) -> estimate.

    Args:
      model: the separator.
      mixture: the recording.
      sources: label -> source in the recording.
      sample_rate: sampling rate of both, in Hz.
      averages: label -> averaged condition.
      oracles: label -> the source in mono at the model's sampling rate.
      reference_blocks: separate in blocks without overlap, as the reference does.

    Raises:
      UserError: the model has one-hot conditions.
    """
    vectors = {}
    if not model.query.module.takes.recordings:
        raise UserError(
            f"{model.path} takes AudioSet classes only; this data set is queried with recordings"
        )
    for label in sources:
        vectors[f"{ORACLE}/{label}"] = recording_vector(model, oracles[label])
        if label in averages:
            vectors[f"{AVERAGE}/{label}"] = averages[label]
    settings = Settings(reference_blocks=reference_blocks)
    separator = Separator(model, settings, mesh=make_mesh())
    separated = separator.separate(mixture, sample_rate, Vectors(vectors))
    found = {tuple(name.split("/", 1)): estimate for name, estimate in separated.items()}
    for label in sources:
        found[HALF, label] = mixture / 2
        found[MIXTURE, label] = mixture
    return found


def report(
    model: Model,
    out: str,
    rows: Sequence[Results],
    header: Sequence[str],
    cells: Sequence[Sequence[Any]],
    explanation: str,
) -> tuple[Results, str]:
    """Writes a Markdown table beside `out`; returns the results, and the table as text.

    Args:
      model: the separator.
      out: JSON file of the results.
      rows: metrics of each query; those of the first are also the headline.
      header: first row of the table.
      cells: the table's other rows.
      explanation: what the metrics are, to be put below the table.
    """
    silent = rows[0].get("silent", 0)
    explanation = "\n\n".join([explanation, *([silent_note(silent)] if silent else [])])
    lines = [f"# {model.path}", "", *markdown_table(header, cells), "", explanation]
    with replacing(sibling(out, ".md")) as temporary:
        write_text(temporary, "\n".join(lines) + "\n")
    headline = {key: value for key, value in rows[0].items() if isinstance(value, float)}
    results = {
        "condition": model.query.module.kind,
        "silent_targets": silent,
        "query": rows[0]["query"],
        **headline,
        "rows": list(rows),
    }
    return results, f"{format_table(header, cells)}\n\n{explanation}"


def identity(
    model: Model,
    averages: Averages,
    how: str,
    names: Sequence[str],
    files: Iterable[str | os.PathLike],
) -> Iterator[bytes]:
    """Yields everything that the metrics of recordings depend on, for `Finished`."""
    yield model.digest.encode()
    yield json.dumps([how, list(names), sorted(averages)]).encode()
    yield stamps(files)
    for _, vector in sorted(averages.items()):
        yield np.asarray(vector, np.float32).tobytes()


def require_package(name: str, what: str) -> types.ModuleType:
    """Imports a package of the extra `suites`; a UserError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{what} needs the package {name}: pip install 'uss-jax[suites]'"
        ) from error
