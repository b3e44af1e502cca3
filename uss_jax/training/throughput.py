"""Measures the speed of a run, for its reports and the ledger `throughput.json`."""

import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from uss_jax.devices.cost import BFLOAT16, flops_by_way, least_seconds, peak_flops
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_json import anything, list_of, mapping_of, parse_json
from uss_jax.training.feed import DeviceFeed
from uss_jax.training.step import Step

LEDGER = "throughput.json"
# While a batch is late, the end of the last step is polled at this interval.
_POLL_SECONDS = 1e-3


class Throughput:
    """Times the steps of a run since its start, without compiling, evaluating and saving.

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
        counted: Step | None = None,
    ):
        """Starts timing; the first host also appends to the ledger of earlier starts.

        Args:
          workdir: folder of the run.
          start_step: number of steps done before.
          global_batch: items per step, over all devices.
          parameters: number of trained parameters.
          dtype: main compute dtype, "float32" or "bfloat16".
          counted: the step without `remat`, whose FLOPs are those of the model; None if the step
            itself recomputes nothing.
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
        self._all = (0, 0.0, 0.0)  # steps, seconds, seconds idle for lack of a batch
        self.go()

    def go(self) -> None:
        """Starts a new interval; the time since the last report does not count."""
        self._began, self._steps, self._waited = time.monotonic(), 0, 0.0

    def compile(self, jitted: Callable, *arguments: Any) -> jax.stages.Compiled:
        """Compiles the step and counts its FLOPs, then starts a new interval."""
        began = time.monotonic()
        traced = jitted.trace(*arguments)
        compiled = traced.lower().compile()
        self._about["compile_seconds"] = time.monotonic() - began
        flops = flops_by_way(self._counted, *arguments) if self._counted else flops_by_way(traced)
        self._about |= {"flops_per_step": sum(flops.values()), "flops_by_way": flops}
        self._least_seconds = least_seconds(flops, self._about["device"])
        self.go()
        return compiled

    def next_batch(self, feed: DeviceFeed, idle: Callable[[], bool] | None) -> dict[str, jax.Array]:
        """Returns the next step's batch and measures how long the devices are idle until then.

        They are idle while every dispatched step is done and the next batch is not on the devices.
        Waiting while they compute costs nothing and does not count.

        Args:
          feed: feed of the batches.
          idle: returns whether every dispatched step is done; None before the first step.
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
        """Counts one step."""
        self._steps += 1

    def report(self, step: int) -> dict[str, float]:
        """Updates the ledger and returns the interval's metrics, once its steps are done.

        Args:
          step: total number of steps done.
        """
        stretch = (self._steps, time.monotonic() - self._began, self._waited)
        self._all = tuple(a + b for a, b in zip(self._all, stretch, strict=True))
        if jax.process_index() == 0:
            self._write(step)
        metrics = self._rates(*stretch)
        peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
        if None not in peaks:  # CPUs do not report it
            metrics["device_memory_gib"] = max(peaks) / 2**30
        return metrics

    def _rates(self, steps: int, seconds: float, waited: float) -> dict[str, float]:
        rates = {
            "items_per_second": steps * self._global_batch / seconds,
            "step_seconds": seconds / steps,
            "input_wait_share": waited / seconds,
        }
        if self.knows_device:  # else the utilisation is unknown
            # On all devices, with each kind of product at its own peak.
            least = self._least_seconds * steps / jax.device_count()
            rates["flop_utilisation"] = least / seconds
        return rates

    def _write(self, step: int) -> None:
        entry = {**self._about, "step": step, **self._rates(*self._all)}
        with replacing(self._workdir / LEDGER, flush=False) as temporary:
            temporary.write_text(json.dumps([*self._earlier, entry], indent=2) + "\n")


def read_ledger(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the ledger of a workdir, one entry per start; empty before the first report.

    Raises:
      ValueError: the ledger is damaged.
    """
    path = pathlib.Path(workdir) / LEDGER
    return parse_json(path.read_bytes(), list_of(mapping_of(anything()))) if path.exists() else []


def _ledger_so_far(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the existing entries; sets a damaged ledger aside, as nothing depends on it."""
    try:
        return read_ledger(workdir)
    except ValueError:
        if jax.process_index() == 0:
            path = workdir / LEDGER
            aside = path.with_name(f"{LEDGER}.damaged")
            os.replace(path, aside)
            print(f"{path} is damaged; moved it to {aside} and began a new one", flush=True)
        return []


class Trace:
    """Profiler trace of some steps, for TensorBoard; a context manager."""

    def __init__(self, folder: pathlib.Path, first: int, last: int):
        """Traces steps first..last into a folder; none if `first` is 0."""
        self._folder, self._first, self._last = folder, first, last
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def before(self, step: int, state: Any) -> None:
        """Starts or stops the trace if due; call it before each step.

        Args:
          step: number of the next step.
          state: state after the previous step.
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
