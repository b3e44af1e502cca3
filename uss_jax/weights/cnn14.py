"""Porting rules of PANNs' tagging net `Cnn14` and detector `Cnn14_DecisionLevelMax`."""

import re

from uss_jax.models.cnn14 import Cnn14
from uss_jax.weights.front_end import FOREIGN, front_end_formulas, infer_front_end
from uss_jax.weights.porting import (
    CONV,
    DENSE,
    NORM,
    Converted,
    Fields,
    Porting,
    StateDict,
    convert,
    count,
)

_TABLE = (
    ("bn0", "bn0", NORM),
    ("conv_block{i}.conv{k}", "conv_block{i}/conv{k}", CONV),
    ("conv_block{i}.bn{k}", "conv_block{i}/bn{k}", NORM),
    ("fc1", "fc1", DENSE),
    ("fc_audioset", "fc_audioset", DENSE),
)


def convert_cnn14(state_dict: StateDict, fields: Fields | None = None) -> Converted:
    """Converts `Cnn14` or `Cnn14_DecisionLevelMax`, which hold the same tensors; see `convert`."""
    return convert(PORTING, state_dict, fields)


def _infer(state_dict: StateDict) -> Fields:
    levels = count(state_dict, r"conv_block(\d{1,4})\.")
    return dict(
        infer_front_end(state_dict),
        channels=tuple(state_dict[f"conv_block{i}.bn2.weight"].size for i in levels),
        classes=state_dict["fc_audioset.bias"].size,
    )


PORTING = Porting(
    name="Cnn14",
    module=Cnn14,
    table=_TABLE,
    foreign=re.compile(FOREIGN),
    counts=lambda fields: (len(fields["channels"]), 1),
    infer=_infer,
    inputs=lambda net: ((1, net.hop_samples * 2 ** len(net.channels)),),
    formulas=front_end_formulas,
)
