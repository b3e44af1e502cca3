"""Draws what each item of a batch is asked with, by position: mined conditions, or texts.

In training a separator gets the condition of the target itself; in use, another: an average, an
example, a class. `query.source` trains it with such conditions.

Letters: `n` positions of the training order, `r` rows of the table of anchors, `k` classes, `w`
width of a vector.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Integer

from uss_jax.anchors.conditions import ConditionTable
from uss_jax.anchors.table import Placement
from uss_jax.data.index import RecordIndex
from uss_jax.data.labels import groups_of, ungrouped
from uss_jax.data.permutation import ASKED, OTHERS, WEIGHTS, uniform
from uss_jax.devices.hosts import say
from uss_jax.errors import UserError, counted
from uss_jax.models.query import probabilities_of, weights_of
from uss_jax.ontology import load_ontology
from uss_jax.training.texts import Texts

# Where a condition can come from, in the order in which shares are drawn.
SOURCES = ("own", "other", "mean", "mix", "masked")
_, _OTHER, _MEAN, _MIX, _MASKED = range(len(SOURCES))
# Those that need mined conditions.
MINED = ("other", "mean", "mix")


@dataclasses.dataclass(frozen=True, eq=False)
class Recordings:
    """The anchors of each class, by recording, to draw one of another recording.

    Attributes:
      rows: [r] rows of the table that may be drawn, sorted by class, then by recording.
      key: [r] class * `recordings` + recording of each, ascending.
      recording: [records] recording of each record; records of one session may share one.
      recordings: number of recordings.
    """

    rows: Integer[np.ndarray, " r"]
    key: Integer[np.ndarray, " r"]
    recording: Integer[np.ndarray, "_"]
    recordings: int

    @classmethod
    def of(
        cls,
        index: RecordIndex,
        usable: Bool[np.ndarray, "_"],
        recording: Integer[np.ndarray, "_"],
    ) -> "Recordings":
        """Sorts the rows of the table; `usable` masks those that may be drawn."""
        rows = np.flatnonzero(usable)
        labels = np.diff(index.label_row.astype(np.int64))
        of_row = recording[np.repeat(np.arange(len(index)), labels)[rows]]
        recordings = int(recording.max()) + 1
        key = index.label_class[rows].astype(np.int64) * recordings + of_row
        order = np.argsort(key, kind="stable")
        return cls(rows[order], key[order], recording, recordings)

    def draw(
        self,
        drawn: Float[np.ndarray, " n"],
        records: Integer[np.ndarray, " n"],
        classes: Integer[np.ndarray, " n"],
    ) -> Integer[np.ndarray, " n"]:
        """Returns the row of an anchor of the class in another recording; -1 where there is none.

        Args:
          drawn: uniform random numbers in [0, 1).
          records, classes: the items' own.
        """
        classes = classes.astype(np.int64)
        own = classes * self.recordings + self.recording[records]
        bounds = (classes * self.recordings, own, own + 1, (classes + 1) * self.recordings)
        first, own_first, own_end, end = (np.searchsorted(self.key, bound) for bound in bounds)
        others = (end - first) - (own_end - own_first)
        at = first + np.floor(drawn * others).astype(np.int64)
        at += np.where(at >= own_first, own_end - own_first, 0)
        return np.where(others > 0, self.rows[np.minimum(at, len(self.rows) - 1)], -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Asking:
    """Draws what each item is asked with, as a function of seed and position.

    Attributes:
      shares: probability of each of SOURCES.
      seed: seed of the run.
      conditions: vectors of the anchors; None: the step computes those of the items' own anchors.
      placement: draws the items' anchors.
      recordings: anchors of other recordings, for `other` and `mix`.
      mean: [k, w] mean of each class, for `mean`.
      weighs: whether conditions are made of weights of the vectors, see `class_means`.
      texts: sentence vectors of texts on the items; None if none is asked with a text.
    """

    shares: Mapping[str, float]
    seed: int
    conditions: ConditionTable | None = None
    placement: Placement | None = None
    recordings: Recordings | None = None
    mean: Float[np.ndarray, "k w"] | None = None
    weighs: bool = False
    texts: Texts | None = None

    @property
    def digest(self) -> str:
        """Hash of everything that determines what is asked; a resumed run must have the same."""
        digest = hashlib.sha256(json.dumps(sorted(self.shares.items())).encode())
        if self.conditions is not None:
            digest.update(self.conditions.digest.encode())
        if self.recordings is not None:
            digest.update(self.recordings.key.tobytes())
        if self.texts is not None:
            digest.update(self.texts.digest.encode())
        if self.weighs and any(self.shares.get(name) for name in ("mean", "mix")):
            digest.update(b"weights")  # older versions averaged the vectors themselves
        return digest.hexdigest()

    def ask(
        self,
        positions: Integer[np.ndarray, " n"],
        records: Integer[np.ndarray, " n"],
        classes: Integer[np.ndarray, " n"],
    ) -> dict[str, np.ndarray]:
        """Returns columns of the batch.

        Returns:
          `vector` [n, w] float32, with mined conditions: what the item is asked with, unless it is
          masked. `masked` [n] uint8, if any item can be: whether it is asked with the mixture's
          probability of its class. `text` and `by_text`, with texts, see training/texts.py.
        """
        ends = np.cumsum([self.shares.get(name, 0.0) for name in SOURCES])
        drawn = uniform(self.seed, ASKED, positions) * ends[-1]
        source = np.minimum((drawn[:, None] >= ends).sum(axis=1), len(SOURCES) - 1)
        columns = {}
        if self.conditions is not None:
            columns["vector"] = self._vectors(source, positions, records, classes)
        if self.shares.get("masked", 0):
            columns["masked"] = (source == _MASKED).astype(np.uint8)
        if self.texts is not None:
            columns |= self.texts.draw(self.seed, positions, records, classes)
        return columns

    def _vectors(
        self, source: np.ndarray, positions: np.ndarray, records: np.ndarray, classes: np.ndarray
    ) -> Float[np.ndarray, "n w"]:
        vectors = self.conditions.read(*self.placement.choose(positions, records, classes))
        if self.recordings is not None:
            at = np.flatnonzero((source == _OTHER) | (source == _MIX))
            others = self.recordings.draw(
                uniform(self.seed, OTHERS, positions[at]), records[at], classes[at]
            )
            at, others = at[others >= 0], others[others >= 0]
            if len(at):
                vector = self.conditions.read(others, np.zeros_like(others))
                weight = uniform(self.seed, WEIGHTS, positions[at])[:, None].astype(np.float32)
                weight = np.where(source[at, None] == _MIX, weight, np.float32(0))
                vectors[at] = self._between(weight, vectors[at], vector)
        if self.mean is not None:
            at = source == _MEAN
            vectors[at] = self.mean[classes[at]]
        return vectors

    def _between(self, weight: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Returns the vectors whose conditions are between those of two others."""
        if self.weighs:
            own, other = weights_of(own, np), weights_of(other, np)
        between = weight * own + (1 - weight) * other
        return probabilities_of(between, np) if self.weighs else between


