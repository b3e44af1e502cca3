"""How fast a run goes: what its reports say of it, and the ledger `throughput.json`."""

import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from uss_jax.atomic import replacing
from uss_jax.checked_json import anything, list_of, mapping_of, parse_json
from uss_jax.training.cost import BFLOAT16, flops_by_way, least_seconds, peak_flops
from uss_jax.training.feed import DeviceFeed
from uss_jax.training.step import Step

LEDGER = "throughput.json"
# How exactly the end of the last step is known while its successor's batch is late.
_POLL_SECONDS = 1e-3


class Throughput:
    """Times the steps of a run since it was started, less compiling, evaluating and saving.

    Attributes:
      knows_device: whether the peaks of the device are known.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        start_step: int,
        global_batch: int,
        parameters: int,
        dtype: str,
        counted: Step,
    ):
        """On every host; the first keeps the ledger, in which earlier starts stay.

        Args:
          workdir: of the run.
          start_step: steps done already.
          global_batch: items of a step on all devices together.
          parameters: that train.
          dtype: in which most is computed, "float32" or "bfloat16".
          counted: the step, of which the operations are those of the model.
        """
        self._counted = counted
        self._workdir = pathlib.Path(workdir)
        self._earlier = _ledger_so_far(self._workdir)
        self._global_batch = global_batch
        device = jax.devices()[0].device_kind
        self.knows_device = peak_flops(device, BFLOAT16) is not None
        self._about = {
            "start_step": start_step,
            "device": device,
            "devices": jax.device_count(),
            "hosts": jax.process_count(),
            "global_batch": global_batch,
            "parameters": parameters,
            "dtype": dtype,
        }
        self._all = (0, 0.0, 0.0)  # steps, seconds, seconds without work for want of a batch
        self.go()

    def go(self) -> None:
        """Begins a stretch of steps; what has passed since the last report does not count."""
        self._began, self._steps, self._waited = time.monotonic(), 0, 0.0

    def compile(self, jitted: Callable, *arguments: Any) -> jax.stages.Compiled:
        """The step, compiled, its operations counted; a stretch begins after it."""
        began = time.monotonic()
        compiled = jitted.lower(*arguments).compile()
        self._about["compile_seconds"] = time.monotonic() - began
        flops = flops_by_way(self._counted, *arguments)
        self._about |= {"flops_per_step": sum(flops.values()), "flops_by_way": flops}
        self._least_seconds = least_seconds(flops, self._about["device"])
        self.go()
        return compiled

    def next_batch(self, feed: DeviceFeed, idle: Callable[[], bool] | None) -> dict[str, jax.Array]:
        """Returns the next step's batch; counts how long the devices had nothing to do for it.

        That is the time in which every step dispatched was done and the next batch was not on the
        devices; a wait while they compute costs nothing and does not count.

        Args:
          feed: of the batches.
          idle: tells whether every step dispatched is done; None before the first.
        """
        idle_from = None
        batch = feed.get(0.0)
        while batch is None:
            if idle_from is None and (idle is None or idle()):
                idle_from = time.monotonic()
            batch = feed.get(_POLL_SECONDS)
        if idle_from is not None:
            self._waited += time.monotonic() - idle_from
        return batch

    def step(self) -> None:
        """Counts one."""
        self._steps += 1

    def report(self, step: int) -> dict[str, float]:
        """Metrics of the stretch that ends here, its steps done; the ledger is brought up to date.

        Args:
          step: steps done in all.
        """
        stretch = (self._steps, time.monotonic() - self._began, self._waited)
        self._all = tuple(a + b for a, b in zip(self._all, stretch, strict=True))
        if jax.process_index() == 0:
            self._write(step)
        metrics = self._rates(*stretch)
        peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
        if None not in peaks:  # CPUs do not say
            metrics["device_memory_gib"] = max(peaks) / 2**30
        return metrics

    def _rates(self, steps: int, seconds: float, waited: float) -> dict[str, float]:
        rates = {
            "items_per_second": steps * self._global_batch / seconds,
            "step_seconds": seconds / steps,
            "input_wait_share": waited / seconds,
        }
        if self.knows_device:  # else there is nothing to be a share of
            # Of all devices, each way of multiplying at its own peak.
            least = self._least_seconds * steps / jax.device_count()
            rates["flop_utilisation"] = least / seconds
        return rates

    def _write(self, step: int) -> None:
        entry = {**self._about, "step": step, **self._rates(*self._all)}
        with replacing(self._workdir / LEDGER, flush=False) as temporary:
            temporary.write_text(json.dumps([*self._earlier, entry], indent=2) + "\n")


def read_ledger(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The ledger of a workdir, an entry for each start; empty before the first report.

    Raises:
      ValueError: it is damaged.
    """
    path = pathlib.Path(workdir) / LEDGER
    return parse_json(path.read_bytes(), list_of(mapping_of(anything()))) if path.exists() else []


def _ledger_so_far(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The entries so far; a damaged ledger is set aside, as nothing depends on it."""
    try:
        return read_ledger(workdir)
    except ValueError:
        if jax.process_index() == 0:
            path = workdir / LEDGER
            aside = path.with_name(f"{LEDGER}.damaged")
            os.replace(path, aside)
            print(f"{path} is damaged; it is now {aside}, and a new one begins", flush=True)
        return []


class Trace:
    """The profiler's trace of some steps, for TensorBoard; used as a context manager."""

    def __init__(self, folder: pathlib.Path, first: int, last: int):
        """Into a folder, of the steps first..last; of none where first is 0."""
        self._folder, self._first, self._last = folder, first, last
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def before(self, step: int, state: Any) -> None:
        """To be called before each step: begins or ends the trace where it is time.

        Args:
          step: number of the step to come.
          state: what the steps before it leave.
        """
        if step in (self._first, self._last + 1):
            jax.block_until_ready(state)
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif step == self._last + 1:
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

    def __exit__(self, *exception: object) -> None:
        self._stop()
