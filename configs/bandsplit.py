"""The band-split separator: `bandsplit.py:size=base|small|large,condition=...,data=full|balanced`.

The recipe of resunet30.py, whose other choices it takes too, with attention over time and bands
instead of a U-Net (models/bandsplit.py). `base` costs as much as ResUNet30, in products that suit
accelerators better; `size=tiny` is quickstart.py's recipe at 16 kHz, with a net of similar cost.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

# Widths of the bands in bins, about equal in mel.
BANDS_32_KHZ = (2,) * 5 + (4,) * 14 + (8,) * 13 + (16,) * 14 + (32,) * 14 + (64,) * 2 + (54,)
BANDS_16_KHZ = (2,) * 3 + (4,) * 7 + (8,) * 7 + (16,) * 7 + (32, 22)
# GMAC of a forward pass of 2 s: small 14, base 54, large 236; ResUNet30 51.
SIZES = {
    "base": dict(width=256, layers=4, head_width=64, hidden_width=683),
    "tiny": dict(width=48, layers=2, head_width=16, hidden_width=128),
    "small": dict(width=128, layers=4, head_width=32, hidden_width=341),
    "large": dict(width=384, layers=8, head_width=64, hidden_width=1024),
}


def get_config(argument: str = "size=base") -> ConfigDict:
    """Returns the config; `argument` chooses the size, and what resunet30.py's chooses."""
    parts = argument.split(",")
    sizes = [part.partition("=")[2] for part in parts if part.startswith("size=")] or ["base"]
    others = [part for part in parts if not part.startswith("size=")]
    tiny = sizes == ["tiny"]
    if len(sizes) > 1 or sizes[0] not in SIZES or (tiny and others):
        raise ValueError(
            f"{argument!r}: expected size={'|'.join(SIZES)}, and further choices of resunet30.py "
            "except for tiny"
        )
    if tiny:
        config = _base("quickstart.py")("part=separator")
        transform = dict(n_fft=512, hop_samples=256, bands=BANDS_16_KHZ)
    else:
        config = _base("resunet30.py")(",".join(others) or "condition=soft")
        transform = dict(n_fft=2048, hop_samples=512, bands=BANDS_32_KHZ)
    norm, dtype = config.separator.condition_norm, config.separator.dtype
    config.separator = ConfigDict(
        dict(net="bandsplit", **transform, **SIZES[sizes[0]], audio_channels=1)
    )
    # Frames on either side that attention over time reaches in a layer; 0: all. 32 are half a
    # second, and windows of long recordings then agree with one pass.
    config.separator.time_span = 32
    config.separator.condition_norm = norm  # norm to which conditions are scaled; 0: as they are
    # True: add the condition once; False: it modulates every norm.
    config.separator.condition_added = False
    config.separator.dtype = dtype  # or "bfloat16" inside the layers
    if sizes == ["large"]:
        config.sharding = (("kernel", "fsdp"),)
    config.clip_norm = 1.0  # attention layers need it
    config.schedule = ConfigDict(
        dict(name="cosine", warm_up_steps=config.total_steps // 20, total_steps=config.total_steps)
    )
    config.schedule.learning_rate = 2e-3 if tiny else 5e-4
    return config


def _base(name: str):
    return runpy.run_path(str(pathlib.Path(__file__).with_name(name)))["get_config"]
