"""Whether bfloat16 learns as float32 does: `python -m tests.benchmarks.precision --out DIR`.

Trains a small separator on the bundled sounds, in float32 from several seeds and in bfloat16 from
each of them, and shows the mean loss of every hundred steps. Between the precisions of one seed,
clips and first parameters are the same; between seeds nothing is. Runs that are in DIR already are
only read.
"""

import argparse
import importlib.resources
import json
import pathlib

import numpy as np

from tests.tiny import CONFIGS
from uss_jax.cli.main import main as uss_jax
from uss_jax.data.conversion import ClipSettings
from uss_jax.data.labels import read_labels
from uss_jax.data.prepare import prepare

RATE, CLIP_SECONDS = 8000, 2.0
CONFIG = {
    "sample_rate": RATE,
    "segment_seconds": 0.5,
    "global_batch": 8,
    "mixing.group_size": 8,
    "data.split": "train",
    "data.clip_seconds": CLIP_SECONDS,
    "data.threads": 1,
    "anchors.source": "random",
    "query.kind": "one_hot",
    "separator.n_fft": 256,
    "separator.hop_samples": 128,
    "separator.channels": (8, 16),
    "schedule.learning_rate": 4e-3,
    "schedule.warm_up_steps": 10,
    "log_every_steps": 1,
}
WINDOW = 100


def losses(out: pathlib.Path, records: pathlib.Path, dtype: str, seed: int, steps: int):
    """Loss of every step of a run, which is done unless it is there."""
    workdir = out / f"{dtype}-{seed}"
    changed = {"data.records": records, "separator.dtype": dtype, "seed": seed}
    changed |= {"total_steps": steps, "checkpoint_every_steps": steps}
    words = [f"--config.{key}={value}" for key, value in {**CONFIG, **changed}.items()]
    command = ["train", "--config", str(CONFIGS / "resunet30.py"), "--workdir", str(workdir)]
    if uss_jax([*command, *words]):
        raise SystemExit("a run failed; its message is above")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.precision", description=__doc__
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    demo = importlib.resources.files("uss_jax") / "assets" / "demo"
    prepared = prepare(
        read_labels(demo / "manifest.csv", demo, "train").clips,
        demo,
        args.out,
        name="demo",
        version="1.0.0",
        split="train",
        settings=ClipSettings(RATE, CLIP_SECONDS),
    )
    means = {}
    for dtype in ("float32", "bfloat16"):
        for seed in range(args.seeds):
            found = losses(args.out, prepared.directory, dtype, seed, args.steps)
            means[dtype, seed] = found.reshape(-1, WINDOW).mean(axis=1)
    print(
        f"{'mean loss of steps':<24}"
        + "".join(
            f"{f'{i * WINDOW + 1}-{(i + 1) * WINDOW}':>12}" for i in range(args.steps // WINDOW)
        )
    )
    for (dtype, seed), values in means.items():
        print(f"{dtype:<16}{f'seed {seed}':<8}" + "".join(f"{value:>12.5f}" for value in values))
    exact = np.array([means["float32", seed] for seed in range(args.seeds)])
    rounded = np.array([means["bfloat16", seed] for seed in range(args.seeds)])
    for name, values in (
        ("spread of float32 seeds", np.ptp(exact, axis=0)),
        ("bfloat16 off at most", np.abs(rounded - exact).max(axis=0)),
    ):
        print(f"{name:<24}" + "".join(f"{value:>12.5f}" for value in values))


if __name__ == "__main__":
    main()
