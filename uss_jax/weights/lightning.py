"""Converts training checkpoints of bytedance/uss to nets, and bundles back to such checkpoints."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from uss_jax.bundles.bundle import Bundle
from uss_jax.bundles.tensors import read_tensors
from uss_jax.disk.atomic import replacing
from uss_jax.disk.folder import make_folder
from uss_jax.errors import UserError, counted
from uss_jax.weights.porting import Converted, StateDict, convert_part, require_fit
from uss_jax.weights.torch import porting_of, state_dict_of

# Part of a bundle -> prefix of its tensors in a training checkpoint.
LIGHTNING_PREFIXES = {
    "separator": "ss_model.",
    "sed": "anchor_segment_detector.sed_model.",
    "query": "query_net.base.",
}
# The detector's smoothing filter; only training checkpoints hold it.
SMOOTHING = "anchor_segment_detector.anchor_segment_scorer.smooth_filter"
FOREIGN = "foreign.safetensors"
# Lightning migrates checkpoints of older versions, and those before 1.6.5 must then hold the state
# of its loops, which is absent here. It warns of checkpoints newer than itself.
_LIGHTNING_VERSION = "1.9.0"
_SEPARATOR_BUFFERS = (
    "base.stft.conv_real.weight",
    "base.stft.conv_imag.weight",
    "base.istft.ola_window",
    "base.istft.conv_real.weight",
    "base.istft.conv_imag.weight",
)
_TAGGER_BUFFERS = (
    "spectrogram_extractor.stft.conv_real.weight",
    "spectrogram_extractor.stft.conv_imag.weight",
    "logmel_extractor.melW",
)


def convert_lightning(state_dict: StateDict) -> dict[str, Converted]:
    """Converts a training checkpoint to "separator", and "sed" and "query" if present."""
    parts, problems, known = {}, [], {SMOOTHING}
    for part, prefix in LIGHTNING_PREFIXES.items():
        members = {name: state_dict[name] for name in state_dict if name.startswith(prefix)}
        known.update(members)
        if members or part == "separator":
            parts[part], found = convert_part(porting_of(part), members, prefix)
            problems += found
    problems += [f"{name} is unexpected" for name in state_dict if name not in known]
    for part in parts:
        require_fit(parts[part], problems)
    # Every foreign tensor belongs to a part; the smoothing filter to the detector if there is one.
    owner = parts.get("sed", parts["separator"])
    owner.foreign.update({n: state_dict[n] for n in (SMOOTHING,) if n in state_dict})
    return parts


def lightning_state_dict(bundle: Bundle) -> StateDict:
    """Returns all tensors that bytedance/uss needs to load a checkpoint with strict=True.

    Raises:
      UserError: the bundle lacks a part, or a foreign tensor that `uss-jax convert` keeps; or it
        has an adaptor or another tagging net than Cnn14.
    """
    parts = [part for part in LIGHTNING_PREFIXES if part not in bundle.config]
    if parts:
        raise UserError(
            f"{bundle.path} has no {parts[0]}; bytedance/uss needs separator, sed and query"
        )
    if bundle.config["query"].get("adaptor_width"):
        raise UserError(f"{bundle.path} has an adaptor, which a .ckpt cannot hold")
    foreign = _foreign(bundle)
    whole: StateDict = {}
    for part, prefix in LIGHTNING_PREFIXES.items():
        section = bundle.config[part]
        fields = section if part == "separator" else section["model"]
        known = "resunet" if part == "separator" else "cnn14"
        if fields.get("net", known) != known:
            raise UserError(
                f"{bundle.path} has a {fields['net']} as {part}; a .ckpt can only hold a {known}"
            )
        trained = state_dict_of(part, fields, bundle.variables(part), prefix)
        kept = {name: array for name, array in foreign.items() if name.startswith(prefix)}
        missing = [name for name in _wanted(part, prefix, fields, trained) if name not in kept]
        if missing:
            raise UserError(
                f"{bundle.path / FOREIGN} lacks {missing[0]} "
                f"({counted(len(missing), 'missing tensor')} in all), which bytedance/uss needs; "
                "convert the .ckpt again"
            )
        whole |= trained | kept
    if SMOOTHING not in foreign:
        raise UserError(f"{bundle.path / FOREIGN} lacks {SMOOTHING}; convert the .ckpt again")
    return whole | {SMOOTHING: foreign[SMOOTHING]}


def _foreign(bundle: Bundle) -> StateDict:
    """Returns the bundle's foreign tensors by their names in the checkpoint."""
    path = bundle.path / FOREIGN
    if not path.is_file():
        raise UserError(
            f"{bundle.path} has no {FOREIGN}, and so lacks tensors that bytedance/uss loads "
            "(transform kernels, counters, layers it never uses); only a bundle that `uss-jax "
            "convert` made from a .ckpt can be written as one"
        )
    return {name.partition("/")[2]: array for name, array in read_tensors(path).items()}


def _wanted(part: str, prefix: str, fields: Mapping[str, Any], trained: StateDict) -> Iterator[str]:
    """Yields the names of the foreign tensors that a net with these fields has."""
    for name in trained:
        if name.endswith(".running_mean"):
            yield name.replace("running_mean", "num_batches_tracked")
    if part != "separator":
        yield from (prefix + name for name in _TAGGER_BUFFERS)
        return
    yield from (prefix + name for name in _SEPARATOR_BUFFERS)
    for i in range(1, len(fields["channels"]) + 1):
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        yield from (f"{prefix}base.decoder_block{i}.bn2.{leaf}" for leaf in norm)
        yield from (f"{prefix}film.decoder_block{i}->beta2.{leaf}" for leaf in ("weight", "bias"))


def write_lightning(path: str | os.PathLike, state_dict: StateDict, steps: int = 0) -> None:
    """Writes a PyTorch Lightning checkpoint atomically.

    Args:
      path: .ckpt file to write.
      state_dict: torch names and arrays.
      steps: training steps of the parameters.

    Raises:
      UserError: PyTorch is not installed, or the file exists.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "writing a PyTorch checkpoint needs PyTorch: pip install 'uss-jax[torch]'"
        ) from error
    if pathlib.Path(path).exists():
        raise UserError(f"{path} already exists; give a new file")
    # PyTorch does not take numpy's bfloat16.
    arrays = {
        name: np.array(a, np.float32 if a.dtype.name == "bfloat16" else None)
        for name, a in state_dict.items()
    }
    make_folder(pathlib.Path(path).parent, "give another file")
    content = {
        "epoch": 0,
        "global_step": steps,
        "pytorch-lightning_version": _LIGHTNING_VERSION,
        "state_dict": {name: torch.from_numpy(a) for name, a in arrays.items()},
    }
    try:
        with replacing(path) as temporary:
            torch.save(content, temporary)
    except RuntimeError as error:  # PyTorch's own of a full disk names no cause
        raise UserError(f"{path} cannot be written, perhaps the disk is full: {error}") from error
