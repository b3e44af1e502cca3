"""Model cards: `card.md` in the folder of a bundle or workdir, for those who use the model.

A card says what the model is, what it was trained on, its figures and how they were measured, what
it cannot do, and the licence and attribution of the parameters. It is written by hand; `inspect`
prints it and `export` copies it.
"""

import pathlib

from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError

CARD = "card.md"
_MOST_BYTES = 1 << 18


def read_card(folder: pathlib.Path) -> str:
    """Returns the text of a model's card; empty if it has none.

    Raises:
      UserError: the card is no UTF-8 text, or longer than 256 kB.
    """
    path = folder / CARD
    try:
        with open(path, "rb", opener=at_once) as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path} is longer than {_MOST_BYTES >> 10} kB; write a shorter model card")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
