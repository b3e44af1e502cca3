"""Converts PyTorch state dicts to Flax variables and back, by the porting rules of a net.

`Porting` holds the rules; each kind of net has a module with its own beside this one. Only arrays
are handled here: `uss_jax.weights.unpickle` reads the files. A foreign tensor is one without a Flax
counterpart.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from uss_jax.bundles.nets import check_fields
from uss_jax.errors import UserError

StateDict = dict[str, np.ndarray]
Fields = dict[str, Any]
Leaves = dict[str, tuple[str, tuple[int, ...]]]

# Leaves of a layer: torch leaf -> (collection, Flax leaf, permutation of the axes). Convolutions
# are OIHW in torch and HWIO here. Transposed ones are IOHW in torch and HWOI here, as
# `transpose_kernel` requires: the same permutation.
NORM = {
    "weight": ("params", "scale", (0,)),
    "bias": ("params", "bias", (0,)),
    "running_mean": ("batch_stats", "mean", (0,)),
    "running_var": ("batch_stats", "var", (0,)),
}
CONV = {"weight": ("params", "kernel", (2, 3, 1, 0)), "bias": ("params", "bias", (0,))}
DENSE = {"weight": ("params", "kernel", (1, 0)), "bias": ("params", "bias", (0,))}


@dataclasses.dataclass(frozen=True)
class Porting:
    """The porting rules of one kind of net.

    Attributes:
      name: name in messages.
      module: class of the Flax module.
      table: rows of (torch layer, Flax layer, leaves). {i} is the level and {j} the block of a
        level, from 1; {from0[i]} and {from0[j]} are the same from 0; {k} is 1 or 2; {centre} is the
        number of levels plus 1; {after} is {j} plus 1. Rows of what a net lacks (a shortcut between
        equal widths, the bias of a convolution before batch norm) are skipped.
      foreign: pattern of the names of foreign tensors: counters, buffers that follow from formulas,
        and layers no forward pass uses.
      counts: from fields, the numbers of levels and of blocks in the deepest level, for which rows
        are repeated.
      infer: from a state dict, the fields of the module.
      inputs: from a module, the shapes of the arguments that initialise it.
      formulas: from fields, names and values of the fixed buffers that follow from them.
      prefix: prefix that all tensor names of a checkpoint may have.
    """

    name: str
    module: type[nn.Module]
    table: tuple[tuple[str, str, dict], ...]
    foreign: re.Pattern
    counts: Callable[[Fields], tuple[int, int]]
    infer: Callable[[StateDict], Fields]
    inputs: Callable[[nn.Module], tuple[tuple[int, ...], ...]]
    formulas: Callable[[Fields], StateDict]
    prefix: str = ""


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


def convert(porting: Porting, state_dict: StateDict, fields: Fields | None = None) -> Converted:
    """Converts a whole state dict.

    Args:
      porting: rules of the net.
      state_dict: torch names and arrays.
      fields: fields of the Flax module; inferred from the arrays when None.

    Raises:
      UserError: tensors are missing, unexpected or invalid; all of them are listed.
    """
    prefix = porting.prefix
    if not any(name.startswith(prefix) for name in state_dict):
        prefix = ""
    members = {name: state_dict[name] for name in state_dict if name.startswith(prefix)}
    converted, problems = convert_part(porting, members, prefix, fields)
    problems += [f"{name} is unexpected" for name in state_dict if name not in members]
    return require_fit(converted, problems)


def require_fit(converted: Converted | None, problems: list[str]) -> Converted:
    """Returns the converted net; raises a UserError that lists any problems."""
    if problems or converted is None:
        raise UserError(f"{len(problems)} of the tensors do not fit: {'; '.join(problems)}")
    return converted


def convert_part(
    porting: Porting, state_dict: StateDict, prefix: str, fields: Fields | None = None
) -> tuple[Converted | None, list[str]]:
    """Converts the tensors under a prefix; returns the net and a list of problems."""
    plain = {name.removeprefix(prefix): array for name, array in state_dict.items()}
    try:
        fields = porting.infer(plain) if fields is None else fields
    except KeyError as error:
        return None, [f"{prefix}{error.args[0]} is missing (is this a {porting.name}?)"]
    except IndexError:
        return None, [f"the arrays have too few axes for a {porting.name}"]
    shapes = _shapes(porting, fields)
    leaves = _leaves(porting, fields, shapes)

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
        elif porting.foreign.fullmatch(name):
            foreign[prefix + name] = array
        else:
            problems.append(f"{prefix}{name} is unexpected")
    problems += [f"{prefix}{name} is missing" for name in leaves if name not in plain]
    problems += [prefix + text for text in _wrong_formulas(porting, fields, plain)]
    variables = {"params": {}, "batch_stats": {}} | unflatten_dict(flat, sep="/")
    return Converted(porting.module, fields, variables, foreign), problems


def state_dict_with(porting: Porting, fields: Fields, variables: dict, prefix: str) -> StateDict:
    """Converts Flax variables to a torch state dict; raises a UserError for a leaf without one."""
    flat = flatten_dict(variables, sep="/")
    leaves = _leaves(porting, fields, _shapes(porting, fields))
    return {
        prefix + name: np.ascontiguousarray(np.transpose(flat[path], np.argsort(permutation)))
        for name, (path, permutation) in leaves.items()
    }


def _leaves(porting: Porting, fields: Fields, paths: Collection[str]) -> Leaves:
    """Maps torch names to (path of the Flax leaf, permutation), for all leaves of the net."""
    levels, blocks = (range(1, n + 1) for n in porting.counts(fields))
    leaves = {}
    for torch_layer, flax_layer, holds in porting.table:
        for i, j, k in itertools.product(levels, blocks, (1, 2)):
            from0 = dict(i=i - 1, j=j - 1)
            index = dict(i=i, j=j, k=k, from0=from0, after=j + 1, centre=len(levels) + 1)
            for leaf, (collection, flax_leaf, permutation) in holds.items():
                path = f"{collection}/{flax_layer.format(**index)}/{flax_leaf}"
                if path in paths:
                    leaves[f"{torch_layer.format(**index)}.{leaf}"] = (path, permutation)
    if homeless := sorted(set(paths) - {path for path, _ in leaves.values()}):
        raise UserError(f"the PyTorch {porting.name} has no tensor for {', '.join(homeless)}")
    return leaves


def _shapes(porting: Porting, fields: Fields) -> dict[str, tuple[int, ...]]:
    """Maps the path of every leaf of the Flax module to its shape."""
    check_fields(fields, porting.name)
    module = porting.module(**fields)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in porting.inputs(module)]
    try:
        variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    except ValueError as error:
        raise UserError(f"the arrays do not form a {porting.name}: {error}") from error
    return {path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()}


def _wrong_formulas(porting: Porting, fields: Fields, state_dict: StateDict) -> Iterator[str]:
    """Yields a message for each fixed buffer that differs from what uss_jax computes instead."""
    for name, expected in porting.formulas(fields).items():
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


def count(state_dict: StateDict, pattern: str) -> range:
    """Returns range 1..n, where n is the highest number the group matches, at least 1."""
    return range(1, max(numbers(state_dict, pattern), default=1) + 1)


def numbers(state_dict: StateDict, pattern: str) -> set[int]:
    """Returns the numbers that the pattern's group matches in tensor names."""
    return {int(m[1]) for m in (re.match(pattern, name) for name in state_dict) if m}
