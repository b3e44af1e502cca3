"""Whether a run waits for its input: `python -m tests.benchmarks.feed`.

The training loop itself runs on records on disk, with a stand-in for the step: a device that is
busy for 20 ms a step and needs neither a core nor the interpreter's lock. As on an accelerator, the
loop dispatches a program that takes the arrays of the published separator's training state (each of
one element, donated), of its frozen nets and of the batch. A second, small program in XLA's own
queue sleeps in C until the device would be done; its result is the loss that the loop waits for.
The batch is a real one, 16 clips of 10 s at 32 kHz or their 2-second anchors from a table, its
records in the page cache. Needs a C compiler.

Printed for each kind of records, over the steps after the first 20:

    waiting  share of the time in which the device was done and the next batch not there
    step     wall time of a step, ms; what is above 20 the device lost
    cores    CPU time of all threads and workers by wall time
    loop     CPU time of the loop's own thread a step, ms: dispatch, metrics, bookkeeping
    dispatch what of it is XLA's dispatch of the step's program, with its hundreds of arrays
"""

import argparse
import contextlib
import ctypes
import io
import itertools
import os
import pathlib
import runpy
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.pipeline import CLIP, SEGMENT, made_up_table, order_of, write_clips
from tests.tiny import CONFIGS
from uss_jax.anchors.table import Placement
from uss_jax.bundles import nets
from uss_jax.bundles.checkpoints import Checkpoints
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.devices.mesh import make_mesh, on_all_devices
from uss_jax.models.cnn14 import Cnn14
from uss_jax.models.resunet import ResUNet
from uss_jax.training.loop import Pace, Reports, fit
from uss_jax.training.optim import adamw_amsgrad
from uss_jax.training.state import TrainState, create_state
from uss_jax.training.throughput import Throughput, Trace
from uss_jax.training.writer import MetricsWriter

BATCH = 16
BUSY_MS = 20
WARM_UP = 20  # steps, in which workers start
# A device's work that needs no core: XLA calls this from a thread of its own, without the
# interpreter's lock.
HOLD = """
#include <time.h>
#include "xla/ffi/api/c_api.h"
XLA_FFI_Error* hold(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Extension_Base* asked = frame->extension_start;
  if (asked && asked->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Api_Version* version = &((XLA_FFI_Metadata_Extension*)asked)->metadata->api_version;
    version->major_version = XLA_FFI_API_MAJOR;
    version->minor_version = XLA_FFI_API_MINOR;
    return 0;
  }
  struct timespec busy = {0, BUSY_MS * 1000000L};
  nanosleep(&busy, 0);
  return 0;
}
"""


def register_hold(folder: pathlib.Path) -> None:
    """Compiles the device's work and makes it known to XLA; needs a C compiler."""
    source, library = folder / "hold.c", folder / "hold.so"
    source.write_text(HOLD)
    words = [f"-DBUSY_MS={BUSY_MS}", f"-I{jax.ffi.include_dir()}", source, "-o", library]
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", *words], check=True)
    hold = ctypes.CDLL(os.fspath(library)).hold
    jax.ffi.register_ffi_target("hold", jax.ffi.pycapsule(hold), platform="cpu")


