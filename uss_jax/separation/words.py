"""Queries in words: ranks the nodes of the ontology by a text, and asks for the nearest.

With a sentence encoder, nodes are ranked by the angle between the vectors of text and name; without
one, by the words that they share.

Letters: `n` nodes or texts, `d` width of a sentence vector or a condition.
"""

import collections
import dataclasses
import functools
import math
import os
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from uss_jax.bundles.model import Model
from uss_jax.bundles.node_vectors import class_texts, load_node_vectors, node_texts
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.errors import UserError, one_line
from uss_jax.models.tagging import unknown_classes
from uss_jax.ontology import load_ontology
from uss_jax.separation.queries import asked_by, indicators

_WORD = re.compile(r"[^\W\d_]+", re.UNICODE)
# Words that say nothing of a sound.
_EMPTY = frozenset(
    _WORD.findall(
        "a an and are as at be by far few for from her his i in into is it its me my near noise "
        "noises of off on one or our over please s some someone something sound sounds that the "
        "their there this to two up very want was which while who whose with you your"
    )
)
_ENDINGS = ("ings", "ing", "ers", "er", "ies", "es", "ed", "s", "y")
_SHORTEST_STEM = 3
LONGEST_TEXT = 1000  # characters; an encoder reads about as many
# Lowest similarities of a node that is asked for, by default.
LEAST_OF_WORDS, LEAST_OF_VECTORS = 0.3, 0.5
# What a name has in another form counts so much of what it has in the very form.
_OTHER_FORM = 0.8
_NEGATIONS = frozenset(("no", "without", "but", "except"))
# Above this, the vectors are near each other whatever the words.
_CERTAIN = 0.6
_SHOWN = 5
_TEXT_SHOWN = 60  # characters
_SILENCE = "/m/028v0c"
# Vectors of so many names are compared; those of one encoder, as float16, differ by less.
_COMPARED, _SAME = 8, 5e-3


