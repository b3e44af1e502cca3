"""What a device makes of the work: `python -m tests.benchmarks.accelerator [--profile]`.

Rows: training step of the published separator (bfloat16, float32 at the default and at the highest
precision) and of the band-split one (`base`, bfloat16), the whole step with detector and query net,
inference of both, and mining. On a CPU the nets are those of the quickstart, and `tiny`. Where
PyTorch sees the device, the same training step and inference in PyTorch follow, eager and compiled.
A run ends after about six minutes: rows for which no time is left are named. Shares are of the
matrix product that the device was seen to do, TFLOP those of the model's products and convolutions.

`--profile` prints time and bytes by family of kernels, and the slowest kernels. `--absent-h100`
compiles the training step for an H100 that need not be there, and prints what it would move; it
needs `jax[cuda12]`, no card, and says nothing of time.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SECONDS = 360.0
RATE, SEGMENT, CLIP = 32000, 64000, 320000
QUICKSTART = {"n_fft": 512, "hop_samples": 256, "channels": (8, 16, 32, 64)}
BANDSPLIT_TINY = {"n_fft": 512, "hop_samples": 256, "width": 48, "layers": 2}
BANDSPLIT_TINY |= {"head_width": 16, "hidden_width": 128}


@dataclasses.dataclass
class Job:
    """One row.

    Attributes:
      title: of the row.
      function: jitted; takes `arguments`, of which the first is carried from call to call when
        `carries`.
      arguments: arrays on the device.
      carries: whether the first output takes the place of the first argument.
      peak: which product's peak the share is of, "bfloat16", "default" or "highest".
      items, unit: what one call does.
    """

    title: str
    function: Callable
    arguments: tuple[Any, ...]
    carries: bool
    peak: str
    items: float
    unit: str


def separator(name: str, dtype: str, on_cpu: bool) -> Any:
    """A separator by its row in bundles/nets.py: of the published size, on a CPU a small one."""
    from uss_jax.models.bandsplit import BandSplit, mel_bands
    from uss_jax.models.resunet import ResUNet

    if name == "resunet":
        return ResUNet(dtype=dtype, **(QUICKSTART if on_cpu else {}))
    small = {"bands": mel_bands(24, 512, 16000), **BANDSPLIT_TINY} if on_cpu else {}
    return BandSplit(dtype=dtype, time_span=32, **small)


def separator_and_state(
    dtype: str, on_cpu: bool, shapes: bool = False, name: str = "resunet"
) -> tuple[Any, Any, Any]:
    """A separator, its optimiser, and a state on the device, or its shapes."""
    import jax
    import jax.numpy as jnp

    from uss_jax.training.optim import adamw_amsgrad
    from uss_jax.training.state import create_state

    net, optimizer = separator(name, dtype, on_cpu), adamw_amsgrad(1e-3)

    def fresh(key):
        waveform = jnp.zeros((1, 1, SEGMENT))
        variables = net.init(key, waveform, jnp.zeros((1, 527)))
        return create_state(
            {"separator": variables["params"], "query": {}},
            {"separator": variables.get("batch_stats", {}), "query": {}},
            optimizer,
        )

    make = jax.eval_shape if shapes else lambda f, key: jax.jit(f)(key)
    return net, optimizer, make(fresh, jax.random.key(0))


def separation_step(net: Any, optimizer: Any, sed: Any, query: Any, batch: int) -> Callable:
    """The step of training, as `uss-jax train` makes it."""
    from uss_jax.training.examples import Mixing
    from uss_jax.training.losses import l1_waveform
    from uss_jax.training.separation_step import Anchoring, Nets, Updating, make_separation_step

    return make_separation_step(
        Nets(net, query, sed),
        optimizer,
        l1_waveform,
        Anchoring(SEGMENT, min_dbfs=-60.0),
        Mixing(sources=2, group_size=batch, match_energy=True),
        Updating(max_norm_ratio=100.0),
    )


def anchors_batch(batch: int, samples: int, from_table: bool) -> dict[str, Any]:
    """A batch of noise, of anchors of a table or of whole clips."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    audio = rng.integers(-3000, 3000, (batch, samples), np.int16)
    made = {"audio": audio, "samples": np.full(batch, samples, np.int32)}
    made["class_index"] = rng.integers(0, 527, batch, np.int32)
    if from_table:
        made |= {name: np.zeros(batch, np.int32) for name in ("begin_sample", "anchor_sample")}
        made |= {"score": np.ones(batch, np.float32)}
    return jax.device_put(made)


