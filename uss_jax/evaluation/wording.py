"""Reads the texts that an evaluation asks with in its row "text", and encodes them.

Letters: `n` items, `t` width of a sentence vector.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from uss_jax.bundles.model import Model
from uss_jax.bundles.node_vectors import spoken
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.disk.checked_json import either, list_of, mapping_of, read_json, text
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError, counted
from uss_jax.evaluation.items import Item
from uss_jax.separation.ranking import Match, rankings
from uss_jax.separation.words import ask, classes_of, require_same_encoder

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

    def classes(self, texts: Sequence[str], model: Model) -> list[tuple[int, ...]]:
        """Returns the classes that each text asks for, as `separate --text` does; () for none.

        `model` is the one that is asked.
        """
        of_model = classes_of(model)
        different = list(dict.fromkeys(texts))

        def asked(text: str, matches: list[Match]) -> tuple[int, ...]:
            try:
                return ask(text, matches, self.encoder, **of_model).class_indexes
            except UserError:
                return ()

        ranked = rankings(different, self.encoder)
        of_text = {text: asked(text, of) for text, of in zip(different, ranked, strict=True)}
        return [of_text[text] for text in texts]

    def remark(self, items: Sequence[Item]) -> str:
        """Returns which labels of the items have no text of their own; "" if all have or none.

        Raises:
          UserError: the texts are of other labels than those of the items.
        """
        labels = sorted({item.label for item in items})
        without = [label for label in labels if label not in self.texts]
        if not self.texts or not without:
            return ""
        if len(without) == len(labels):
            raise UserError(
                f"--texts has none of the labels that are evaluated (the first is {labels[0]!r}, "
                f"in --texts {min(self.texts)!r}); write them as the table of results does"
            )
        count = counted(len(without), "label")
        return f"--texts has none for {count} of {len(labels)}, asked by name, such as {without[0]}"


def read_wording(model: Model, encoder: str | None, texts: str | None) -> Wording | None:
    """Reads the encoder, and a JSON file of the texts of labels: a text or a list of texts each.

    Args:
      model: the model to ask.
      encoder: folder of a sentence encoder; None: nothing is asked with texts.
      texts: the file; None: the labels themselves.

    Raises:
      UserError: encoder or file is unusable, or the model cannot be asked with texts.
    """
    if encoder is None:
        return None
    takes = model.query.module.takes
    if not (takes.texts or takes.classes or takes.probabilities):
        raise UserError(f"{model.path} takes recordings only; leave out --text-encoder")
    wording = Wording(TextEncoder(encoder), {} if texts is None else _read_texts(texts))
    if takes.texts:
        require_same_encoder(model, wording.encoder)
    return wording


def _read_texts(path: str) -> dict[str, list[str]]:
    try:
        with open(path, "rb", opener=at_once) as file:
            stored = read_json(file, _TEXTS)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a JSON file") from error
    except ValueError as error:
        raise UserError(
            f'{path}: {error}; expected a label and its texts, as in {{"Dog": ["a dog barks"]}}'
        ) from error
    return {label: [of] if isinstance(of, str) else of for label, of in stored.items()}


def how_asked(encoder: str | None, texts: str | None) -> dict[str, str | None]:
    """Returns what results say of the options."""
    return {} if encoder is None else {"text_encoder": os.fspath(encoder), "texts": texts}
