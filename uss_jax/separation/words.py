"""Queries in words: ranks the nodes of the ontology by a text, and asks for the nearest.

With a sentence encoder, nodes are ranked by the angle between the vectors of text and name; without
one, by the words that they share.

Letters: `n` nodes, `d` width of a sentence vector.
"""

import collections
import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from uss_jax.bundles.node_vectors import load_node_vectors, node_texts
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.separation.queries import parse_classes

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
LEAST_OF_WORDS, LEAST_OF_VECTORS = 0.3, 0.4
# Above this, the vectors are near each other whatever the words.
_CERTAIN = 0.6
_SHOWN = 5
_TEXT_SHOWN = 60  # characters
_SILENCE = "/m/028v0c"


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
    """What a text asks for.

    Attributes:
      text: the text.
      matches: the nearest nodes, the nearest first.
      asked: those of them that it asks for.
    """

    text: str
    matches: list[Match]
    asked: list[Match]

    @property
    def name(self) -> str:
        """Name of the sound; a "/" would make a folder."""
        return self.text.replace("/", " ")

    @property
    def class_indexes(self) -> tuple[int, ...]:
        """What the nodes ask for, as one set of classes."""
        (indexes,) = parse_classes(["+".join(match.mid for match in self.asked)]).values()
        return indexes

    def facts(self) -> dict[str, Any]:
        """Returns what report.json says of it."""
        return {"text": self.text, "nodes": {m.name: round(m.similarity, 4) for m in self.asked}}

    def __str__(self) -> str:
        others = [match for match in self.matches if match not in self.asked]
        also = f"; next {listed(others)}" if others else ""
        return f'"{self.text}" asks for {listed(self.asked)}{also}'


def find_texts(
    texts: Sequence[str], encoder: str | os.PathLike | None, least: float | None, most: int
) -> list[Found]:
    """Finds what texts ask for.

    Args:
      texts: descriptions of sounds, in English.
      encoder: folder of a sentence encoder; None to compare words.
      least: lowest similarity of a node that is asked for; None for the default.
      most: largest number of nodes that one text asks for.

    Raises:
      UserError: a text is unusable or near to nothing, or the encoder cannot be read.
    """
    texts = [check_text(text) for text in texts]
    if encoder is None:
        rankings = [rank_by_words(text) for text in texts]
    else:
        opened = TextEncoder(encoder)
        rankings = _rankings_by(opened, texts)
        for text, matches in zip(texts, rankings, strict=True):
            if matches[0].similarity < _CERTAIN and not _is_english(text, opened):
                raise _far(text, matches)
    if least is None:
        least = LEAST_OF_WORDS if encoder is None else LEAST_OF_VECTORS
    return [
        Found(text, matches[: max(_SHOWN, most)], chosen(text, matches, least, most))
        for text, matches in zip(texts, map(_names_first, texts, rankings), strict=True)
    ]


def _names_first(text: str, matches: list[Match]) -> list[Match]:
    """Puts the node whose very name the text is before all others."""
    named = [n.mid for n in load_ontology().nodes.values() if n.name.casefold() == text.casefold()]
    return [*(Match(mid, 1.0) for mid in named), *(m for m in matches if m.mid not in named)]


def _rankings_by(encoder: TextEncoder, texts: Sequence[str]) -> list[list[Match]]:
    nodes = load_node_vectors()
    vectors = nodes.vectors
    if nodes.encoder != encoder.hash:  # those in the package are of another encoder
        vectors = encoder.encode(node_texts())
    return [rank_by_vectors(vector, nodes.mids, vectors) for vector in encoder.encode(texts)]


def check_text(text: str) -> str:
    """Returns the text without spaces around it.

    Raises:
      UserError: it is empty or too long.
    """
    found = " ".join(text.split())
    if not _WORD.search(found):
        raise UserError(f'--text "{found[:60]}" has no words; describe a sound')
    if len(found) > LONGEST_TEXT:
        raise UserError(
            f"--text has {len(found):,} characters, more than {LONGEST_TEXT:,}; describe one sound"
        )
    return found


def rank_by_words(text: str) -> list[Match]:
    """Ranks the nodes by the words that name and text share, the nearest first.

    The similarity is the cosine of their vectors of words, reduced to stems and weighted by how few
    names have them. Nodes without a word in common are left out.
    """
    mids, names, weight = _vocabulary()
    asked = collections.Counter(_stems(text))
    longest = max(weight.values())
    length = math.sqrt(sum(weight.get(stem, longest) ** 2 for stem in asked)) or 1.0
    matches = []
    for mid, stems in zip(mids, names, strict=True):
        common = sum(weight[stem] ** 2 for stem in stems if stem in asked)
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


def chosen(text: str, matches: Sequence[Match], least: float, most: int) -> list[Match]:
    """Returns the nodes that a text asks for: the best, and others as near as `least`.

    Nodes below which there is no class, such as "Gull, seagull", cannot be asked for.

    Args:
      text: the text.
      matches: all nodes, the nearest first.
      least: lowest similarity.
      most: largest number of nodes.

    Raises:
      UserError: no node is near enough, or the nearest is silence.
    """
    ontology = load_ontology()
    with_classes = [match for match in matches if ontology.class_indexes(match.mid)]
    near = [match for match in with_classes[:most] if match.similarity >= least]
    if not near:
        raise _far(text, matches)
    if near[0].mid == _SILENCE:
        raise UserError(f'"{_short(text)}" is silence, which cannot be separated; describe a sound')
    return near


def _is_english(text: str, encoder: TextEncoder) -> bool:
    """Returns whether the encoder knows at least half of the words that tell of a sound.

    Vectors of other languages and of nonsense are as near to some node as those of English.
    """
    words = [word for word in _WORD.findall(text.casefold()) if word not in _EMPTY]
    return 2 * sum(map(encoder.knows, words)) >= len(words)


def _far(text: str, matches: Sequence[Match]) -> UserError:
    return UserError(
        f'nothing in the ontology is near "{_short(text)}"; the nearest: {listed(matches[:3])}; '
        "say it in other words, in English, or give --classes"
    )


def _short(text: str) -> str:
    return text if len(text) <= _TEXT_SHOWN else f"{text[:_TEXT_SHOWN]}..."


def listed(matches: Sequence[Match]) -> str:
    """Returns names and similarities for a line of text."""
    return ", ".join(f'"{match.name}" {match.similarity:.2f}' for match in matches) or "none"


@functools.cache
def _vocabulary() -> tuple[list[str], list[tuple[str, ...]], dict[str, float]]:
    """Returns the nodes, the stems of each one's name, and the weight of every stem."""
    nodes = load_ontology().nodes
    names = [tuple(dict.fromkeys(_stems(node.name))) for node in nodes.values()]
    count = collections.Counter(stem for stems in names for stem in stems)
    weight = {stem: math.log(1 + len(names) / number) for stem, number in count.items()}
    return list(nodes), names, weight


def _stems(text: str) -> list[str]:
    """Returns the words of a text, in lower case and without their endings."""
    words = (word for word in _WORD.findall(text.casefold()) if word not in _EMPTY)
    return [_stem(word) for word in words]


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= _SHORTEST_STEM:
            # "running" and "run", "barking" and "bark"
            double = ending in ("ing", "ings", "ed", "er", "ers") and stem[-1:] == stem[-2:-1]
            return stem[:-1] if double and stem[-1] not in "sl" else stem.removesuffix("e")
    return word.removesuffix("e") if len(word) > _SHORTEST_STEM else word
