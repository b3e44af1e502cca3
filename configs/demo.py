"""The separator in the package: `demo.py`, which launch/demo.sh trains on the bundled recordings.

quickstart.py's separator, trained for longer and on more varied mixtures. With a hundred
recordings, variety counts more than the size of the net.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the config."""
    quickstart = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))
    config = quickstart["get_config"]("part=separator")
    config.data.clip_seconds = 10.0
    config.data.threads = 2
    config.total_steps = 5000
    config.schedule.total_steps = 5000
    config.schedule.warm_up_steps = 200
    config.ema_decay = 0.999
    config.query.one_class_share = 0.25
    # Other segments of a clip than the best, at other levels.
    config.anchors.top_k = 4
    config.anchors.jitter_samples = 8000
    config.mixing.gain_db = 6.0
    config.mixing.order = "conflict_free"
    return config
