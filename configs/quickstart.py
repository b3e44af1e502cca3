"""Tagger and separator, small enough for two CPU cores: `quickstart.py:part=tagger|separator`.

The recipes of tagger_cnn14.py and resunet30.py at 16 kHz with small nets; launch/quickstart.sh runs
the separator's on the bundled sounds in minutes.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config(argument: str = "part=separator") -> ConfigDict:
    """Returns the config of the tagger or of the separator."""
    parts = {"part=tagger": _tagger, "part=separator": _separator}
    if argument not in parts:
        raise ValueError(f"{argument!r}: expected {' or '.join(parts)}")
    config = parts[argument]()
    config.seed = 0
    config.sample_rate = 16000
    config.data.split = "train"
    config.data.clip_seconds = 5.0
    config.data.threads = 1
    config.data.workers = 0
    config.log_every_steps = 50
    config.checkpoint_every_steps = 100
    return config


def _base(name: str) -> ConfigDict:
    return runpy.run_path(str(pathlib.Path(__file__).with_name(name)))["get_config"]()


def _tagger() -> ConfigDict:
    config = _base("tagger_cnn14.py")
    config.total_steps = 1000
    config.global_batch = 8
    config.tagger.n_fft = 512
    config.tagger.hop_samples = 320
    config.tagger.mel_bins = 32
    config.tagger.f_max = 7500.0
    config.tagger.channels = (16, 32, 64, 128)
    config.outputs = ("clipwise", "tagging")
    # The bundled clips are cleaner than most recordings, and short ones end in digital silence.
    config.noise = ConfigDict(dict(least_snr_db=10.0, most_snr_db=60.0))
    config.norm_momentum = 0.01  # low, since statistics of 8 clips are noisy
    config.mixup_alpha = 0.2
    config.spec_augment.time_width = 16
    config.spec_augment.mel_width = 4
    config.schedule = ConfigDict(
        dict(name="cosine", learning_rate=5e-3, warm_up_steps=50, total_steps=1000)
    )
    return config


def _separator() -> ConfigDict:
    config = _base("resunet30.py")
    config.total_steps = 500
    config.global_batch = 6
    config.mixing.group_size = 6
    # Speed change augments the data, 8 minutes of sound instead of 5000 hours.
    config.speed = ConfigDict(dict(least=0.7, most=1.4))
    config.sed_bundle = config.query_bundle = "yamnet"
    config.sed_net = config.query_net = "yamnet"
    config.anchors.source = "table"  # `uss-jax mine` finds the anchors of hundreds of clips at once
    config.query.kind = "class_vectors"
    config.query.one_class_share = 0.1
    config.loss = "snr_threshold"
    config.clip_norm = 5.0  # otherwise a few items that are nearly separated drive the step
    config.separator.n_fft = 512
    config.separator.hop_samples = 256
    config.separator.channels = (8, 16, 32, 64)
    config.separator.condition_norm = 10.0
    config.schedule = ConfigDict(
        dict(name="cosine", learning_rate=2e-3, warm_up_steps=50, total_steps=500)
    )
    return config
