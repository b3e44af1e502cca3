"""A run's processes: how they find each other, and how they are asked to stop."""

import glob
import importlib.util
import os
import re
import signal
import threading
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from uss_jax.errors import UserError

# What says it of a process where neither a TPU pod nor SLURM does, such as a JobSet's manifest.
ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}


def join_hosts(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Makes this process one of a run's; alone where nothing says that there are others.

    Said by the arguments, by the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID, by SLURM's of a job step with several tasks, or by a TPU pod.

    Args:
      coordinator: host and port of process 0.
      processes: how many there are.
      process: number of this one, from 0.

    Raises:
      UserError: some of the three are missing, or they do not fit each other.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    if all(value is None for value in given.values()):
        given = {name: os.environ.get(key) or None for name, key in ENVIRONMENT.items()}
    if any(value is not None for value in given.values()):
        jax.distributed.initialize(**_explicit(given), cluster_detection_method="deactivate")
    elif "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        jax.distributed.initialize(cluster_detection_method="slurm")
        if _alone_on_its_node() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
            # initialize() gives task i of a node its device i and no other.
            for platform in ("cuda", "rocm"):
                jax.config.update(f"jax_{platform}_visible_devices", "all")
    elif importlib.util.find_spec("libtpu") and glob.glob("/dev/accel*") + glob.glob("/dev/vfio/*"):
        jax.distributed.initialize()


def _alone_on_its_node() -> bool:
    """Whether every node of the SLURM step has a single task, for all its devices."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    return re.fullmatch(r"1(\(x\d+\))?", tasks) is not None


def _explicit(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of jax.distributed.initialize."""
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
        raise UserError(f"--process {process} is not between 0 and --processes {processes} - 1")
    if not str(given["coordinator"]).rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator {given['coordinator']} has no port; give HOST:PORT")
    return {
        "coordinator_address": str(given["coordinator"]),
        "num_processes": processes,
        "process_id": process,
    }


class StopNotice:
    """Whether this run was asked to stop, by SIGTERM to any of its processes.

    Schedulers send it before they take a machine away. Used as a context manager.
    """

    def __enter__(self) -> "StopNotice":
        self._asked, self._before = False, None
        # Of several processes JAX's own handler tells the others, so that all stop at one step.
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

    def heard(self, step: int) -> bool:
        """Whether to stop after this step: the same on all hosts. To be asked once a step."""
        if self._alone:
            return self._asked
        return multihost_utils.reached_preemption_sync_point(step)
