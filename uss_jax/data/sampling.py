"""Sampling orders: map a training position to a clip and a class.

An order is a pure function of (seed, position), where position counts examples from the start of
training. It has no state, so a run can resume at any position and every host can draw its own
positions.

Shape letters: n positions, r records, l labels, k classes, g groups, i items of a group.
"""

import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped, UInt64

from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

_GOLDEN = 0x9E3779B97F4A7C15
# Each round moves an index with probability 1/2: after 40 rounds, 2**-40 of them never moved.
_ROUND_KEYS = np.arange(1, 41, dtype=np.uint64) * np.uint64(_GOLDEN)
# Purpose of a key, hashed into it so that no two permutations share one.
_PLACES, _CLIPS, _LABELS = 1, 2, 3
ANCHORS, JITTER, _ARRANGEMENTS = 4, 5, 6
_RESTARTS = 8


def _mixed(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Scrambles 64 bits (the finaliser of SplitMix64, doi.org/10.1145/2660193.2660195)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, *parts: int | np.ndarray) -> UInt64[np.ndarray, " n"]:
    """Hashes the seed and all parts to 64 bits."""
    key = np.array([seed % 2**64], np.uint64)
    for part in parts:
        key = _mixed((key + np.uint64(_GOLDEN)) ^ _mixed(np.atleast_1d(part).astype(np.uint64)))
    return key


