"""What the sounds of an evaluation are called in words, for the row "text".

Letters: `n` items, `t` width of a sentence vector.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from uss_jax.bundles.node_vectors import spoken
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.disk.checked_json import either, list_of, mapping_of, read_json, text
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError
from uss_jax.evaluation.items import Item
from uss_jax.separation.words import find_texts

_TEXTS = mapping_of(either(text(), list_of(text(), 1)))


@dataclasses.dataclass(frozen=True)
class Wording:
    """The text that each item is asked with.

    Attributes:
      encoder: the sentence encoder.
      texts: label -> texts, which its items take in turn; others are asked with their label.
    """

    encoder: TextEncoder
    texts: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def of(self, items: Sequence[Item]) -> list[str]:
        """Returns the text of each item."""
        seen: dict[str, int] = {}
        found = []
        for item in items:
            turn = seen[item.label] = seen.get(item.label, -1) + 1
            texts = self.texts.get(item.label) or [spoken(item.label.replace("_", " "))]
            found.append(texts[turn % len(texts)])
        return found

    def vectors(self, texts: Sequence[str]) -> Float[np.ndarray, "n t"]:
        """Returns the sentence vectors of texts."""
        different = list(dict.fromkeys(texts))
        of_text = dict(zip(different, self.encoder.encode(different), strict=True))
        return np.stack([of_text[text] for text in texts])

    def classes(self, texts: Sequence[str], unknown: Sequence[int]) -> list[tuple[int, ...]]:
        """Returns the classes that each text asks for, as `separate --text` does; () for none.

        `unknown` are classes that the model has no output for.
        """

        def found(text: str) -> tuple[int, ...]:
            try:
                return find_texts([text], self.encoder, unknown=unknown)[0].class_indexes
            except UserError:
                return ()

        of_text = {text: found(text) for text in dict.fromkeys(texts)}
        return [of_text[text] for text in texts]


def read_wording(encoder: str | None, texts: str | None) -> Wording | None:
    """Reads the encoder, and a JSON file of the texts of labels: a text or a list of texts each.

    Args:
      encoder: folder of a sentence encoder; None: nothing is asked with texts.
      texts: the file; None: the labels themselves.

    Raises:
      UserError: encoder or file is unusable.
    """
    if encoder is None:
        return None
    if texts is None:
        return Wording(TextEncoder(encoder))
    try:
        with open(texts, "rb", opener=at_once) as file:
            stored = read_json(file, _TEXTS)
    except OSError as error:
        raise UserError(f"{texts} cannot be read ({error.strerror}); give a JSON file") from error
    except ValueError as error:
        raise UserError(
            f'{texts}: {error}; expected a label and its texts, as in {{"Dog": ["a dog barks"]}}'
        ) from error
    listed = {label: [of] if isinstance(of, str) else of for label, of in stored.items()}
    return Wording(TextEncoder(encoder), listed)


def require_labels(wording: Wording | None, items: Sequence[Item]) -> None:
    """Raises a UserError if the texts are of other labels than those of the items."""
    labels = {item.label for item in items}
    if wording is not None and wording.texts and not labels & set(wording.texts):
        raise UserError(
            f"--texts has none of the labels that are evaluated (the first is {min(labels)!r}, in "
            f"--texts {min(wording.texts)!r}); write them as the table of results does"
        )


def how_asked(encoder: str | None, texts: str | None) -> dict[str, str | None]:
    """Returns what results say of the options."""
    return {} if encoder is None else {"text_encoder": os.fspath(encoder), "texts": texts}
