"""Ctrl-C and SIGTERM at any moment, also while the main thread is inside a compiler or a device's
runtime.
"""

import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from uss_jax.disk.leaving import leave
from uss_jax.errors import tell

# Time for the main thread to react to Ctrl-C before the second thread ends the process.
_PATIENCE_SECONDS = 2.0


def end_on_interrupt() -> None:
    """Makes SIGINT end the process, whatever its main thread is doing.

    Python handles signals in the main thread, between bytecode instructions, which can be minutes
    apart during a compilation. So a second thread listens too. If the main thread reacts in
    time, KeyboardInterrupt unwinds it as usual; if not, or on a second Ctrl-C, the second thread
    removes unfinished files and ends the process. An ignored SIGINT stays ignored.

    On SIGTERM the second thread does so at once, unless a training run listens (StopNotice).
    """
    heard = threading.Event()
    report = sys.unraisablehook

    def hear(number: int, frame: Any) -> NoReturn:
        del number
        heard.set()
        if _compiles(frame):
            _leave_interrupted()
        raise KeyboardInterrupt

    def raise_again(unraisable: Any) -> None:
        # Python swallows exceptions from destructors and GC callbacks: send the signal again.
        if unraisable.exc_type is not KeyboardInterrupt:
            report(unraisable)
            return
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()

    sys.unraisablehook = raise_again
    listening, told = os.pipe()
    os.set_blocking(told, False)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # background jobs inherit that
        signal.signal(signal.SIGINT, hear)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _left_to_the_second_thread)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(listening, heard), daemon=True).start()


def _listen(listening: int, heard: threading.Event) -> NoReturn:
    first = None
    while True:
        signals = os.read(listening, 64)
        if signal.SIGTERM in signals and (
            signal.getsignal(signal.SIGTERM) is _left_to_the_second_thread
        ):
            _leave("terminated", 128 + signal.SIGTERM)
        if signal.SIGINT not in signals:
            continue
        # One key press can arrive twice: from the terminal and from a parent process.
        again = first is not None and time.monotonic() - first > 1.0
        first = first or time.monotonic()
        if again or not heard.wait(_PATIENCE_SECONDS):
            _leave_interrupted()


def _left_to_the_second_thread(number: int, frame: Any) -> None:
    """Handles SIGTERM: Python tells the second thread only of signals that have a handler."""
    del number, frame


def _compiles(frame: Any) -> bool:
    """Returns whether JAX's compiler is among a frame's callers.

    The compiler polls for signals. An exception would unwind it while its threads are running,
    which would crash the process.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == "jax._src.compiler":
            return True
        frame = frame.f_back
    return False


def _leave_interrupted() -> NoReturn:
    _leave("interrupted", 128 + signal.SIGINT)


def _leave(word: str, status: int) -> NoReturn:
    tell(word)
    leave(status)
