"""Custom gradients that compute at the matmul precision of the call."""

import functools
from collections.abc import Callable
from typing import Any

import jax


class custom_vjp:
    """A `jax.custom_vjp` whose rules compute at the matmul precision in force at the call.

    JAX traces the rules when it differentiates, possibly after a `jax.default_matmul_precision`
    around the call has ended. Gradients of JAX's own products keep the precision of the call; with
    plain `jax.custom_vjp`, gradients of these functions would not.
    """

    def __init__(self, function: Callable):
        """Wraps a function of arrays; `defvjp` must follow, as for `jax.custom_vjp`."""
        functools.update_wrapper(self, function)
        self._at = jax.custom_vjp(_at_given_precision(function), nondiff_argnums=(0,))

    def defvjp(self, forward: Callable, backward: Callable) -> None:
        """Sets the rules: (arrays) to (output, residuals), and (residuals, dy) to gradients."""
        self._at.defvjp(_at_given_precision(forward), _at_given_precision(backward))

    def __call__(self, *arrays: Any) -> Any:
        return self._at(jax.config.jax_default_matmul_precision, *arrays)


def _at_given_precision(function: Callable) -> Callable:
    """Adds the precision as first argument; None for JAX's default."""

    def at(precision: str | None, *args: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return function(*args)

    at.__name__ = function.__name__  # for messages and profiles
    return at
