"""Ends all processes of a run, with a message, when one of them is lost or fails alone.

Each process sends a heartbeat: every few seconds it changes a value in the key-value store that
JAX keeps in process 0. Process 0 detects stopped heartbeats and records them in the store, where
the others read them; they detect the loss of process 0 by their connection to it. JAX has
heartbeats too, but on a loss it aborts the process with a stack trace, and jaxlib 0.10 cannot call
a Python callback instead: it aborts while converting the argument. So JAX's timeout is set longer.

A collective whose partner is gone may raise an error on CPUs, or hang forever. Therefore a separate
thread ends the process, whatever the main thread does. It cannot prevent an abort by gloo, which
happens on CPUs if a process has several devices and these get out of step after the loss.
"""

import atexit
import contextlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from uss_jax.disk.leaving import leave
from uss_jax.errors import Stopped, UserError, one_line

# A host without a heartbeat for this long is lost; heartbeats continue during compilation.
LOST_SECONDS = 60.0
# The limit after an unexpected error on any host, which the loss of another may have caused.
_SUSPECT_SECONDS = 15.0
_BEAT_SECONDS = 3.0
# How long a process continues after reading that another one ended: it may be about to fail with
# the same error, and the others need time to read the message from process 0.
_GRACE_SECONDS = 6.0
# How long the interpreter may take to exit after an error.
_LEAVE_SECONDS = 30.0

_BEAT, _BROKEN, _END = "uss_jax/beat/", "uss_jax/broken/", "uss_jax/end/"
_DONE = "done"


