"""Ranks the nodes of the ontology by a text.

With a sentence encoder, by the angle between the vectors of text and name; without one, by the
words that they share.

Letters: `n` nodes or texts, `d` width of a sentence vector.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from uss_jax.bundles.node_vectors import load_node_vectors, node_texts
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.ontology import load_ontology

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
# What a name has in another form counts so much of what it has in the very form.
_OTHER_FORM = 0.8


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


def rankings(texts: Sequence[str], encoder: TextEncoder | None) -> list[list[Match]]:
    """Ranks all nodes for each text, the nearest first; a node of this very name is before all."""
    if encoder is not None:
        return rankings_by(encoder, texts, encoder.encode(texts))
    return [_names_first(text, rank_by_words(text)) for text in texts]


def rankings_by(
    encoder: TextEncoder, texts: Sequence[str], vectors: Float[np.ndarray, "n d"]
) -> list[list[Match]]:
    """Ranks all nodes by the vectors of texts."""
    nodes = load_node_vectors()
    of_nodes = nodes.vectors
    if nodes.encoder != encoder.hash:  # those in the package are of another encoder
        of_nodes = encoder.encode(node_texts())
    ranked = [rank_by_vectors(vector, nodes.mids, of_nodes) for vector in vectors]
    return [_names_first(*of) for of in zip(texts, ranked, strict=True)]


def _names_first(text: str, matches: list[Match]) -> list[Match]:
    """Puts the node whose very name the text is before all others."""
    named = _named(text)
    return [*(Match(mid, 1.0) for mid in named), *(m for m in matches if m.mid not in named)]


def rank_by_words(text: str) -> list[Match]:
    """Ranks the nodes by the words that name and text share, the nearest first.

    The similarity is the cosine of their vectors of words, reduced to stems and weighted by how few
    names have them; a word in another form counts less. Nodes without a word in common are left
    out.
    """
    mids, names, weight = _vocabulary()
    words = telling(text)
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


def split(text: str) -> list[str]:
    """Returns the words of a text, in lower case."""
    return _WORD.findall(text.casefold())


def telling(text: str) -> list[str]:
    """Returns the words that tell of a sound, in lower case; all, if the text is a node's name."""
    words = split(text)
    return [word for word in words if word not in _EMPTY] or (words if _named(text) else [])


def _named(text: str) -> list[str]:
    """Returns the mids of the nodes whose very name the text is."""
    nodes = load_ontology().nodes.values()
    return [node.mid for node in nodes if node.name.casefold() == text.casefold()]


def in_some_name(word: str) -> bool:
    """Returns whether the name of a node has this word, in any form."""
    _, _, weight = _vocabulary()
    return _stem(word) in weight


@functools.cache
def _vocabulary() -> tuple[list[str], list[dict[str, str]], dict[str, float]]:
    """Returns the nodes, stem -> word of each one's name, and the weight of every stem."""
    nodes = load_ontology().nodes
    names = [{_stem(word): word for word in telling(node.name)} for node in nodes.values()]
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
