"""Sampling orders: map a training position to a clip and a class.

An order is a pure function of (seed, position), where position counts examples from the start of
training. It has no state, so a run can resume at any position and every host can draw its own
positions.

Shape letters: n positions, l labels.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from uss_jax.data.permutation import CLIPS, LABELS, PLACES, hash_key, permute
from uss_jax.errors import UserError


@runtime_checkable
class Order(Protocol):
    """Maps positions to records and class indexes."""

    def draw(
        self, positions: Integer[np.ndarray, " n"]
    ) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
        """Returns the record and the class index at each position."""
        ...


class BalancedOrder:
    """Draws every class once per round, and all clips of a class before any repeats.

    A class of weight w is drawn w times per round. Every round, and every pass through the clips
    of a class, has a new order. Classes without clips are left out.

    Attributes:
      classes: class indexes that are drawn.
      missing: class indexes of positive weight that have no clips.
      round_length: number of examples in a round.
    """

    def __init__(
        self,
        label_row: Integer[np.ndarray, " _"],
        label_class: Integer[np.ndarray, " l"],
        seed: int,
        weights: Sequence[int] | np.ndarray | None = None,
        classes: int = 527,
    ):
        """
        Args:
          label_row, label_class: labels of each record, as in RecordIndex.
          seed: seed of the order.
          weights: draws of each class per round, non-negative integers; None: one each.
          classes: number of classes.

        Raises:
          UserError: the weights are invalid, or no class can be drawn.
        """
        weights = np.ones(classes, np.int64) if weights is None else np.asarray(weights)
        if weights.shape != (classes,) or weights.dtype.kind not in "iu" or (weights < 0).any():
            raise UserError(
                f"class weights must be {classes} whole numbers from 0, one for each class"
            )
        self._seed = seed
        labels = np.diff(label_row.astype(np.int64))  # np.repeat rejects the index's uint64
        records = np.repeat(np.arange(len(labels), dtype=np.uint32), labels)
        self._records = records[np.argsort(label_class, kind="stable")]  # sorted by class
        self._clips = np.bincount(label_class, minlength=classes)
        self._first_clip = np.cumsum(self._clips) - self._clips
        self.missing = np.flatnonzero((self._clips == 0) & (weights > 0))
        self._weights = np.where(self._clips > 0, weights, 0)
        self._slot_class = np.repeat(np.arange(classes), self._weights)
        self.classes = np.flatnonzero(self._weights)
        self._first_slot = np.cumsum(self._weights) - self._weights
        self.round_length = len(self._slot_class)
        if not self.round_length:
            raise UserError(
                "no record has a label of a class with a weight above 0; "
                "check the labels and class weights"
            )

    def draw(
        self, positions: Integer[np.ndarray, " n"]
    ) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
        """Returns the record and the class index at each position."""
        number, place = np.divmod(positions.astype(np.int64), self.round_length)
        key = hash_key(self._seed, PLACES, number)
        chosen = self._slot_class[permute(place, self.round_length, key)]

        # Clips of the class drawn so far: w in each earlier round, plus those in this one.
        drawn = number * self._weights[chosen]
        if self._weights.max() > 1:
            drawn += self._earlier_in_round(chosen, place, key)
        epoch, at = np.divmod(drawn, self._clips[chosen])
        clip = permute(at, self._clips[chosen], hash_key(self._seed, CLIPS, chosen, epoch))
        return self._records[self._first_clip[chosen] + clip.astype(np.int64)], chosen

    def _earlier_in_round(
        self, chosen: np.ndarray, place: np.ndarray, key: np.ndarray
    ) -> np.ndarray:
        earlier = np.zeros_like(place)
        for slot in range(self._weights.max()):
            has_slot = slot < self._weights[chosen]
            slots = np.where(has_slot, self._first_slot[chosen] + slot, 0)
            earlier += has_slot & (permute(slots, self.round_length, key, inverse=True) < place)
        return earlier


class UniformOrder:
    """Draws every labelled clip once per epoch, with a random one of its labels.

    Every epoch has a new order.

    Attributes:
      classes: class indexes that are drawn.
    """

    def __init__(
        self,
        label_row: Integer[np.ndarray, " _"],
        label_class: Integer[np.ndarray, " l"],
        seed: int,
    ):
        """
        Args:
          label_row, label_class: labels of each record, as in RecordIndex.
          seed: seed of the order.

        Raises:
          UserError: no record has a label.
        """
        self._seed = seed
        self.classes = np.unique(label_class)
        self._label_row, self._label_class = label_row.astype(np.int64), label_class
        self._records = np.flatnonzero(np.diff(self._label_row))
        if not self._records.size:
            raise UserError("no record has a label; check the labels")

    def draw(
        self, positions: Integer[np.ndarray, " n"]
    ) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
        """Returns the record and the class index at each position."""
        epoch, at = np.divmod(positions.astype(np.int64), len(self._records))
        record = self._records[permute(at, len(self._records), hash_key(self._seed, CLIPS, epoch))]
        begin = self._label_row[record]
        count = (self._label_row[record + 1] - begin).astype(np.uint64)
        label = hash_key(self._seed, LABELS, positions) % count
        return record, self._label_class[begin + label.astype(np.int64)].astype(np.int64)
