"""Queries in words: ranks the nodes of the ontology by a text.

With a sentence encoder, by the angle between the vectors of text and name; without, by the words
that they share.

Letters: `n` nodes.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

# Words that say nothing of a sound.
_EMPTY = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "far",
        "few",
        "for",
        "from",
        "his",
        "her",
        "i",
        "in",
        "into",
        "is",
        "it",
        "its",
        "me",
        "my",
        "near",
        "of",
        "off",
        "on",
        "one",
        "or",
        "our",
        "over",
        "please",
        "some",
        "someone",
        "something",
        "sound",
        "sounds",
        "noise",
        "noises",
        "s",
        "that",
        "the",
        "their",
        "there",
        "this",
        "to",
        "two",
        "up",
        "very",
        "want",
        "was",
        "which",
        "while",
        "who",
        "whose",
        "with",
        "you",
        "your",
    ]
)
_WORD = re.compile(r"[^\W\d_]+", re.UNICODE)
_ENDINGS = ("ings", "ing", "ers", "er", "ies", "es", "ed", "s", "y")
_SHORTEST_STEM = 3
LONGEST_TEXT = 1000  # characters; an encoder reads about as many
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
    vector: Float[np.ndarray, "_"], mids: Sequence[str], vectors: Float[np.ndarray, "n _"]
) -> list[Match]:
    """Ranks the nodes by the cosine of their vectors with that of a text, the nearest first.

    Args:
      vector: the text's, of norm 1.
      mids: the nodes.
      vectors: theirs, of norm 1.
    """
    similarity = vectors.astype(np.float32) @ vector
    order = np.argsort(-similarity, kind="stable")
    return [Match(mids[at], float(np.clip(similarity[at], 0, 1))) for at in order]


def chosen(text: str, matches: Sequence[Match], least: float, most: int) -> list[Match]:
    """Returns the nodes that a text asks for: the best, and others as near as `least`.

    Args:
      text: the text.
      matches: all nodes, the nearest first.
      least: lowest similarity.
      most: largest number of nodes.

    Raises:
      UserError: no node is near enough, no class is below the best, or it is silence.
    """
    near = [match for match in matches[:most] if match.similarity >= least]
    if not near:
        raise UserError(
            f'nothing in the ontology is near "{text}"; the nearest: {listed(matches[:3])}; say it '
            "in other words, in English, or give --classes"
        )
    if near[0].mid == _SILENCE:
        raise UserError(f'"{text}" is silence, which cannot be separated; describe a sound')
    ontology = load_ontology()
    near = [match for match in near if ontology.class_indexes(match.mid)]
    if not near:
        raise UserError(
            f'"{text}" is nearest to "{matches[0].name}", below which there is no class; say it in '
            "other words"
        )
    return near


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