def training_job(
    dtype: str,
    precision: str,
    batch: int,
    on_cpu: bool,
    shapes: bool = False,
    name: str = "resunet",
) -> Job:
    """A training step of the separator alone: mixing, separation, loss, update."""
    import jax

    from uss_jax.devices.precision import at_precision
    from uss_jax.models.query import QueryNet

    net, optimizer, state = separator_and_state(dtype, on_cpu, shapes, name)
    step = separation_step(net, optimizer, None, QueryNet(None, "one_hot"), batch)
    step = jax.jit(at_precision(precision, step), donate_argnums=0)
    arguments = (state, {}, anchors_batch(batch, SEGMENT, True), jax.random.key(0))
    peak = "bfloat16" if dtype == "bfloat16" else precision
    way = dtype if dtype == "bfloat16" else f"float32, {precision}"
    title = f"training step, {_named(name)}{way}, {batch} x 2 s"
    return Job(title, step, arguments, True, peak, batch, "items")


def _named(name: str) -> str:
    """Names another separator than the published one in a row's title."""
    return "" if name == "resunet" else f"{name}, "


def taggers(on_cpu: bool) -> tuple[Any, Any, Any, Any]:
    """Detector and query net, with random variables."""
    import jax
    import jax.numpy as jnp

    from uss_jax.models.cnn14 import Cnn14, Cnn14DecisionLevelMax

    fields = {"channels": (16, 32, 64, 128), "n_fft": 512, "mel_bins": 32} if on_cpu else {}
    nets = Cnn14DecisionLevelMax(**fields), Cnn14(**fields)
    make = lambda net: jax.jit(net.init)(jax.random.key(1), jnp.zeros((1, SEGMENT)))  # noqa: E731
    return nets[0], make(nets[0]), nets[1], make(nets[1])


def whole_job(dtype: str, batch: int, on_cpu: bool) -> Job:
    """A whole step: detector on 10 s, mixing, query net, separation, loss, update."""
    import jax

    from uss_jax.devices.precision import at_precision
    from uss_jax.models.query import QueryNet

    sed, sed_variables, tagger, variables = taggers(on_cpu)
    net, optimizer, state = separator_and_state(dtype, on_cpu)
    step = separation_step(net, optimizer, sed, QueryNet(tagger, "soft"), batch)
    frozen = {"sed": sed_variables, "query": {k: {"tagger": v} for k, v in variables.items()}}
    step = jax.jit(at_precision("default", step), donate_argnums=0)
    arguments = (state, frozen, anchors_batch(batch, CLIP, False), jax.random.key(0))
    title = f"whole step, {dtype}, {batch} x 10 s"
    return Job(title, step, arguments, True, "bfloat16", batch, "clips")


def inference_job(dtype: str, batch: int, on_cpu: bool, name: str = "resunet") -> Job:
    """Separation of segments."""
    import jax
    import jax.numpy as jnp

    from uss_jax.devices.precision import at_precision

    net, _, state = separator_and_state(dtype, on_cpu, name=name)
    variables = {"params": state.params["separator"], "batch_stats": state.batch_stats["separator"]}
    separate = jax.jit(at_precision("default", net.apply))
    noise = 0.1 * jax.random.normal(jax.random.key(0), (batch, 1, SEGMENT))
    arguments = (variables, noise, jnp.full((batch, 527), 0.01))
    title = f"inference, {_named(name)}{dtype}, {batch} x 2 s"
    return Job(title, separate, arguments, False, dtype, 2 * batch, "s of sound")


def mining_job(batch: int, on_cpu: bool) -> Job:
    """The detector on whole clips, and the anchors of a class of each."""
    import functools

    import jax

    from uss_jax.anchors.find import find_anchors

    sed, variables, *_ = taggers(on_cpu)
    find = functools.partial(find_anchors, sed, segment_samples=SEGMENT, min_dbfs=-60.0)
    arguments = (variables, anchors_batch(batch, CLIP, False), jax.random.key(0))
    title = f"mining, float32, {batch} x 10 s"
    return Job(title, jax.jit(find), arguments, False, "highest", batch, "clips")


def jobs(on_cpu: bool) -> Iterator[Callable[[], Job]]:
    """What to measure, the most important first."""
    import functools as f

    small, large = (4, 8) if on_cpu else (16, 64)
    yield f.partial(training_job, "bfloat16", "default", small, on_cpu)
    yield f.partial(whole_job, "bfloat16", small, on_cpu)
    yield f.partial(training_job, "bfloat16", "default", small, on_cpu, name="bandsplit")
    yield f.partial(training_job, "float32", "default", small, on_cpu)
    yield f.partial(training_job, "float32", "highest", small, on_cpu)
    yield f.partial(inference_job, "bfloat16", small, on_cpu)
    yield f.partial(inference_job, "bfloat16", small, on_cpu, name="bandsplit")
    yield f.partial(mining_job, small, on_cpu)
    yield f.partial(training_job, "bfloat16", "default", large, on_cpu)
    yield f.partial(training_job, "float32", "default", large, on_cpu)
    yield f.partial(training_job, "float32", "highest", large, on_cpu)


