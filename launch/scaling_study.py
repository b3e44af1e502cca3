#!/usr/bin/env python
"""Trains over a grid of sizes, data and devices, and plots loss and SDRi against compute.

    python launch/scaling_study.py launch/scaling_study.json --out out/scaling

The study is a JSON file with these keys:
  config  config file
  set     object of config keys and values for all runs (optional)
  grid    object of axes, each an object from a name to the config keys and values that it sets;
          there is a run for every combination of names
  launch  command before the arguments of `uss-jax`, such as ["bash", "launch/local.sh", "2"]
          (optional)
Keys in capitals among the config keys, such as JAX_NUM_CPU_DEVICES, are set as environment
variables of that command. The same command resumes a study that was stopped.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from types import MappingProxyType
from typing import Any

import matplotlib
import numpy as np

from uss_jax.disk.atomic import replacing
from uss_jax.errors import UserError
from uss_jax.training.throughput import read_ledger

matplotlib.use("agg")
KEYS = {"config", "set", "grid", "launch"}
TRAIN = (sys.executable, "-m", "uss_jax.cli.main")
# Fewer points, or points of one compute, fix no line and say nothing of how sure it is.
LEAST_POINTS = 4


def read_study(path: pathlib.Path, also: Set[str] = frozenset()) -> dict[str, Any]:
    """The study of a file, checked; it may have the keys of `also` too."""
    try:
        study = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(study, dict) or not {"config", "grid"} <= set(study) <= KEYS | also:
        more = ", ".join(sorted((KEYS | also) - {"config", "grid"}))
        raise UserError(f"{path} must be an object with config and grid, optionally {more}")
    if not isinstance(study["config"], str) or not isinstance(study["grid"], dict):
        raise UserError(f"{path}: config must be the name of a file, grid an object")
    if not isinstance(study.get("set", {}), dict) or not isinstance(study.get("launch", []), list):
        raise UserError(f"{path}: set must be an object, launch a list of words")
    for axis, values in study["grid"].items():
        named = isinstance(values, dict) and values
        if not named or not all(isinstance(leaves, dict) for leaves in values.values()):
            raise UserError(
                f"{path}: grid.{axis} must be an object of objects: name to config keys"
            )
    return study


def runs_of(study: dict[str, Any]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yields (axis -> name, leaves) of each run."""
    for names in itertools.product(*study["grid"].values()):
        point = dict(zip(study["grid"], names, strict=True))
        leaves = dict(study.get("set", {}))
        for axis, name in point.items():
            leaves |= study["grid"][axis][name]
        yield point, leaves


def name_of(point: dict[str, str]) -> str:
    """The folder of a run."""
    return "_".join(f"{axis}-{name}" for axis, name in point.items()).replace("/", "-")


def train(
    study: dict[str, Any],
    leaves: dict[str, Any],
    workdir: pathlib.Path,
    cores: set[int] | None = None,
) -> None:
    """Trains one run to its end, from wherever it stands, on these CPU cores or any."""
    leaves = dict(leaves)
    config = leaves.pop("config", study["config"])
    environment = {key: str(value) for key, value in leaves.items() if key.isupper()}
    words = [
        f"--config.{key}={tuple(value) if isinstance(value, list) else value}"
        for key, value in leaves.items()
        if not key.isupper()
    ]
    command = [*study.get("launch", TRAIN), "train", "--config", config]
    call([*command, "--workdir", str(workdir), *words], f"{workdir}: training", cores, environment)


