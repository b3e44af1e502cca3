"""Ctrl-C at any moment, also while the main thread is inside a compiler or a device's runtime."""

import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from uss_jax.leaving import leave

# So long the main thread may take to hear of Ctrl-C before the process ends without it.
_PATIENCE_SECONDS = 2.0


def end_on_interrupt() -> None:
    """Sees to it that SIGINT ends the process, whatever its main thread is doing.

    Python tells the main thread of a signal between two of its own instructions, which during a
    compilation can be minutes away. So a second thread listens too. When the main thread hears of
    the signal, KeyboardInterrupt ends its blocks as usual; when it does not, or on a second Ctrl-C,
    the second thread removes what is half written and ends the process.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started so, as in the background
        return
    heard = threading.Event()
    report = sys.unraisablehook

    def hear(number: int, frame: Any) -> NoReturn:
        del number
        heard.set()
        if _compiles(frame):
            _leave_interrupted()
        raise KeyboardInterrupt

    def raise_again(unraisable: Any) -> None:
        # Raised in a destructor or a callback of the garbage collector, it got no further.
        if unraisable.exc_type is not KeyboardInterrupt:
            report(unraisable)
            return
        main = threading.main_thread().ident
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()

    sys.unraisablehook = raise_again
    listening, told = os.pipe()
    os.set_blocking(told, False)
    signal.signal(signal.SIGINT, hear)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(listening, heard), daemon=True).start()


def _listen(listening: int, heard: threading.Event) -> NoReturn:
    first = None
    while True:
        if signal.SIGINT not in os.read(listening, 64):
            continue
        # One press can arrive twice, from the terminal and from a parent process.
        again = first is not None and time.monotonic() - first > 1.0
        first = first or time.monotonic()
        if again or not heard.wait(_PATIENCE_SECONDS):
            _leave_interrupted()


def _compiles(frame: Any) -> bool:
    """Tells whether JAX's compiler is among the calls that a frame is in.

    It looks for signals now and then. An exception would unwind it while its own threads still
    work for it, and they would crash the process.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == "jax._src.compiler":
            return True
        frame = frame.f_back
    return False


def _leave_interrupted() -> NoReturn:
    print("uss-jax: interrupted", file=sys.stderr)
    leave(130)