@dataclasses.dataclass(frozen=True)
class Match:
    """A node of the ontology and how near it is to a text.

    Attributes:
      mid: the node.
      similarity: in [0, 1]; 1 is the same.
    """

    mid: str
    similarity: float

    @property
    def name(self) -> str:
        """Name of the node."""
        return load_ontology().nodes[self.mid].name


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
    model: Model, encoder: TextEncoder, texts: Sequence[str]
) -> tuple[list[Found], Float[np.ndarray, "n d"]]:
    """Returns the nodes nearest to texts, and the conditions that their sentence vectors make.

    Args:
      model: a model that takes texts.
      encoder: its sentence encoder.
      texts: descriptions of sounds, in English; they need not be near any node.

    Raises:
      UserError: a text is unusable or given twice, or the encoder is not that of the model.
    """
    require_same_encoder(model, encoder)
    texts = _checked(texts)
    vectors, found = encoder.encode(texts), []
    mids = {load_ontology().class_mids[k] for k in model.query.module.named}
    for text, matches in zip(texts, _rankings_by(encoder, texts, vectors), strict=True):
        _require_sense(text, matches, encoder)
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
    model: Model, encoder: TextEncoder | None, texts: Sequence[str]
) -> tuple[dict[str, Float[np.ndarray, "d"]], str]:
    """Returns a condition for each text, by the name of its sound, and how they are made.

    Raises:
      UserError: a text cannot be asked with, or the model's conditions cannot be made of one.
    """
    takes = model.query.module.takes
    if takes.texts and encoder is not None:
        found, vectors = vectors_of_texts(model, encoder, texts)
        how = made_of(model)
    elif takes.classes:
        found = find_texts(texts, encoder, **classes_of(model))
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

    Raises:
      UserError: a text is unusable, given twice, or near to nothing.
    """
    texts = _checked(texts)
    return [
        ask(text, matches, encoder, least, most, unknown, trained)
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
) -> Found:
    """Returns what a text asks for, given the ranking of all nodes; as in `find_texts`."""
    if encoder is not None:
        _require_sense(text, matches, encoder)
    if least is None:
        least = LEAST_OF_WORDS if encoder is None else LEAST_OF_VECTORS
    asked = chosen(text, matches, least, most, unknown, trained)
    return Found(text, matches[: max(_SHOWN, most)], asked)


def rankings(texts: Sequence[str], encoder: TextEncoder | None) -> list[list[Match]]:
    """Ranks all nodes for each text, the nearest first; a node of this very name is before all."""
    if encoder is not None:
        return _rankings_by(encoder, texts, encoder.encode(texts))
    return [_names_first(text, rank_by_words(text)) for text in texts]


def _checked(texts: Sequence[str]) -> list[str]:
    """Returns the texts without spaces around them; raises a UserError if two have one name."""
    texts = [check_text(text) for text in texts]
    names = list(map(_name, texts))
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise UserError(f'--text "{_short(twice[0])}" is given twice; give it once')
    return texts


def _require_sense(text: str, matches: list[Match], encoder: TextEncoder) -> None:
    """Raises a UserError if the encoder does not understand a text, or if it means silence."""
    if matches[0].similarity < _CERTAIN:
        _require_known(text, encoder)
    if matches[0].mid == _SILENCE and matches[0].similarity >= LEAST_OF_VECTORS:
        raise _silent(text)


def _name(text: str) -> str:
    return text.replace("/", " ")  # which would make a folder


def excludes(text: str) -> bool:
    """Returns whether a text may mean what is not to be heard, which no vector tells."""
    return not _NEGATIONS.isdisjoint(_WORD.findall(text.casefold()))


def _names_first(text: str, matches: list[Match]) -> list[Match]:
    """Puts the node whose very name the text is before all others."""
    named = _named(text)
    return [*(Match(mid, 1.0) for mid in named), *(m for m in matches if m.mid not in named)]


def _rankings_by(
    encoder: TextEncoder, texts: Sequence[str], vectors: Float[np.ndarray, "n d"]
) -> list[list[Match]]:
    """Ranks all nodes by the vectors of texts."""
    nodes = load_node_vectors()
    of_nodes = nodes.vectors
    if nodes.encoder != encoder.hash:  # those in the package are of another encoder
        of_nodes = encoder.encode(node_texts())
    ranked = [rank_by_vectors(vector, nodes.mids, of_nodes) for vector in vectors]
    return [_names_first(*of) for of in zip(texts, ranked, strict=True)]


def check_text(text: str) -> str:
    """Returns the text without spaces around it.

    Raises:
      UserError: it has no words, or is too long.
    """
    found = " ".join(text.split())
    if not _telling(found):
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


def _telling(text: str) -> list[str]:
    """Returns the words that tell of a sound, in lower case; all, if the text is a node's name."""
    words = _WORD.findall(text.casefold())
    return [word for word in words if word not in _EMPTY] or (words if _named(text) else [])


def _named(text: str) -> list[str]:
    """Returns the mids of the nodes whose very name the text is."""
    nodes = load_ontology().nodes.values()
    return [node.mid for node in nodes if node.name.casefold() == text.casefold()]


def rank_by_words(text: str) -> list[Match]:
    """Ranks the nodes by the words that name and text share, the nearest first.

    The similarity is the cosine of their vectors of words, reduced to stems and weighted by how few
    names have them; a word in another form counts less. Nodes without a word in common are left
    out.
    """
    mids, names, weight = _vocabulary()
    words = _telling(text)
    asked = {_stem(word): word for word in words}
    longest = max(weight.values())
    length = math.sqrt(sum(weight.get(stem, longest) ** 2 for stem in asked))
    matches = []
    for mid, stems in zip(mids, names, strict=True):
        common = sum(
            weight[stem] ** 2 * (1 if word in words else _OTHER_FORM)
            for stem, word in stems.items()
            if stem in asked
        )
        if common:
            norm = math.sqrt(sum(weight[stem] ** 2 for stem in stems))
            matches.append(Match(mid, common / (norm * length)))
    return sorted(matches, key=lambda match: -match.similarity)


def rank_by_vectors(
    vector: Float[np.ndarray, "d"], mids: Sequence[str], vectors: Float[np.ndarray, "n d"]
) -> list[Match]:
    """Ranks the nodes by the cosine of their vectors with that of a text, the nearest first.

    Args:
      vector: the text's.
      mids: the nodes.
      vectors: theirs.
    """
    order, similarity = rank(vector, vectors)
    near = np.clip(similarity, 0, 1).tolist()
    return [Match(mids[at], value) for at, value in zip(order.tolist(), near, strict=True)]


