#!/usr/bin/env python
"""Trains over a grid of sizes, data and devices, and plots error and SDRi against compute.

    python launch/scaling_study.py launch/scaling_study.json --out out/scaling

The study is a JSON file with these keys:
  config  config file
  set     object of config keys and values for all runs (optional)
  grid    object of axes, each an object from a name to the config keys and values that it sets;
          there is a run for every combination of names
  launch  command before the arguments of `uss-jax train`, such as
          ["bash", "launch/local.sh", "2"] (optional)
Keys in capitals among the config keys, such as JAX_NUM_CPU_DEVICES, are set as environment
variables of that command. Every run must evaluate itself after its last step: set `eval.pairs`, and
`eval.every_steps` to a divisor of `total_steps`. The same command resumes a study that was stopped.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from types import FrameType, MappingProxyType
from typing import Any

import matplotlib
import numpy as np

from uss_jax.cli.config import load_config
from uss_jax.disk.atomic import replacing
from uss_jax.disk.folder import make_folder
from uss_jax.errors import UserError
from uss_jax.evaluation.text_table import markdown_table
from uss_jax.training.throughput import read_ledger

matplotlib.use("agg")
KEYS = {"config", "set", "grid", "launch"}
TRAIN = (sys.executable, "-m", "uss_jax.cli.main")
# Fewer points, or points of one compute, determine neither a line nor its standard error.
LEAST_POINTS = 4
# In the folder of a run: what it is made of.
RECORD = "run.json"
# Column -> metric of a run's own evaluation. `l1` is the mean absolute error of the waveform.
METRICS = {name: f"eval/{name}" for name in ("l1", "sdri", "si_sdri", "half_sdri")}
_children: set[subprocess.Popen] = set()
_ending = threading.Event()


def read_study(path: pathlib.Path, also: Set[str] = frozenset()) -> dict[str, Any]:
    """The study of a file, checked; it may have the keys of `also` too."""
    study = read(path)
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


def read(path: pathlib.Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from error


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


def recipe_of(study: dict[str, Any], leaves: dict[str, Any]) -> dict[str, Any]:
    """What determines a run's results: not the environment, so not how many devices share it."""
    keys = {k: value for k, value in leaves.items() if not k.isupper() and k != "config"}
    config = leaves.get("config", study["config"])
    # A config file may change while its name stays.
    content = json.loads(load_config(config, []).to_json_best_effort())
    return {
        "config": config,
        "content": content,
        "set": keys,
        "evaluate": study.get("evaluate", []),
    }


def environment_of(leaves: dict[str, Any]) -> dict[str, str]:
    """The environment variables among the leaves."""
    return {key: str(value) for key, value in leaves.items() if key.isupper()}


def words_of(recipe: dict[str, Any]) -> list[str]:
    """The words of `uss-jax train` that set the keys of a recipe."""
    return [
        f"--config.{key}={tuple(value) if isinstance(value, list) else value}"
        for key, value in recipe["set"].items()
    ]


def require_same(workdir: pathlib.Path, recipe: dict[str, Any]) -> None:
    """Raises a UserError if the folder holds a run of another recipe that has reported already."""
    metrics = workdir / "metrics.jsonl"
    if not metrics.exists() or not metrics.stat().st_size:
        return
    if not (workdir / RECORD).exists():
        print(f"{workdir} has no {RECORD}: it is taken for a run of this study", flush=True)
        return
    record = read(workdir / RECORD)
    if not isinstance(record, dict) or {"content": recipe["content"], **record} != recipe:
        raise UserError(
            f"{workdir} was made by another study ({workdir / RECORD} has its settings); give "
            "another --out"
        )


def train(
    study: dict[str, Any],
    leaves: dict[str, Any],
    workdir: pathlib.Path,
    cores: set[int] | None = None,
) -> None:
    """Trains one run to its end, from wherever it stands, on these CPU cores or any."""
    recipe = recipe_of(study, leaves)
    require_same(workdir, recipe)  # the config file may have changed while other runs trained
    make_folder(workdir, "give another --out")
    with replacing(workdir / RECORD) as temporary:
        temporary.write_text(json.dumps(recipe, indent=2) + "\n")
    command = [*study.get("launch", TRAIN), "train", "--config", recipe["config"]]
    command += ["--workdir", str(workdir), *words_of(recipe)]
    call(command, f"{workdir}: training", cores, environment_of(leaves))


