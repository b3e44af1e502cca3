"""Queries: sets of classes, or condition vectors.

Letters: `n` sets of classes, `s` segments of a recording, `k` classes, `d` condition width.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32

from uss_jax.bundles.model import Model
from uss_jax.bundles.nets import unknown_among
from uss_jax.errors import UserError
from uss_jax.models.query import HEARD
from uss_jax.models.tagging import unknown_classes
from uss_jax.ontology import Node, load_ontology, reference_tree
from uss_jax.separation.windows import Target

# Conditions are probabilities, activations or an adaptor's output; a net overflows long before the
# largest float32.
_LARGEST_VALUE = 1e6


def parse_classes(words: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Parses classes, or sets of them joined by "+", into a dict of name -> class indexes.

    A node of the ontology that is no class, such as "Human voice", is the set of all classes below.

    Raises:
      UserError: no node is called so, it has no class below, or a set is given twice.
    """
    ontology, sets = load_ontology(), {}
    for word in words:
        nodes = [ontology.node(part) for part in word.split("+")]
        name = " + ".join(dict.fromkeys(node.name for node in nodes))
        if name in sets:
            raise UserError(f'"{name}" is given twice; give it once')
        indexes = [index for node in nodes for index in asked_by(node)]
        sets[name] = tuple(dict.fromkeys(indexes))
    return sets


def asked_by(node: Node) -> tuple[int, ...]:
    """Returns the classes that a node asks for: itself, or all below it if it is no class.

    Raises:
      UserError: no class is below it.
    """
    if node.class_index is not None:
        return (node.class_index,)
    below = load_ontology().class_indexes(node.mid)
    if not below:
        raise UserError(f'"{node.name}" is in the ontology, but no class is below it; drop it')
    return below