def rank(
    vector: Float[np.ndarray, "d"], node_vectors: Float[np.ndarray, "n d"]
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Ranks nodes by the cosine similarity to a sentence.

    Args:
      vector: the sentence's.
      node_vectors: of any norm; a vector of zeros has similarity 0.

    Returns:
      The rows of `node_vectors`, most similar first and equal ones in their order, and the
      similarity of each in this order.
    """
    rows = node_vectors.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(vector.astype(np.float64))
    similarity = rows @ vector / np.where(norms > 0, norms, 1)
    order = np.argsort(-similarity, kind="stable")
    return order, similarity[order].astype(np.float32)


def chosen(
    text: str,
    matches: Sequence[Match],
    least: float,
    most: int,
    unknown: Collection[int] = (),
    trained: Collection[int] = (),
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

    Raises:
      UserError: no node is near enough, or there is no class below the nearest, or it is silence.
    """
    ontology = load_ontology()

    def classes(match: Match) -> tuple[int, ...]:
        return ontology.class_indexes(match.mid)

    askable = [match for match in matches if not set(classes(match)) <= set(unknown)]
    near = [match for match in askable if match.similarity >= least]
    nearest = listed([match for match in askable if match.mid != _SILENCE][:3])
    if matches and matches[0].similarity >= least and not classes(matches[0]):
        raise UserError(
            f'"{_short(text)}" is nearest to "{matches[0].name}", which is no class and has none '
            f"below it; the nearest that can be asked for: {nearest}; give one with --classes"
        )
    if not near:
        raise UserError(
            f'nothing in the ontology is near "{_short(text)}"; the nearest: {nearest}; say it in '
            "other words, in English, or give --classes"
        )
    if near[0].mid == _SILENCE:
        raise _silent(text)
    well = [m for m in near if not trained or not set(trained).isdisjoint(classes(m))]
    return (well or near)[:most]


def _silent(text: str) -> UserError:
    return UserError(f'"{_short(text)}" is silence, which cannot be separated; describe a sound')


def _require_known(text: str, encoder: TextEncoder) -> None:
    """Raises a UserError unless the encoder knows at least half of the words that tell of a sound.

    Vectors of other languages and of nonsense are as near to some node as those of English.
    """
    words, (_, _, weight) = _telling(text), _vocabulary()
    strange = [word for word in words if not encoder.knows(word) and _stem(word) not in weight]
    if 2 * len(strange) > len(words):
        raise UserError(
            f"the sentence encoder does not know {', '.join(map(repr, strange[:5]))} of "
            f'"{_short(text)}"; say it in other words, in English, or give --classes'
        )


def _short(text: str) -> str:
    return text if len(text) <= _TEXT_SHOWN else f"{text[:_TEXT_SHOWN]}..."


def listed(matches: Sequence[Match]) -> str:
    """Returns names and similarities for a line of text."""
    return ", ".join(f'"{match.name}" {match.similarity:.2f}' for match in matches) or "none"


@functools.cache
def _vocabulary() -> tuple[list[str], list[dict[str, str]], dict[str, float]]:
    """Returns the nodes, stem -> word of each one's name, and the weight of every stem."""
    nodes = load_ontology().nodes
    names = [{_stem(word): word for word in _telling(node.name)} for node in nodes.values()]
    count = collections.Counter(stem for stems in names for stem in stems)
    weight = {stem: math.log(1 + len(names) / number) for stem, number in count.items()}
    return list(nodes), names, weight


def _stem(word: str) -> str:
    """Returns a word without its ending, if a stem of three letters is left."""
    for ending in _ENDINGS:
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= _SHORTEST_STEM:
            # "running" and "run"
            double = ending in ("ing", "ings", "ed", "er", "ers") and stem[-1:] == stem[-2:-1]
            return _without_e(stem[:-1] if double and stem[-1] not in "sl" else stem)
    return _without_e(word)


def _without_e(stem: str) -> str:
    return stem.removesuffix("e") if len(stem) > _SHORTEST_STEM else stem
