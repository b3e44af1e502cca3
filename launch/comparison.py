#!/usr/bin/env python
"""Trains over a grid with several seeds, evaluates every run on pairs, and tabulates their SDRi.

    python launch/comparison.py launch/asked.json --out out/asked --parallel 2

The study is a JSON file as launch/scaling_study.py takes it, with these keys besides:
  pairs     object from a name to a folder of pairs, written by `uss-jax make-pairs`
  evaluate  list of further arguments of `uss-jax evaluate pairs` (optional)
  curves    what curves are drawn over, "steps" (default) or "minutes"
A grid point may set `config` to use another config file. Runs that differ in the axis `seed` only
become one row: the mean SDRi with its standard deviation, and the mean SI-SDRi. A curve of each row
is drawn if the runs evaluate themselves (`eval.pairs`). A run that fails is reported, and left out.
The same command resumes a comparison that was stopped: a run whose results are there is not
repeated, and one of other settings is refused.
"""

import concurrent.futures
import json
import os
import pathlib
import queue
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from scaling_study import (
    TRAIN,
    call,
    end_children,
    environment_of,
    heed_sigterm,
    name_of,
    printed,
    read,
    read_study,
    recipe_of,
    require_same,
    runs_of,
    study_parser,
    train,
)

from uss_jax.disk.atomic import replacing
from uss_jax.errors import UserError
from uss_jax.evaluation.items import ALL
from uss_jax.evaluation.rows import IDENTITY, MIXTURE, ORACLE
from uss_jax.evaluation.text_table import markdown_table

matplotlib.use("agg")
SEED = "seed"
# Rows of `evaluate pairs` that are no separation of the mixture, nor the baseline.
LEFT_OUT = (IDENTITY, MIXTURE)
STEPS, MINUTES = "steps", "minutes"
HALF = "eval/half_sdri"
CURVES = {
    "eval/sdri": "oracle",
    "eval/average_sdri": "class average",
    "eval/mean_sdri": "class by its mean",
    "eval/class_sdri": "class alone",
}


def row_of(point: dict[str, str]) -> dict[str, str]:
    """The point without its seed."""
    return {axis: name for axis, name in point.items() if axis != SEED}


def results_of(workdir: pathlib.Path, pairs: str) -> pathlib.Path:
    """The file of a run's results on some pairs."""
    return workdir / "results" / f"{name_of({'pairs': pairs})}.json"


def is_done(study: dict[str, Any], workdir: pathlib.Path) -> bool:
    """Whether a run has its results on all pairs."""
    return all(results_of(workdir, pairs).exists() for pairs in study["pairs"])


def evaluate(
    study: dict[str, Any], leaves: dict[str, Any], workdir: pathlib.Path, cores: set[int] | None
) -> None:
    """Evaluates a run on all pairs, unless that is done; in one process, however it was trained."""
    for pairs, folder in study["pairs"].items():
        out = results_of(workdir, pairs)
        if out.exists():
            continue
        out.parent.mkdir(exist_ok=True)
        words = ["--model", str(workdir), "--data", folder, "--out", str(out)]
        command = [*TRAIN, "evaluate", "pairs", *words, *study.get("evaluate", [])]
        call(command, f"{workdir}: evaluation", cores, environment_of(leaves))


def require_same_pairs(study: dict[str, Any], workdir: pathlib.Path) -> None:
    """Raises a UserError if results under the name of some pairs are those of another folder."""
    for pairs, folder in study["pairs"].items():
        path = results_of(workdir, pairs)
        # `evaluate` notes the folder without its ~.
        if path.exists() and (found := read(path)["how"]["data"]) != os.path.expanduser(folder):
            raise UserError(
                f"{path} is of the pairs {found}, not of {folder}; name these otherwise, or "
                "give another --out"
            )