def measured_peaks(on_cpu: bool) -> dict[str, float]:
    """FLOP/s of a large matrix product, by how it is done."""
    import jax
    import jax.numpy as jnp

    size = 1024 if on_cpu else 8192

    def peak(dtype: Any, precision: str) -> float:
        x = jnp.ones((size, size), dtype)
        product = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
        return 2 * size**3 / _seconds(lambda: product(x), 10)

    found = {way: peak(jnp.float32, way) for way in ("default", "highest")}
    return {"bfloat16": peak(jnp.bfloat16, "default"), **found}


def _seconds(call: Callable[[], Any], calls: int) -> float:
    """Median of three times per call, of `calls` dispatched after each other."""
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def ours(deadline: float, profile: bool) -> None:
    """Prints a JSON line for each row."""
    import jax

    from uss_jax.devices.cost import device_bytes, model_flops

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    peaks = measured_peaks(on_cpu)
    _print(device=device.device_kind, jax=jax.__version__, peaks=peaks)

    def compile_(make: Callable[[], Job]) -> tuple[Job, Any, float] | None:
        if time.time() > deadline - 60:
            return None
        job = make()
        began = time.perf_counter()
        compiled = job.function.lower(*job.arguments).compile()
        return job, compiled, time.perf_counter() - began

    # None is compiled beside a timing: all before it, as many at a time as cores allow, or, where
    # that is one, each just before its own.
    workers = max(1, (os.cpu_count() or 1) // 4)
    if workers == 1:
        made: Iterable[tuple[Job, Any, float] | None] = map(compile_, jobs(on_cpu))
    else:
        with ThreadPoolExecutor(workers) as pool:
            made = list(pool.map(compile_, jobs(on_cpu)))
    for make, found in zip(jobs(on_cpu), made, strict=True):
        if found is None or time.time() > deadline:
            _print(left_out=f"{make.func.__name__} {make.args} {make.keywords or ''}".rstrip())
            continue
        job, compiled, seconds = found
        arguments = list(job.arguments)

        def call(arguments=arguments, compiled=compiled, carries=job.carries):
            outputs = compiled(*arguments)
            if carries:
                arguments[0], outputs = outputs
            return outputs

        flops = model_flops(job.function, *job.arguments)
        memory = device_bytes(compiled) or {}
        row = {"title": job.title, "ms": 1e3 * _seconds(call, 2 if on_cpu else 10)}
        row |= {"tflop": flops / 1e12, "peak": peaks[job.peak], "compile": seconds}
        row |= {"items": job.items, "unit": job.unit, "gb": memory.get("temporary", 0) / 1e9}
        _print(**row)
        if profile and job.carries and "bfloat16" in job.title:
            profile = False
            _print(profile=profiled(call, compiled))


def profiled(call: Callable[[], Any], compiled: Any) -> list[str]:
    """Lines of time and bytes by family, and of the slowest kernels, over three calls."""
    import jax

    from tests.benchmarks.kernels import kernels

    known = {kernel.name: kernel for kernel in kernels(compiled)}
    calls, seconds = 3, collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines:
                    for event in line.events:
                        name = dict(event.stats).get("hlo_op", event.name)
                        if name in known:
                            seconds[name] += event.duration_ns / 1e9 / calls
    families = collections.defaultdict(lambda: [0.0, 0])
    for name, time_ in seconds.items():
        families[known[name].family][0] += time_
        families[known[name].family][1] += known[name].bytes
    rows = sorted(families.items(), key=lambda row: -row[1][0])
    lines = [f"{'ms':>8} {'GB':>8} {'TB/s':>6}  family"]
    lines += [_moved(*values, family) for family, values in rows]
    lines += [f"{'ms':>8} {'GB':>8} {'TB/s':>6}  kernel"]
    for name, time_ in seconds.most_common(20):
        lanes = f", {known[name].lanes} lanes" if known[name].lanes else ""
        what = f"{known[name].family}{lanes}: {known[name].operation[-90:]}"
        lines.append(_moved(time_, known[name].bytes, what))
    return lines


def _moved(seconds: float, count: int, name: str) -> str:
    rate = count / 1e12 / seconds if seconds else float("nan")
    return f"{1e3 * seconds:8.3f} {count / 1e9:8.3f} {rate:6.2f}  {name}"


def theirs(deadline: float) -> None:
    """Prints a JSON line for each row of PyTorch on its GPU."""
    import torch

    from tests.benchmarks.torch_nets import ResUNet30

    if not torch.cuda.is_available():
        _print(left_out="PyTorch sees no GPU here")
        return
    torch.set_default_device("cuda")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    batch = 16
    mixture, condition = 0.1 * torch.randn(batch, 1, SEGMENT), torch.rand(batch, 527)
    for compiled in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            how = "compiled" if compiled else "eager"
            name = f"{str(dtype).removeprefix('torch.')}, {batch} x 2 s, PyTorch {how}"
            if time.time() > deadline - (90 if compiled else 20):
                _print(left_out=name)
                continue
            net = ResUNet30().to(memory_format=torch.channels_last).train()
            optimizer = torch.optim.AdamW(net.parameters(), 1e-3, amsgrad=True, fused=True)
            forward = torch.compile(net) if compiled else net
            autocast = torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16)

            def step(forward=forward, optimizer=optimizer, autocast=autocast):
                optimizer.zero_grad()
                with autocast:
                    loss = (forward(mixture, condition) - mixture).abs().mean()
                loss.backward()
                optimizer.step()

            torch.cuda.reset_peak_memory_stats()
            ms = _torch_ms(step)
            gb = torch.cuda.max_memory_allocated() / 1e9
            _print(title=f"training step, {name}", ms=ms, items=batch, unit="items", gb=gb)
            net.eval()
            with torch.inference_mode(), autocast:
                ms = _torch_ms(lambda forward=forward: forward(mixture, condition))
            _print(title=f"inference, {name}", ms=ms, items=2 * batch, unit="s of sound")


