"""What each tagging net costs for 10 s: `python -m tests.benchmarks.taggers [--rounds N]`.

Parameters, floating-point operations as XLA counts them in the compiled program, and CPU seconds on
one core in float32 (medians; the nets take turns, so that a slow minute hits them alike). The time
includes the log-mel front end.
"""

import argparse
import os
import statistics
import time

import jax
import numpy as np

from tests.tiny import random_variables
from uss_jax.models.cnn14 import Cnn14
from uss_jax.models.htsat import HTSAT

NETS = {
    "Cnn14": Cnn14(),
    "HTS-AT, 768 latents": HTSAT(),
    "HTS-AT, 2048 latents": HTSAT(token_width=256),
}
SECONDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.taggers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each net")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    runs, costs, times = {}, {}, {name: [] for name in NETS}
    for name, net in NETS.items():
        shape = (1, SECONDS * net.sample_rate)
        variables = jax.tree.map(jax.numpy.asarray, random_variables(net, shape))
        waveform = jax.numpy.asarray(np.random.default_rng(0).uniform(-0.1, 0.1, shape), np.float32)
        run = jax.jit(net.apply).lower(variables, waveform).compile()
        parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        costs[name] = (parameters / 1e6, run.cost_analysis()["flops"] / 1e9)
        runs[name] = (run, (variables, waveform))
    for round in range(-2, args.rounds):  # two to warm up
        for name, (run, arrays) in runs.items():
            began = time.process_time()
            jax.block_until_ready(run(*arrays))
            if round >= 0:
                times[name].append(time.process_time() - began)
    print(f"{'net, 10 s':<24}{'M parameters':>14}{'GFLOP':>8}{'CPU s':>8}")
    for name, (parameters, flops) in costs.items():
        median = statistics.median(times[name])
        print(f"{name:<24}{parameters:>14.1f}{flops:>8.1f}{median:>8.2f}")


if __name__ == "__main__":
    main()
