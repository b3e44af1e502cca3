"""Cost of a step: FLOPs of the model, bytes on a device, and peak FLOP/s of devices."""

import collections
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.extend

# Ways to compute products: on bfloat16 arrays, or on float32 arrays at a precision.
BFLOAT16 = "bfloat16"


def _nvidia(bfloat16: float, tf32: float, float32: float) -> dict[str, float]:
    return {BFLOAT16: bfloat16, "default": tf32, "high": tf32, "highest": float32}


def _tpu(bfloat16: float) -> dict[str, float]:
    """Float32 products take one, three or six bfloat16 passes, by precision."""
    passes = {BFLOAT16: 1, "default": 1, "high": 3, "highest": 6}
    return {way: bfloat16 / times for way, times in passes.items()}


# Published dense peaks in FLOP/s of one JAX device. The first pattern that matches `device_kind`
# counts.
PEAKS = (
    (r"B200", _nvidia(2250e12, 1125e12, 75e12)),
    (r"H200|H100 80GB HBM3|GH200", _nvidia(989e12, 495e12, 67e12)),
    (r"H100 NVL", _nvidia(835e12, 418e12, 60e12)),
    (r"H100", _nvidia(756e12, 378e12, 51e12)),
    (r"A100", _nvidia(312e12, 156e12, 19.5e12)),
    (r"L40S", _nvidia(362e12, 183e12, 91.6e12)),
    (r"L4\b", _nvidia(121e12, 60e12, 30.3e12)),
    (r"A10G", _nvidia(70e12, 35e12, 31.5e12)),
    (r"TPU v6 lite|TPU v6e", _tpu(918e12)),
    (r"TPU v5 lite|TPU v5e", _tpu(197e12)),
    (r"TPU v5", _tpu(459e12)),
    (r"TPU v4", _tpu(275e12)),
    (r"TPU v3", _tpu(61.5e12)),
    (r"TPU v2", _tpu(22.5e12)),
)


def peak_flops(device_kind: str, way: str) -> float | None:
    """Returns the peak of a device in FLOP/s; None if unknown.

    Args:
      device_kind: JAX's name of the device.
      way: "bfloat16", or the precision of float32 products.
    """
    for pattern, peaks in PEAKS:
        if re.search(pattern, device_kind):
            return peaks[way]
    return None


def least_seconds(flops: Mapping[str, float], device_kind: str) -> float | None:
    """Returns the seconds that one device at its peaks needs for the FLOPs of `flops_by_way`.

    None if its peaks are unknown.
    """
    seconds = 0.0
    for way, count in flops.items():
        peak = peak_flops(device_kind, way)
        if peak is None:
            return None
        seconds += count / peak
    return seconds


def model_flops(function: Callable, *arguments: Any) -> float:
    """Counts the FLOPs of the matrix products and convolutions of a function.

    Counted in the traced program, so over all devices and before compilation; a multiply-add is
    two. Model FLOP utilisation counts only these, without recomputation to save memory, so pass a
    step without `remat`.

    Args:
      function: function to trace; it is not run.
      arguments: arrays or their shapes (`jax.ShapeDtypeStruct`).
    """
    return sum(flops_by_way(function, *arguments).values())


def flops_by_way(function: Callable, *arguments: Any) -> dict[str, float]:
    """Splits the count of `model_flops` by "bfloat16" and the precisions of float32 products.

    The peaks of one device for these differ by up to a factor of 30.

    Args:
      function: function to trace, or one already traced (`jax.jit(function).trace(*arguments)`).
      arguments: arrays or their shapes; none for a traced function.
    """
    traced = function if isinstance(function, jax.stages.Traced) else None
    program = traced.jaxpr if traced else jax.make_jaxpr(function)(*arguments)
    return dict(_flops(program.jaxpr))


def _flops(jaxpr: Any) -> dict[str, float]:
    total: dict[str, float] = collections.defaultdict(float)
    for equation in jaxpr.eqns:
        name, out = equation.primitive.name, equation.outvars
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            count = 2.0 * out[0].aval.size * math.prod(shape[axis] for axis in contracted)
            total[_way(equation)] += count
        elif name == "conv_general_dilated":
            features_out = equation.params["dimension_numbers"].rhs_spec[0]
            kernel = equation.invars[1].aval
            count = 2.0 * out[0].aval.size * kernel.size / kernel.shape[features_out]
            total[_way(equation)] += count
        else:
            times = equation.params["length"] if name == "scan" else 1
            if name == "shard_map":
                times = equation.params["mesh"].size
            programs = list(_inner(equation.params))
            if name == "cond":  # the last branch of jax.lax.platform_dependent is the default
                programs = programs[-1:]
            for program in programs:
                for way, count in _flops(program).items():
                    total[way] += times * count
    return total


def _way(product: Any) -> str:
    if all(operand.aval.dtype == BFLOAT16 for operand in product.invars):
        return BFLOAT16
    precision = product.params["precision"]  # one per operand; None is JAX's default
    return precision[0].name.lower() if isinstance(precision, tuple) else "default"


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs in the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def device_bytes(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Returns the bytes of a compiled step on one device; None if the backend reports none.

    Keys: `arguments` (state, frozen nets, batch), `temporary` (mostly residuals of the forward
    pass) and `total`, in which results that reuse a donated argument's buffer count once.
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
