"""Mixing groups: arranges the items of each group so that few mixtures hold a class twice.

Shape letters: n positions, r restarts, l labels, k classes, g item orders, i items of a group.
"""

import functools

import numpy as np
from jaxtyping import Bool, Integer, Shaped, UInt64

from uss_jax.data.orders import Order
from uss_jax.data.permutation import ARRANGEMENTS, hash_key, permute, scramble
from uss_jax.ontology import load_ontology

_RESTARTS = 8


class GroupedOrder:
    """Splits an order into mixing groups and marks the mixtures whose clips conflict.

    Item i of a group is mixed with items i + 1 ... i + sources - 1, modulo the group size. Two
    clips conflict when a label of one equals a label of the other, or is its ancestor or descendant
    in the ontology: the mixture then holds the queried class twice, and the target is ambiguous.
    """

    def __init__(
        self,
        order: Order,
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
                key = hash_key(self._seed, ARRANGEMENTS, group)
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
    keys = scramble(key + np.arange(1, _RESTARTS, dtype=np.uint64))
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