def _torch_ms(call: Callable[[], Any]) -> float:
    import torch

    for _ in range(3):
        call()
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 100)
    return statistics.median(times)


def absent_h100() -> None:
    """Prints what the bfloat16 training step moves, compiled for a card that need not be there."""
    import jax

    from tests.benchmarks.kernels import absent_h100 as there
    from tests.benchmarks.kernels import by_family, kernels

    # Shapes only: nothing of the published size is made here.
    sharding = there()
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    job = training_job("bfloat16", "default", 16, on_cpu=False, shapes=True)
    compiled = job.function.lower(*jax.tree.map(place, job.arguments)).compile()
    found = kernels(compiled)
    print(f"{job.title}, compiled for an H100:\n{'kernels':>8} {'GB':>8}  family")
    for family, (count, moved) in by_family(found).items():
        print(f"{count:8} {moved / 1e9:8.3f}  {family}")
    rest = [k for k in found if not k.family.startswith(("convolution", "product"))]
    total = sum(k.bytes for k in rest) / 1e9
    print(f"{len(rest):8} {total:8.3f}  all but convolutions and products\n")
    for kernel in sorted(rest, key=lambda k: -k.bytes)[:20]:
        lanes = f", {kernel.lanes} lanes" if kernel.lanes else ""
        print(f"{kernel.bytes / 1e6:8.1f} MB  {kernel.family}{lanes}: {kernel.operation[-90:]}")


def _print(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def show(row: dict[str, Any]) -> None:
    """Prints a row of the table."""
    if "device" in row:
        peaks = ", ".join(f"{way} {peak / 1e12:.3g}" for way, peak in row["peaks"].items())
        print(f"{row['device']}, jax {row['jax']}; matrix product in TFLOP/s: {peaks}\n")
        print(f"{'':<44}{'ms':>9}{'TFLOP/s':>9}{'share':>7}{'GB':>7}{'compile s':>10}  rate")
    elif "left_out" in row:
        print(f"left out, no time or device: {row['left_out']}")
    elif "profile" in row:
        print("\n".join(row["profile"]))
    else:
        seconds = row["ms"] / 1e3
        rate = row["tflop"] / seconds if "tflop" in row else None
        share = f"{1e12 * rate / row['peak']:7.2f}" if rate else f"{'':7}"
        cells = f"{row['ms']:9.2f}" + (f"{rate:9.3g}" if rate else f"{'':9}") + share
        cells += f"{row['gb']:7.2f}" if row.get("gb") else f"{'':7}"
        cells += f"{row['compile']:10.1f}" if "compile" in row else f"{'':10}"
        print(
            f"{row['title']:<44}{cells}  {row['items'] / seconds:.4g} {row['unit']}/s", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--profile", action="store_true", help="time and bytes by kernel family")
    parser.add_argument("--absent-h100", action="store_true", help="bytes only, without a card")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="default: %(default)g")
    parser.add_argument("--contender", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.absent_h100:
        absent_h100()
    elif args.contender == "ours":
        ours(args.deadline, args.profile)
    elif args.contender == "theirs":
        theirs(args.deadline)
    else:
        deadline = time.time() + args.seconds
        # Processes of their own: each framework takes the device for itself.
        for contender, share in (("ours", 0.75), ("theirs", 1.0)):
            until = deadline - args.seconds * (1 - share)
            command = [sys.executable, "-m", "tests.benchmarks.accelerator"]
            command += ["--contender", contender, f"--deadline={until}"]
            command += ["--profile"] * args.profile
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
                for line in worker.stdout:
                    show(json.loads(line))


if __name__ == "__main__":
    main()
