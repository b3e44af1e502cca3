"""One contender of the benchmark, in a process of its own: `python -m tests.benchmarks.worker`.

Arguments: job, framework, core. It pins itself to the core, runs the job twice to warm up (and
compile), prints a JSON line with what the job computed, then runs it again for every line it reads
and prints the seconds it took.
"""

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np

from uss_jax.devices.cpu import tune_for_cpu

SAMPLES = {"separate": 64000, "train": 64000, "tag": 320000, "long": 960000}
BLOCK = 64000

Job = Callable[[], np.ndarray]


def inputs(job: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """State dict, waveform [b, t] and condition [b, 527] of a job."""
    from tests.golden.inputs import make_batch
    from tests.golden.weights import build_state_dict

    batch = 1 if job == "long" else 2
    waveform = make_batch(f"benchmark/{job}", batch, SAMPLES[job])
    condition = np.random.default_rng(0).random((batch, 527), np.float32)
    layout = "cnn14" if job == "tag" else "resunet30_cond527"
    return build_state_dict(layout, fixed=False), waveform, condition


def torch_job(job: str) -> Job:
    """The job in PyTorch; called, it returns a result to compare."""
    import torch

    from tests.benchmarks.torch_nets import Cnn14, ResUNet30, load

    torch.set_num_threads(1)
    state_dict, waveform, condition = inputs(job)
    net = load(Cnn14() if job == "tag" else ResUNet30(), state_dict)
    waveform, condition = torch.from_numpy(waveform), torch.from_numpy(condition)

    def tag():
        with torch.inference_mode():
            return net(waveform)[0].numpy()

    def separate():
        with torch.inference_mode():
            return net(waveform[:, None], condition).numpy()

    def separate_long():
        with torch.inference_mode():
            blocks = [net(block[:, None], condition) for block in waveform.split(BLOCK, dim=1)]
            return torch.cat(blocks, dim=2).numpy()

    if job != "train":
        return {"tag": tag, "separate": separate, "long": separate_long}[job]
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0, amsgrad=True)
    target = waveform[:, None].roll(1, 0)

    def train():
        optimizer.zero_grad()
        loss = (net(waveform[:, None], condition) - target).abs().mean()
        loss.backward()
        optimizer.step()
        return loss.detach().numpy()

    return train


def jax_job(job: str) -> Job:
    """The job in this project; called, it returns a result to compare."""
    import jax
    import jax.numpy as jnp
    import optax

    from uss_jax.models.cnn14 import Cnn14
    from uss_jax.models.resunet import ResUNet
    from uss_jax.training.losses import l1_waveform
    from uss_jax.training.optim import adamw_amsgrad
    from uss_jax.weights.cnn14 import convert_cnn14
    from uss_jax.weights.resunet import convert_resunet

    state_dict, waveform, condition = inputs(job)
    convert = convert_cnn14 if job == "tag" else convert_resunet
    variables = jax.tree.map(jnp.asarray, convert(state_dict).variables)
    del state_dict
    waveform, condition = jnp.asarray(waveform), jnp.asarray(condition)

    if job == "tag":
        tag = jax.jit(Cnn14().apply)
        return lambda: np.asarray(tag(variables, waveform)["clipwise"])
    net = ResUNet()
    if job == "separate":
        separate = jax.jit(net.apply)
        return lambda: np.asarray(separate(variables, waveform[:, None], condition))

    if job == "long":
        return lambda: separate_long(net, variables, np.asarray(waveform), np.asarray(condition))

    optimizer = adamw_amsgrad(1e-3)
    target = jnp.roll(waveform[:, None], 1, 0)

    def step(variables, moments):
        def objective(params):
            estimate, updates = net.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                waveform[:, None],
                condition,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.mean(l1_waveform(estimate, target)), updates

        params = variables["params"]
        (loss, updates), grads = jax.value_and_grad(objective, has_aux=True)(params)
        change, moments = optimizer.update(grads, moments, params)
        return {"params": optax.apply_updates(params, change), **updates}, moments, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    state = [variables, jax.jit(optimizer.init)(variables["params"])]

    def train():
        *state[:], loss = step(*state)
        jax.block_until_ready(state)
        return np.asarray(loss)

    return train


def separate_long(net, variables, waveform, condition) -> np.ndarray:
    """A recording as `uss-jax separate` takes it, in windows or (by environment) in blocks."""
    from types import SimpleNamespace

    from uss_jax.bundles.model import Net
    from uss_jax.separation.windows import Layout, Target, separate_blocks

    model = SimpleNamespace(separator=Net(net, variables), sample_rate=32000, segment_samples=BLOCK)
    if "USS_JAX_BENCHMARK_BLOCKS" in os.environ:
        layout = Layout.blocks(model)
    else:
        layout = Layout.windows(model, waveform.shape[1])
    targets = [Target("sound", condition, np.array([True]))]
    pieces = separate_blocks(model, layout, [waveform], targets, batch_size=1)
    return np.concatenate(list(pieces), axis=2)


def main() -> None:
    job, framework, core = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    if framework == "jax":
        tune_for_cpu()  # as every command does
    run = (jax_job if framework == "jax" else torch_job)(job)
    run()
    # The second run still allocates. Its result tells whether the contenders agree: in training it
    # is the loss after an update.
    result = run().ravel()
    print(json.dumps(result[:: max(result.size // 1000, 1)].tolist()), flush=True)
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