def recording_of(index: RecordIndex, groups: str) -> Integer[np.ndarray, "_"]:
    """Returns a number for the recording of each record: its group, or the record itself.

    Args:
      index: index of the records.
      groups: table with a column `group`; "" if no record shares a recording with another.
    """
    if not groups:
        return np.arange(len(index))
    ids = index.clip_ids()
    found = groups_of(groups, ids)
    if said := ungrouped(groups, found):
        say(f"config.query.groups: {said}")
    # A file's name holds no \0.
    names = [group or f"\0{id}" for id, group in zip(ids, found, strict=True)]
    return np.unique(names, return_inverse=True)[1].ravel()


def check_shares(shares: Mapping[str, float], mined: bool) -> None:
    """Raises a UserError unless the shares sum to 1 and can be drawn.

    Args:
      shares: `query.source`.
      mined: whether conditions are mined.
    """
    for name in shares:
        if name not in SOURCES:
            raise UserError(f"config.query.source.{name}: expected {', '.join(SOURCES)}")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise UserError(
            f"the shares of config.query.source sum to {total:g}, expected 1: "
            + ", ".join(f"{name}={share:g}" for name, share in shares.items())
        )
    wanting = [name for name in MINED if shares.get(name, 0) and not mined]
    if wanting:
        raise UserError(
            f"config.query.source.{wanting[0]} needs mined conditions: give config.query.table, "
            "which `uss-jax mine --query` writes"
        )


def alone(recordings: Recordings) -> str:
    """Returns a sentence on the classes of one recording, which have no other; or ""."""
    pairs = np.unique(recordings.key)
    classes, count = np.unique(pairs // recordings.recordings, return_counts=True)
    only = classes[count == 1]
    if not only.size:
        return ""
    names = ", ".join(load_ontology().class_names[k] for k in only[:3].tolist())
    more = " ..." if only.size > 3 else ""
    return (
        f"config.query.source: {counted(only.size, 'class', 'classes')} of {len(classes)} have one "
        f"recording only: the item's own condition stands for another's, and their mean is of that "
        f"recording: {names}{more}"
    )