def run_all(study: dict[str, Any], out: pathlib.Path, parallel: int) -> list[str]:
    """Trains and evaluates every run, so many at a time, each on its share of the cores.

    An error of a run is printed at once, and the others go on.

    Returns:
      The names of the runs that failed.

    Raises:
      UserError: a run that is there has other settings or pairs.
    """
    runs = list(runs_of(study))
    for point, leaves in runs:
        require_same(out / name_of(point), recipe_of(study, leaves))
        require_same_pairs(study, out / name_of(point))
    slots: queue.Queue[set[int] | None] = queue.Queue()
    cores = sorted(os.sched_getaffinity(0)) if parallel > 1 else []
    for slot in range(parallel):
        slots.put(set(cores[slot::parallel]) or None)

    def one(point: dict[str, str], leaves: dict[str, Any]) -> None:
        workdir, share = out / name_of(point), slots.get()
        try:
            if not is_done(study, workdir):
                train(study, leaves, workdir, share)
                evaluate(study, leaves, workdir, share)
        finally:
            slots.put(share)

    failed = []
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        waiting = {pool.submit(one, *run): name_of(run[0]) for run in runs}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                try:
                    future.result()
                except UserError as error:
                    failed.append(waiting[future])
                    print(f"comparison: {error}", file=sys.stderr, flush=True)
                print(f"comparison: {done} of {len(runs)} runs have ended", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first, so that none takes another run
            end_children()
            raise
    return failed


def figures_of(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Query -> metrics over all pairs, of a file of `evaluate pairs`."""
    return {
        row["query"]: row
        for row in read(path)["rows"]
        if row["group"] == ALL and row["query"] not in LEFT_OUT and row["sdri"] is not None
    }


def span(numbers: Iterable[int]) -> str:
    """The number, or the least and the largest, as text."""
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def cell(of_seeds: Sequence[Mapping[str, Any]], seeds: int, pairs: str) -> str:
    """Mean SDRi of the seeds with its standard deviation, and mean SI-SDRi, as text.

    Args:
      of_seeds: metrics of a query, one mapping for each seed that has it.
      seeds: number of seeds; if another one has the query, that is added.
      pairs: number of the oracle's pairs; if the query has another one, that is added.
    """
    sdri, si_sdri = (np.array([of[key] for of in of_seeds], float) for key in ("sdri", "si_sdri"))
    spread = f" ± {sdri.std(ddof=1):.2f}" if len(of_seeds) > 1 else ""
    # Adding 0.0 turns -0.0 into 0.0.
    sdri, si_sdri = (f"{round(of.mean(), 2) + 0.0:.2f}" for of in (sdri, si_sdri))
    notes = [f"{number} pairs"] if (number := pairs_of(of_seeds)) != pairs else []
    notes += [f"n = {len(of_seeds)}"] if len(of_seeds) != seeds else []
    return f"{sdri}{spread} / {si_sdri}" + (f" ({', '.join(notes)})" if notes else "")


def pairs_of(of_seeds: Sequence[Mapping[str, Any]]) -> str:
    """The number of pairs that a query's metrics are over, as text; empty without the query."""
    return span([of["pairs"] for of in of_seeds]) if of_seeds else ""


def table(out: pathlib.Path, points: Sequence[dict[str, str]], pairs: str) -> str:
    """SDRi / SI-SDRi in dB of each row of runs for each query, as a Markdown table.

    Runs without results are left out.
    """
    rows: dict[str, tuple[dict[str, str], list[dict[str, dict[str, Any]]]]] = {}
    for point in points:
        if (path := results_of(out / name_of(point), pairs)).exists():
            _, runs = rows.setdefault(name_of(row_of(point)), (row_of(point), []))
            runs.append(figures_of(path))
    queries = list(dict.fromkeys(query for _, runs in rows.values() for of in runs for query in of))
    lines = []
    for row, runs in rows.values():
        by_query = {query: [of[query] for of in runs if query in of] for query in queries}
        number = pairs_of(by_query.get(ORACLE, []))
        cells = [cell(of, len(runs), number) if of else "" for of in by_query.values()]
        lines.append([*row.values(), len(runs), number, *cells])
    axes = list(row_of(points[0]))
    return "\n".join(markdown_table([*axes, "seeds", "pairs", *queries], lines)) + "\n"


def curves(
    out: pathlib.Path, points: Sequence[dict[str, str]], over: str = STEPS
) -> dict[str, dict[str, np.ndarray]]:
    """Row -> metric -> (step, mean, least, most) of its runs' own evaluations.

    Over "minutes", a step takes the median of its row's step times.
    """
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    seconds: dict[str, list[float]] = {}
    for point in points:
        row = name_of(row_of(point))
        of_row = found.setdefault(row, {})
        path = out / name_of(point) / "metrics.jsonl"
        for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
            for metric in {HALF, *CURVES} & line.keys():
                of_row.setdefault(metric, {}).setdefault(line["step"], []).append(line[metric])
            if "step_seconds" in line:
                seconds.setdefault(row, []).append(line["step_seconds"])
    scale = {row: np.median(of) / 60 for row, of in seconds.items()} if over == MINUTES else {}
    return {
        row: {
            metric: np.array(
                [(s * scale.get(row, 1), np.mean(x), min(x), max(x)) for s, x in sorted(by.items())]
            )
            for metric, by in of_row.items()
        }
        for row, of_row in found.items()
    }


def draw(rows: dict[str, dict[str, np.ndarray]], path: pathlib.Path, over: str = STEPS) -> None:
    """Learning curves: the mean of a row's seeds, and a band from the least to the most.

    A dashed line is half the mixture.
    """
    from matplotlib import pyplot

    drawn = [metric for metric in CURVES if any(metric in of_row for of_row in rows.values())]
    size = dict(figsize=(3 + 3 * len(drawn), 3.4), layout="constrained")
    figure, panels = pyplot.subplots(1, len(drawn), sharey=True, squeeze=False, **size)
    for axes, metric in zip(panels[0], drawn, strict=True):
        for number, (row, of_row) in enumerate(rows.items()):
            if metric in of_row:
                step, mean, least, most = of_row[metric].T
                axes.plot(step, mean, ".-", color=f"C{number}", label=row)
                axes.fill_between(step, least, most, color=f"C{number}", alpha=0.2, lw=0)
        for half in (of_row[HALF][0, 1] for of_row in rows.values() if HALF in of_row):
            axes.axhline(half, color="grey", ls="--", lw=1)
        axes.set(title=CURVES[metric], xlabel=over)
    panels[0, 0].set_ylabel("SDRi / dB")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    pyplot.close(figure)


def checked(path: pathlib.Path) -> dict[str, Any]:
    """Reads a study; raises a UserError if it is invalid."""
    study = read_study(path, also={"pairs", "evaluate", "curves"})
    pairs, words = study.get("pairs"), study.get("evaluate", [])
    over = study.setdefault("curves", STEPS)
    if over not in (STEPS, MINUTES):
        raise UserError(f"{path}: curves is {over!r}, expected {STEPS!r} or {MINUTES!r}")
    if (
        not isinstance(pairs, dict)
        or not pairs
        or not all(isinstance(x, str) for x in pairs.values())
    ):
        raise UserError(f"{path}: pairs must be an object from a name to a folder of pairs")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path}: evaluate must be a list of words")
    return study


def run(path: pathlib.Path, out: pathlib.Path, parallel: int) -> str:
    """Runs a comparison; returns what there is to read.

    Raises:
      UserError: the study is invalid, was edited, or runs failed; what the others gave is printed.
    """
    study = checked(path)
    failed = run_all(study, out, parallel)
    points = [point for point, _ in runs_of(study)]
    tables = [
        f"SDRi / SI-SDRi in dB, {pairs}\n\n{table(out, points, pairs)}" for pairs in study["pairs"]
    ]
    with replacing(out / "table.md") as temporary:
        temporary.write_text("\n".join(tables))
    written = "table.md"
    # Of whole runs: a mean over seeds of which one ended early would jump there.
    whole = [point for point in points if is_done(study, out / name_of(point))]
    rows = curves(out, whole, study["curves"])
    if any(metric in of_row for of_row in rows.values() for metric in CURVES):
        draw(rows, out / "curves.png", study["curves"])
        written += ", curves.png"
    text = "\n".join([*tables, f"{out}: {written}"])
    if failed:
        print(text, flush=True)
        raise UserError(
            f"{len(failed)} of {len(points)} runs failed: {', '.join(failed)}; see above. The same "
            "command tries them again"
        )
    return text


def main() -> int:
    """The command."""
    parser = study_parser(__doc__)
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        choices=range(1, 65),
        metavar="N",
        help="runs at a time, each on its share of the CPU cores (Linux)",
    )
    args = parser.parse_args()
    heed_sigterm()
    return printed("comparison", lambda: run(args.study, args.out, args.parallel))


if __name__ == "__main__":
    sys.exit(main())
