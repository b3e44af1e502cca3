"""Seconds a pair, `evaluate pairs --oracle-only` beside the program of the paper: run

    python3 -m venv reference
    reference/bin/pip install torch librosa torchlibrosa lightning einops pandas h5py matplotlib \
        panns_inference && reference/bin/pip install --no-deps uss==0.0.4
    python -m tests.benchmarks.evaluation --reference reference/bin/python

Both separate the same pairs of 2 s with the condition of the clean source and measure SDR, all
cores at their service, with the same weights. They are fresh processes that take turns, so that a
slow minute hits them alike, and have warmed up (and compiled) before. The original is run by
`reference_program.py` with the default malloc and with one told to keep its memory. Its SDRs must
be ours to 1e-3 dB.
"""

import argparse
import csv
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
}
AGREEMENT = 1e-3  # dB


def write_inputs(place: pathlib.Path, pairs: int) -> None:
    """A checkpoint, its bundle, the labels the original wants, and pairs of two noises."""
    import torch

    from tests.golden.weights import build_state_dict
    from uss_jax.audio.files import write_wav
    from uss_jax.cli.main import main as uss_jax
    from uss_jax.ontology import load_ontology

    checkpoint = place / "weights.ckpt"
    tensors = build_state_dict("lit_separation_cond527")
    state_dict = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    torch.save({"state_dict": state_dict}, checkpoint)
    if uss_jax(["convert", str(checkpoint), str(place / "bundle")]):
        raise SystemExit("the checkpoint could not be converted")
    ontology = load_ontology()
    with open(place / "labels.csv", "w", encoding="utf-8", newline="") as file:
        rows = zip(ontology.class_mids, ontology.class_names, strict=True)
        csv.writer(file).writerows(
            [("index", "mid", "display_name"), *((i, *row) for i, row in enumerate(rows))]
        )
    rng = np.random.default_rng(0)
    folder = place / "pairs" / "class_id=0"
    folder.mkdir(parents=True)
    for i in range(pairs):
        noises = 0.1 * rng.standard_normal((2, 64000)).astype(np.float32)
        source, other = noises[0], (noises[1] + np.roll(noises[1], 1)) / np.sqrt(2)
        for side, waveform in (("source", source), ("mixture", source + other)):
            write_wav(folder / f"{i:03d},{side}.wav", waveform[None], 32000)


def work(place: pathlib.Path) -> None:
    """Our contender: as the command does, for every line it reads."""
    from uss_jax.bundles.model import Model
    from uss_jax.devices.cpu import tune_for_cpu
    from uss_jax.devices.mesh import one_device_per_core
    from uss_jax.evaluation.rows import ORACLE
    from uss_jax.evaluation.scoring import score
    from uss_jax.evaluation.suites.pairs import find_pairs

    tune_for_cpu()
    one_device_per_core()
    model = Model(place / "bundle")
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        figures, _ = score(model, find_pairs(place / "pairs"), oracle_only=True)
        seconds = time.perf_counter() - began
        print(json.dumps([seconds, figures[ORACLE]["sdr"].tolist()]), flush=True)


def measure(place: pathlib.Path, reference: str, rounds: int) -> dict[str, list[float]]:
    """Contender -> seconds of each round."""
    theirs = [reference, pathlib.Path(__file__).with_name("reference_program.py"), place]
    contenders = {
        "uss_jax": ([sys.executable, "-m", "tests.benchmarks.evaluation", "--work", place], {}),
        "bytedance/uss": (theirs, {}),
        "bytedance/uss, tuned malloc": (theirs, KEEP_MEMORY),
    }
    workers, times, sdrs = {}, {name: [] for name in contenders}, {}
    try:
        for name, (words, environment) in contenders.items():
            workers[name] = subprocess.Popen(
                list(map(str, words)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | environment,
            )
            answer(workers[name])
        for round in range(-3, rounds):  # three to warm up
            for name, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                seconds, sdrs[name] = answer(worker)
                if round >= 0:
                    times[name].append(seconds)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    apart = max(np.abs(np.subtract(sdrs["uss_jax"], of)).max() for of in sdrs.values())
    print(f"SDRs agree to {apart:.1e} dB", file=sys.stderr)
    if not apart < AGREEMENT:
        raise SystemExit("the contenders do not measure the same")
    return times


def answer(worker: subprocess.Popen):
    """The next line of JSON that a worker prints."""
    for line in worker.stdout:
        if line.startswith(("[", '"')):
            return json.loads(line)
    raise SystemExit("a worker stopped; its message is above")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reference", metavar="PYTHON", help="where the original is installed")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each contender")
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return
    if not args.reference:
        parser.error("--reference PYTHON is missing; see above how to make it")
    with tempfile.TemporaryDirectory() as place:
        write_inputs(pathlib.Path(place), args.pairs)
        times = measure(pathlib.Path(place), args.reference, args.rounds)
    ours = statistics.median(times["uss_jax"])
    print(f"{'':<30}{'s a pair':>10}{'fastest':>10}{'theirs / ours':>16}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        ratio = "" if name == "uss_jax" else f"{median / ours:.2f}"
        each, best = median / args.pairs, min(seconds) / args.pairs
        print(f"{name:<30}{each:>10.2f}{best:>10.2f}{ratio:>16}")


if __name__ == "__main__":
    main()
