"""Converts PyTorch state dicts of foreign checkpoints to Flax variables and back, by name tables.

The nets are PANNs' tagging net `Cnn14` and detector `Cnn14_DecisionLevelMax` (the same tensors),
HTS-AT, which is both, the separator `ResUNet30` of bytedance/uss and variants with other widths and
depths, and whole training checkpoints that hold a separator and PANNs' nets. This module handles
arrays only: `uss_jax.weights.unpickle` reads the files. A foreign tensor is one without a Flax
counterpart.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from uss_jax.audio.mel import mel_matrix
from uss_jax.audio.stft import hann_window
from uss_jax.bundles.nets import check_fields
from uss_jax.errors import UserError
from uss_jax.models.cnn14 import Cnn14
from uss_jax.models.htsat import HTSAT
from uss_jax.models.resunet import ResUNet

StateDict = dict[str, np.ndarray]
Fields = dict[str, Any]
Leaves = dict[str, tuple[str, tuple[int, ...]]]

# Leaves of a layer: torch leaf -> (collection, Flax leaf, permutation of the axes). Convolutions
# are OIHW in torch and HWIO here. Transposed ones are IOHW in torch and HWOI here, as
# `transpose_kernel` requires: the same permutation.
_NORM = {
    "weight": ("params", "scale", (0,)),
    "bias": ("params", "bias", (0,)),
    "running_mean": ("batch_stats", "mean", (0,)),
    "running_var": ("batch_stats", "var", (0,)),
}
_CONV = {"weight": ("params", "kernel", (2, 3, 1, 0)), "bias": ("params", "bias", (0,))}
_DENSE = {"weight": ("params", "kernel", (1, 0)), "bias": ("params", "bias", (0,))}
_LAYER_NORM = {"weight": ("params", "scale", (0,)), "bias": ("params", "bias", (0,))}
_POSITIONS = {
    "relative_position_bias_table": ("params", "relative_position_bias", (0, 1)),
}

# Porting tables: torch layer, Flax layer, leaves. {i} is the level and {j} the block of a level,
# from 1; {from0[i]} and {from0[j]} are the same from 0; {k} is 1 or 2. Rows of what a net lacks (a
# shortcut between equal widths, the bias of a convolution before batch norm) are skipped.
_CNN14_TABLE = (
    ("bn0", "bn0", _NORM),
    ("conv_block{i}.conv{k}", "conv_block{i}/conv{k}", _CONV),
    ("conv_block{i}.bn{k}", "conv_block{i}/bn{k}", _NORM),
    ("fc1", "fc1", _DENSE),
    ("fc_audioset", "fc_audioset", _DENSE),
)
_BLOCKS = (  # shared by encoder, centre and decoder
    ("base.{torch}.bn{k}", "{flax}/bn{k}", _NORM),
    ("base.{torch}.conv{k}", "{flax}/conv{k}", _CONV),
    ("base.{torch}.shortcut", "{flax}/shortcut", _CONV),
    ("film.{film}->beta{k}", "{flax}/film{k}/shift", _DENSE),
)
_PLACES = (
    ("encoder_block{i}.conv_block{j}", "encoder_block{i}/conv_block{j}"),
    ("conv_block{centre}a.conv_block{j}", "centre_block/conv_block{j}"),
    ("decoder_block{i}.conv_block{after}", "decoder_block{i}/conv_block{j}"),
)
_RESUNET_TABLE = (
    ("base.bn0", "bn0", _NORM),
    ("base.pre_conv", "pre_conv", _CONV),
    *(
        (
            row[0].replace("{torch}", torch_name).replace("{film}", torch_name.replace(".", "->")),
            row[1].replace("{flax}", flax_name),
            row[2],
        )
        for torch_name, flax_name in _PLACES
        for row in _BLOCKS
    ),
    ("base.decoder_block{i}.bn1", "decoder_block{i}/bn", _NORM),
    ("base.decoder_block{i}.conv1", "decoder_block{i}/up", _CONV),
    ("film.decoder_block{i}->beta1", "decoder_block{i}/film/shift", _DENSE),
    ("base.after_conv", "after_conv", _CONV),
)
_HTSAT_BLOCK = (
    ("norm{k}", "norm{k}", _LAYER_NORM),
    ("attn", "attention", _POSITIONS),
    ("attn.qkv", "attention/qkv", _DENSE),
    ("attn.proj", "attention/projection", _DENSE),
    ("mlp.fc{k}", "fc{k}", _DENSE),
)
_HTSAT_TABLE = (
    ("bn0", "bn0", _NORM),
    ("patch_embed.proj", "patch_embedding", _CONV),
    ("patch_embed.norm", "patch_embedding/norm", _LAYER_NORM),
    *(
        (
            f"layers.{{from0[i]}}.blocks.{{from0[j]}}.{row[0]}",
            f"stage{{i}}/block{{j}}/{row[1]}",
            row[2],
        )
        for row in _HTSAT_BLOCK
    ),
    ("layers.{from0[i]}.downsample.norm", "stage{i}/merge_norm", _LAYER_NORM),
    ("layers.{from0[i]}.downsample.reduction", "stage{i}/merge", _DENSE),
    ("norm", "norm", _LAYER_NORM),
    ("tscam_conv", "token_semantic", _CONV),
)

# Foreign tensors: counters, buffers that follow from formulas, and layers no forward pass uses.
_CNN14_FOREIGN = re.compile(
    r".*\.num_batches_tracked|(spectrogram_extractor|logmel_extractor)\..*",
)
_RESUNET_FOREIGN = re.compile(
    r".*\.num_batches_tracked|base\.i?stft\..*"
    r"|base\.decoder_block\d+\.bn2\..*|film\.decoder_block\d+->beta2\..*",
)
_HTSAT_FOREIGN = re.compile(
    r".*\.num_batches_tracked|(spectrogram_extractor|logmel_extractor)\..*"
    r"|layers\..*\.(relative_position_index|attn_mask)|head\.(weight|bias)",
)
# The detector's smoothing filter; only whole training checkpoints hold it.
SMOOTHING = "anchor_segment_detector.anchor_segment_scorer.smooth_filter"

# Settings that do not follow from a tagging net's arrays: PANNs' published front ends, by n_fft.
_FRONT_ENDS = {
    1024: dict(sample_rate=32000, hop_samples=320, f_min=50.0, f_max=14000.0),
    512: dict(sample_rate=16000, hop_samples=160, f_min=50.0, f_max=8000.0),
    256: dict(sample_rate=8000, hop_samples=80, f_min=50.0, f_max=4000.0),
}

# Prefix of the tensor names in HTS-AT's checkpoints.
HTSAT_PREFIX = "sed_model."

# Whole training checkpoints: part of a bundle -> prefix of its tensors.
LIGHTNING_PREFIXES = {
    "separator": "ss_model.",
    "sed": "anchor_segment_detector.sed_model.",
    "query": "query_net.base.",
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A net converted from a foreign checkpoint.

    Attributes:
      module: class of the Flax module.
      fields: keyword arguments of the module.
      variables: {"params": ..., "batch_stats": ...} of numpy arrays.
      foreign: foreign tensors, unchanged, by full name.
    """

    module: type[nn.Module]
    fields: Fields
    variables: dict[str, Any]
    foreign: StateDict

    def build(self) -> nn.Module:
        """Builds the Flax module."""
        return self.module(**self.fields)


