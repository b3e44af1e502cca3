"""What a step costs: operations of the model, bytes on a device, and what devices can do."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import numpy as np

# Dense peaks in FLOP/s, as makers publish them, of what jax counts as one device: in bfloat16, and
# in float32 at jax's default precision (TF32 on NVIDIA, bfloat16 passes on TPU). The first pattern
# found in `device_kind` counts.
PEAKS = (
    (r"B200", 2250e12, 1125e12),
    (r"H200|H100 80GB HBM3|GH200", 989e12, 495e12),
    (r"H100 NVL", 835e12, 418e12),
    (r"H100", 756e12, 378e12),
    (r"A100", 312e12, 156e12),
    (r"L40S", 362e12, 183e12),
    (r"L4\b", 121e12, 60e12),
    (r"A10G", 70e12, 35e12),
    (r"TPU v6 lite|TPU v6e", 918e12, 918e12),
    (r"TPU v5 lite|TPU v5e", 197e12, 197e12),
    (r"TPU v5", 459e12, 459e12),
    (r"TPU v4", 275e12, 275e12),
    (r"TPU v3", 61.5e12, 61.5e12),
    (r"TPU v2", 22.5e12, 22.5e12),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak of a device in FLOP/s, computing in "float32" or "bfloat16"; None if not known."""
    for pattern, bfloat16, float32 in PEAKS:
        if re.search(pattern, device_kind):
            return bfloat16 if dtype == "bfloat16" else float32
    return None


def model_flops(function: Callable, *arguments: Any) -> float:
    """Floating-point operations of the matrix products and convolutions of a function.

    Those of the whole batch, whatever the devices and their compiler make of it, with two for a
    multiplication and addition. Only these count in a model's FLOP utilisation; blocks computed
    again to save memory should not, so count a step without `remat`.

    Args:
      function: traced, not run.
      arguments: arrays or their shapes (`jax.ShapeDtypeStruct`).
    """
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, out = equation.primitive.name, equation.outvars
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * out[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            features_out = equation.params["dimension_numbers"].rhs_spec[0]
            kernel = equation.invars[1].aval
            total += 2 * out[0].aval.size * kernel.size / kernel.shape[features_out]
        elif name == "cond":  # of forms for different platforms, the last is the plain one
            *_, plain = _inner(equation.params)
            total += _flops(plain)
        else:
            times = equation.params["length"] if name == "scan" else 1
            if name == "shard_map":
                times = equation.params["mesh"].size
            total += times * sum(map(_flops, _inner(equation.params)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation holds."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def residual_bytes(function: Callable, *arguments: Any) -> int:
    """Bytes that a differentiated function keeps for its backward pass, besides its arguments.

    Args:
      function: of which the gradient by all arguments is taken; traced, not run.
      arguments: arrays or their shapes.
    """
    kept = lambda *args: jax.tree.leaves(jax.vjp(function, *args)[1])  # noqa: E731
    jaxpr = jax.make_jaxpr(kept)(*arguments).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    found = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var)} - given
    return sum(v.aval.size * np.dtype(v.aval.dtype).itemsize for v in found)


def device_bytes(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Bytes of a compiled step on one device, None where the backend does not tell.

    `arguments` (state, frozen nets and batch), `temporary` (mostly what the forward pass keeps) and
    `total`, in which a result written over a donated argument counts once.
    """
    found = compiled.memory_analysis()
    if found is None:
        return None
    arguments, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return {
        "arguments": arguments,
        "temporary": temporary,
        "total": arguments + temporary + results,
    }
