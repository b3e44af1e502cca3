"""The suites of `uss-jax evaluate`: each gives results, and prints them as a table."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import uss_jax
from uss_jax.errors import UserError
from uss_jax.evaluation import pairs as pairs_suite
from uss_jax.evaluation.clips import open_records
from uss_jax.evaluation.planted import (
    EVENT_SECONDS,
    SNR_DB,
    evaluate_planted,
    format_planted,
)
from uss_jax.evaluation.table import write_results
from uss_jax.evaluation.tagging import evaluate_tagging, format_tagging
from uss_jax.separation.queries import require_npz, write_bank
from uss_jax.training.model import Model

Results = dict[str, Any]


def run_pairs(
    model: Model,
    data: str,
    *,
    train_records: str | None,
    split: str,
    bank: str | None,
    examples: int,
    out_dir: str | None,
) -> tuple[Results, str]:
    """Separation of pairs; see evaluation/pairs.py. Returns results and a table."""
    if bank and not train_records:
        raise UserError("--bank stores averages over training clips; give --train-records too")
    if bank:
        require_npz(bank)
    if examples and not out_dir:
        raise UserError("--examples needs --out-dir, the folder to write them to")
    pairs = pairs_suite.find_pairs(data)
    averages = None
    if train_records:
        reader = open_records(train_records, split, model)
        classes = sorted({pair.class_index for pair in pairs})
        averages = pairs_suite.class_averages(model, reader, classes)
    figures, rows = pairs_suite.evaluate_pairs(model, pairs, averages)
    groups = sorted({pair.group for pair in pairs if pair.group})
    summaries = pairs_suite.summarise(pairs, figures)
    for group in groups:
        summaries += pairs_suite.summarise(pairs, figures, group)
    text = [pairs_suite.format_summaries(summaries)]
    if averages and bank:
        write_bank(bank, pairs_suite.bank_of_averages(model, averages))
        text.append(f"{bank}: vectors of {len(averages)} classes")
    if examples and out_dir:
        pictures = pairs_suite.write_examples(model, pairs, figures, rows, examples, out_dir)
        text += [f"{picture}: sounds beside it" for picture in pictures]
    half = next(row for row in summaries if row["query"] == pairs_suite.HALF)
    headline = {key: summaries[0][key] for key in ("query", "sdr", "sdri", "si_sdr", "si_sdri")}
    results = {
        "condition": model.query.module.kind,
        **headline,
        "baseline_sdri": half["sdri"],
        "classes": summaries[0]["classes"],
        "rows": summaries,
        "how": {"train_records": train_records, "split": split if train_records else None},
    }
    return results, "\n\n".join(text)


def run_tagging(model: Model, data: str, *, split: str) -> tuple[Results, str]:
    """Tagging of records; see evaluation/tagging.py."""
    summaries = evaluate_tagging(model, open_records(data, split, model))
    return {"rows": summaries, "how": {"split": split}}, format_tagging(summaries)


def run_planted(
    model: Model, data: str, *, split: str, clips: int, seed: int
) -> tuple[Results, str]:
    """Anchors of planted events; see evaluation/planted.py."""
    summaries = evaluate_planted(model, open_records(data, split, model), clips=clips, seed=seed)
    how = {
        "split": split,
        "clips": clips,
        "seed": seed,
        "event_seconds": EVENT_SECONDS,
        "snr_db": SNR_DB,
    }
    return {"rows": summaries, "how": how}, format_planted(summaries)


SUITES: dict[str, Callable[..., tuple[Results, str]]] = {
    "pairs": run_pairs,
    "tagging": run_tagging,
    "planted": run_planted,
}


def evaluate(suite: str, model_path: str, data: str, out: str, **options: Any) -> str:
    """Runs a suite and writes its results; returns the table.

    Args:
      suite: a name in SUITES.
      model_path: bundle or training workdir.
      data: pairs or records, as the suite takes them.
      out: the JSON file of results.
      options: of the suite.
    """
    if not pathlib.Path(out).absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder to write it to; make it first")
    model = Model(model_path)
    results, text = SUITES[suite](model, data, **options)
    how = {"data": os.fspath(data), "uss_jax": uss_jax.__version__, **results.pop("how")}
    write_results(out, {"suite": suite, "model": os.fspath(model_path), **results, "how": how})
    return text
