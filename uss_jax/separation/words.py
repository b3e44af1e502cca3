"""Queries in words: asks for the nodes of the ontology that are nearest to a text.

Letters: `n` texts, `d` width of a condition.
"""

import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from uss_jax.bundles.model import Model
from uss_jax.bundles.node_vectors import class_texts
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.errors import UserError, one_line
from uss_jax.models.tagging import unknown_classes
from uss_jax.ontology import load_ontology
from uss_jax.separation.queries import asked_by, indicators
from uss_jax.separation.ranking import (
    Match,
    in_some_name,
    rankings,
    rankings_by,
    split,
    telling,
)

# Option of `uss-jax separate` that asks for a class by its name.
BY_CLASSES = "--classes"
LONGEST_TEXT = 1000  # characters; an encoder reads about as many
# Lowest similarities of a node that is asked for, by default.
LEAST_OF_WORDS, LEAST_OF_VECTORS = 0.3, 0.5
_NEGATIONS = frozenset(("no", "without", "but", "except"))
# Above this, the vectors are near each other whatever the words.
_CERTAIN = 0.6
_SHOWN = 5
_TEXT_SHOWN = 60  # characters
_SILENCE = "/m/028v0c"
# Vectors of so many names are compared; those of one encoder, as float16, differ by less.
_COMPARED, _SAME = 8, 5e-3


@dataclasses.dataclass(frozen=True)
class Found:
    """The nodes that a text asks for.

    Attributes:
      text: the text.
      matches: the nearest nodes, the nearest first.
      asked: those of them that it asks for; none if it asks with a sentence vector.
    """

    text: str
    matches: list[Match]
    asked: list[Match]

    @property
    def name(self) -> str:
        """Name of the sound."""
        return _name(self.text)

    @property
    def class_indexes(self) -> tuple[int, ...]:
        """The classes of these nodes, as one set."""
        nodes = load_ontology().nodes
        indexes = [k for match in self.asked for k in asked_by(nodes[match.mid])]
        return tuple(dict.fromkeys(indexes))

    def facts(self) -> dict[str, Any]:
        """Returns what report.json says of it."""
        return {"text": self.text, "nodes": {m.name: round(m.similarity, 4) for m in self.asked}}

    def __str__(self) -> str:
        if not self.asked:
            return one_line(f'"{_short(self.text)}" is nearest to {listed(self.matches)}')
        others = [match for match in self.matches if match not in self.asked]
        also = f"; near too: {listed(others)}" if others else ""
        return one_line(f'"{_short(self.text)}" asks for {listed(self.asked)}{also}')


def require_same_encoder(model: Model, encoder: TextEncoder) -> None:
    """Raises a UserError unless the encoder's vectors are those that a model was trained with."""
    stored = np.asarray(model.query.variables["params"]["names"])[:_COMPARED]
    found = encoder.encode(class_texts()[:_COMPARED])
    if np.abs(stored - found).max() > _SAME:
        raise UserError(
            f"{encoder.path} is another sentence encoder than that which {model.path} was trained "
            "with; give that one"
        )


def vectors_of_texts(
    model: Model, encoder: TextEncoder, texts: Sequence[str], by: str = BY_CLASSES
) -> tuple[list[Found], Float[np.ndarray, "n d"]]:
    """Returns the nodes nearest to texts, and the conditions that their sentence vectors make.

    Args:
      model: a model that takes texts.
      encoder: its sentence encoder.
      texts: descriptions of sounds, in English; they need not be near any node.
      by: option that asks for a class by its name, for messages.

    Raises:
      UserError: a text is unusable or given twice, or the encoder is not that of the model.
    """
    require_same_encoder(model, encoder)
    texts = _checked(texts)
    vectors, found = encoder.encode(texts), []
    mids = {load_ontology().class_mids[k] for k in model.query.module.named}
    for text, matches in zip(texts, rankings_by(encoder, texts, vectors), strict=True):
        _require_sense(text, matches, encoder, by)
        taken = [match for match in matches if not mids or match.mid in mids]
        found.append(Found(text, taken[:_SHOWN], []))
    return found, model.of_texts(vectors)