def call(
    command: list[str],
    what: str,
    cores: set[int] | None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Runs a command to its end, on these CPU cores or any; a UserError says that `what` failed."""
    all_cores = os.sched_getaffinity(0)
    try:
        # Of this thread: a process begins with those of the thread that starts it.
        os.sched_setaffinity(0, cores or all_cores)
        process = subprocess.Popen(command, env={**os.environ, **environment})
    except OSError as error:
        raise UserError(f"{what}: {command[0]} cannot be started ({error.strerror})") from error
    finally:
        os.sched_setaffinity(0, all_cores)
    _children.add(process)
    try:
        if _ending.is_set():
            process.terminate()
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()  # a training saves first
        raise
    finally:
        _children.discard(process)
    if status:
        raise UserError(f"{what} ended with status {status}; see above")


def end_children() -> None:
    """Tells every command of `call` to end, also those that start later."""
    _ending.set()
    for process in list(_children):
        process.terminate()


def heed_sigterm() -> None:
    """Has SIGTERM raise SystemExit with status 143: whoever waits for commands then ends them."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def require_evaluations(study: dict[str, Any]) -> None:
    """Raises a UserError unless every run evaluates itself after its last step."""
    for point, leaves in runs_of(study):
        recipe = recipe_of(study, leaves)
        config = load_config(recipe["config"], words_of(recipe))
        evaluated = config.get("eval", {})
        if not evaluated.get("pairs") or config.total_steps % max(evaluated.every_steps, 1):
            raise UserError(
                f"the run {name_of(point)} is not evaluated after its last step; set eval.pairs, "
                "and eval.every_steps to a divisor of total_steps"
            )


def result_of(workdir: pathlib.Path) -> dict[str, float]:
    """What became of a run: FLOPs spent, and the evaluation after its last step."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    ledger = read_ledger(workdir)
    last = lines[-1]
    steps = last["step"]
    if not set(METRICS.values()) <= last.keys():
        raise UserError(f"{workdir} has no evaluation after its last step, {steps}; set eval.pairs")
    config = json.loads((workdir / "config.json").read_text())["training"]
    return {
        "parameters": ledger[-1]["parameters"],
        "global_batch": config["global_batch"],
        "steps": steps,
        "devices": ledger[-1]["devices"],
        "flops": ledger[-1]["flops_per_step"] * steps,
        "items_per_second": ledger[-1]["items_per_second"],
        **{key: last[name] for key, name in METRICS.items()},
    }


def power_law(compute: np.ndarray, l1: np.ndarray) -> dict[str, float] | None:
    """l1 = scale x compute ^ exponent by least squares of logarithms; None of too few points.

    `exponent_error` is the exponent's standard error.
    """
    x, y = np.log(compute), np.log(l1)
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
    columns = [*axes, "parameters", "steps", "devices", "flops", "items_per_second", *METRICS]
    text = [
        [f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        for row in rows
    ]
    return "\n".join(markdown_table(columns, text)) + "\n"


def draw(rows: list[dict[str, Any]], fit: dict[str, float] | None, path: pathlib.Path) -> None:
    """Error and SDRi against compute, a colour for each name on the first axis."""
    from matplotlib import pyplot

    axis = next(iter(rows[0]))
    figure, (errors, sdris) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in dict.fromkeys(row[axis] for row in rows):
        of_name = [row for row in rows if row[axis] == name]
        flops = [row["flops"] for row in of_name]
        errors.plot(flops, [row["l1"] for row in of_name], "o", label=f"{axis} {name}")
        sdris.plot(flops, [row["sdri"] for row in of_name], "o", label=f"{axis} {name}")
    if fit is not None:
        ends = np.array([min(row["flops"] for row in rows), max(row["flops"] for row in rows)])
        label = f"exponent {fit['exponent']:.3f} ± {fit['exponent_error']:.3f}"
        errors.plot(ends, fit["scale"] * ends ** fit["exponent"], "k--", label=label)
    errors.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="mean absolute error")
    sdris.set(xscale="log", xlabel="training FLOPs", ylabel="SDRi / dB")
    for axes in (errors, sdris):
        axes.xaxis.set_minor_formatter(pyplot.NullFormatter())
    figure.legend(*errors.get_legend_handles_labels(), loc="outside right", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    pyplot.close(figure)


def run(path: pathlib.Path, out: pathlib.Path) -> str:
    """Runs a study; returns what there is to read."""
    study = read_study(path)
    require_evaluations(study)
    for point, leaves in runs_of(study):
        require_same(out / name_of(point), recipe_of(study, leaves))
    rows = []
    for point, leaves in runs_of(study):
        workdir = out / name_of(point)
        train(study, leaves, workdir)
        rows.append({**point, **result_of(workdir)})
    fit = power_law(*(np.array([row[key] for row in rows]) for key in ("flops", "l1")))
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
            f"mean absolute error (l1) ~ compute ^ {fit['exponent']:.3f} "
            f"(standard error {fit['exponent_error']:.3f})"
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
    heed_sigterm()
    return printed("scaling_study", lambda: run(args.study, args.out))


if __name__ == "__main__":
    sys.exit(main())
