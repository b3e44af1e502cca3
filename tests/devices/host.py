"""A process of a run whose training is as told: python -m tests.devices.host

It imports, then waits for a line of JSON: `environment`, and `words`, which are WORKDIR WHAT WHAT.
These say what processes 0 and 1 do in place of training; a third, `patient` or `alone`, is for
both. Limits are short. If its standard input is closed before, it ends.
"""

import json
import os
import sys
import threading
import time

import jax

import uss_jax.training.train_separator
from tests.tiny import CONFIGS
from uss_jax.cli.main import command
from uss_jax.devices import hosts, watch
from uss_jax.errors import UserError

watch.LOST_SECONDS, watch._SUSPECT_SECONDS = 12.0, 6.0
watch._BEAT_SECONDS, watch._GRACE_SECONDS = 0.3, 4.0


def _train(config, workdir):
    what = WHATS[int(os.environ["JAX_PROCESS_ID"])]
    print("joined", flush=True)
    if what == "hang":  # as in a collective of an accelerator whose partner is gone
        threading.Event().wait()
    if what == "busy":  # longer than the limit, with the interpreter's lock free
        time.sleep(1.5 * watch.LOST_SECONDS)
    if what == "late":
        time.sleep(3)
    if what == "bad":
        raise UserError("/data/shard-3 cannot be read")
    if what == "bug":
        raise TypeError("of our own making")
    if what == "breaks":  # after its partner is lost
        while not os.path.exists(os.path.join(WORKDIR, "lost")):
            time.sleep(0.1)
    if what in ("broken", "breaks"):
        raise jax.errors.JaxRuntimeError("INTERNAL: no partner")


uss_jax.training.train_separator.train_separator = _train

if __name__ == "__main__":
    about = json.loads(sys.stdin.readline() or "null")
    if about is None:
        sys.exit()
    os.environ.update(about["environment"])  # nothing of it is read by an import
    WORKDIR, *WHATS = about["words"]
    if "alone" in WHATS:
        hosts._JOIN_SECONDS = 8.0
    if "patient" in WHATS:  # what waits for another host then waits too long
        watch._SUSPECT_SECONDS = watch._GRACE_SECONDS = 300.0
    # As users start it: without `end_on_interrupt`, a SIGINT just before the main thread waits for
    # a lock would be handled only when the wait is over.
    config = str(CONFIGS / "resunet30.py")
    sys.argv[1:] = ["train", "--config", config, "--workdir", WORKDIR]
    command()
