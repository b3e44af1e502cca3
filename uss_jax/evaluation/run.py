"""Runs the suites of `uss-jax evaluate`: each returns its results, and a table to print."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import uss_jax
from uss_jax.bundles.model import Model
from uss_jax.devices.precision import HIGHEST
from uss_jax.disk.atomic import replacing
from uss_jax.errors import UserError
from uss_jax.evaluation.averages import (
    Averages,
    bank_of_averages,
    by_name,
    class_averages,
    file_averages,
    source_averages,
)
from uss_jax.evaluation.clips import open_records
from uss_jax.evaluation.pairs import find_pairs, sources_by_class, write_examples
from uss_jax.evaluation.planted import (
    EVENT_SECONDS,
    SNR_DB,
    evaluate_planted,
    format_planted,
)
from uss_jax.evaluation.scoring import Figures, Item, Row, score
from uss_jax.evaluation.suites import (
    fsd50k,
    fsdkaggle2018,
    musdb18,
    slakh2100,
    voicebank_demand,
)
from uss_jax.evaluation.summary import (
    EXPLANATION,
    format_summaries,
    headline,
    summarise,
    without_silent,
    write_class_plot,
    write_class_table,
    write_markdown,
)
from uss_jax.evaluation.tagging import evaluate_tagging, format_tagging
from uss_jax.evaluation.text_table import format_table, markdown_table, silent_note, write_results
from uss_jax.separation.queries import require_npz, write_bank
from uss_jax.wording import counted

Results = dict[str, Any]


def run_pairs(
    model: Model,
    data: str,
    out: str,
    *,
    oracle_only: bool,
    train_records: str | None,
    split: str,
    train_pairs: str | None,
    bank: str | None,
    examples: int,
    out_dir: str | None,
) -> tuple[Results, str]:
    """Evaluates separation on pairs; see evaluation/scoring.py. Returns results and a table."""
    if train_records and train_pairs:
        raise UserError("--train-records and --train-pairs both give class averages; give one")
    if oracle_only and (train_records or train_pairs):
        raise UserError(
            "--oracle-only uses no class averages; leave out --train-records and --train-pairs"
        )
    if bank and not (train_records or train_pairs):
        raise UserError(
            "--bank stores averages over training clips; give --train-records or --train-pairs too"
        )
    if bank:
        require_npz(bank)
    if examples and not out_dir:
        raise UserError("--examples needs --out-dir, the folder to write them to")
    pairs = find_pairs(data)
    averages, how = {}, {"train_records": train_records, "split": split if train_records else None}
    if train_records:
        reader = open_records(train_records, split, model)
        classes = sorted({pair.class_index for pair in pairs})
        averages = by_name(class_averages(model, reader, classes))
    if train_pairs:
        how = {"train_pairs": train_pairs}
        averages = file_averages(model, sources_by_class(train_pairs), without_silence=False)
    results, text, (figures, rows) = score_items(model, pairs, averages, out, oracle_only)
    if averages and bank:
        stored = bank_of_averages(model, averages, f"averaged over {train_records or train_pairs}")
        write_bank(bank, stored)
        text.append(f"{bank}: vectors of {counted(len(averages), 'class', 'classes')}")
    if examples and out_dir:
        pictures = write_examples(model, pairs, figures, rows, examples, out_dir)
        text += [f"{picture}: its audio files are next to it" for picture in pictures]
    return {**results, "how": how}, "\n\n".join(text)


def score_items(
    model: Model, items: Sequence[Item], averages: Averages, out: str, oracle_only: bool = False
) -> tuple[Results, list[str], tuple[dict[str, Figures], dict[str, Row]]]:
    """Scores items; writes a CSV file, a plot and Markdown next to `out`, under the same name.

    Returns:
      Results, paragraphs to print, and what `score` returned.
    """
    figures, rows = score(
        model, items, averages, oracle_only=oracle_only, unfinished=_beside(out, ".unfinished")
    )
    kept, figures_kept = without_silent(items, figures)
    summaries = summarise(kept, figures_kept)
    for group in sorted({item.group for item in kept if item.group}):
        summaries += summarise(kept, figures_kept, group)
    write_class_table(sibling(out, ".csv"), kept, summaries)
    write_class_plot(sibling(out, ".png"), kept, summaries)
    silent = len(items) - len(kept)
    note = [silent_note(silent)] if silent else []
    explanation = "\n\n".join([EXPLANATION, *note])
    write_markdown(sibling(out, ".md"), f"{model.path}", summaries, explanation)
    results = {
        "condition": model.query.module.kind,
        "silent_targets": silent,
        **headline(summaries),
        "rows": summaries,
    }
    return results, [format_summaries(summaries), *note], (figures, rows)


def run_tagging(model: Model, data: str, out: str, *, split: str) -> tuple[Results, str]:
    """Evaluates tagging on records; see evaluation/tagging.py."""
    summaries = evaluate_tagging(model, open_records(data, split, model))
    return {"rows": summaries, "how": {"split": split}}, format_tagging(summaries)


def run_planted(
    model: Model, data: str, out: str, *, split: str, clips: int, seed: int
) -> tuple[Results, str]:
    """Evaluates the anchors of planted events; see evaluation/planted.py."""
    summaries = evaluate_planted(model, open_records(data, split, model), clips=clips, seed=seed)
    how = {
        "split": split,
        "clips": clips,
        "seed": seed,
        "event_seconds": EVENT_SECONDS,
        "snr_db": SNR_DB,
    }
    return {"rows": summaries, "how": how}, format_planted(summaries)


def run_fsdkaggle2018(model: Model, data: str, out: str) -> tuple[Results, str]:
    """Evaluates separation on FSDKaggle2018; see evaluation/suites/fsdkaggle2018.py."""
    return _run_items(model, out, lambda split: fsdkaggle2018.items(pathlib.Path(data), split), {})


def run_fsd50k(model: Model, data: str, out: str, *, labels: str) -> tuple[Results, str]:
    """Evaluates separation on FSD50K; see evaluation/suites/fsd50k.py."""

    def items(split: str) -> Sequence[Item]:
        return fsd50k.items(pathlib.Path(data), split, all_labels=labels == "all")

    return _run_items(model, out, items, {"labels": labels})


def run_slakh2100(model: Model, data: str, out: str, *, by: str) -> tuple[Results, str]:
    """Evaluates separation on Slakh2100; see evaluation/suites/slakh2100.py."""

    def items(split: str) -> Sequence[Item]:
        return slakh2100.items(pathlib.Path(data), split, by=by)

    return _run_items(model, out, items, {"by": by})


def _run_items(
    model: Model, out: str, items: Callable[[str], Sequence[Item]], how: Results
) -> tuple[Results, str]:
    """Scores the test split, with conditions averaged over the sources of the training split."""
    test = items("test")
    averages = source_averages(model, items("train"))
    results, text, _ = score_items(model, test, averages, out)
    return {**results, "how": how}, "\n\n".join(text)


def run_musdb18(model: Model, data: str, out: str, *, legacy: bool) -> tuple[Results, str]:
    """Evaluates separation on MUSDB18-HQ; see evaluation/suites/musdb18.py."""
    folder = pathlib.Path(data)
    musdb18.songs(folder, "test")
    averages = musdb18.stem_averages(model, folder)
    unfinished = _beside(out, ".unfinished")
    rows = musdb18.score_songs(model, folder, averages, unfinished, legacy=legacy)
    figures = ("sdr", "sdri", *(("legacy_sdr", "legacy_sdri") if legacy else ()))
    cells = []
    for row in rows:
        of_stems = (row["stems"][stem]["sdr"] for stem in musdb18.STEMS)
        cells.append((row["query"], *(row.get(figure) for figure in figures), *of_stems))
    header = ("", *figures, *(f"{stem} sdr" for stem in musdb18.STEMS))
    return _whole(model, out, rows, header, cells, {"legacy": legacy}, "dB; median over songs")


def run_voicebank_demand(model: Model, data: str, out: str, *, blocks: str) -> tuple[Results, str]:
    """Evaluates enhancement on Voicebank-Demand; see evaluation/suites/voicebank_demand.py."""
    folder = pathlib.Path(data)
    voicebank_demand.sentences(folder)
    averages = voicebank_demand.speech_average(model, folder)
    rows = voicebank_demand.score_sentences(
        model,
        folder,
        averages,
        _beside(out, ".unfinished"),
        reference_blocks=blocks == "reference",
    )
    figures = ("pesq", "ssnr", "csig", "cbak", "covl")
    cells = [(row["query"], *(row[figure] for figure in figures)) for row in rows]
    explanation = "medians over sentences, as published; means are in the JSON file; SSNR in dB"
    return _whole(model, out, rows, ("", *figures), cells, {"blocks": blocks}, explanation)


def _beside(out: str, ending: str) -> pathlib.Path:
    path = pathlib.Path(out)
    return path.with_name(f".{path.name}{ending}")


def sibling(out: str, suffix: str) -> pathlib.Path:
    """Returns the path of a JSON file with another suffix."""
    return pathlib.Path(out.removesuffix(".json") + suffix)


def _whole(
    model: Model,
    out: str,
    rows: Sequence[Results],
    header: Sequence[str],
    cells: Sequence[Sequence[Any]],
    how: Results,
    explanation: str,
) -> tuple[Results, str]:
    """Writes the Markdown table of a suite of whole recordings; returns its results and text."""
    silent = rows[0].get("silent", 0)
    explanation = "\n\n".join([explanation, *([silent_note(silent)] if silent else [])])
    lines = [f"# {model.path}", "", *markdown_table(header, cells), "", explanation]
    with replacing(sibling(out, ".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    first = {key: value for key, value in rows[0].items() if isinstance(value, float)}
    results = {
        "condition": model.query.module.kind,
        "silent_targets": silent,
        "query": rows[0]["query"],
        **first,
    }
    text = f"{format_table(header, cells)}\n\n{explanation}"
    return {**results, "rows": list(rows), "how": how}, text


SUITES: dict[str, Callable[..., tuple[Results, str]]] = {
    "pairs": run_pairs,
    "tagging": run_tagging,
    "planted": run_planted,
    "fsdkaggle2018": run_fsdkaggle2018,
    "fsd50k": run_fsd50k,
    "slakh2100": run_slakh2100,
    "musdb18": run_musdb18,
    "voicebank_demand": run_voicebank_demand,
}


def evaluate(
    suite: str,
    model_path: str,
    data: str,
    out: str,
    *,
    precision: str = HIGHEST,
    **options: Any,
) -> str:
    """Runs a suite and writes its results; returns the table.

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
    results, text = SUITES[suite](model, data, out, **options)
    how = {"data": os.fspath(data), "uss_jax": uss_jax.__version__, "precision": precision}
    how |= results.pop("how")
    write_results(out, {"suite": suite, "model": os.fspath(model_path), **results, "how": how})
    return text