class Relay:
    """Forwards JAX's connection to process 0, and detects when process 0 is gone or silent.

    JAX aborts the process as soon as this connection breaks. With a relay in between, JAX's end of
    it stays open and the process can exit in its own way.

    Attributes:
      address: address of the relay, to be given to JAX as the coordinator's.
    """

    def __init__(self, coordinator: str):
        host, _, port = coordinator.rpartition(":")
        self._coordinator = host.strip("[]"), int(port)
        self._on_loss: Callable[[str], None] | None = None
        # A Unix socket, because gRPC may connect to a port through an HTTP proxy.
        self._folder = tempfile.mkdtemp(prefix="uss-jax-")
        path = os.path.join(self._folder, "relay")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen()
        self.address = f"unix:{path}"
        threading.Thread(target=self._accept, daemon=True).start()

    def joined(self, on_loss: Callable[[str], None]) -> None:
        """From now on calls `on_loss` with the reason when a connection breaks."""
        self._on_loss = on_loss

    def close(self) -> None:
        """Stops accepting connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                ours, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._coordinator, timeout=LOST_SECONDS)
                except OSError:  # process 0 is not up yet: JAX retries
                    ours.close()
                    continue
                far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for ends in ((ours, far), (far, ours)):
                    threading.Thread(target=self._carry, args=(*ends, far), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, far: socket.socket) -> None:
        why = "its connection broke" if source is far else None
        try:
            while data := self._receive(source):
                sink.sendall(data)
        except TimeoutError:
            why = f"nothing was heard from it for {LOST_SECONDS:.0f} seconds"
        except OSError as error:
            why = f"its connection broke ({error.strerror or error})"
        if why is not None and self._on_loss is not None:
            self._on_loss(why)
            return
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _receive(self, source: socket.socket) -> bytes:
        while True:
            try:
                return source.recv(1 << 16)
            except TimeoutError:  # process 0 is silent until all have joined
                if self._on_loss is not None:
                    raise


class Watch:
    """Sends this process's heartbeat, and ends the process when another one is lost or has failed.

    A context manager: it reports an exception to the other processes; without one it waits until
    they have finished too.
    """

    def __init__(
        self,
        store: Any,
        process: int,
        processes: int,
        coordinator: str,
        last_step: Callable[[], int | None] = lambda: None,
        relay: Relay | None = None,
    ):
        """Starts no thread yet.

        Args:
          store: JAX's client of the key-value store.
          process: index of this process.
          processes: number of processes.
          coordinator: host and port of process 0.
          last_step: returns the step of the run's last checkpoint; None if there is none.
          relay: relay of this process's connection to process 0; None in process 0.
        """
        self._store, self._process, self._processes = store, process, processes
        self._coordinator = coordinator.rpartition(":")[0]
        self._last_step, self._relay = last_step, relay
        self._name = socket.gethostname()
        self._beats: dict[int, tuple[str, float]] = {}  # last beat of each, and when it came
        self._read_beats: dict[int, str] = {}  # beats as last read; empty if not read yet
        self._ends: dict[int, str] = {}  # how processes ended: _DONE or a message
        self._failure: str | None = None  # the first such message
        self._broken: set[int] = set()  # processes with an unexpected error
        self._asking = False  # whether this process has one
        self._heard_of_end: float | None = None
        self._left: tuple[float, int] | None = None  # time of an error, and exit status
        self._over = threading.Event()
        self._ending = threading.Lock()

    def __enter__(self) -> "Watch":
        if self._relay is not None:
            self._relay.joined(self._lost_process_0)
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, Stopped):
            self._write(_END, _DONE)
            # JAX waits at interpreter exit too, but reports a lost host with a stack trace.
            while len(self._ends) < self._processes or self._failure:
                time.sleep(0.2)
            self._over.set()
            return
        # At interpreter exit JAX would wait for processes that never get there.
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        atexit.register(leave, status)
        if not isinstance(error, UserError | KeyboardInterrupt):
            # Perhaps a failed collective, or an error that orbax or others raised because of one.
            self._wait_for_who_broke_it()
        self._left = time.monotonic(), status
        self._write(_END, f"{_host(self._process, self._name)} ended: {_told(error)}")
        # The store ends with process 0, so the others need time to read it.
        until = time.monotonic() + _GRACE_SECONDS + 3 * _BEAT_SECONDS
        while self._process == 0 and len(self._ends) < self._processes:
            if time.monotonic() > until:
                break
            time.sleep(0.2)

    def _wait_for_who_broke_it(self) -> None:
        """Waits while another process may be lost; if one is, this process ends meanwhile."""
        self._read_beats = before = {}
        self._asking = True
        self._write(_BROKEN, "")
        now = time.monotonic()
        until, latest = now + _SUSPECT_SECONDS + 5 * _BEAT_SECONDS, now + LOST_SECONDS
        while len(self._broken) < self._processes:  # else each host has an error of its own
            now = time.monotonic()
            before = before or self._read_beats  # the first that are read after the error
            if not self._failure and now > until and (self._all_live(before) or now > latest):
                return
            time.sleep(0.2)

    def _all_live(self, before: dict[int, str]) -> bool:
        """Tells if every other process sent a heartbeat after those in `before`, or has ended."""
        others = set(range(self._processes)) - {self._process} - set(self._ends)
        return all(self._read_beats.get(other) != before.get(other) for other in others)

    def _beat(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is lost: see Relay
                self._store.key_value_set(
                    f"{_BEAT}{self._process}", f"{count} {self._name}", allow_overwrite=True
                )
                self._ends = self._read(_END)
                failures = (how for how in self._ends.values() if how != _DONE)
                self._failure = self._failure or next(failures, None)
                if self._process == 0 or self._asking:
                    self._broken = set(self._read(_BROKEN))
                    self._read_beats = self._read(_BEAT)
                if self._process == 0:
                    self._note_lost(time.monotonic())
            self._end_when_due(time.monotonic())
            # Poll faster if a process waits; more processes poll less often, to spare process 0.
            waiting = self._ends or self._broken or self._asking
            pause = 0.05 * self._processes if waiting else _BEAT_SECONDS
            self._over.wait(min(pause, _BEAT_SECONDS))

    def _note_lost(self, now: float) -> None:
        """Records in the store the hosts that have sent no heartbeat for too long."""
        limit = _SUSPECT_SECONDS if self._broken else LOST_SECONDS
        for process in range(self._processes):  # one may be lost before its first heartbeat
            beat = self._read_beats.get(process, "")
            before, since = self._beats.setdefault(process, ("", now))
            if beat != before:
                self._beats[process] = beat, now
            elif now - since > limit and self._ends.get(process, _DONE) == _DONE:
                host = _host(process, beat.partition(" ")[2] or "unknown")
                why = f"nothing was heard from it for {limit:.0f} seconds"
                self._write(_END, f"{host} was lost: {why}", process)

    def _end_when_due(self, now: float) -> None:
        if self._left is not None:
            since, status = self._left
            if now - since > _LEAVE_SECONDS:
                leave(status)
        elif self._failure is not None:
            self._heard_of_end = self._heard_of_end or now
            if now - self._heard_of_end > _GRACE_SECONDS:
                self._write(_END, _DONE)  # process 0 need not wait for this one
                self._end(self._failure)

    def _lost_process_0(self, why: str) -> None:
        if self._left is None and not self._over.is_set():
            self._end(self._failure or f"{_host(0, self._coordinator)} was lost: {why}")

    def _end(self, how: str) -> None:
        """Ends this process with a message that names the last checkpoint."""
        if not self._ending.acquire(blocking=False):
            return
        step = self._last_step()
        if step is None:
            then = "there is no checkpoint yet: the same command starts from the beginning"
        else:
            then = f"the last checkpoint is step {step}: the same command resumes from there"
        end_process(f"{how}; {then}")

    def _read(self, folder: str) -> dict[int, str]:
        rows = self._store.key_value_dir_get(folder)
        return {int(key.rpartition("/")[2]): value for key, value in rows}

    def _write(self, folder: str, value: str, process: int | None = None) -> None:
        process = self._process if process is None else process
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"{folder}{process}", value, allow_overwrite=True)


def end_process(sentence: str) -> None:
    """Ends the process at once, from any thread, with a message and exit status 1."""
    # Not through sys.stderr, whose lock the main thread may hold.
    os.write(2, f"uss-jax: {sentence}\n".encode(errors="surrogateescape"))
    os._exit(1)


def _host(process: int, name: str) -> str:
    return f"host {process} ({name})"


def _told(error: BaseException) -> str:
    """Describes an error in one line, for the other hosts."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return one_line(f"{type(error).__name__}: {error}")[:300]
