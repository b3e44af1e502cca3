"""Bundles that travel in the package and open by name."""

import os
import pathlib

from uss_jax.assets import FOLDER
from uss_jax.errors import UserError

# Name -> folder. `yamnet` is a tagger that knows 521 of AudioSet's 527 classes, `demo` a small
# separator whose tagging nets are those of `yamnet`.
PACKAGED = {"yamnet": FOLDER / "yamnet", "demo": FOLDER / "separator"}


def find_bundle(path: str | os.PathLike) -> pathlib.Path:
    """Returns the folder of a bundle, which is given by its path or by its name in PACKAGED.

    Only a string can be a name.

    Raises:
      UserError: the working directory holds a bundle of that name too.
    """
    name = os.fspath(path)
    if isinstance(path, os.PathLike) or name not in PACKAGED:
        return pathlib.Path(path)
    if pathlib.Path(name, "config.json").is_file():
        raise UserError(
            f"{name} is the name of a bundle in the package, and this folder holds a bundle {name} "
            f"too; write ./{name} for the latter, or run the command in another folder"
        )
    return PACKAGED[name]