@dataclasses.dataclass(frozen=True)
class Net:
    """The porting rules of one kind of net.

    Attributes:
      name: name in messages.
      module: class of the Flax module.
      table: rows of (torch layer, Flax layer, leaves).
      foreign: pattern of the names of foreign tensors.
      counts: from fields, the numbers of levels and of blocks in the deepest level, for which rows
        are repeated.
      infer: from a state dict, the fields of the module.
      inputs: from a module, the shapes of the arguments that initialise it.
      formulas: from fields, names and values of the fixed buffers that follow from them.
    """

    name: str
    module: type[nn.Module]
    table: tuple[tuple[str, str, dict], ...]
    foreign: re.Pattern
    counts: Callable[[Fields], tuple[int, int]]
    infer: Callable[[StateDict], Fields]
    inputs: Callable[[nn.Module], tuple[tuple[int, ...], ...]]
    formulas: Callable[[Fields], StateDict]


def convert_cnn14(state_dict: StateDict, fields: Fields | None = None) -> Converted:
    """Converts `Cnn14` or `Cnn14_DecisionLevelMax`, which hold the same tensors.

    Args:
      state_dict: torch names and arrays.
      fields: fields of the Flax module; inferred from the arrays when None.

    Raises:
      UserError: tensors are missing, unexpected or invalid; all of them are listed.
    """
    return _finish(*_convert(CNN14, state_dict, "", fields))