def without(
    sets: Mapping[str, Sequence[int]], words: Sequence[str]
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Leaves classes, and all classes below them, out of sets of classes.

    Args:
      sets: name -> class indexes.
      words: names, mids or indexes of nodes, each or several joined by "+".

    Returns:
      The sets that are left, of the same names; and remarks on the nodes that no set has, and the
      sets of which nothing is left.

    Raises:
      UserError: no node is called so, or nothing is left of every set.
    """
    ontology, remarks = load_ontology(), []
    gone: set[int] = set()
    asked = {index for indexes in sets.values() for index in indexes}
    for node in (ontology.node(part) for word in words for part in word.split("+")):
        below = set(ontology.class_indexes(node.mid))
        gone |= below
        if not below & asked:
            remarks.append(f"--without {node.name}: no query has any of it")
    left = {name: tuple(k for k in indexes if k not in gone) for name, indexes in sets.items()}
    empty = [name for name, indexes in left.items() if not indexes]
    if len(empty) == len(left):
        raise UserError(
            f"--without {' '.join(words)} leaves nothing of {', '.join(sets)}; leave out less"
        )
    remarks += [f"--without leaves nothing of {name}, which is not separated" for name in empty]
    return {name: indexes for name, indexes in left.items() if indexes}, remarks


def indicators(sets: Sequence[Sequence[int]]) -> Float32[np.ndarray, "n k"]:
    """Returns a row for each set of class indexes: 1 for a class in it, 0 elsewhere."""
    rows = np.zeros((len(sets), len(load_ontology().class_mids)), np.float32)
    for row, indexes in zip(rows, sets, strict=True):
        row[list(indexes)] = 1
    return rows


def level_sets(levels: Sequence[int], first_parent_only: bool) -> dict[str, tuple[int, ...]]:
    """Maps "level=L/Name" to class indexes, for the nodes with classes at the given levels.

    Args:
      levels: levels of the ontology; 1 is the top.
      first_parent_only: use the tree of bytedance/uss, where a sound with several parents counts
        under one of them.

    Raises:
      UserError: a level that the ontology does not have.
    """
    if first_parent_only:
        nodes = [(n.level, n.name, n.class_indexes()) for n in reference_tree().walk()]
    else:
        ontology = load_ontology()
        nodes = [(n.level, n.name, ontology.class_indexes(m)) for m, n in ontology.nodes.items()]
    sets = {
        f"level={level}/{name}": tuple(indexes)
        for wanted in levels
        for level, name, indexes in nodes
        if level == wanted and indexes
    }
    for wanted in levels:
        if not any(name.startswith(f"level={wanted}/") for name in sets):
            deepest = max(level for level, _, indexes in nodes if indexes)
            raise UserError(f"the ontology has no level {wanted}; its levels are 1 to {deepest}")
    return sets


@dataclasses.dataclass(frozen=True)
class Classes:
    """Queries sets of classes in the segments where they are heard, as bytedance/uss does.

    The condition of a segment is made of its tagging probabilities, with those outside the set
    zeroed, or of the set itself if classes are conditions of the model. Of a model that has means
    of its classes, it is made of these. A segment is active if any probability of the set reaches
    the threshold.

    Attributes:
      sets: name -> class indexes.
      threshold: probability in [0, 1].
      only_active: leave out sets that are active in no segment.
    """

    sets: Mapping[str, Sequence[int]]
    threshold: float = HEARD
    only_active: bool = False
    needs_tags: ClassVar[bool] = True

    def require_fit(self, model: Model) -> None:
        """Raises a UserError if the model does not take classes or an index is out of range."""
        takes = model.query.module.takes
        if not (takes.classes or takes.probabilities):
            raise UserError(
                f"{model.path} takes embeddings of example recordings, not classes; give --query a "
                "folder of recordings, or a query bank and names of its vectors with --classes"
            )
        number = len(load_ontology().class_mids)
        for name, indexes in self.sets.items():
            if not len(indexes) or not all(0 <= index < number for index in indexes):
                raise UserError(
                    f'"{name}" has the class indexes {list(indexes)}; give one or more from 0 to '
                    f"{number - 1}"
                )
            if not self.only_active and set(indexes) <= set(unknown_classes(model.tagger.module)):
                unknown = unknown_among(model.tagger.module, indexes)
                examples = ", or with --query RECORDINGS" if takes.recordings else ""
                raise UserError(f"{unknown}; ask for a class above{examples}")

    def unheard_of(self, model: Model) -> str:
        """Returns a sentence on the classes that the tagging net has no output for; or "".

        Of sets that are asked for only where they are heard, those with no other class count.
        """
        lacking = set(unknown_classes(model.tagger.module))
        sets = [s for s in self.sets.values() if not self.only_active or lacking.issuperset(s)]
        unknown = unknown_among(model.tagger.module, {k for s in sets for k in s})
        return unknown and f"{unknown}, so nothing is separated as one of them"

    def peaks(self, probabilities: Float32[np.ndarray, "s k"]) -> dict[str, float]:
        """Returns each set's highest probability in the recording."""
        return {
            name: float(probabilities[:, list(indexes)].max())
            for name, indexes in self.sets.items()
        }

    def targets(self, model: Model, probabilities: Float32[np.ndarray, "s k"]) -> list[Target]:
        """Returns the targets of a recording, given its segments' tagging probabilities."""
        self.require_fit(model)
        targets = []
        for name, indexes in self.sets.items():
            indexes = list(indexes)
            active = probabilities[:, indexes].max(axis=1) >= self.threshold
            if self.only_active and not active.any():
                continue
            if model.query.module.takes.classes:
                conditions = model.of_classes(indicators([indexes]))
            else:
                vectors = np.zeros_like(probabilities)
                vectors[:, indexes] = probabilities[:, indexes]
                # Of hours of a recording, only what is used is kept.
                used = active if active.any() else np.arange(len(active)) == 0
                conditions = model.of_probabilities(vectors)[used]
            targets.append(Target(name, conditions, active))
        return targets


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Queries with condition vectors, each constant over the recording.

    Attributes:
      vectors: name -> condition [d].
    """

    vectors: Mapping[str, Float32[np.ndarray, " d"]]
    needs_tags: ClassVar[bool] = False

    def require_fit(self, model: Model) -> None:
        """Raises a UserError if a vector has the wrong width, or is NaN or too large."""
        width = model.separator.module.condition_width
        for name, vector in self.vectors.items():
            if vector.shape != (width,):
                raise UserError(
                    f'the vector "{name}" has {vector.size} values, {model.path} takes conditions '
                    f"of width {width}"
                )
            if not np.abs(vector).max(initial=0) <= _LARGEST_VALUE:  # also false for NaN
                raise UserError(
                    f'the vector "{name}" has a value that is NaN or larger than '
                    f"{_LARGEST_VALUE:g} in magnitude; make it again"
                )

    def targets(self, model: Model, probabilities: Any) -> list[Target]:
        """Returns the targets; `probabilities` is unused."""
        self.require_fit(model)
        always = np.ones(1, bool)
        return [Target(name, vector[None], always) for name, vector in self.vectors.items()]


Query = Classes | Vectors


def not_trained(model: Model, query: Classes | Vectors) -> str:
    """Returns a sentence on the sets of classes that a model was not trained on.

    It is "" if there are none, if the model does not tell, or if all that is heard is asked for.
    """
    trained = model.query.module.trained
    if not trained or not isinstance(query, Classes) or query.only_active:
        return ""
    strange = [f'"{k}"' for k, indexes in query.sets.items() if set(trained).isdisjoint(indexes)]
    if not strange:
        return ""
    return f"{model.path} was not trained on {', '.join(strange)}: its estimates are guesses"
