"""Summarises metrics of items (medians, means, intervals) as tables, CSV, Markdown and a plot.

Letters: `n` items.
"""

import csv
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from uss_jax.bundles.model import Model
from uss_jax.disk.atomic import replacing
from uss_jax.evaluation.items import ALL, Item
from uss_jax.evaluation.metrics import SEPARATION_FIGURES, class_medians
from uss_jax.evaluation.rows import CLASS, HALF, IDENTITY, MIXTURE, ORACLE, SHUFFLED
from uss_jax.evaluation.scoring import Figures
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.text_table import (
    format_table,
    markdown_table,
    sibling,
    silent_note,
    write_text,
)
from uss_jax.ontology import load_ontology

_FIGURES = (*SEPARATION_FIGURES, "level", "level_error")
_WITH_INTERVALS = ("sdri", "si_sdri")
_RESAMPLES = 1000
_HEADER = (
    *("SDR", "SDRi", "95 %", "SI-SDR", "SI-SDRi", "mean SDRi", "mean SI-SDRi", "level"),
    *("> 5 dB", "±3 dB"),
)
EXPLANATION = (
    "dB; median within a class, then mean over classes, with its 95 % bootstrap interval; mean: "
    "over all pairs; level: energy of the estimate over that of the mixture; share of all pairs "
    "whose SDRi is above 5 dB, and whose estimate is within 3 dB of the target's level"
)
# Name -> metric, and what the items that count have.
_SHARES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "sdri_above_5_db": ("sdri", lambda sdri: sdri > 5),
    "level_within_3_db": ("level_error", lambda error: np.abs(error) <= 3),
}

Summary = dict[str, Any]


def without_silent(
    items: Sequence[Item], figures: dict[str, Figures]
) -> tuple[list[Item], dict[str, dict[str, np.ndarray]]]:
    """Drops items with a silent target, whose metrics are undefined."""
    heard = np.isfinite(figures[MIXTURE]["sdr"])
    kept = [item for item, is_heard in zip(items, heard, strict=True) if is_heard]
    return kept, {
        row: {figure: of[heard] for figure, of in by_figure.items()}
        for row, by_figure in figures.items()
    }


def report(
    model: Model, items: Sequence[Item], figures: dict[str, Figures], out: str
) -> tuple[Results, str]:
    """Summarises metrics; writes a CSV file, a plot and Markdown beside `out`, under the same name.

    Args:
      model: the separator.
      items: items as given to `score`.
      figures: their metrics as returned by `score`.
      out: JSON file of the results.

    Returns:
      Results, and a table as text.
    """
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
    return results, "\n\n".join([format_summaries(summaries), *note])


def summarise(
    items: Sequence[Item],
    figures: dict[str, Figures],
    group: str | None = None,
) -> list[Summary]:
    """Summarises each row: median within a class, then mean over classes; and plain means.

    Args:
      items: items as given to `score`.
      figures: their metrics as returned by `score`.
      group: use only the items of this group.
    """
    labels = np.array([item.label for item in items])
    of_group = np.array([group is None or item.group == group for item in items])
    summaries = []
    for name, by_figure in figures.items():
        use = of_group & np.isfinite(by_figure["sdr"])
        if not use.any():
            continue
        here = [figure for figure in _FIGURES if figure in by_figure]
        names, classes = np.unique(labels[use], return_inverse=True)
        medians = {figure: class_medians(by_figure[figure][use], classes) for figure in here}
        summaries.append(
            {
                "query": name,
                "group": group or ALL,
                "pairs": int(use.sum()),
                **{figure: float(np.mean(list(of.values()))) for figure, of in medians.items()},
                "intervals": {
                    figure: bootstrap_interval(by_figure[figure][use], classes)
                    for figure in _WITH_INTERVALS
                    if figure in here
                },
                "plain_mean": {
                    figure: float(np.mean(by_figure[figure][use])) for figure in medians
                },
                "shares": {
                    share: float(np.mean(counts(by_figure[figure][use])))
                    for share, (figure, counts) in _SHARES.items()
                    if figure in here
                },
                "classes": {
                    "number": len(names),
                    "medians": {
                        str(label): {figure: medians[figure][at] for figure in medians}
                        for at, label in enumerate(names)
                    },
                },
            }
        )
    return summaries


def bootstrap_interval(
    values: Float[np.ndarray, " n"], classes: Integer[np.ndarray, " n"]
) -> list[float]:
    """95 % percentile bootstrap interval of the mean of class medians.

    Resamples items within each class, with a fixed seed.
    """
    rng = np.random.default_rng(0)
    total = np.zeros(_RESAMPLES)
    numbers = np.unique(classes)
    for label in numbers:
        of_class = values[classes == label]
        drawn = rng.integers(len(of_class), size=(_RESAMPLES, len(of_class)))
        total += np.median(of_class[drawn], axis=1)
    return [float(edge) for edge in np.percentile(total / len(numbers), [2.5, 97.5])]


def format_summaries(summaries: list[Summary]) -> str:
    """Formats the summaries as text, one table per group."""
    blocks = []
    for group in dict.fromkeys(summary["group"] for summary in summaries):
        rows = [_cells(summary) for summary in summaries if summary["group"] == group]
        blocks.append(format_table((group, *_HEADER, "pairs", "classes"), rows))
    return "\n\n".join([*blocks, EXPLANATION])


