"""PyTorch state dicts of foreign checkpoints to Flax variables and back, as tables of names.

The nets are PANNs' tagging net `Cnn14` and detector `Cnn14_DecisionLevelMax` (the same tensors),
HTS-AT, which is both, the separator `ResUNet30` of bytedance/uss and its relatives with other
widths and depths, and a whole training checkpoint that holds a separator and PANNs' nets. Arrays
only: `uss_jax.weights.unpickle` reads the files.
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
from uss_jax.errors import UserError
from uss_jax.models.cnn14 import Cnn14
from uss_jax.models.htsat import HTSAT
from uss_jax.models.resunet import ResUNet
from uss_jax.training.nets import check_fields

StateDict = dict[str, np.ndarray]
Fields = dict[str, Any]
Leaves = dict[str, tuple[str, tuple[int, ...]]]

# What a layer holds: torch leaf -> (collection, Flax leaf, permutation of the axes). Convolutions
# are OIHW in torch and HWIO here; a transposed one is IOHW there and, as `transpose_kernel` wants
# it, HWOI here: the same permutation.
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

# The porting tables: torch layer, Flax layer, what it holds. {i} counts levels and {j} the blocks
# of a level, from 1; so do {from0[i]} and {from0[j]}, from 0; {k} is 1 or 2. A row without a
# counterpart in a given net (a shortcut between equal widths, a bias of a convolution before a
# batch norm) does not apply to it.
_CNN14_TABLE = (
    ("bn0", "bn0", _NORM),
    ("conv_block{i}.conv{k}", "conv_block{i}/conv{k}", _CONV),
    ("conv_block{i}.bn{k}", "conv_block{i}/bn{k}", _NORM),
    ("fc1", "fc1", _DENSE),
    ("fc_audioset", "fc_audioset", _DENSE),
)
_BLOCKS = (  # the same rows for encoder, centre and decoder
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

# Tensors that need no counterpart: counters, formulas, and layers that no forward pass uses.
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
# The detector's moving average, a tensor of the whole checkpoint.
SMOOTHING = "anchor_segment_detector.anchor_segment_scorer.smooth_filter"

# What the arrays of a tagging net do not tell: the front ends that PANNs published, by n_fft.
_FRONT_ENDS = {
    1024: dict(sample_rate=32000, hop_samples=320, f_min=50.0, f_max=14000.0),
    512: dict(sample_rate=16000, hop_samples=160, f_min=50.0, f_max=8000.0),
    256: dict(sample_rate=8000, hop_samples=80, f_min=50.0, f_max=4000.0),
}

# HTS-AT's checkpoints name its tensors under this.
HTSAT_PREFIX = "sed_model."

# Parts of a whole checkpoint: part of a bundle -> prefix of its tensors.
LIGHTNING_PREFIXES = {
    "separator": "ss_model.",
    "sed": "anchor_segment_detector.sed_model.",
    "query": "query_net.base.",
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A net from a foreign checkpoint.

    Attributes:
      module: the Flax module's class.
      fields: its keyword arguments.
      variables: {"params": ..., "batch_stats": ...} of numpy arrays.
      foreign: the tensors without a counterpart, under their full names, as they were.
    """

    module: type[nn.Module]
    fields: Fields
    variables: dict[str, Any]
    foreign: StateDict

    def build(self) -> nn.Module:
        """The Flax module."""
        return self.module(**self.fields)


