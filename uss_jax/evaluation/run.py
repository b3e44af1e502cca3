"""Runs a suite of `uss-jax evaluate` and writes its results."""

import os
import pathlib
from typing import Any

import uss_jax
from uss_jax.bundles.model import Model
from uss_jax.devices.precision import HIGHEST
from uss_jax.disk.checked_json import read_json, record, text
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError
from uss_jax.evaluation.finished import unfinished_beside
from uss_jax.evaluation.suites import SUITES
from uss_jax.evaluation.text_table import MOST_BYTES, sibling, write_results

# Endings of what a suite writes beside its JSON file.
_BESIDE = (".csv", ".md", ".png")


def evaluate(
    suite: str,
    model_path: str,
    data: str,
    out: str,
    *,
    precision: str = HIGHEST,
    **options: Any,
) -> str:
    """Runs a suite and writes its results; returns the text to print.

    Args:
      suite: key of SUITES.
      model_path: bundle or training workdir.
      data: folder of pairs, of records or of a data set, as the suite needs.
      out: JSON file for the results.
      precision: precision of separator and query net, see uss_jax/devices/precision.py.
      options: options of the suite.

    Raises:
      UserError: `out` is not a JSON file in an existing folder, or would replace other files than
        results.
    """
    if not out.endswith(".json") or pathlib.Path(out).name == ".json":
        raise UserError(
            f"--out {out}: results are written as JSON; give a file name that ends in .json"
        )
    if not pathlib.Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out}: its folder does not exist; create it first")
    _require_replaceable(out)
    if SUITES[suite].detector_only:
        precision = HIGHEST
    model = Model(model_path, precision)
    results, text = SUITES[suite].run(model, data, out, **options)
    how = {"data": os.fspath(data), "uss_jax": uss_jax.__version__, "precision": precision}
    how |= results.pop("how")
    write_results(out, {"suite": suite, "model": os.fspath(model_path), **results, "how": how})
    unfinished_beside(out).unlink(missing_ok=True)
    return text


def _require_replaceable(out: str) -> None:
    """Raises a UserError if a file that is not of an earlier evaluation would be replaced."""
    wanted = "give --out another name"
    if os.path.lexists(out):
        try:
            with open(out, "rb", opener=at_once) as file:
                read_json(file, record({"suite": text()}, others=True), max_bytes=MOST_BYTES)
        except (OSError, ValueError) as error:
            raise UserError(f"{out} exists and holds no results; {wanted}") from error
        return
    if unfinished_beside(out).exists():  # a run was stopped while it wrote
        return
    for ending in _BESIDE:
        if (beside := sibling(out, ending)).exists():
            raise UserError(f"{beside} exists, but no results {out} beside it; {wanted}")