def _cells(summary: Summary) -> tuple[str | int | float | None, ...]:
    interval = summary["intervals"].get("sdri")
    return (
        summary["query"],
        summary["sdr"],
        summary.get("sdri"),
        None if interval is None else f"{interval[0]:.2f} .. {interval[1]:.2f}",
        summary["si_sdr"],
        summary.get("si_sdri"),
        summary["plain_mean"].get("sdri"),
        summary["plain_mean"].get("si_sdri"),
        summary.get("level"),
        *(_percent(summary["shares"].get(share)) for share in _SHARES),
        summary["pairs"],
        summary["classes"]["number"],
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"


def headline(summaries: list[Summary]) -> dict[str, Any]:
    """Returns the main results of a run: those of the oracle, and the baseline's SDRi."""
    rows = {summary["query"]: summary for summary in summaries if summary["group"] == ALL}
    first = rows[ORACLE]
    leaked, identity = rows.get(SHUFFLED), rows.get(IDENTITY)
    return {
        "query": ORACLE,
        **{figure: first[figure] for figure in SEPARATION_FIGURES},
        "intervals": first["intervals"],
        "baseline_sdri": rows[HALF]["sdri"],
        # Level of the estimate when the queried sound is absent, in dB relative to the mixture.
        "leakage": None if leaked is None else leaked["level"],
        "identity_sdr": None if identity is None else identity["sdr"],
        "classes": first["classes"],
    }


def write_class_table(
    path: str | os.PathLike, items: Sequence[Item], summaries: list[Summary]
) -> None:
    """Writes a CSV file with a line per class: its medians for every query."""
    rows = [summary for summary in summaries if summary["group"] == ALL]
    with (
        replacing(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file)
        columns = [(row["query"], figure) for row in rows for figure in _FIGURES if figure in row]
        named = [f"{query}: {figure}" for query, figure in columns]
        writer.writerow(["class_index", "class", "branch", "pairs", *named])
        for label, (number, index) in _classes(items).items():
            medians = {row["query"]: row["classes"]["medians"].get(label, {}) for row in rows}
            values = [medians[query].get(figure) for query, figure in columns]
            cells = ["" if value is None else f"{value:.4f}" for value in values]
            writer.writerow(
                ["" if index is None else index, label, branch_of(index), number, *cells]
            )


def write_markdown(
    path: str | os.PathLike, title: str, summaries: list[Summary], explanation: str = EXPLANATION
) -> None:
    """Writes the summaries as Markdown tables, one per group."""
    lines = [f"# {title}", ""]
    for group in dict.fromkeys(summary["group"] for summary in summaries):
        rows = [_cells(summary) for summary in summaries if summary["group"] == group]
        lines += [*markdown_table((group, *_HEADER, "pairs", "classes"), rows), ""]
    with replacing(path) as temporary:
        write_text(temporary, "\n".join([*lines, explanation]) + "\n")


def write_class_plot(
    path: str | os.PathLike, items: Sequence[Item], summaries: list[Summary]
) -> None:
    """Writes a PNG of the SDRi of every class, sorted within each branch of the ontology."""
    rows = {summary["query"]: summary for summary in summaries if summary["group"] == ALL}
    medians = rows[ORACLE]["classes"]["medians"]
    by_branch: dict[str, list[str]] = {}
    for label, (_, index) in _classes(items).items():
        if label not in medians:  # a model of classes is not asked for a sound that is of none
            continue
        by_branch.setdefault(branch_of(index) or "other", []).append(label)
    figure = Figure(figsize=(min(max(6.0, 0.14 * len(medians) + 3), 60), 4.5), layout="tight")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    place, names = 0, []
    for branch, labels in sorted(by_branch.items()):
        labels = sorted(labels, key=lambda label: -medians[label]["sdri"])
        where = np.arange(place, place + len(labels))
        axis.bar(where, [medians[label]["sdri"] for label in labels], label=branch)
        vectors = rows.get(CLASS, {"classes": {"medians": {}}})["classes"]["medians"]
        also = [
            (at, vectors[x]["sdri"]) for at, x in zip(where, labels, strict=True) if x in vectors
        ]
        if also:
            axis.plot(*zip(*also, strict=True), "k.", markersize=3)
        place, names = place + len(labels) + 1, [*names, *labels, ""]
    axis.axhline(rows[HALF]["sdri"], color="grey", linestyle="--", label=HALF)
    axis.set_xticks(np.arange(len(names)), names, rotation=90, fontsize=6)
    axis.set_xlim(-1, len(names))
    axis.set_ylabel("SDRi, dB (median)")
    axis.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def branch_of(class_index: int | None) -> str:
    """Returns the name of the top-level ontology node above a class; empty for None."""
    if class_index is None:
        return ""
    ontology = load_ontology()
    above = ontology.ancestors(ontology.class_mids[class_index])
    return next(
        node.name for mid, node in ontology.nodes.items() if mid in above and node.level == 1
    )


def _classes(items: Sequence[Item]) -> dict[str, tuple[int, int | None]]:
    """Returns label -> (number of items, class index), in AudioSet's order, then by name."""
    counts: dict[str, tuple[int, int | None]] = {}
    for item in items:
        number, _ = counts.get(item.label, (0, None))
        counts[item.label] = (number + 1, item.class_index)
    last = len(load_ontology().class_mids)
    return dict(sorted(counts.items(), key=lambda c: (last if c[1][1] is None else c[1][1], c[0])))