@dataclasses.dataclass(frozen=True)
class Net:
    """How one kind of net is named in torch and in Flax.

    Attributes:
      name: for messages.
      module: the Flax module.
      table: rows of (torch layer, Flax layer, what it holds).
      foreign: names of the tensors without a counterpart.
      counts: levels, and blocks of the deepest of them, that the table's rows are repeated for.
      infer: fields of the module from a state dict.
      inputs: shapes of arguments to initialise a module with.
      formulas: names and values of fixed buffers that follow from the fields.
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
    """`Cnn14` or `Cnn14_DecisionLevelMax`, which hold the same tensors.

    Args:
      state_dict: torch names and arrays.
      fields: fields of `uss_jax.models.cnn14.Cnn14`; inferred from the arrays when None.

    Raises:
      UserError: lists every tensor that is missing, unexpected or misshapen.
    """
    return _finish(*_convert(CNN14, state_dict, "", fields))


def convert_htsat(state_dict: StateDict, fields: Fields | None = None) -> Converted:
    """HTS-AT, with or without `HTSAT_PREFIX`; arguments and errors as for `convert_cnn14`."""
    prefix = HTSAT_PREFIX if any(name.startswith(HTSAT_PREFIX) for name in state_dict) else ""
    members = {name: state_dict[name] for name in state_dict if name.startswith(prefix)}
    converted, problems = _convert(_HTSAT, members, prefix, fields)
    problems += [f"{name} is unexpected" for name in state_dict if name not in members]
    return _finish(converted, problems)


def convert_resunet(state_dict: StateDict, fields: Fields | None = None) -> Converted:
    """A separator (`base.*` and `film.*`); arguments and errors as for `convert_cnn14`."""
    return _finish(*_convert(RESUNET, state_dict, "", fields))


def convert_lightning(state_dict: StateDict) -> dict[str, Converted]:
    """A whole training checkpoint: "separator", and "sed" and "query" where it holds them."""
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
    # Every foreign tensor belongs to some part; the detector's smoothing goes with the detector.
    owner = parts.get("sed", parts["separator"])
    owner.foreign.update({n: state_dict[n] for n in (SMOOTHING,) if n in state_dict})
    return parts


def state_dict_of(part: str, fields: Fields, variables: dict, prefix: str = "") -> StateDict:
    """Torch names and arrays of Flax variables: the inverse of the conversions.

    Args:
      part: "separator", "sed" or "query".
      fields: the module's fields, or those in a bundle's config, with `net` and lists for tuples.
      variables: {"params": ..., "batch_stats": ...}.
      prefix: put before every name, such as `LIGHTNING_PREFIXES[part]`.
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
    """The net of a part with this name; where it has none, the first of the part's."""
    nets = {"resunet": RESUNET} if part == "separator" else {"cnn14": CNN14, "htsat": _HTSAT}
    name = name or next(iter(nets))
    if name not in nets:
        raise UserError(
            f"the {part} is a {name}, which PyTorch's programs do not know; only "
            f"{' and '.join(nets)} can be written for them"
        )
    return nets[name]


def _finish(converted: Converted | None, problems: list[str]) -> Converted:
    """The converted net, if there is nothing wrong with it."""
    if problems or converted is None:
        raise UserError(f"{len(problems)} of the tensors do not fit: {'; '.join(problems)}")
    return converted


def _convert(
    net: Net, state_dict: StateDict, prefix: str, fields: Fields | None
) -> tuple[Converted | None, list[str]]:
    """Converts the tensors under a prefix and lists what is wrong with them."""
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
                problems.append(f"{prefix}{name} holds values that are not finite")
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
    """Torch name -> (path of the Flax leaf, permutation), for all leaves that the net has."""
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
        raise UserError(f"the PyTorch {net.name} has no place for {', '.join(homeless)}")
    return leaves


def _shapes(net: Net, fields: Fields) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every leaf of the Flax module."""
    check_fields(fields, net.name)
    module = net.module(**fields)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in net.inputs(module)]
    try:
        variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    except ValueError as error:
        raise UserError(f"the arrays make no {net.name}: {error}") from error
    return {path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()}


def _wrong_formulas(net: Net, fields: Fields, state_dict: StateDict) -> Iterator[str]:
    """Fixed buffers that are not what this project computes, so that nothing differs in silence."""
    for name, expected in net.formulas(fields).items():
        array = state_dict.get(name, expected)
        # Published buffers differ by rounding, a window that is not periodic by 3e-3.
        if array.shape != expected.shape or not _is_rounded(array, expected):
            yield (
                f"{name} is not that of a periodic Hann window of {fields['n_fft']} samples"
                " or of Slaney's mel scale"
            )


def _is_rounded(array: np.ndarray, expected: np.ndarray) -> bool:
    """Whether an array is another one in its own precision, which may once have been half."""
    tolerance = np.full(expected.shape, 1e-4)
    for dtype, rounding in ((np.float16, 2**-11), (jnp.bfloat16, 2**-8)):
        with np.errstate(over="ignore"):  # then it is another array
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
            f"the tagging net has an STFT of {n_fft} samples, of which the sample rate is unknown; "
            f"known are {', '.join(map(str, _FRONT_ENDS))}"
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
    # Of many layers with the same condition, most are right.
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
    """1 .. the highest number that the pattern's group matches, at least 1."""
    return range(1, max(_numbers(state_dict, pattern), default=1) + 1)


def _numbers(state_dict: StateDict, pattern: str) -> set[int]:
    """What the pattern's group matches."""
    return {int(m[1]) for m in (re.match(pattern, name) for name in state_dict) if m}


def _cosine_kernel(n_fft: int) -> np.ndarray:
    """Real half of a windowed DFT as torchlibrosa stores it, [n_fft // 2 + 1, 1, n_fft]."""
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