def work(queue: jax.Array, audio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the device does in a step, after the one before and once it has the batch."""
    held = jax.ffi.ffi_call(
        "hold", jax.ShapeDtypeStruct((1,), jnp.float32), input_output_aliases={0: 0}
    )(queue + 0 * audio[0, :1])
    # XLA:CPU would run anything smaller in the thread that dispatches it.
    queue = held + 0 * jnp.sum(jnp.full((64, 64), held[0]) @ jnp.ones((64, 64)))
    return queue, queue[0]


class StandIn(Throughput):
    """Measures as a run does, and makes of the loop's step a device that is busy for so long.

    Attributes:
      row: what is printed.
    """

    def __init__(self, workdir: pathlib.Path):
        super().__init__(workdir, 0, BATCH, 1, "float32", lambda *arguments: None)
        self._dispatched, self._dispatch, self._start = 0, 0.0, (0.0, 0.0, 0.0)

    def compile(self, jitted: Callable, *arguments: object) -> Callable:
        compiled = jitted.lower(*arguments).compile()
        queue, audio = jnp.zeros(1), arguments[2]["audio"]
        device = jax.jit(work).lower(queue, audio).compile()
        self._flops = 0

        def step(state, frozen, batch, key):
            nonlocal queue
            began = time.thread_time()
            state, metrics = compiled(state, frozen, batch, key)
            self._dispatch += time.thread_time() - began
            queue, loss = device(queue, batch["audio"])
            return state, {**metrics, "loss": loss}

        return step

    def step(self) -> None:
        super().step()
        self._dispatched += 1
        if self._dispatched == WARM_UP:
            self._all = (0, 0.0, 0.0)
            self.go()
            self._dispatch = 0.0
            self._start = time.monotonic(), cpu_seconds(), time.thread_time()

    def report(self, step: int) -> dict[str, float]:
        now = time.monotonic(), cpu_seconds(), time.thread_time()
        metrics = super().report(step)
        steps = self._dispatched - WARM_UP
        wall, cpu, loop = (b - a for a, b in zip(self._start, now, strict=True))
        by_step = (1e3 * seconds / steps for seconds in (loop, self._dispatch))
        self.row = (self._all[2] / wall, 1e3 * wall / steps, cpu / wall, *by_step)
        return metrics


def cpu_seconds() -> float:
    """CPU time of this process and of its workers."""
    ticks = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def published_state() -> tuple[TrainState, dict]:
    """The arrays of the published separator's state and of its frozen nets, of one element each."""
    tree = lambda net: jax.tree.map(lambda x: np.zeros([1] * x.ndim, x.dtype), nets.layout(net))  # noqa: E731
    separator, frozen = tree(ResUNet(condition_width=2048)), tree(Cnn14())
    names = ("params", "batch_stats")
    params, statistics = ({"separator": separator[name], "query": {}} for name in names)
    state = create_state(params, statistics, adamw_amsgrad(lambda step: 1e-3, 0.0))
    return state, {"sed": frozen, "query": frozen}


def toy_step(state: TrainState, frozen: dict, batch: dict, key: jax.Array) -> tuple:
    """Takes and gives what a training step does, and computes next to nothing."""
    names = ("loss", "sdri", "anchor_score", "conflict_share", "grad_norm", "param_norm")
    metrics = dict.fromkeys(names, batch["samples"][0] / 1e6)
    metrics |= {"skipped_steps": state.skipped["total"], "skipped_in_a_row": jnp.int32(0)}
    return jax.tree.map(lambda x: x + 1, state), metrics


def measure(feed: Iterator[dict[str, np.ndarray]], steps: int) -> tuple[float, ...]:
    """A row of the table: the loop on these batches."""
    mesh = make_mesh()
    state, frozen = (on_all_devices(tree, mesh) for tree in published_state())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        workdir = pathlib.Path(folder)
        stand_in = StandIn(workdir)
        with (
            Checkpoints(workdir / "checkpoints", keep=1) as checkpoints,
            MetricsWriter(workdir, 0, steps, "feed") as writer,
        ):
            fit(
                toy_step,
                state,
                frozen,
                feed,
                key=on_all_devices(jax.random.key(0), mesh),
                mesh=mesh,
                pace=Pace(WARM_UP + steps, 100, 10**9),
                checkpoints=checkpoints,
                position=lambda done: {},
                reports=Reports(
                    writer, stand_in, Trace(workdir / "profile", 0, 0), lambda done: 1e-3
                ),
            )
    return stand_in.row


def main() -> None:
    shipped = runpy.run_path(str(CONFIGS / "resunet30.py"))["get_config"]().data
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.feed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=300, help="to measure, of each row")
    parser.add_argument("--clips", type=int, default=200, help="records to write")
    parser.add_argument("--threads", type=int, nargs="+", default=[shipped.threads])
    parser.add_argument("--workers", type=int, nargs="+", default=[shipped.workers])
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the beginning")
    print(
        f"{'':<22}{'threads':>8}{'workers':>8}{'waiting':>10}{'step':>9}{'cores':>8}{'loop':>9}{'dispatch':>12}"
    )
    with tempfile.TemporaryDirectory() as folder:
        register_hold(pathlib.Path(folder))
        for encoding in ("pcm_s16le", "flac"):
            directory = pathlib.Path(folder) / encoding
            index = write_clips(directory, args.clips, encoding)
            table = Placement(made_up_table(index), index, 0, top_k=4, jitter_samples=1600)
            for places, threads, workers in itertools.product(
                (None, table), args.threads, args.workers
            ):
                feed = batches(
                    ClipReader(directory, index),
                    order_of(index),
                    start_step=0,
                    stop_step=WARM_UP + args.steps,
                    batch_size=BATCH,
                    clip_samples=CLIP if places is None else SEGMENT,
                    threads=threads,
                    workers=workers,
                    places=places,
                )
                waiting, step, cores, loop, dispatch = measure(feed, args.steps)
                name = f"{encoding}, {'whole clips' if places is None else 'anchors'}"
                print(
                    f"{name:<22}{threads:>8}{workers:>8}{waiting:>10.1%}{step:>6.2f} ms"
                    f"{cores:>8.2f}{loop:>6.2f} ms{dispatch:>9.2f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