def call(
    command: list[str],
    what: str,
    cores: set[int] | None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Runs a command to its end, on these CPU cores or any; a UserError says that `what` failed."""
    process = subprocess.Popen(command, env={**os.environ, **environment})
    if cores:
        os.sched_setaffinity(process.pid, cores)
    if status := process.wait():
        raise UserError(f"{what} ended with status {status}; see above")


def result_of(workdir: pathlib.Path) -> dict[str, float]:
    """What became of a run: FLOPs spent, and its last evaluation or else its last reports."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    ledger = read_ledger(workdir)
    steps = lines[-1]["step"]
    # Of pairs where there are some: batches differ from run to run.
    names = {"loss": "eval/l1", "sdri": "eval/sdri"}
    last = [line for line in lines if "eval/l1" in line][-1:]
    if not last:
        names, last = {"loss": "loss", "sdri": "sdri"}, lines[-(len(lines) // 10 + 1) :]
    config = json.loads((workdir / "config.json").read_text())["training"]
    return {
        "parameters": ledger[-1]["parameters"],
        "global_batch": config["global_batch"],
        "steps": steps,
        "devices": ledger[-1]["devices"],
        "flops": ledger[-1]["flops_per_step"] * steps,
        "items_per_second": ledger[-1]["items_per_second"],
        **{key: float(np.mean([line[name] for line in last])) for key, name in names.items()},
    }


def power_law(compute: np.ndarray, loss: np.ndarray) -> dict[str, float] | None:
    """loss = scale x compute ^ exponent by least squares of logarithms; None of too few points.

    `exponent_error` is the exponent's standard error.
    """
    x, y = np.log(compute), np.log(loss)
    if len(x) < LEAST_POINTS or np.ptp(x) < 1e-6:
        return None
    x = x - x.mean()
    exponent = float(np.sum(x * y) / np.sum(x * x))
    rest = y - y.mean() - exponent * x
    error = math.sqrt(np.sum(rest**2) / (len(x) - 2) / np.sum(x * x))
    scale = float(np.exp(y.mean() - exponent * np.mean(np.log(compute))))
    return {"scale": scale, "exponent": exponent, "exponent_error": error}


def table(rows: list[dict[str, Any]], axes: list[str]) -> str:
    """The results as a Markdown table."""
    columns = [*axes, "parameters", "steps", "devices", "flops", "items_per_second", "loss", "sdri"]
    text = [columns, ["---"] * len(columns)]
    text += [
        [f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in text) + "\n"


def draw(rows: list[dict[str, Any]], fit: dict[str, float] | None, path: pathlib.Path) -> None:
    """Loss and SDRi against compute, a colour for each name on the first axis."""
    from matplotlib import pyplot

    axis = next(iter(rows[0]))
    figure, (losses, sdris) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in dict.fromkeys(row[axis] for row in rows):
        of_name = [row for row in rows if row[axis] == name]
        flops = [row["flops"] for row in of_name]
        losses.plot(flops, [row["loss"] for row in of_name], "o", label=f"{axis} {name}")
        sdris.plot(flops, [row["sdri"] for row in of_name], "o", label=f"{axis} {name}")
    if fit is not None:
        ends = np.array([min(row["flops"] for row in rows), max(row["flops"] for row in rows)])
        label = f"exponent {fit['exponent']:.3f} ± {fit['exponent_error']:.3f}"
        losses.plot(ends, fit["scale"] * ends ** fit["exponent"], "k--", label=label)
    losses.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="loss")
    sdris.set(xscale="log", xlabel="training FLOPs", ylabel="SDRi / dB")
    for axes in (losses, sdris):
        axes.xaxis.set_minor_formatter(pyplot.NullFormatter())
    figure.legend(*losses.get_legend_handles_labels(), loc="outside right", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    pyplot.close(figure)


def run(path: pathlib.Path, out: pathlib.Path) -> str:
    """Runs a study; returns what there is to read."""
    study = read_study(path)
    rows = []
    for point, leaves in runs_of(study):
        workdir = out / name_of(point)
        train(study, leaves, workdir)
        rows.append({**point, **result_of(workdir)})
    fit = power_law(*(np.array([row[key] for row in rows]) for key in ("flops", "loss")))
    with replacing(out / "results.json") as temporary:
        temporary.write_text(json.dumps({"runs": rows, "fit": fit}, indent=2) + "\n")
    text = table(rows, list(study["grid"]))
    with replacing(out / "table.md") as temporary:
        temporary.write_text(text)
    draw(rows, fit, out / "scaling.png")
    if fit is None:
        said = f"no power law: the fit needs at least {LEAST_POINTS} runs of different compute"
    else:
        said = (
            f"loss ~ compute ^ {fit['exponent']:.3f} (standard error {fit['exponent_error']:.3f})"
        )
    return f"{text}\n{said}\n{out}: results.json, table.md, scaling.png"


def study_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of every study."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=pathlib.Path, help="JSON file of the study")
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="folder for runs and results"
    )
    return parser


def printed(program: str, run: Callable[[], str]) -> int:
    """Prints what there is to read, or an error in one sentence; returns the exit status."""
    try:
        print(run())
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """The command."""
    args = study_parser(__doc__).parse_args()
    return printed("scaling_study", lambda: run(args.study, args.out))


if __name__ == "__main__":
    sys.exit(main())
