"""Seconds on one CPU core, this project beside PyTorch: `python -m tests.benchmarks [--rounds N]`.

Jobs: ResUNet30 on 2 x 2 s (forward), one training step of it on 2 x 2 s (forward, backward, AdamW
with amsgrad, batch statistics), Cnn14 on 2 x 10 s, and ResUNet30 over 30 s of a recording, in our
windows with context and in the reference's blocks of 2 s side by side. All in float32 with the same
weights and inputs. The contenders of a job are fresh processes pinned to one core, which take
turns, so that a slow minute hits them alike. PyTorch (`torch_nets.py`, held to the reference's
numbers by a test, with `torch.stft` instead of the reference's slower DFT by convolution) runs with
the default malloc and with one told to keep its memory, which saves it page faults. The table shows
medians, CPU time including all threads, and this project's share of PyTorch's time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import numpy as np

JOBS = {
    "separate": "ResUNet30, 2 x 2 s",
    "train": "training step, 2 x 2 s",
    "tag": "Cnn14, 2 x 10 s",
    "long": "ResUNet30, 30 s, windows",
}
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
# Name in the table -> framework, additional environment.
CONTENDERS = {
    "uss_jax": ("jax", {"JAX_PLATFORMS": "cpu"}),
    "PyTorch": ("torch", {}),
    "PyTorch, tuned malloc": ("torch", KEEP_MEMORY),
}
# Windows and blocks differ on purpose: of this job our blocks are held to PyTorch's.
BLOCKS = "uss_jax, blocks of 2 s"
# Rounding alone parts the frameworks by 1e-5; another net would be off by far more.
AGREEMENT = 1e-3


def start(job: str, framework: str, environment: dict[str, str], core: int) -> subprocess.Popen:
    """A worker of its own, still warming up."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.worker", job, framework, str(core)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def answer(worker: subprocess.Popen):
    """The next line a worker prints."""
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("a worker stopped; its message is above")
    return json.loads(line)


def measure(job: str, rounds: int, core: int) -> dict[str, dict[str, float]]:
    """Contender -> median CPU and wall seconds of a job."""
    contenders = dict(CONTENDERS)
    if job == "long":
        contenders[BLOCKS] = ("jax", {**CONTENDERS["uss_jax"][1], "USS_JAX_BENCHMARK_BLOCKS": "1"})
    workers, results, times = {}, {}, {name: [] for name in contenders}
    try:
        for name, (framework, environment) in contenders.items():
            workers[name] = start(job, framework, environment, core)
            results[name] = np.array(answer(workers[name]))
        for _ in range(rounds):
            for name, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                times[name].append(answer(worker))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    ours, theirs = results[BLOCKS if job == "long" else "uss_jax"], results["PyTorch"]
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    print(f"{JOBS[job]}: results agree to {difference:.1e}", file=sys.stderr)
    if not difference < AGREEMENT:
        raise SystemExit(f"{job}: the contenders do not compute the same")
    return {
        name: {kind: statistics.median(t[kind] for t in times[name]) for kind in ("cpu", "wall")}
        for name in contenders
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each contender")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    args = parser.parse_args()
    print(f"{'':<24}{'':<24}{'CPU s':>8}{'wall s':>8}{'ours / theirs (CPU)':>22}")
    for job in args.jobs:
        medians = measure(job, args.rounds, args.core)
        ours = medians["uss_jax"]["cpu"]
        for name, median in medians.items():
            ratio = "" if name == "uss_jax" else f"{ours / median['cpu']:.2f}"
            title = JOBS[job] if name == "uss_jax" else ""
            print(
                f"{title:<24}{name:<24}{median['cpu']:>8.2f}{median['wall']:>8.2f}{ratio:>22}",
                flush=True,
            )


if __name__ == "__main__":
    main()
