"""Porting rules of bytedance/uss's separator `ResUNet30`, of any widths and depth."""

import re
from collections import Counter

from uss_jax.errors import UserError
from uss_jax.models.resunet import ResUNet
from uss_jax.weights.front_end import cosine_kernel
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

_BLOCKS = (  # shared by encoder, centre and decoder
    ("base.{torch}.bn{k}", "{flax}/bn{k}", NORM),
    ("base.{torch}.conv{k}", "{flax}/conv{k}", CONV),
    ("base.{torch}.shortcut", "{flax}/shortcut", CONV),
    ("film.{film}->beta{k}", "{flax}/film{k}/shift", DENSE),
)
_PLACES = (
    ("encoder_block{i}.conv_block{j}", "encoder_block{i}/conv_block{j}"),
    ("conv_block{centre}a.conv_block{j}", "centre_block/conv_block{j}"),
    ("decoder_block{i}.conv_block{after}", "decoder_block{i}/conv_block{j}"),
)
_TABLE = (
    ("base.bn0", "bn0", NORM),
    ("base.pre_conv", "pre_conv", CONV),
    *(
        (
            row[0].replace("{torch}", torch_name).replace("{film}", torch_name.replace(".", "->")),
            row[1].replace("{flax}", flax_name),
            row[2],
        )
        for torch_name, flax_name in _PLACES
        for row in _BLOCKS
    ),
    ("base.decoder_block{i}.bn1", "decoder_block{i}/bn", NORM),
    ("base.decoder_block{i}.conv1", "decoder_block{i}/up", CONV),
    ("film.decoder_block{i}->beta1", "decoder_block{i}/film/shift", DENSE),
    ("base.after_conv", "after_conv", CONV),
)
_FOREIGN = re.compile(
    r".*\.num_batches_tracked|base\.i?stft\..*"
    r"|base\.decoder_block\d+\.bn2\..*|film\.decoder_block\d+->beta2\..*",
)


def convert_resunet(state_dict: StateDict, fields: Fields | None = None) -> Converted:
    """Converts a separator (`base.*` and `film.*`); see `convert`."""
    return convert(PORTING, state_dict, fields)


def _infer(state_dict: StateDict) -> Fields:
    n_fft = 2 * (state_dict["base.bn0.weight"].size - 1)
    if n_fft != ResUNet.n_fft:  # the reference has one transform; no tensor tells hop or rate
        raise UserError(
            f"the separator has an STFT of {n_fft} samples, whose hop is unknown; supported is "
            f"{ResUNet.n_fft}, that of ResUNet30"
        )
    levels = count(state_dict, r"base\.encoder_block(\d{1,4})\.")
    # All FiLM layers share one condition width; the majority decides if some are misshapen.
    widths = Counter(
        array.shape[-1] for name, array in state_dict.items() if re.match(r"film\..*weight", name)
    )
    if not widths:
        raise KeyError("film.encoder_block1->conv_block1->beta1.weight")
    return dict(
        n_fft=n_fft,
        hop_samples=ResUNet.hop_samples,
        channels=tuple(
            state_dict[f"base.encoder_block{i}.conv_block1.bn2.weight"].size for i in levels
        ),
        blocks_per_level=len(count(state_dict, r"base\.encoder_block1\.conv_block(\d{1,4})\.")),
        audio_channels=state_dict["base.pre_conv.weight"].shape[1],
        condition_width=widths.most_common(1)[0][0],
    )


def _formulas(fields: Fields) -> StateDict:
    return {"base.stft.conv_real.weight": cosine_kernel(fields["n_fft"])}


PORTING = Porting(
    name="ResUNet",
    module=ResUNet,
    table=_TABLE,
    foreign=_FOREIGN,
    counts=lambda fields: (len(fields["channels"]), fields.get("blocks_per_level", 1)),
    infer=_infer,
    inputs=lambda net: ((1, net.audio_channels, 2 * net.n_fft), (1, net.condition_width)),
    formulas=_formulas,
)
