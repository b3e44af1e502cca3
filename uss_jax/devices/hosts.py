"""Processes of a run: connecting them, and detecting requests to stop."""

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from uss_jax.devices.watch import LOST_SECONDS, Relay, Watch, end_process
from uss_jax.errors import UserError

# Variables that identify a process outside TPU pods and SLURM, for example in a JobSet's manifest.
ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}

# Time limit for all processes to connect.
_JOIN_SECONDS = 300.0


@contextlib.contextmanager
def join_hosts(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    last_step: Callable[[], int | None] = lambda: None,
) -> Iterator[None]:
    """Connects this process to the others of its run; does nothing if there are none.

    They are found from the arguments, from the environment variables JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, from SLURM's variables of a job step with several tasks,
    or from a TPU pod. Inside the context, if one process is lost or fails, the others end within
    90 seconds; see Watch.

    Args:
      coordinator: host and port of process 0.
      processes: number of processes.
      process: index of this process, from 0.
      last_step: returns the step of the run's last checkpoint, for the message of a lost process;
        None if there is none.

    Raises:
      UserError: some of the first three are missing or inconsistent.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if all(value is None for value in given.values()):
        given = {name: os.environ.get(key) or None for name, key in ENVIRONMENT.items()}
    if any(value is not None for value in given.values()):
        found = _explicit(given)
    elif "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        found = _of_slurm(os.environ)
    elif importlib.util.find_spec("libtpu") and glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*"):
        found = _of_tpu_pod()
    else:
        yield
        return
    if found is None:
        jax.distributed.initialize()
        yield
        return
    with _joined(found, last_step):
        yield


def _joined(
    arguments: Mapping[str, Any], last_step: Callable[[], int | None]
) -> contextlib.AbstractContextManager:
    """Connects this process to the others; returns the context that watches them."""
    coordinator, process = arguments["coordinator_address"], arguments["process_id"]
    # JAX's own time limit aborts with a stack trace.
    late = threading.Timer(
        _JOIN_SECONDS,
        end_process,
        [
            f"the {arguments['num_processes']} hosts did not all connect within "
            f"{_JOIN_SECONDS:.0f} seconds: start the same command on each of them, and check "
            f"that they can reach host 0 at {coordinator}"
        ],
    )
    late.daemon = True
    late.start()
    relay = Relay(coordinator) if process else None
    try:
        jax.distributed.initialize(
            **{**arguments, "coordinator_address": relay.address if relay else coordinator},
            cluster_detection_method="deactivate",
            initialization_timeout=round(2 * _JOIN_SECONDS),
            heartbeat_timeout_seconds=round(10 * LOST_SECONDS),  # Watch has its own heartbeat
            shutdown_timeout_seconds=round(LOST_SECONDS),  # Watch lets all shut down together
        )
    finally:
        late.cancel()
        if relay:
            relay.close()
    try:  # the client has no public name; orbax accesses it in the same way
        from jax._src.distributed import global_state

        store = global_state.client
    except (ImportError, AttributeError):  # JAX has changed: rely on its abort after a loss
        return contextlib.nullcontext()
    return Watch(store, process, arguments["num_processes"], coordinator, last_step, relay)


def _explicit(given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the given values; returns arguments of jax.distributed.initialize."""
    for name, value in given.items():
        if value is None:
            raise UserError(
                f"--{name} is missing: give --coordinator, --processes and --process, or all of "
                f"{', '.join(ENVIRONMENT.values())}"
            )
    try:
        processes, process = int(given["processes"]), int(given["process"])
    except ValueError as error:
        raise UserError(
            f"{ENVIRONMENT['processes']} and {ENVIRONMENT['process']} must be whole numbers, not "
            f"{given['processes']!r} and {given['process']!r}"
        ) from error
    if not 0 <= process < processes:
        raise UserError(f"--process {process}: expected at least 0, below --processes {processes}")
    if not str(given["coordinator"]).rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator {given['coordinator']} has no port; give HOST:PORT")
    return {
        "coordinator_address": str(given["coordinator"]),
        "num_processes": processes,
        "process_id": process,
    }


