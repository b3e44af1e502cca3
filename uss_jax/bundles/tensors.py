"""Safetensors files: foreign tensors, and the variables of a model's parts."""

import contextlib
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from uss_jax.bundles.failures import room_for
from uss_jax.errors import UserError

# File of a bundle, with the parts that have no folder: tensors are `part/collection/.../leaf`.
PARTS_FILE = "model.safetensors"
# `NAME.scale` belongs to the whole numbers in `NAME`: the leaf is their product.
_SCALE = ".scale"


def read_tensors(path: pathlib.Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Reads a safetensors file; with `names`, only these tensors.

    Raises:
      UserError: the file is damaged; the library checks all sizes against that of the file.
    """
    with _telling(path):
        if names is None:
            return load_file(path)
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in names}


def names_in(path: pathlib.Path) -> set[str]:
    """Returns the names of a file's tensors, which are not read; empty if there is no such file.

    Raises:
      UserError: the file is damaged.
    """
    if not path.is_file():
        return set()
    with _telling(path), safe_open(path, framework="np") as file:
        return set(file.keys())


def shapes_in(path: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns shape and type ("F32") of a file's tensors, which are not read.

    Raises:
      UserError: the file is missing or damaged.
    """
    with _telling(path), safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}


@contextlib.contextmanager
def _telling(path: pathlib.Path) -> Iterator[None]:
    """Raises a UserError about a file that the library cannot read."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a safetensors file ({str(error)[:200]}); get it again"
        ) from error


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file with the permissions of any other new file.

    Raises:
      UserError: the disk is full.
    """
    path.touch()
    mode = path.stat().st_mode
    with room_for(path.parent):
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
        scales = {name.removesuffix(_SCALE) for name in tensors if name.endswith(_SCALE)}
        leaves = {name: tensors[name] for name in tensors if not name.endswith(_SCALE)}
        for name in leaves.keys() | scales:
            _require_leaf(name, name in scales, leaves.get(name))
        for name in scales:
            leaves[name] = leaves[name].astype(np.float32) * tensors[name + _SCALE]
        return unflatten_dict(leaves, sep="/")
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} holds tensors that are no parts of a model ({error})") from error


def _require_leaf(name: str, scaled: bool, tensor: np.ndarray | None) -> None:
    """Raises a ValueError unless a tensor can be a leaf of a part's variables."""
    part, collection, leaf = [*name.split("/", 2), "", ""][:3]
    if not part or collection not in ("params", "batch_stats") or not leaf:
        raise ValueError(f"{name} is not named part/params/... or part/batch_stats/...")
    if tensor is None:
        raise ValueError(f"{name}{_SCALE} belongs to no tensor")
    if not scaled and not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"{name} holds {tensor.dtype} and has no {name}{_SCALE}")
