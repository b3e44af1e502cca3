"""Checks that arrays on disk have the layout of the configured model."""

from typing import Any

from uss_jax.bundles.fingerprint import by_path
from uss_jax.errors import UserError


def require_same_layout(expected: Any, found: Any, what: str, where: str) -> None:
    """Raises a UserError naming the first entry that differs in presence or shape.

    Args:
      expected: arrays or shapes of the configured model.
      found: arrays or shapes that were read.
      what: name of the tree, for the message.
      where: source of `found`, for the message.
    """
    wanted, present = _shapes(expected), _shapes(found)
    for key in sorted(wanted.keys() | present.keys()):
        if wanted.get(key) != present.get(key):
            raise UserError(
                f"{where} is of another model: {what}/{key} is {present.get(key, 'missing')}, "
                f"the config's model has {wanted.get(key, 'no such entry')}; "
                "use the config it was made with, or another workdir"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Maps the path of each array to its shape."""
    return {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()}