def made_of(model: Model) -> str:
    """Returns what the conditions of texts are made of, for a model that takes texts."""
    if model.query.module.named:
        return "sentence vectors of the trained names nearest to texts"
    return "sentence vectors of texts"


def classes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns the arguments `unknown` and `trained` of `find_texts` for a model."""
    query = model.query.module
    unknown = unknown_classes(model.tagger.module) if query.takes.probabilities else ()
    return {"unknown": unknown, "trained": query.trained}


def conditions_of_texts(
    model: Model, encoder: TextEncoder | None, texts: Sequence[str], by: str
) -> tuple[dict[str, Float[np.ndarray, "d"]], str]:
    """Returns a condition for each text, by the name of its sound, and how they are made.

    `by` is the option that asks for a class by its name, for messages.

    Raises:
      UserError: a text cannot be asked with, or the model's conditions cannot be made of one.
    """
    takes = model.query.module.takes
    if takes.texts and encoder is not None:
        found, vectors = vectors_of_texts(model, encoder, texts, by)
        how = made_of(model)
    elif takes.classes:
        found = find_texts(texts, encoder, **classes_of(model), by=by)
        vectors = model.of_classes(indicators([one.class_indexes for one in found]))
        how = "the classes of the nodes nearest to texts"
    elif takes.probabilities:
        raise UserError(
            f"a text asks {model.path} for classes, whose conditions are made of the tags of each "
            "recording and cannot be stored; give `uss-jax separate --text`"
        )
    else:
        raise UserError(f"{model.path} takes recordings only; give folders of them, not --text")
    return {one.name: vector for one, vector in zip(found, vectors, strict=True)}, how


def find_texts(
    texts: Sequence[str],
    encoder: TextEncoder | None,
    least: float | None = None,
    most: int = 1,
    unknown: Collection[int] = (),
    trained: Collection[int] = (),
    by: str = BY_CLASSES,
) -> list[Found]:
    """Finds the nodes that texts ask for.

    Args:
      texts: descriptions of sounds, in English.
      encoder: a sentence encoder; None to compare words.
      least: lowest similarity of a node that is asked for; None for the default.
      most: largest number of nodes that one text asks for.
      unknown: classes that the model has no output for; nodes of these alone are passed over.
      trained: classes that the model was trained on; others are asked for only where none of these
        is near. () for all.
      by: option that asks for a class by its name, for messages.

    Raises:
      UserError: a text is unusable, given twice, or near to nothing.
    """
    texts = _checked(texts)
    return [
        ask(text, matches, encoder, least, most, unknown, trained, by)
        for text, matches in zip(texts, rankings(texts, encoder), strict=True)
    ]


def ask(
    text: str,
    matches: list[Match],
    encoder: TextEncoder | None,
    least: float | None = None,
    most: int = 1,
    unknown: Collection[int] = (),
    trained: Collection[int] = (),
    by: str = BY_CLASSES,
) -> Found:
    """Returns what a text asks for, given the ranking of all nodes; as in `find_texts`."""
    if encoder is not None:
        _require_sense(text, matches, encoder, by)
    if least is None:
        least = LEAST_OF_WORDS if encoder is None else LEAST_OF_VECTORS
    asked = chosen(text, matches, least, most, unknown, trained, by)
    return Found(text, matches[: max(_SHOWN, most)], asked)


def _checked(texts: Sequence[str]) -> list[str]:
    """Returns the texts without spaces around them; raises a UserError if two have one name."""
    texts = [check_text(text) for text in texts]
    names = list(map(_name, texts))
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise UserError(f'--text "{_short(twice[0])}" is given twice; give it once')
    return texts


def _require_sense(text: str, matches: list[Match], encoder: TextEncoder, by: str) -> None:
    """Raises a UserError if the encoder does not understand a text, or if it means silence."""
    if matches[0].similarity < _CERTAIN:
        _require_known(text, encoder, by)
    if matches[0].mid == _SILENCE and matches[0].similarity >= LEAST_OF_VECTORS:
        raise _silent(text)


def _name(text: str) -> str:
    return text.replace("/", " ")  # which would make a folder


def excludes(text: str) -> bool:
    """Returns whether a text may mean what is not to be heard, which no vector tells."""
    return not _NEGATIONS.isdisjoint(split(text))


def check_text(text: str) -> str:
    """Returns the text without spaces around it.

    Raises:
      UserError: it has no words, or is too long.
    """
    found = " ".join(text.split())
    if not telling(found):
        raise UserError(f'--text "{_short(found)}" has no words that tell of a sound; describe one')
    if len(found) > LONGEST_TEXT:
        raise UserError(
            f"--text has {len(found):,} characters, more than {LONGEST_TEXT:,}; describe one sound"
        )
    return found


def refuse_files(texts: Sequence[str]) -> None:
    """Raises a UserError if a text is the path of a file: recordings given after --text."""
    for text in texts:
        if os.path.isfile(text):
            raise UserError(f'--text "{text}" is a file; give recordings before --text')


def chosen(
    text: str,
    matches: Sequence[Match],
    least: float,
    most: int,
    unknown: Collection[int] = (),
    trained: Collection[int] = (),
    by: str = BY_CLASSES,
) -> list[Match]:
    """Returns the nodes that a text asks for: the best, and others as near as `least`.

    Args:
      text: the text.
      matches: all nodes, the nearest first.
      least: lowest similarity.
      most: largest number of nodes.
      unknown: classes that the model has no output for; nodes of these alone are passed over.
      trained: classes that the model was trained on; others are asked for only where none of these
        is near. () for all.
      by: option that asks for a class by its name, for messages.

    Raises:
      UserError: no node is near enough, or there is no class below the nearest, or it is silence.
    """
    ontology = load_ontology()

    def classes(match: Match) -> tuple[int, ...]:
        there = ontology.class_indexes(match.mid)
        return there and asked_by(ontology.nodes[match.mid])

    askable = [match for match in matches if not set(classes(match)) <= set(unknown)]
    near = [match for match in askable if match.similarity >= least]
    nearest = listed([match for match in askable if match.mid != _SILENCE][:3])
    if matches and matches[0].similarity >= least and not classes(matches[0]):
        raise UserError(
            f'"{_short(text)}" is nearest to "{matches[0].name}", which is no class and has none '
            f"below it; the nearest that can be asked for: {nearest}; give one with {by}"
        )
    if not near:
        raise UserError(
            f'nothing in the ontology is near "{_short(text)}"; the nearest: {nearest}; say it in '
            f"other words, in English, or give {by}"
        )
    if near[0].mid == _SILENCE:
        raise _silent(text)
    near = [match for match in near if match.mid != _SILENCE]
    well = [m for m in near if not trained or not set(trained).isdisjoint(classes(m))]
    return (well or near)[:most]


def _silent(text: str) -> UserError:
    return UserError(f'"{_short(text)}" is silence, which cannot be separated; describe a sound')


def _require_known(text: str, encoder: TextEncoder, by: str) -> None:
    """Raises a UserError unless the encoder knows at least half of the words that tell of a sound.

    Vectors of other languages and of nonsense are as near to some node as those of English.
    """
    words = telling(text)
    strange = [word for word in words if not encoder.knows(word) and not in_some_name(word)]
    if 2 * len(strange) > len(words):
        raise UserError(
            f"the sentence encoder does not know {', '.join(map(repr, strange[:5]))} of "
            f'"{_short(text)}"; say it in other words, in English, or give {by}'
        )


def _short(text: str) -> str:
    return text if len(text) <= _TEXT_SHOWN else f"{text[:_TEXT_SHOWN]}..."


def listed(matches: Sequence[Match]) -> str:
    """Returns names and similarities for a line of text."""
    return ", ".join(f'"{match.name}" {match.similarity:.2f}' for match in matches) or "none"
