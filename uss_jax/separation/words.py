"""Ranks ontology nodes, or anything else with a sentence vector, by a sentence.

Letters: `n` nodes, `d` width of the sentence vectors.
"""

import numpy as np
from jaxtyping import Float, Int


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
