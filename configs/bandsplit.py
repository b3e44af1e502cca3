"""The band-split separator: `bandsplit.py:size=base|small|large,condition=...,data=full|balanced`.

The recipe of resunet30.py, whose other choices it takes too, with attention over time and bands
instead of a U-Net (models/bandsplit.py). `base` costs as much as ResUNet30, in products that suit
accelerators better; `size=tiny` is quickstart.py's recipe at 16 kHz, with a net of similar cost.
`bands=N` spaces about N bands on the mel scale; `separator.bands` lists the widths.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from uss_jax.models.bandsplit import mel_bands

# GMAC of a forward pass of 2 s: small 15, base 52, large 235; ResUNet30 51. Widths of base and
# large are multiples of 128, which a TPU computes at once.
SIZES = {
    "base": dict(width=256, layers=4, head_width=64, hidden_width=640),
    "tiny": dict(width=48, layers=2, head_width=16, hidden_width=128),
    "small": dict(width=128, layers=4, head_width=32, hidden_width=384),
    "large": dict(width=384, layers=8, head_width=64, hidden_width=1024),
}


def get_config(argument: str = "size=base") -> ConfigDict:
    """Returns the config; `argument` chooses size and bands, and what resunet30.py's chooses."""
    parts = argument.split(",")
    own = [part.partition("=") for part in parts if part.startswith(("size=", "bands="))]
    others = [part for part in parts if not part.startswith(("size=", "bands="))]
    chosen = {name: value for name, _, value in own}
    size = chosen.get("size", "base")
    tiny = size == "tiny"
    if len({name for name, _, _ in own}) < len(own) or size not in SIZES or (tiny and others):
        raise ValueError(
            f"{argument!r}: expected size={'|'.join(SIZES)}, bands=N, and further choices of "
            "resunet30.py except for tiny"
        )
    if tiny:
        config = _base("quickstart.py")("part=separator")
        transform, bands = dict(n_fft=512, hop_samples=256), "24"
    else:
        config = _base("resunet30.py")(",".join(others) or "condition=soft")
        transform, bands = dict(n_fft=2048, hop_samples=512), "60"
    widths = _mel_bands(chosen.get("bands", bands), transform["n_fft"], config.sample_rate)
    norm, dtype = config.separator.condition_norm, config.separator.dtype
    config.separator = ConfigDict(
        dict(net="bandsplit", **transform, bands=widths, **SIZES[size], audio_channels=1)
    )
    # Frames on either side that attention over time reaches in a layer; 0: all. 32 are half a
    # second, and windows of long recordings then nearly agree with one pass.
    config.separator.time_span = 32
    config.separator.condition_norm = norm  # norm to which conditions are scaled; 0: as they are
    # True: add the condition once; False: it modulates every norm.
    config.separator.condition_added = False
    config.separator.dtype = dtype  # or "bfloat16" inside the layers
    if size == "large":
        config.sharding = (("kernel", "fsdp"),)
    # With losses in dB nearly every step is scaled to this norm, with `l1_wav` rare spikes are.
    config.clip_norm = 1.0
    config.schedule = ConfigDict(
        dict(name="cosine", warm_up_steps=config.total_steps // 20, total_steps=config.total_steps)
    )
    config.schedule.learning_rate = 2e-3 if tiny else 5e-4
    return config


def _mel_bands(count: str, n_fft: int, sample_rate: int) -> tuple[int, ...]:
    if not count.isdecimal() or not 1 <= int(count) <= 256:
        raise ValueError(f"bands={count}: expected a whole number from 1 to 256")
    return mel_bands(int(count), n_fft, sample_rate)


def _base(name: str):
    return runpy.run_path(str(pathlib.Path(__file__).with_name(name)))["get_config"]