def convert_htsat(state_dict: StateDict, fields: Fields | None = None) -> Converted:
    """Converts HTS-AT, with or without `HTSAT_PREFIX`; see `convert_cnn14`."""
    prefix = HTSAT_PREFIX if any(name.startswith(HTSAT_PREFIX) for name in state_dict) else ""
    members = {name: state_dict[name] for name in state_dict if name.startswith(prefix)}
    converted, problems = _convert(_HTSAT, members, prefix, fields)
    problems += [f"{name} is unexpected" for name in state_dict if name not in members]
    return _finish(converted, problems)


def convert_resunet(state_dict: StateDict, fields: Fields | None = None) -> Converted:
    """Converts a separator (`base.*` and `film.*`); see `convert_cnn14`."""
    return _finish(*_convert(RESUNET, state_dict, "", fields))


def convert_lightning(state_dict: StateDict) -> dict[str, Converted]:
    """Converts a whole training checkpoint to "separator", and "sed" and "query" if present."""
    parts, problems, known = {}, [], {SMOOTHING}
    for part, prefix in LIGHTNING_PREFIXES.items():
        members = {name: state_dict[name] for name in state_dict if name.startswith(prefix)}
        known.update(members)
        if members or part == "separator":
            parts[part], found = _convert(_net_of(part), members, prefix, None)
            problems += found
    problems += [f"{name} is unexpected" for name in state_dict if name not in known]
    for part in parts:
        _finish(parts[part], problems)
    # Every foreign tensor belongs to a part; the smoothing filter to the detector if there is one.
    owner = parts.get("sed", parts["separator"])
    owner.foreign.update({n: state_dict[n] for n in (SMOOTHING,) if n in state_dict})
    return parts


def state_dict_of(part: str, fields: Fields, variables: dict, prefix: str = "") -> StateDict:
    """Converts Flax variables to a torch state dict, the inverse of the conversions above.

    Args:
      part: "separator", "sed" or "query".
      fields: the module's fields, or a bundle config's, which have `net` and lists for tuples.
      variables: {"params": ..., "batch_stats": ...}.
      prefix: prefix of every name, such as `LIGHTNING_PREFIXES[part]`.

    Raises:
      UserError: the net or one of its leaves has no PyTorch counterpart.
    """
    net = _net_of(part, fields.get("net"))
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name != "net"
    }
    flat = flatten_dict(variables, sep="/")
    leaves = _leaves(net, fields, _shapes(net, fields))
    return {
        prefix + name: np.ascontiguousarray(np.transpose(flat[path], np.argsort(permutation)))
        for name, (path, permutation) in leaves.items()
    }


def _net_of(part: str, name: str | None = None) -> Net:
    """Returns a part's porting rules by name of the net; the first of the part when None."""
    nets = {"resunet": RESUNET} if part == "separator" else {"cnn14": CNN14, "htsat": _HTSAT}
    name = name or next(iter(nets))
    if name not in nets:
        raise UserError(
            f"the {part} is a {name}, which has no PyTorch counterpart; only "
            f"{' and '.join(nets)} can be written for PyTorch"
        )
    return nets[name]


def _finish(converted: Converted | None, problems: list[str]) -> Converted:
    """Returns the converted net; raises a UserError that lists any problems."""
    if problems or converted is None:
        raise UserError(f"{len(problems)} of the tensors do not fit: {'; '.join(problems)}")
    return converted


