#!/usr/bin/env python
"""Trains over a grid with several seeds, evaluates every run on pairs, and tabulates their SDRi.

    python launch/comparison.py launch/asked.json --out out/asked --parallel 2

The study is a JSON file as launch/scaling_study.py takes it, with these keys besides:
  pairs     object from a name to a folder of pairs, written by `uss-jax make-pairs`
  evaluate  list of further arguments of `uss-jax evaluate pairs` (optional)
Among the config keys of a name, `config` is another config file than the study's. Runs that
differ in the axis `seed` only become one row: the mean with the standard deviation. A curve of
each row is drawn if the runs evaluate themselves (`eval.pairs`). The same command resumes a
comparison that was stopped; a run whose results are there is not looked at again.
"""

import concurrent.futures
import json
import os
import pathlib
import queue
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from scaling_study import TRAIN, call, name_of, printed, read_study, runs_of, study_parser, train

from uss_jax.disk.atomic import replacing
from uss_jax.errors import UserError

matplotlib.use("agg")
SEED = "seed"
# Rows of `evaluate pairs` that need no model, or tell of leakage only.
LEFT_OUT = ("target alone", "half the mixture", "the mixture")
CURVES = {"eval/sdri": "oracle", "eval/average_sdri": "class average"}


def row_of(point: dict[str, str]) -> dict[str, str]:
    """The point without its seed."""
    return {axis: name for axis, name in point.items() if axis != SEED}


def results_of(workdir: pathlib.Path, pairs: str) -> pathlib.Path:
    """The file of a run's results on some pairs."""
    return workdir / "results" / f"{name_of({'pairs': pairs})}.json"


def evaluate(study: dict[str, Any], workdir: pathlib.Path, cores: set[int] | None) -> None:
    """Evaluates a run on all pairs, unless that is done."""
    for pairs, folder in study["pairs"].items():
        out = results_of(workdir, pairs)
        if out.exists():
            continue
        out.parent.mkdir(exist_ok=True)
        words = ["--model", str(workdir), "--data", folder, "--out", str(out)]
        command = [*study.get("launch", TRAIN), "evaluate", "pairs", *words]
        call([*command, *study.get("evaluate", [])], f"{workdir}: evaluation", cores)


def run_all(study: dict[str, Any], out: pathlib.Path, parallel: int) -> list[dict[str, str]]:
    """Trains and evaluates every run, so many at a time, each on its share of the cores."""
    slots: queue.Queue[set[int] | None] = queue.Queue()
    cores = sorted(os.sched_getaffinity(0)) if parallel > 1 else []
    for slot in range(parallel):
        slots.put(set(cores[slot::parallel]) or None)

    def one(point: dict[str, str], leaves: dict[str, Any]) -> None:
        workdir, share = out / name_of(point), slots.get()
        try:
            if not all(results_of(workdir, pairs).exists() for pairs in study["pairs"]):
                train(study, leaves, workdir, share)
                evaluate(study, workdir, share)
        finally:
            slots.put(share)

    runs = list(runs_of(study))
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        waiting = [pool.submit(one, point, leaves) for point, leaves in runs]
        try:
            for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                future.result()
                print(f"comparison: {done} of {len(runs)} runs are done", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [point for point, _ in runs]


def figures_of(path: pathlib.Path) -> dict[str, float]:
    """Query -> SDRi over all pairs, of a file of `evaluate pairs`."""
    rows = json.loads(path.read_text())["rows"]
    return {
        row["query"]: row["sdri"]
        for row in rows
        if row["group"] == "all" and row["query"] not in LEFT_OUT and row["sdri"] is not None
    }


def summary(figures: Sequence[float]) -> str:
    """Mean and standard deviation of the seeds, as text."""
    mean = f"{np.mean(figures):.2f}"
    return f"{mean} ± {np.std(figures, ddof=1):.2f}" if len(figures) > 1 else mean


def table(out: pathlib.Path, points: Sequence[dict[str, str]], pairs: str) -> str:
    """SDRi in dB of each row of runs for each query, as a Markdown table."""
    rows: dict[str, tuple[dict[str, str], dict[str, list[float]]]] = {}
    for point in points:
        row, of = rows.setdefault(name_of(row_of(point)), (row_of(point), {}))
        for query, figure in figures_of(results_of(out / name_of(point), pairs)).items():
            of.setdefault(query, []).append(figure)
    queries = list(dict.fromkeys(query for _, of in rows.values() for query in of))
    axes = list(dict.fromkeys(axis for row, _ in rows.values() for axis in row))
    lines = [[*axes, "seeds", *queries], ["---"] * (len(axes) + 1 + len(queries))]
    for row, of in rows.values():
        seeds = str(max(map(len, of.values())))
        figures = [summary(of[query]) if query in of else "" for query in queries]
        lines.append([*(row[axis] for axis in axes), seeds, *figures])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def curves(out: pathlib.Path, points: Sequence[dict[str, str]]) -> dict[str, dict[str, np.ndarray]]:
    """Row -> metric -> (step, mean, least, most) of its runs' own evaluations."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for point in points:
        of_row = found.setdefault(name_of(row_of(point)), {})
        text = (out / name_of(point) / "metrics.jsonl").read_text()
        for line in map(json.loads, text.splitlines()):
            for metric in CURVES.keys() & line.keys():
                of_row.setdefault(metric, {}).setdefault(line["step"], []).append(line[metric])
    return {
        row: {
            metric: np.array([(s, np.mean(x), min(x), max(x)) for s, x in sorted(steps.items())])
            for metric, steps in of_row.items()
        }
        for row, of_row in found.items()
    }


def draw(rows: dict[str, dict[str, np.ndarray]], path: pathlib.Path) -> None:
    """Learning curves: the mean of a row's seeds, and a band from the least to the most."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(CURVES), figsize=(9, 3.4), layout="constrained")
    for axes, (metric, title) in zip(panels, CURVES.items(), strict=True):
        for row, of_row in rows.items():
            if metric in of_row:
                step, mean, least, most = of_row[metric].T
                (line,) = axes.plot(step, mean, ".-", label=row)
                axes.fill_between(step, least, most, color=line.get_color(), alpha=0.2, lw=0)
        axes.set(title=title, xlabel="steps", ylabel="SDRi / dB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    pyplot.close(figure)


def run(path: pathlib.Path, out: pathlib.Path, parallel: int) -> str:
    """Runs a comparison; returns what there is to read."""
    study = read_study(path, also={"pairs", "evaluate"})
    pairs, words = study.get("pairs"), study.get("evaluate", [])
    if (
        not isinstance(pairs, dict)
        or not pairs
        or not all(isinstance(x, str) for x in pairs.values())
    ):
        raise UserError(f"{path}: pairs must be an object from a name to a folder of pairs")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path}: evaluate must be a list of words")
    points = run_all(study, out, parallel)
    tables = [f"SDRi in dB, {pairs}\n\n{table(out, points, pairs)}" for pairs in study["pairs"]]
    with replacing(out / "table.md") as temporary:
        temporary.write_text("\n".join(tables))
    written = "table.md"
    if any((rows := curves(out, points)).values()):
        draw(rows, out / "curves.png")
        written += ", curves.png"
    return "\n".join([*tables, f"{out}: {written}"])


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
    return printed("comparison", lambda: run(args.study, args.out, args.parallel))


if __name__ == "__main__":
    sys.exit(main())
