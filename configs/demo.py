"""The separator in the package, which launch/demo.sh trains on the bundled recordings: `demo.py`.

quickstart.py's separator, trained for longer and on more varied mixtures. With a hundred
recordings, variety counts more than the size of the net. `demo.py:steps=20000,asked=varied` is the
recipe for about a thousand recordings: most items are asked with another condition than their own.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

# Shares of `query.source`; "varied" needs query.table, and several recordings of most classes.
ASKED = {"own": {}, "varied": {"own": 0.4, "other": 0.3, "mean": 0.3}}


def get_config(argument: str = "steps=5000") -> ConfigDict:
    """Returns the config of a run of that many steps."""
    name, _, rest = argument.partition("=")
    steps, _, asked = rest.partition(",asked=")
    if name != "steps" or not steps.isdecimal() or int(steps) < 1000 or asked not in ("", *ASKED):
        raise ValueError(
            f"{argument!r}: expected steps=N with N from 1000, and perhaps asked={'|'.join(ASKED)}"
        )
    quickstart = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))
    config = quickstart["get_config"]("part=separator")
    config.data.clip_seconds = 10.0
    config.data.threads = 2
    config.total_steps = config.schedule.total_steps = int(steps)
    config.schedule.warm_up_steps = 200
    config.ema_decay = 0.999
    config.query.one_class_share = 0.25
    for source, share in ASKED[asked or "own"].items():
        config.query.source[source] = share
    # Other segments of a clip than the best, at other levels.
    config.anchors.top_k = 4
    config.anchors.jitter_samples = 8000
    config.mixing.gain_db = 6.0
    config.mixing.order = "conflict_free"
    return config
