"""Rows of the table: kinds of query, and the conditions they give each item.

Each mixture is separated with
- the condition of the clean source ("oracle"),
- the condition averaged over training recordings of its class ("class average"),
- the mean condition of a few such recordings, drawn for the mixture ("1 recording", ...),
- a text on it ("text"): its sentence vector, or the classes that it asks for,
- the tagging probability of its class in the mixture, others zero ("class alone"),
- the mean of its class that the model has, as `separate --classes` asks ("class by its mean"),
- the oracle of an unrelated item ("shuffled oracle"): shows whether the query matters, and its
  level shows the leakage when the queried sound is absent.
The source as its own mixture ("target alone") shows the distortion added by the net. Two baselines
need no model: the mixture, and half the mixture, which has an SDRi of +3 dB at equal energies.

Letters: `n` items, `m` some of them, `d` width of the condition.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from uss_jax.bundles.model import Model
from uss_jax.bundles.nets import takes_length
from uss_jax.errors import UserError, counted
from uss_jax.evaluation.items import Batches, Item, on_host, samples_digest
from uss_jax.evaluation.metrics import is_silent
from uss_jax.evaluation.wording import Wording
from uss_jax.ontology import load_ontology
from uss_jax.separation.queries import indicators

ORACLE, AVERAGE, CLASS, MEAN = "oracle", "class average", "class alone", "class by its mean"
SHUFFLED, IDENTITY = "shuffled oracle", "target alone"
MIXTURE, HALF = "the mixture", "half the mixture"
TEXT = "text"
_ROWS_AT_A_TIME = 1024
_BEFORE, _AFTER = (ORACLE, AVERAGE), (TEXT, MEAN, CLASS, SHUFFLED, IDENTITY, HALF, MIXTURE)


def row_of(recordings: int) -> str:
    """Returns the name of the row whose queries are that many recordings."""
    return counted(recordings, "recording")


def in_order(names: Collection[str]) -> list[str]:
    """Sorts names of rows as in the table; a row of fewer recordings stands below one of more."""
    others = [name for name in names if name not in _BEFORE + _AFTER]
    others.sort(key=lambda name: -int(name.split()[0].replace(",", "")))
    return [name for name in (*_BEFORE, *others, *_AFTER) if name in names]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Training recordings that are drawn for each item.

    Attributes:
      vectors: label -> conditions of its recordings [m, d].
      counts: numbers of recordings of a query; each is a row.
    """

    vectors: Mapping[str, Float[np.ndarray, "m d"]]
    counts: Sequence[int]

    def rows(self, labels: Sequence[str], heard: Bool[np.ndarray, " n"], width: int) -> list["Row"]:
        """Returns the rows: an item has those of as many recordings as its label has.

        The draw depends on the item's place alone, and fewer recordings are among those of more.
        """
        conditions = np.zeros((len(self.counts), len(labels), width), np.float32)
        exists = np.zeros(conditions.shape[:2], bool)
        for at in np.flatnonzero(heard).tolist():
            vectors = self.vectors.get(labels[at], np.zeros((0, width), np.float32))
            order = np.random.default_rng(at).permutation(len(vectors))
            for row, count in enumerate(self.counts):
                if count <= len(vectors):
                    conditions[row, at] = vectors[order[:count]].mean(axis=0)
                    exists[row, at] = True
        names = map(row_of, self.counts)
        return [Row(*row) for row in zip(names, conditions, exists, strict=True)]


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of query, with its condition for each item; a row of the table.

    Attributes:
      name: name in the table.
      conditions: [n, d].
      exists: [n] False where the item has no such condition.
    """

    name: str
    conditions: Float[np.ndarray, "n d"]
    exists: Bool[np.ndarray, " n"]


def find_rows(
    model: Model,
    batches: Batches,
    averages: dict[str, Float[np.ndarray, " d"]] | None,
    drawn: Drawn | None,
    wording: Wording | None,
    oracle_only: bool,
) -> list[Row]:
    """Computes the conditions of every query that at least one item has."""
    items, takes = batches.items, model.query.module.takes
    conditions, digests, heard = oracle_conditions(model, batches)
    if not heard.any():
        raise UserError("every source is silent, so no metric is defined; check the recordings")
    asked = heard
    if not takes.recordings:  # without a class there is no query
        asked = heard & [item.class_index is not None for item in items]
        if not asked.any():
            raise UserError(
                f"{model.path} is asked with AudioSet classes, and none of these sounds is of one"
            )
    rows = [Row(ORACLE, conditions, asked)]
    if oracle_only:
        return rows
    if averages:
        exists = heard & [item.label in averages for item in items]
        zeros = np.zeros(conditions.shape[1], np.float32)
        rows.append(
            Row(AVERAGE, np.stack([averages.get(item.label, zeros) for item in items]), exists)
        )
    if drawn:
        rows += drawn.rows([item.label for item in items], heard, conditions.shape[1])
    if wording is not None or (takes.texts and takes.recordings):  # else it is the oracle
        rows.append(_text_row(model, batches, heard, wording))
    if takes.probabilities:
        found, exists = _heard_classes(model, batches, heard, _own_classes(items))
        # `separate` refuses classes that the tagging net lacks: their probability is always 0.
        exists &= found.any(axis=1)
        if model.means is not None:
            rows.append(Row(MEAN, _in_parts(model.of_probabilities, found), exists))
        rows.append(Row(CLASS, _in_parts(model.adapt, found), exists))
    classes = [item.label if item.class_index is None else item.class_index for item in items]
    others = unrelated_items(classes, digests, [item.other_class_index for item in items])
    exists = heard & (others >= 0) & asked[others]
    rows.append(Row(SHUFFLED, conditions[np.maximum(others, 0)], exists))
    return [row for row in rows if row.exists.any()]


def oracle_conditions(
    model: Model, batches: Batches
) -> tuple[Float[np.ndarray, "n d"], list[str], Bool[np.ndarray, " n"]]:
    """Returns the conditions of the clean sources, their digests, and whether each is audible.

    Equal digests mark one sound under several labels, so each silent source has a digest of its
    own.
    """
    _require_long_enough(model, batches)
    query = model.query.on(batches.mesh)
    conditions: list[Any] = [None] * len(batches.items)
    digests = [f"silent {place}" for place in range(len(batches.items))]
    heard = np.zeros(len(batches.items), bool)
    for number, (source,) in batches.read(("source",), range(len(batches.places)), "conditions"):
        at = batches.places[number]
        classes = [batches.items[place].class_index or 0 for place in batches.filled[number]]
        inputs = batches.put(source), batches.put(np.array(classes, np.int32))
        found = on_host(query(*inputs), batches.mesh)
        for row, place in enumerate(at.tolist()):
            conditions[place] = found[row]
            if not is_silent(source[row]):
                heard[place] = True
                digests[place] = samples_digest(source[row])
    return np.stack(conditions), digests, heard


def _require_long_enough(model: Model, batches: Batches) -> None:
    """Raises a UserError if the query net cannot compute on items as short as some are."""
    samples, at = min(zip(batches.samples, batches.places, strict=True), key=lambda pair: pair[0])
    tagger = model.query.module.tagger
    if tagger is not None and not takes_length(tagger, samples):
        raise UserError(
            f"{batches.items[at[0]].name} lasts {samples / model.sample_rate:.3g} s, too short for "
            f"the query net of {model.path}; leave out items of this length"
        )


def _text_row(
    model: Model,
    batches: Batches,
    heard: Bool[np.ndarray, " n"],
    wording: Wording | None,
) -> Row:
    """Conditions on a text on each item.

    A model that takes texts gets the sentence vector, or that of the class's name without an
    encoder; another the classes that the text asks for, as `separate --text` does.
    """
    items, takes = batches.items, model.query.module.takes
    if wording is None:
        sets = _own_classes(items)
    elif takes.texts:
        return Row(TEXT, model.of_texts(wording.vectors(wording.of(items))), heard)
    else:
        sets = wording.classes(wording.of(items), model)
    if takes.classes:
        exists = heard & [len(indexes) > 0 for indexes in sets]
        return Row(TEXT, model.of_classes(indicators(sets)), exists)
    found, exists = _heard_classes(model, batches, heard, sets)
    return Row(TEXT, _in_parts(model.of_probabilities, found), exists & found.any(axis=1))


def _in_parts(
    ask: Callable[[np.ndarray], np.ndarray], rows: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, "n d"]:
    """Computes conditions of many rows, a part of them at a time on the device."""
    parts = range(0, len(rows), _ROWS_AT_A_TIME)
    return np.concatenate([ask(rows[first : first + _ROWS_AT_A_TIME]) for first in parts])


def _own_classes(items: Sequence[Item]) -> list[tuple[int, ...]]:
    """Returns the class of each item, as a set; an empty one without a class."""
    return [() if item.class_index is None else (item.class_index,) for item in items]


def left_out(rows: Mapping[str, Row], items: int) -> str:
    """Returns sentences on the items that "text" and "class alone" leave out; "" if none."""
    said = []
    if TEXT in rows and (without := items - int(rows[TEXT].exists.sum())):
        said.append(
            f"the row {TEXT} leaves out {counted(without, 'item')} of {items:,}: those that are "
            "silent, and those whose text asks for no class"
        )
    if CLASS in rows and (without := int((rows[ORACLE].exists & ~rows[CLASS].exists).sum())):
        said.append(
            f"the rows by class leave out {counted(without, 'item')} of {items:,}: those of no "
            "class of AudioSet, or of one that the tagging net has no output for"
        )
    return "\n".join(said)


def _heard_classes(
    model: Model,
    batches: Batches,
    heard: Bool[np.ndarray, " n"],
    sets: Sequence[Sequence[int]],
) -> tuple[Float[np.ndarray, "n k"], Bool[np.ndarray, " n"]]:
    """Returns the tagging probabilities of classes in each mixture, others 0, and who has a class.

    With one class, this is what the reference asks with. It would not separate items without one.
    """
    items, tagger = batches.items, model.tagger.on(batches.mesh)
    heard_of = np.zeros((len(items), model.tagger.module.classes), np.float32)
    exists = heard & [len(indexes) > 0 for indexes in sets]
    which = [number for number, at in enumerate(batches.places) if exists[at].any()]
    for number, (mixture,) in batches.read(("mixture",), which, "classes asked for"):
        at = batches.places[number]
        found = on_host(tagger(batches.put(mixture))["clipwise"], batches.mesh)[: len(at)]
        asked = indicators([sets[place] for place in at])
        heard_of[at] = np.where(asked > 0, found, 0)
    return heard_of, exists


def unrelated_items(
    classes: Sequence[Hashable],
    digests: Sequence[str],
    others: Sequence[int | None] | None = None,
) -> Integer[np.ndarray, " n"]:
    """Chooses for each item another whose class is absent from the mixture; -1 if there is none.

    The chosen class is not equal to, above or below the item's class in the ontology, nor another
    label of any source of the item's class (a clip may have several), nor related to the mixture's
    other source, if known. The choice is deterministic.

    Args:
      classes: for each item an AudioSet class index, or a name, which has no relatives.
      digests: for each item the digest of its source's samples.
      others: for each item the class index of the mixture's other source, if known.
    """
    labels_of: dict[str, set[Hashable]] = {}
    for label, digest in zip(classes, digests, strict=True):
        labels_of.setdefault(digest, set()).add(label)
    related = {label: _relatives(label) for label in set(classes)}
    for labels in labels_of.values():
        for label in labels:
            related[label] |= labels
    numbers = {label: number for number, label in enumerate(dict.fromkeys(classes))}
    number_of = np.array([numbers[label] for label in classes])

    @functools.cache
    def candidates(label: Hashable, other: int | None) -> Integer[np.ndarray, " m"]:
        taken = related[label] | (set() if other is None else _relatives(other))
        taken = [numbers[label] for label in taken if label in numbers]
        return np.flatnonzero(~np.isin(number_of, taken))

    chosen = np.full(len(classes), -1)
    for at, label in enumerate(classes):
        found = candidates(label, others[at] if others else None)
        if len(found):
            chosen[at] = np.random.default_rng(at).choice(found)
    return chosen


def _relatives(label: Hashable) -> set[Hashable]:
    return set(load_ontology().relatives(label)) if isinstance(label, int) else {label}
