"""The sentence vectors of all ontology nodes that travel in the package.

Letters: `n` nodes, in the order of the ontology, `k` classes, `d` width.
"""

import dataclasses
import os

import numpy as np
from jaxtyping import Float

from uss_jax.assets import FOLDER
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.ontology import load_ontology

NODES_FILE = FOLDER / "text" / "nodes.npz"
TEMPLATE = "{name}"
_COLUMNS = {
    "mids": Column("S", "n"),
    "vectors": Column("f2", "n d"),
    "template": Column("U"),
    "encoder": Column("U"),
}


@dataclasses.dataclass(frozen=True)
class NodeVectors:
    """Sentence vectors of the ontology's nodes.

    Attributes:
      mids: [n] nodes.
      vectors: [n, d], of norm 1 up to the rounding of float16.
      template: text that was encoded; {name} stands for `spoken` of the node's name.
      encoder: `hash` of the TextEncoder; vectors of others do not compare.
    """

    mids: tuple[str, ...]
    vectors: Float[np.ndarray, "n d"]
    template: str
    encoder: str

    def of_classes(self) -> Float[np.ndarray, "k d"]:
        """Returns the vectors of the nodes that are classes, by class index."""
        row = {mid: at for at, mid in enumerate(self.mids)}
        return self.vectors[[row[mid] for mid in load_ontology().class_mids]]


def spoken(name: str) -> str:
    """Returns a node's name in lower case, except acronyms: "UK garage", "telephone dialing, DTMF".

    Acronyms are words without small letters, but with two or more capitals.
    """
    return " ".join(word if _is_acronym(word) else word.lower() for word in name.split(" "))


def _is_acronym(word: str) -> bool:
    return word == word.upper() and sum(letter.isupper() for letter in word) > 1


def node_texts(template: str = TEMPLATE) -> list[str]:
    """Returns the text of every node, in the order of the ontology."""
    return [template.format(name=spoken(node.name)) for node in load_ontology().nodes.values()]


def class_texts(template: str = TEMPLATE) -> list[str]:
    """Returns the text of every class."""
    return [template.format(name=spoken(name)) for name in load_ontology().class_names]


def load_node_vectors() -> NodeVectors:
    """Reads the vectors in the package; those of an installed package need no encoder."""
    with open(NODES_FILE, "rb") as file:
        stored = read_npz(file, _COLUMNS)
    mids = tuple(mid.decode() for mid in stored["mids"].tolist())
    vectors = stored["vectors"].astype(np.float32)
    return NodeVectors(mids, vectors, str(stored["template"]), str(stored["encoder"]))


def write_node_vectors(path: str | os.PathLike, nodes: NodeVectors) -> None:
    """Writes an .npz file with `mids`, `vectors` as float16, `template` and `encoder`."""
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            mids=np.array([mid.encode() for mid in nodes.mids], np.bytes_),
            vectors=nodes.vectors.astype(np.float16),
            template=nodes.template,
            encoder=nodes.encoder,
        )
