"""How exactly devices multiply float32 arrays: the precision of products and convolutions.

| word | NVIDIA GPU | TPU | CPU |
|---|---|---|---|
| `highest` | float32 | six bfloat16 passes, as good as float32 | float32 |
| `high` | TF32: inputs rounded to 11 bits | three bfloat16 passes | float32 |
| `default` | TF32 | one bfloat16 pass: inputs rounded to 8 bits | float32 |

Sums are float32 in all of them. What a net passes as bfloat16, and Fourier transforms, are the same
under each word. A precision belongs to a function or to an object that holds a net; it is never
set for the whole process.
"""

import functools
from collections.abc import Callable
from typing import Any

from uss_jax.errors import UserError

HIGHEST = "highest"
PRECISIONS = (HIGHEST, "high", "default")


def check_precision(word: Any, name: str) -> str:
    """Returns the word, or raises a UserError that names the option or key that holds it."""
    if word not in PRECISIONS:
        raise UserError(f"{name} is {word!r}, expected {', '.join(PRECISIONS)}")
    return word


def at_precision(precision: str, function: Callable) -> Callable:
    """Returns a function whose products and convolutions have a precision.

    It holds wherever the function is traced or called, in any thread, and whatever
    `jax_default_matmul_precision` says there; what the function itself differentiates has the same
    precision in its backward pass. An inner `at_precision` wins over an outer one.

    Args:
      precision: one of PRECISIONS.
      function: of arrays; in it, products that are given a `precision=` keep theirs.
    """
    check_precision(precision, "precision")

    @functools.wraps(function)
    def at(*args: Any, **kwargs: Any) -> Any:
        import jax  # here, since the command line reads PRECISIONS and answers --help at once

        with jax.default_matmul_precision(precision):
            return function(*args, **kwargs)

    return at
