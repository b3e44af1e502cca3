"""A run's processes: how they find each other, and how they are asked to stop."""

import contextlib
import glob
import importlib.util
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import multihost_utils

from uss_jax.errors import UserError
from uss_jax.training.watch import LOST_SECONDS, Relay, Watch, end_process

# What says it of a process where neither a TPU pod nor SLURM does, such as a JobSet's manifest.
ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}

# In which all processes must have started.
_JOIN_SECONDS = 300.0


@contextlib.contextmanager
def join_hosts(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    workdir: str | os.PathLike | None = None,
) -> Iterator[None]:
    """Connects this process to the others of its run; does nothing where there are no others.

    They are named by the arguments, by the environment variables JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, by SLURM's variables of a job step with several tasks, or
    by a TPU pod. Inside the context, when one process is lost or fails, the others end within 90
    seconds; see Watch.

    Args:
      coordinator: host and port of process 0.
      processes: number of processes.
      process: number of this one, from 0.
      workdir: folder of the run, whose last checkpoint is named when a process is lost.

    Raises:
      UserError: some of the three are missing, or they do not fit each other.
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
    with _joined(found, workdir):
        yield


def _joined(
    arguments: Mapping[str, Any], workdir: str | os.PathLike | None
) -> contextlib.AbstractContextManager:
    """Connects this process to the others; returns the context that watches over them."""
    coordinator, process = arguments["coordinator_address"], arguments["process_id"]
    # At its own time limit JAX would abort with a stack trace.
    late = threading.Timer(
        _JOIN_SECONDS,
        end_process,
        [
            f"the {arguments['num_processes']} hosts did not all connect within "
            f"{_JOIN_SECONDS:.0f} seconds: start the same command on each of them, and see that "
            f"they reach host 0 at {coordinator}"
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
            heartbeat_timeout_seconds=round(10 * LOST_SECONDS),  # Watch has its own
            shutdown_timeout_seconds=round(LOST_SECONDS),  # Watch lets all come to it together
        )
    finally:
        late.cancel()
        if relay:
            relay.close()
    try:  # it has no public name; orbax uses it in this way
        from jax._src.distributed import global_state

        store = global_state.client
    except (ImportError, AttributeError):  # JAX has changed: a loss ends all by its abort
        return contextlib.nullcontext()
    return Watch(store, process, arguments["num_processes"], coordinator, workdir, relay)


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


def _of_slurm(environment: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of jax.distributed.initialize for a task of a SLURM job step.

    JAX's own reading of SLURM gives each task one GPU, however many the node has.
    """
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", environment["SLURM_STEP_NODELIST"])[0]
    host = re.sub(r"\[(\d+)[^]]*\]", r"\1", first)
    # Above 61440 and the same on all nodes, as in JAX; two jobs can share a node.
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
    """Which of the GPUs that a SLURM task sees are its own; None for all.

    Where SLURM shows all tasks of a node the same GPUs, they share them evenly.
    """
    tasks = _tasks_on_node(environment)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    on_node = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    seen = on_node if visible is None else len([gpu for gpu in visible.split(",") if gpu])
    if tasks == 1 or "JAX_LOCAL_DEVICE_IDS" in environment or 0 < seen < on_node:
        return None
    place = int(environment["SLURM_LOCALID"])
    if not seen:  # GPUs that SLURM knows nothing of, or none
        return [place]
    if seen % tasks:
        raise UserError(
            f"{tasks} tasks cannot share {seen} GPUs of a node evenly: change --ntasks-per-node"
        )
    return list(range(seen // tasks * place, seen // tasks * (place + 1)))


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """How many tasks of the job step are on this node."""
    counts = []
    # Such as 8(x2),4: two nodes of eight and one of four.
    for text in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", text):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(environment.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else int(environment["SLURM_NTASKS"])


def _of_tpu_pod() -> dict[str, Any] | None:
    """The arguments of jax.distributed.initialize on a TPU host; None where JAX is to find them.

    They are wanted before joining, and JAX has no public function that finds them.
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
