"""Reports what XLA compiles where that takes long, so that no command is silent for minutes."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

_EVENT = "/jax/core/compile/backend_compile_duration"
# Most programs are a single operation and compile instantly; only slow ones are reported.
_PATIENCE_SECONDS = 2.0
# Jitted function name -> description.
_PROGRAMS = {
    "step": "the training step",
    "fresh_state": "the initial state",
    "fresh": "the initial state",
    "_apply": "a network",
    "mine_batch": "the detector",
    "anchors_of_batch": "the detector",
    "_figures": "the evaluation of pairs",
    "_measure": "the separation of mixtures",
    "separate_with": "the separator",
}


@contextlib.contextmanager
def long_compilations_reported() -> Iterator[None]:
    """Prints a line on standard error for each program that compiles for over _PATIENCE_SECONDS.

    The line is printed while the program compiles, by the first host only.
    """
    import jax  # imported late to keep --help fast

    timers: dict[int, threading.Timer] = {}  # by thread
    hint = "JAX_COMPILATION_CACHE_DIR=DIR keeps compiled programs for later runs"
    hints = [] if os.environ.get("JAX_COMPILATION_CACHE_DIR") else [f" ({hint})"]

    def report(name: str) -> None:
        what = _PROGRAMS.get(name, f"a program ({name})")
        advice = hints.pop() if hints else ""
        print(
            f"compiling {what}: this can take minutes for full-size networks{advice}",
            file=sys.stderr,
            flush=True,
        )

    def begin(event: str, value: Any, fun_name: str = "", **about: Any) -> None:
        if event == _EVENT and jax.process_index() == 0:
            name = fun_name.removeprefix("jit(").removesuffix(")")
            timer = timers[threading.get_ident()] = threading.Timer(
                _PATIENCE_SECONDS, report, [name]
            )
            timer.daemon = True
            timer.start()

    def end(event: str, value: Any, **about: Any) -> None:
        if event == _EVENT and (timer := timers.pop(threading.get_ident(), None)):
            timer.cancel()

    jax.monitoring.register_scalar_listener(begin)
    jax.monitoring.register_event_duration_secs_listener(end)
    try:
        yield
    finally:
        jax.monitoring.unregister_scalar_listener(begin)
        jax.monitoring.unregister_event_duration_listener(end)
        for timer in list(timers.values()):
            timer.cancel()
