"""The paper's ablations and further ones: `ablations.py:NAME`, each a small change to resunet30.py.

configs/README.md lists each with the question it answers. All else is as in the base,
resunet30.py:condition=soft,data=balanced (bandsplit.py with the same choices, for the names
bandsplit:...), so that the runs of two names can be compared:

    uss-jax train --config configs/ablations.py:sources=3 --workdir runs/sources3 \
        --config.data.records=/data/audioset/1.0.0 --config.sed_bundle=panns \
        --config.query_bundle=panns
"""

import pathlib
import runpy

from ml_collections import ConfigDict

_NARROW, _WIDE = (16, 32, 64, 128, 192, 192), (48, 96, 192, 384, 576, 576)

# Widths of the bands in bins, about equal in mel; bandsplit.py has 63.
_BANDS_33 = (4,) * 3 + (8,) * 7 + (16,) * 7 + (32,) * 7 + (64,) * 7 + (128,) + (44,)
_BANDS_124 = (1,) * 9 + (2,) * 27 + (4,) * 27 + (8,) * 27 + (16,) * 27 + (32,) * 6 + (13,)

# name -> {config key: value}
ABLATIONS = {
    # The condition.
    "condition=one_hot": {"query.kind": "one_hot"},
    "condition=soft": {},
    "condition=class_vectors": {
        "query.kind": "class_vectors",
        "separator.condition_norm": 10.0,
    },
    "condition=embedding": {"query.kind": "embedding"},
    "condition=text": {"query.kind": "text", "separator.condition_norm": 10.0},
    "condition=text_or_audio": {
        "query.kind": "text_or_audio",
        "query.adaptor_width": 512,
        "separator.condition_norm": 10.0,
    },
    # Training of the query net.
    "query=frozen": {},
    "query=finetuned": {"query.finetune": True},
    "query=adaptor": {"query.adaptor_width": 512},
    "query=shortcut": {"query.adaptor_width": 527, "query.shortcut": True},
    # What items are asked with, half of them; those of mined conditions need query.table.
    "asked=own": {},
    "asked=other": {"query.source.own": 0.5, "query.source.other": 0.5},
    "asked=mean": {"query.source.own": 0.5, "query.source.mean": 0.5},
    "asked=mix": {"query.source.own": 0.5, "query.source.mix": 0.5},
    "asked=masked": {"query.source.own": 0.5, "query.source.masked": 0.5},
    # Source and length of anchors.
    "anchors=device": {},
    "anchors=random": {"anchors.source": "random"},
    "segment=0.5": {"segment_seconds": 0.5},
    "segment=1": {"segment_seconds": 1.0},
    "segment=2": {},
    "segment=4": {"segment_seconds": 4.0},
    "segment=6": {"segment_seconds": 6.0},
    "segment=8": {"segment_seconds": 8.0},
    "segment=10": {"segment_seconds": 10.0},
    # Mixtures.
    "sources=2": {},
    "sources=3": {"mixing.sources": 3},
    "sources=4": {"mixing.sources": 4},
    "energy=matched": {},
    "energy=as_recorded": {"mixing.match_energy": False},
    "energy=random_gain": {"mixing.gain_db": 10.0},
    "order=conflict_free": {"mixing.order": "conflict_free"},
    "silence=0.1": {"mixing.silent_share": 0.1},
    # The separator.
    "net=resunet": {},
    "depth=30": {},
    "depth=60": {"separator.blocks_per_level": 2},
    "width=half": {"separator.channels": _NARROW},
    "width=1.5": {"separator.channels": _WIDE},
    "film=gain": {"separator.film_gain": True},
    "average=0.999": {"ema_decay": 0.999},
    # Loss and training data.
    "loss=l1_wav": {},
    "loss=l1_wav_l1_sp": {"loss": "l1_wav_l1_sp"},
    "loss=si_sdr": {"loss": "si_sdr"},
    "loss=snr_threshold": {"loss": "snr_threshold"},
    "data=balanced": {},
    "data=full": {"data.split": "full_train"},
}

# The same for the band-split separator, whose base is bandsplit.py:condition=soft,data=balanced.
BAND_SPLIT = {
    "net=bandsplit": {},
    "bandsplit_layers=2": {"separator.layers": 2},
    "bandsplit_layers=8": {"separator.layers": 8},
    "bandsplit_width=128": {
        "separator.width": 128,
        "separator.head_width": 32,
        "separator.hidden_width": 384,
    },
    "bandsplit_width=384": {"separator.width": 384, "separator.hidden_width": 1024},
    "bandsplit_bands=33": {"separator.bands": _BANDS_33},
    "bandsplit_bands=124": {"separator.bands": _BANDS_124},
    "bandsplit_span=all": {"separator.time_span": 0},
    "bandsplit_condition=added": {"separator.condition_added": True},
    "bandsplit_channels=2": {"separator.audio_channels": 2, "mixing.pan": 1.0},
}


def get_config(argument: str = "condition=soft") -> ConfigDict:
    """Returns the base config with the changes of one ablation."""
    if argument not in ABLATIONS | BAND_SPLIT:
        raise ValueError(f"{argument!r}: expected one of {', '.join(ABLATIONS | BAND_SPLIT)}")
    base = "resunet30.py" if argument in ABLATIONS else "bandsplit.py"
    module = runpy.run_path(str(pathlib.Path(__file__).with_name(base)))
    config = module["get_config"]("condition=soft,data=balanced")
    config.update_from_flattened_dict((ABLATIONS | BAND_SPLIT)[argument])
    return config
