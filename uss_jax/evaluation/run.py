"""Runs a suite of `uss-jax evaluate` and writes its results."""

import os
import pathlib
from typing import Any

import uss_jax
from uss_jax.bundles.model import Model
from uss_jax.devices.precision import HIGHEST
from uss_jax.errors import UserError
from uss_jax.evaluation.suites import SUITES
from uss_jax.evaluation.text_table import write_results


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
      UserError: `out` is not a JSON file in an existing folder.
    """
    if not out.endswith(".json") or pathlib.Path(out).name == ".json":
        raise UserError(
            f"--out {out}: results are written as JSON; give a file name that ends in .json"
        )
    if not pathlib.Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out}: its folder does not exist; create it first")
    model = Model(model_path, precision)
    results, text = SUITES[suite].run(model, data, out, **options)
    how = {"data": os.fspath(data), "uss_jax": uss_jax.__version__, "precision": precision}
    how |= results.pop("how")
    write_results(out, {"suite": suite, "model": os.fspath(model_path), **results, "how": how})
    return text
