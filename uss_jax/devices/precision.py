"""Precision of float32 matrix products and convolutions on each kind of device.

| name | NVIDIA GPU | TPU | CPU |
|---|---|---|---|
| `highest` | float32 | six bfloat16 passes, as good as float32 | float32 |
| `high` | TF32: inputs rounded to 11 bits | three bfloat16 passes | float32 |
| `default` | TF32 | one bfloat16 pass: inputs rounded to 8 bits | float32 |

Sums are float32 in all cases. Products of bfloat16 arrays and Fourier transforms are not affected.
The precision is set per function or per object that holds a network, never for the whole process.
"""

import functools
from collections.abc import Callable
from typing import Any

from uss_jax.errors import UserError

HIGHEST = "highest"
PRECISIONS = (HIGHEST, "high", "default")


def check_precision(word: Any, name: str) -> str:
    """Returns `word` if it is a precision, else raises a UserError that names the option or key."""
    if word not in PRECISIONS:
        raise UserError(f"{name} is {word!r}, expected {', '.join(PRECISIONS)}")
    return word


def at_precision(precision: str, function: Callable) -> Callable:
    """Wraps a function to run its matrix products and convolutions at a given precision.

    Applies in every thread, to calls and tracing, and overrides `jax_default_matmul_precision`.
    Gradients taken inside the function have the same precision in their backward pass. An inner
    `at_precision` overrides an outer one.

    Args:
      precision: one of PRECISIONS.
      function: function of arrays; products with an explicit `precision=` keep theirs.
    """
    check_precision(precision, "precision")

    @functools.wraps(function)
    def at(*args: Any, **kwargs: Any) -> Any:
        import jax  # imported here: the command line reads PRECISIONS, and --help must be fast

        with jax.default_matmul_precision(precision):
            return function(*args, **kwargs)

    return at
