"""Draws the text that each item is asked with, by position: a name of its class, or its caption.

Letters: `n` positions of the training order, `k` classes, `m` templates, `t` width of a vector.
"""

import dataclasses
import hashlib
import json

import numpy as np
from jaxtyping import Float, Integer

from uss_jax.anchors.captions import CaptionTable, open_captions
from uss_jax.bundles.node_vectors import class_texts, load_node_vectors
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.data.index import RecordIndex
from uss_jax.data.permutation import BY_TEXT, TEMPLATES, uniform

# What a class is asked with, {name} being its name; the first is that of evaluation and use.
NAMED_AS = (
    "{name}",
    "the sound of {name}",
    "a recording of {name}",
    "{name} can be heard",
    "sounds like {name}",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """Sentence vectors of what items are asked with.

    Attributes:
      names: [k, m, t] vectors of each class's name in every template, the bare name first.
      share: share of items that are asked with a text; the others with a sound.
      encoder: hash of the sentence encoder.
      digest: hash of what the vectors are made of; the same on every device.
      captions: vectors of clips' captions, which stand in for the names; None without.
    """

    names: Float[np.ndarray, "k m t"]
    share: float
    encoder: str
    digest: str
    captions: CaptionTable | None = None

    def draw(
        self,
        seed: int,
        positions: Integer[np.ndarray, " n"],
        records: Integer[np.ndarray, " n"],
        classes: Integer[np.ndarray, " n"],
    ) -> dict[str, np.ndarray]:
        """Returns columns of the batch.

        Returns:
          `text` [n, t] float32, the vector of a text on each item; `by_text` [n] uint8, whether the
          item is asked with it.
        """
        templates = self.names.shape[1]
        template = (uniform(seed, TEMPLATES, positions) * templates).astype(np.int64)
        by_text = uniform(seed, BY_TEXT, positions) < self.share
        text = self.names[classes, template]
        if self.captions is not None:
            there, vectors = self.captions.read(records)
            text[there] = vectors
        return {"text": text, "by_text": by_text.astype(np.uint8)}


def load_texts(encoder: str, share: float) -> Texts:
    """Encodes the classes' names in all templates.

    Args:
      encoder: folder of a sentence encoder; "" for the vectors in the package, which are those of
        the bare names.
      share: share of items that are asked with a text.
    """
    if encoder:
        net = TextEncoder(encoder)
        names = np.stack([net.encode(class_texts(template)) for template in NAMED_AS], axis=1)
        made_by, templates = net.hash, list(NAMED_AS)
    else:
        nodes = load_node_vectors()
        names = nodes.of_classes()[:, None]
        made_by, templates = nodes.encoder, [nodes.template]
    about = json.dumps([made_by, templates, share])
    return Texts(names, share, made_by, hashlib.sha256(about.encode()).hexdigest())


def with_captions(texts: Texts, path: str, index: RecordIndex) -> Texts:
    """Returns the texts with the captions of a split's clips, which `uss-jax captions` encoded."""
    captions = open_captions(path, index, texts.encoder)
    digest = hashlib.sha256(f"{texts.digest} {captions.header['digest']}".encode()).hexdigest()
    return dataclasses.replace(texts, captions=captions, digest=digest)