def uniform(
    seed: int, what_for: int, positions: Integer[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Returns a pseudo-random number in [0, 1) for each position."""
    key = _key(seed, what_for, positions)
    return (key >> np.uint64(11)) * 2.0**-53


def permute(
    index: Integer[np.ndarray, " n"],
    size: int | Integer[np.ndarray, " n"],
    key: UInt64[np.ndarray, "_"],
    inverse: bool = False,
) -> UInt64[np.ndarray, " n"]:
    """Maps `index` through a keyed pseudo-random permutation of 0..size-1.

    A swap-or-not shuffle (Hoang, Morris, Rogaway 2012, arxiv.org/abs/1208.1176): each round pairs
    x with (offset - x) mod size and swaps the pair if a hash of it says so. It permutes ranges of
    any size, at the same cost for 3 clips and 3 million.

    Args:
      index: indexes to map, below `size`.
      size: length of the permuted range; one for all or one per index.
      key: selects the permutation; one for all or one per index.
      inverse: apply the inverse permutation.
    """
    x = index.astype(np.uint64)
    size = np.broadcast_to(size, x.shape).astype(np.uint64)
    for round_key in _ROUND_KEYS[::-1] if inverse else _ROUND_KEYS:
        round_key = _mixed(key + round_key)
        offset = round_key % size
        partner = np.where(offset >= x, offset - x, offset + size - x)
        swap = _mixed(round_key ^ np.maximum(x, partner)) & np.uint64(1)
        x = np.where(swap, partner, x)
    return x


class BalancedOrder:
    """Draws every class once per round, and all clips of a class before any repeats.

    A class of weight w is drawn w times per round. Every round, and every pass through the clips
    of a class, has a new order. Classes without clips are left out.

    Attributes:
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
        key = _key(self._seed, _PLACES, number)
        chosen = self._slot_class[permute(place, self.round_length, key)]

        # Clips of the class drawn so far: w in each earlier round, plus those in this one.
        drawn = number * self._weights[chosen]
        if self._weights.max() > 1:
            drawn += self._earlier_in_round(chosen, place, key)
        epoch, at = np.divmod(drawn, self._clips[chosen])
        clip = permute(at, self._clips[chosen], _key(self._seed, _CLIPS, chosen, epoch))
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
        self._label_row, self._label_class = label_row.astype(np.int64), label_class
        self._records = np.flatnonzero(np.diff(self._label_row))
        if not self._records.size:
            raise UserError("no record has a label; check the labels")

    def draw(
        self, positions: Integer[np.ndarray, " n"]
    ) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
        """Returns the record and the class index at each position."""
        epoch, at = np.divmod(positions.astype(np.int64), len(self._records))
        record = self._records[permute(at, len(self._records), _key(self._seed, _CLIPS, epoch))]
        begin = self._label_row[record]
        count = (self._label_row[record + 1] - begin).astype(np.uint64)
        label = _key(self._seed, _LABELS, positions) % count
        return record, self._label_class[begin + label.astype(np.int64)].astype(np.int64)


@runtime_checkable
class _Order(Protocol):
    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class GroupedOrder:
    """Splits an order into mixing groups and marks the mixtures whose clips conflict.

    Item i of a group is mixed with items i + 1 ... i + sources - 1, modulo the group size. Two
    clips conflict when a label of one equals a label of the other, or is its ancestor or descendant
    in the ontology: the mixture then holds the queried class twice, and the target is ambiguous.
    """

    def __init__(
        self,
        order: _Order,
        label_row: Integer[np.ndarray, " _"],
        label_class: Integer[np.ndarray, " l"],
        seed: int,
        *,
        group_size: int,
        sources: int,
        conflict_free: bool,
        sets: bool = False,
    ):
        """
        Args:
          order: the order to split into groups.
          label_row, label_class: all labels of each record, as in RecordIndex.
          seed: seed of the arrangements.
          group_size: items per group; groups begin at multiples of it.
          sources: clips per mixture.
          conflict_free: rearrange the items of each group to leave few conflicts, mostly none;
            False: keep them in the order's positions.
          sets: every `sources` consecutive items share one mixture; False: as above.
        """
        self._order, self._seed = order, seed
        self._label_row, self._label_class = label_row.astype(np.int64), label_class
        self._group_size, self._sources = group_size, sources
        self._conflict_free, self._sets = conflict_free, sets

    def draw(
        self, positions: Integer[np.ndarray, " n"]
    ) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
        """Returns the record and the class index at each position."""
        return self.draw_marked(positions)[:2]

    def draw_marked(
        self, positions: Integer[np.ndarray, " n"]
    ) -> tuple[
        Integer[np.ndarray, " n"],
        Integer[np.ndarray, " n"],
        Bool[np.ndarray, " n"],
        Bool[np.ndarray, " n"],
    ]:
        """Returns the record and class index at each position, and two marks.

        Returns:
          record; class index; conflict: whether the mixture has a conflict; absent: whether the
          class of the item `sources` further in the group is absent from the mixture, as are its
          ancestors and descendants.
        """
        groups, of_group = np.unique(positions // self._group_size, return_inverse=True)
        whole = groups[:, None] * self._group_size + np.arange(self._group_size)
        records, classes = (x.reshape(whole.shape) for x in self._order.draw(whole.ravel()))
        marked, absent = np.zeros(whole.shape, bool), np.zeros(whole.shape, bool)
        for row, group in enumerate(groups.tolist()):
            held, conflict = self._related(records[row], classes[row])
            item = np.arange(self._group_size)
            if self._conflict_free:
                key = _key(self._seed, _ARRANGEMENTS, group)
                item = arrange(conflict, self._sources, key)
                records[row], classes[row] = records[row, item], classes[row, item]
            marked[row] = self._first(_mixed_conflicts(conflict, item[None], self._sources)[0]) > 0
            absent[row] = ~self._holds_further(held[np.ix_(item, item)])
        at = positions % self._group_size
        return tuple(x[of_group, at] for x in (records, classes, marked, absent))

    def _first(self, of_mixture: Shaped[np.ndarray, " i"]) -> Shaped[np.ndarray, " i"]:
        """Broadcasts a per-mixture value to the items of that mixture."""
        return np.repeat(of_mixture[:: self._sources], self._sources) if self._sets else of_mixture

    def _holds_further(self, held: Bool[np.ndarray, "i i"]) -> Bool[np.ndarray, " i"]:
        """Returns whether each item's mixture holds the class of the item `sources` further.

        Args:
          held: [i, j] whether the class of item i is related to a label of item j.
        """
        item = np.arange(self._group_size)
        further = (item + self._sources) % self._group_size
        begin = self._first(item)
        mixed = (begin[:, None] + np.arange(self._sources)) % self._group_size
        return held[further[:, None], mixed].any(axis=1)

    def _related(
        self, records: Integer[np.ndarray, " i"], classes: Integer[np.ndarray, " i"]
    ) -> tuple[Bool[np.ndarray, "i i"], Bool[np.ndarray, "i i"]]:
        """Returns two [i, j] matrices: whether item i is related to a label of item j.

        The first compares the drawn class of item i, the second any of its labels.
        """
        counts = self._label_row[records + 1] - self._label_row[records]
        first = np.cumsum(counts) - counts
        place = np.repeat(self._label_row[records] - first, counts) + np.arange(counts.sum())
        labels = self._label_class[place]
        # Every drawn record has a label, so no segment of reduceat is empty.
        of_items = lambda related: np.logical_or.reduceat(related, first, axis=1)  # noqa: E731
        held = of_items(_relatives()[classes[:, None], labels])
        related = of_items(_relatives()[labels[:, None], labels])
        return held, np.logical_or.reduceat(related, first, axis=0)


def arrange(
    conflict: Bool[np.ndarray, "i i"], sources: int, key: UInt64[np.ndarray, "1"]
) -> Integer[np.ndarray, " i"]:
    """Orders a group's items so that few conflict with the next `sources` - 1.

    Greedy search: applies the best swap of two items until none helps. If conflicts remain,
    restarts from shuffled items and keeps the best result. A group without conflicts is unchanged.
    """
    size = len(conflict)
    first, second = np.triu_indices(size, 1)
    best, best_cost = np.arange(size), np.inf
    for restart in range(_RESTARTS):
        item = np.arange(size)
        if restart == 1:
            shuffled = _shuffled(size, key)
        if restart:
            item = shuffled[restart - 1]
        cost = _mixed_conflicts(conflict, item[None], sources).sum()
        while cost and size > 1:
            changes = _swap_changes(conflict[np.ix_(item, item)], sources)[first, second]
            swap = np.argmin(changes)
            if changes[swap] >= 0:
                break
            places = [first[swap], second[swap]]
            item[places], cost = item[places[::-1]], cost + changes[swap]
        if cost < best_cost:
            best, best_cost = item, cost
        if not cost:
            break
    return best


def _shuffled(size: int, key: UInt64[np.ndarray, "1"]) -> Integer[np.ndarray, "r i"]:
    """Returns a random order of the items for each restart."""
    keys = _mixed(key + np.arange(1, _RESTARTS, dtype=np.uint64))
    items = np.tile(np.arange(size), len(keys))
    return permute(items, size, np.repeat(keys, size)).astype(np.int64).reshape(-1, size)


def _swap_changes(conflict: Bool[np.ndarray, "i i"], sources: int) -> Integer[np.ndarray, "i i"]:
    """Returns the change in the number of conflicts for each swap of two items.

    Args:
      conflict: whether the items at two places conflict; symmetric.
      sources: clips per mixture.
    """
    held, mixed = conflict.astype(np.int64), _mixed_together(len(conflict), sources)
    # There are sum(mixed * held) / 2 conflicts; a swap exchanges two rows and columns of `held`.
    moved = mixed @ held
    own, alone = np.diag(moved), np.diag(held)
    stays = (mixed[0, 0] - mixed) * (2 * held - alone - alone[:, None])  # the swapped pair itself
    return moved + moved.T - own - own[:, None] - stays


@functools.cache
def _mixed_together(size: int, sources: int) -> Integer[np.ndarray, "i i"]:
    """Returns the number of mixtures that two places share; it depends on their distance only."""
    together = np.zeros((size, size), np.int64)
    for far in range(1, sources):
        together += (sources - far) * np.roll(np.eye(size, dtype=np.int64), far, axis=1)
    return together + together.T


def _mixed_conflicts(
    conflict: Bool[np.ndarray, "i i"], items: Integer[np.ndarray, "g i"], sources: int
) -> Integer[np.ndarray, "g i"]:
    """Counts the conflicting pairs in the mixture at each place, for each of g item orders."""
    counts = np.zeros(items.shape, np.int64)
    for far in range(1, sources):
        for near in range(far):
            counts += conflict[np.roll(items, -near, axis=1), np.roll(items, -far, axis=1)]
    return counts


@functools.cache
def _relatives() -> Bool[np.ndarray, "k k"]:
    """Returns whether two classes are equal, or one is an ancestor of the other."""
    ontology = load_ontology()
    matrix = np.zeros((len(ontology.class_mids),) * 2, bool)
    for index in range(len(matrix)):
        matrix[index, list(ontology.relatives(index))] = True
    return matrix