def _convert(
    net: Net, state_dict: StateDict, prefix: str, fields: Fields | None
) -> tuple[Converted | None, list[str]]:
    """Converts the tensors under a prefix; returns the net and a list of problems."""
    plain = {name.removeprefix(prefix): array for name, array in state_dict.items()}
    try:
        fields = net.infer(plain) if fields is None else fields
    except KeyError as error:
        return None, [f"{prefix}{error.args[0]} is missing (is this a {net.name}?)"]
    except IndexError:
        return None, [f"the arrays have too few axes for a {net.name}"]
    shapes = _shapes(net, fields)
    leaves = _leaves(net, fields, shapes)

    flat, foreign, problems = {}, {}, []
    for name, array in plain.items():
        if name in leaves:
            path, permutation = leaves[name]
            wanted = tuple(np.array(shapes[path])[np.argsort(permutation)].tolist())
            if array.dtype.kind != "f":
                problems.append(f"{prefix}{name} holds {array.dtype} instead of floats")
            elif not np.isfinite(array).all():
                problems.append(f"{prefix}{name} holds NaN or infinite values")
            elif array.shape == wanted:
                flat[path] = np.ascontiguousarray(np.transpose(array, permutation), np.float32)
            else:
                problems.append(f"{prefix}{name} has shape {array.shape} instead of {wanted}")
        elif net.foreign.fullmatch(name):
            foreign[prefix + name] = array
        else:
            problems.append(f"{prefix}{name} is unexpected")
    problems += [f"{prefix}{name} is missing" for name in leaves if name not in plain]
    problems += [prefix + text for text in _wrong_formulas(net, fields, plain)]
    variables = {"params": {}, "batch_stats": {}} | unflatten_dict(flat, sep="/")
    return Converted(net.module, fields, variables, foreign), problems


def _leaves(net: Net, fields: Fields, paths: Collection[str]) -> Leaves:
    """Maps torch names to (path of the Flax leaf, permutation), for all leaves of the net."""
    levels, blocks = (range(1, count + 1) for count in net.counts(fields))
    leaves = {}
    for torch_layer, flax_layer, holds in net.table:
        for i, j, k in itertools.product(levels, blocks, (1, 2)):
            from0 = dict(i=i - 1, j=j - 1)
            index = dict(i=i, j=j, k=k, from0=from0, after=j + 1, centre=len(levels) + 1)
            for leaf, (collection, flax_leaf, permutation) in holds.items():
                path = f"{collection}/{flax_layer.format(**index)}/{flax_leaf}"
                if path in paths:
                    leaves[f"{torch_layer.format(**index)}.{leaf}"] = (path, permutation)
    if homeless := sorted(set(paths) - {path for path, _ in leaves.values()}):
        raise UserError(f"the PyTorch {net.name} has no tensor for {', '.join(homeless)}")
    return leaves


def _shapes(net: Net, fields: Fields) -> dict[str, tuple[int, ...]]:
    """Maps the path of every leaf of the Flax module to its shape."""
    check_fields(fields, net.name)
    module = net.module(**fields)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in net.inputs(module)]
    try:
        variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    except ValueError as error:
        raise UserError(f"the arrays do not form a {net.name}: {error}") from error
    return {path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()}


def _wrong_formulas(net: Net, fields: Fields, state_dict: StateDict) -> Iterator[str]:
    """Yields a message for each fixed buffer that differs from what uss_jax computes instead."""
    for name, expected in net.formulas(fields).items():
        array = state_dict.get(name, expected)
        # Published buffers differ by rounding only; a symmetric window would differ by 3e-3.
        if array.shape != expected.shape or not _is_rounded(array, expected):
            yield (
                f"{name} does not match a periodic Hann window of {fields['n_fft']} samples"
                " or Slaney's mel scale"
            )


def _is_rounded(array: np.ndarray, expected: np.ndarray) -> bool:
    """Returns whether the arrays agree up to rounding, also if one was stored in 16 bits."""
    tolerance = np.full(expected.shape, 1e-4)
    for dtype, rounding in ((np.float16, 2**-11), (jnp.bfloat16, 2**-8)):
        with np.errstate(over="ignore"):  # overflow gives inf, which is not equal
            is_half = np.array_equal(array.astype(dtype).astype(array.dtype), array)
        if is_half:
            tolerance += rounding * np.abs(expected)
            break
    return bool(np.all(np.abs(array - expected) <= tolerance))


def _infer_front_end(state_dict: StateDict) -> Fields:
    n_fft = 1024
    if (kernel := state_dict.get("spectrogram_extractor.stft.conv_real.weight")) is not None:
        n_fft = kernel.shape[-1]
    if n_fft not in _FRONT_ENDS:
        raise UserError(
            f"the tagging net has an STFT of {n_fft} samples, whose sampling rate is unknown; "
            f"supported are {', '.join(map(str, _FRONT_ENDS))}"
        )
    return dict(_FRONT_ENDS[n_fft], n_fft=n_fft, mel_bins=state_dict["bn0.weight"].size)