def _of_slurm(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns arguments of jax.distributed.initialize for a task of a SLURM job step.

    JAX's own SLURM detection gives each task one GPU, however many the node has.
    """
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", environment["SLURM_STEP_NODELIST"])[0]
    host = re.sub(r"\[(\d+)[^]]*\]", r"\1", first)
    # As in JAX: from 61440 up, the same on all nodes; differs between jobs, which may share a node.
    port = (
        environment.get("JAX_COORDINATOR_PORT") or 61440 + int(environment["SLURM_JOB_ID"]) % 4096
    )
    found = {
        "coordinator_address": f"{host}:{port}",
        "num_processes": int(environment["SLURM_NTASKS"]),
        "process_id": int(environment["SLURM_PROCID"]),
    }
    gpus = _gpus_of_task(environment)
    return found if gpus is None else {**found, "local_device_ids": gpus}


def _gpus_of_task(environment: Mapping[str, str]) -> list[int] | None:
    """Returns the indices of this SLURM task's own GPUs among those it sees; None for all.

    Tasks that see all GPUs of their node share them evenly.
    """
    tasks = _tasks_on_node(environment)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    on_node = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    seen = on_node if visible is None else len([gpu for gpu in visible.split(",") if gpu])
    if tasks == 1 or "JAX_LOCAL_DEVICE_IDS" in environment or 0 < seen < on_node:
        return None
    place = int(environment["SLURM_LOCALID"])
    if not seen:  # no GPUs, or GPUs that SLURM does not manage
        return [place]
    if seen % tasks:
        raise UserError(
            f"{tasks} tasks cannot share {seen} GPUs of a node evenly: change --ntasks-per-node"
        )
    return list(range(seen // tasks * place, seen // tasks * (place + 1)))


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """Returns the number of tasks of the job step on this node."""
    counts = []
    # For example 8(x2),4: two nodes with eight tasks each and one with four.
    for text in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", text):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(environment.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else int(environment["SLURM_NTASKS"])


def _of_tpu_pod() -> dict[str, Any] | None:
    """Returns arguments of jax.distributed.initialize on a TPU host; None to let JAX find them.

    They are needed before connecting, and JAX has no public function to find them.
    """
    try:
        from jax._src.clusters import ClusterEnv

        coordinator, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, 300
        )
    except (ImportError, AttributeError, TypeError):  # JAX has changed
        return None
    if None in (coordinator, processes, process):
        return None
    return {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}


def say(text: str) -> None:
    """Prints a line, on the first host only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def require_same(about: Mapping[str, Any]) -> None:
    """Raises a UserError on all hosts if something differs on one from that of host 0.

    A run does not notice by itself: each host would train with its own.

    Args:
      about: name -> JSON; with the same names on all hosts.
    """
    if jax.process_count() == 1:
        return
    names = sorted(about)
    texts = [json.dumps(about[name], sort_keys=True, default=str) for name in names]
    digests = np.stack(
        [np.frombuffer(hashlib.sha256(t.encode()).digest(), np.uint8) for t in texts]
    )
    of_hosts = np.asarray(multihost_utils.process_allgather(digests))
    differs = (of_hosts != of_hosts[0]).any(axis=-1)  # [hosts, names]
    if differs.any():
        host = int(differs.any(axis=1).argmax())
        differing = ", ".join(
            name for name, other in zip(names, differs[host], strict=True) if other
        )
        raise UserError(
            f"host {host} has other values than host 0 of: {differing}; give all hosts the same "
            "version, config, records, anchors and conditions"
        )


class StopNotice:
    """Detects a request to stop: SIGTERM to any process of the run. A context manager.

    Schedulers send it before they reclaim a machine.
    """

    def __enter__(self) -> "StopNotice":
        self._asked, self._before, self._calls = False, None, 0
        # With several processes, JAX's own handler informs all, so that they stop at the same step.
        self._alone = not jax.distributed.is_initialized()
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        del number, frame
        self._asked = True

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def heard(self) -> bool:
        """Returns whether to stop, the same on all hosts, which must call it equally often.

        Once True, it stays True.
        """
        if not self._alone:
            self._calls += 1
            # True once only, at the call that the hosts agree on.
            agreed = multihost_utils.reached_preemption_sync_point(self._calls)
            self._asked = self._asked or agreed
        return self._asked
