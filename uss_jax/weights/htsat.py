"""Porting rules of HTS-AT, which is both a tagging net and a detector."""

import re

from uss_jax.models.htsat import HTSAT
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
    numbers,
)

# Prefix of the tensor names in HTS-AT's checkpoints.
HTSAT_PREFIX = "sed_model."

_LAYER_NORM = {"weight": ("params", "scale", (0,)), "bias": ("params", "bias", (0,))}
_POSITIONS = {
    "relative_position_bias_table": ("params", "relative_position_bias", (0, 1)),
}
_BLOCK = (
    ("norm{k}", "norm{k}", _LAYER_NORM),
    ("attn", "attention", _POSITIONS),
    ("attn.qkv", "attention/qkv", DENSE),
    ("attn.proj", "attention/projection", DENSE),
    ("mlp.fc{k}", "fc{k}", DENSE),
)
_TABLE = (
    ("bn0", "bn0", NORM),
    ("patch_embed.proj", "patch_embedding", CONV),
    ("patch_embed.norm", "patch_embedding/norm", _LAYER_NORM),
    *(
        (
            f"layers.{{from0[i]}}.blocks.{{from0[j]}}.{row[0]}",
            f"stage{{i}}/block{{j}}/{row[1]}",
            row[2],
        )
        for row in _BLOCK
    ),
    ("layers.{from0[i]}.downsample.norm", "stage{i}/merge_norm", _LAYER_NORM),
    ("layers.{from0[i]}.downsample.reduction", "stage{i}/merge", DENSE),
    ("norm", "norm", _LAYER_NORM),
    ("tscam_conv", "token_semantic", CONV),
)
_FOREIGN = re.compile(
    FOREIGN + r"|layers\..*\.(relative_position_index|attn_mask)|head\.(weight|bias)",
)


def convert_htsat(state_dict: StateDict, fields: Fields | None = None) -> Converted:
    """Converts HTS-AT, with or without `HTSAT_PREFIX`; see `convert`."""
    return convert(PORTING, state_dict, fields)


def _infer(state_dict: StateDict) -> Fields:
    stages = range(len(numbers(state_dict, r"layers\.(\d{1,4})\.")))
    positions = "layers.{}.blocks.0.attn.relative_position_bias_table"
    return dict(
        infer_front_end(state_dict),
        image_size=HTSAT.image_size,
        token_width=state_dict["patch_embed.proj.bias"].size,
        depths=tuple(
            len(numbers(state_dict, rf"layers\.{i}\.blocks\.(\d{{1,4}})\.")) for i in stages
        ),
        heads=tuple(state_dict[positions.format(i)].shape[1] for i in stages),
        classes=state_dict["tscam_conv.bias"].size,
    )


PORTING = Porting(
    name="HTS-AT",
    module=HTSAT,
    table=_TABLE,
    foreign=_FOREIGN,
    counts=lambda fields: (len(fields["depths"]), max(fields["depths"])),
    infer=_infer,
    inputs=lambda net: ((1, net.n_fft),),
    formulas=front_end_formulas,
    prefix=HTSAT_PREFIX,
)