def _infer_cnn14(state_dict: StateDict) -> Fields:
    levels = _count(state_dict, r"conv_block(\d{1,4})\.")
    return dict(
        _infer_front_end(state_dict),
        channels=tuple(state_dict[f"conv_block{i}.bn2.weight"].size for i in levels),
        classes=state_dict["fc_audioset.bias"].size,
    )


def _infer_htsat(state_dict: StateDict) -> Fields:
    stages = range(len(_numbers(state_dict, r"layers\.(\d{1,4})\.")))
    positions = "layers.{}.blocks.0.attn.relative_position_bias_table"
    return dict(
        _infer_front_end(state_dict),
        image_size=HTSAT.image_size,
        token_width=state_dict["patch_embed.proj.bias"].size,
        depths=tuple(
            len(_numbers(state_dict, rf"layers\.{i}\.blocks\.(\d{{1,4}})\.")) for i in stages
        ),
        heads=tuple(state_dict[positions.format(i)].shape[1] for i in stages),
        classes=state_dict["tscam_conv.bias"].size,
    )


def _infer_resunet(state_dict: StateDict) -> Fields:
    levels = _count(state_dict, r"base\.encoder_block(\d{1,4})\.")
    # All FiLM layers share one condition width; the majority decides if some are misshapen.
    widths = Counter(
        array.shape[-1] for name, array in state_dict.items() if re.match(r"film\..*weight", name)
    )
    if not widths:
        raise KeyError("film.encoder_block1->conv_block1->beta1.weight")
    return dict(
        n_fft=2 * (state_dict["base.bn0.weight"].size - 1),
        hop_samples=ResUNet.hop_samples,
        channels=tuple(
            state_dict[f"base.encoder_block{i}.conv_block1.bn2.weight"].size for i in levels
        ),
        blocks_per_level=len(_count(state_dict, r"base\.encoder_block1\.conv_block(\d{1,4})\.")),
        audio_channels=state_dict["base.pre_conv.weight"].shape[1],
        condition_width=widths.most_common(1)[0][0],
    )


def _count(state_dict: StateDict, pattern: str) -> range:
    """Returns range 1..n, where n is the highest number the group matches, at least 1."""
    return range(1, max(_numbers(state_dict, pattern), default=1) + 1)


def _numbers(state_dict: StateDict, pattern: str) -> set[int]:
    """Returns the numbers that the pattern's group matches in tensor names."""
    return {int(m[1]) for m in (re.match(pattern, name) for name in state_dict) if m}


def _cosine_kernel(n_fft: int) -> np.ndarray:
    """Returns the real part of a windowed DFT as in torchlibrosa, [n_fft // 2 + 1, 1, n_fft]."""
    steps = np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) % n_fft
    return (np.cos(2 * np.pi * steps / n_fft) * hann_window(n_fft))[:, None]


def _front_end_formulas(fields: Fields) -> StateDict:
    front_end = ("sample_rate", "n_fft", "mel_bins", "f_min", "f_max")
    return {
        "spectrogram_extractor.stft.conv_real.weight": _cosine_kernel(fields["n_fft"]),
        "logmel_extractor.melW": mel_matrix(**{name: fields[name] for name in front_end}),
    }


def _resunet_formulas(fields: Fields) -> StateDict:
    return {"base.stft.conv_real.weight": _cosine_kernel(fields["n_fft"])}


CNN14 = Net(
    "Cnn14",
    Cnn14,
    _CNN14_TABLE,
    _CNN14_FOREIGN,
    lambda fields: (len(fields["channels"]), 1),
    _infer_cnn14,
    lambda net: ((1, net.hop_samples * 2 ** len(net.channels)),),
    _front_end_formulas,
)
_HTSAT = Net(
    "HTS-AT",
    HTSAT,
    _HTSAT_TABLE,
    _HTSAT_FOREIGN,
    lambda fields: (len(fields["depths"]), max(fields["depths"])),
    _infer_htsat,
    lambda net: ((1, net.n_fft),),
    _front_end_formulas,
)
RESUNET = Net(
    "ResUNet",
    ResUNet,
    _RESUNET_TABLE,
    _RESUNET_FOREIGN,
    lambda fields: (len(fields["channels"]), fields.get("blocks_per_level", 1)),
    _infer_resunet,
    lambda net: ((1, net.audio_channels, 2 * net.n_fft), (1, net.condition_width)),
    _resunet_formulas,
)
