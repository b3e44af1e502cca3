"""Safetensors files: foreign tensors, and the variables of a model's parts."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from uss_jax.errors import UserError

# File of a bundle, with the parts that have no folder: tensors are `part/collection/.../leaf`.
PARTS_FILE = "model.safetensors"
# `NAME.scale` belongs to the whole numbers in `NAME`: the leaf is their product.
_SCALE = ".scale"


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file.

    Raises:
      UserError: the file is damaged; the library checks all sizes against that of the file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a safetensors file ({str(error)[:200]}); get it again"
        ) from error


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file with the permissions of any other new file."""
    path.touch()
    mode = path.stat().st_mode
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, path)
    path.chmod(mode)


def read_parts(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Reads the variables of every part in a safetensors file; empty if there is no such file.

    Raises:
      UserError: the file is damaged, or its tensors have no place in a tree.
    """
    if not path.is_file():
        return {}
    tensors = read_tensors(path)
    try:
        leaves = {
            name: _scaled(tensor, tensors.get(name + _SCALE))
            for name, tensor in tensors.items()
            if not name.endswith(_SCALE)
        }
        return unflatten_dict(leaves, sep="/")
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} holds tensors that are no parts of a model ({error})") from error


def _scaled(tensor: np.ndarray, scale: np.ndarray | None) -> np.ndarray:
    return tensor if scale is None else tensor.astype(np.float32) * scale
