import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.toy import audioset_labels
from uss_jax.data.grouping import GroupedOrder, _mixed_conflicts, _swap_changes, arrange
from uss_jax.data.orders import BalancedOrder, UniformOrder
from uss_jax.data.permutation import hash_key
from uss_jax.ontology import load_ontology

SEEDS = range(10)
GROUP = 16


def _labels(records=400, seed=0):
    """Up to four labels a clip, some of them far more common than others."""
    rng = np.random.default_rng(seed)
    likely = 1 / (20 + np.arange(527))
    rows = [
        sorted(set(rng.choice(527, rng.integers(1, 5), p=likely / likely.sum()).tolist()))
        for _ in range(records)
    ]
    return np.cumsum([0, *map(len, rows)]), np.array([k for row in rows for k in row])


def _grouped(seed=0, conflict_free=True, sources=2, kind=BalancedOrder, sets=False):
    label_row, label_class = _labels(seed=seed)
    order = kind(label_row, label_class, seed)
    return order, GroupedOrder(
        order,
        label_row,
        label_class,
        seed,
        group_size=GROUP,
        sources=sources,
        conflict_free=conflict_free,
        sets=sets,
    )


def _literal_marks(seed, records, classes, sources, sets=False):
    """By the rules in words, [groups, items]: conflict, and absence of the class further on."""
    label_row, label_class = _labels(seed=seed)
    of = lambda record: label_class[label_row[record] : label_row[record + 1]].tolist()  # noqa: E731
    relatives = lambda label: load_ontology().relatives(int(label))  # noqa: E731
    marked, absent = np.zeros(records.shape, bool), np.zeros(records.shape, bool)
    for group, item in np.ndindex(records.shape):
        begin = item // sources * sources if sets else item
        mixture = [records[group, (begin + k) % GROUP] for k in range(sources)]
        marked[group, item] = any(
            b in relatives(a)
            for one, other in itertools.combinations(mixture, 2)
            for a in of(one)
            for b in of(other)
        )
        asked = classes[group, (item + sources) % GROUP]
        absent[group, item] = not any(b in relatives(asked) for one in mixture for b in of(one))
    return marked, absent


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sources", [2, 3])
def test_marks_are_the_conflicts_and_arranging_leaves_few(seed, sources):
    positions = np.arange(GROUP * 6)
    shares = []
    for conflict_free in (False, True):
        _, grouped = _grouped(seed, conflict_free, sources)
        drawn = [x.reshape(-1, GROUP) for x in grouped.draw_marked(positions)]
        np.testing.assert_array_equal(drawn[2:], _literal_marks(seed, *drawn[:2], sources))
        shares.append(drawn[2].mean())
        assert drawn[3].mean() > 0.5  # enough that can be asked for
    assert shares[0] > 0.05
    assert shares[1] < shares[0] / 4


@pytest.mark.parametrize("conflict_free", [False, True])
def test_marks_of_sets_are_those_of_the_mixture_that_they_share(conflict_free):
    _, grouped = _grouped(sources=4, conflict_free=conflict_free, sets=True)
    drawn = [x.reshape(-1, GROUP) for x in grouped.draw_marked(np.arange(GROUP * 6))]
    literal = _literal_marks(0, *drawn[:2], 4, sets=True)
    np.testing.assert_array_equal(drawn[2:], literal)
    assert conflict_free or 0 < literal[0].mean() < 1
    assert literal[1].mean() < 1  # some hold what their neighbours ask for


@pytest.mark.parametrize("kind", [BalancedOrder, UniformOrder])
def test_items_stay_in_their_group_and_the_reference_order_stays(kind):
    order, grouped = _grouped(kind=kind)
    positions = np.arange(GROUP * 8)
    before, after = (np.stack(x.draw(positions)).reshape(2, -1, GROUP) for x in (order, grouped))
    assert (before != after).any()
    for group in range(8):
        assert sorted(before[:, group].T.tolist()) == sorted(after[:, group].T.tolist())
    _, reference = _grouped(kind=kind, conflict_free=False)
    np.testing.assert_array_equal(np.stack(reference.draw(positions)).reshape(before.shape), before)


@settings(max_examples=10)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_any_position_can_be_computed_alone(positions):
    _, grouped = _grouped()
    together = grouped.draw_marked(np.array(positions))
    for at, position in enumerate(positions):
        alone = grouped.draw_marked(np.array([position]))
        assert [column[0] for column in alone] == [column[at] for column in together]


@pytest.mark.parametrize("hosts", [2, 4, 32])
def test_hosts_together_see_one_order(hosts):
    _, grouped = _grouped()
    positions = np.arange(5 * 32, 6 * 32)
    whole = np.stack(grouped.draw_marked(positions))
    parts = [np.stack(grouped.draw_marked(part)) for part in np.split(positions, hosts)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@settings(max_examples=50)
@given(st.integers(1, 10), st.integers(1, 3), st.integers(0, 2**32))
def test_arranging_keeps_every_item_and_never_adds_conflicts(size, sources, seed):
    conflict = np.random.default_rng(seed).random((size, size)) < 0.3
    conflict = conflict | conflict.T | np.eye(size, dtype=bool)
    cost = lambda item: sum(  # noqa: E731
        conflict[item[(at + near) % size], item[(at + far) % size]]
        for at in range(size)
        for far in range(1, sources)
        for near in range(far)
    )
    item = arrange(conflict, sources, hash_key(seed))
    assert sorted(item.tolist()) == list(range(size))
    assert cost(item) <= cost(np.arange(size))
    if cost(np.arange(size)) == 0:
        assert item.tolist() == list(range(size))


def test_arranging_finds_the_one_free_order_of_two_kinds():
    # Items of a kind conflict; only taking turns is free.
    kind = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    item = arrange(kind[:, None] == kind, 2, hash_key(0))
    assert (kind[item] != np.roll(kind[item], -1)).all()


@given(data=st.data(), size=st.integers(2, 9), sources=st.integers(2, 5))
def test_the_change_of_a_swap_is_what_counting_again_gives(data, size, sources):
    upper = data.draw(st.lists(st.booleans(), min_size=size * size, max_size=size * size))
    conflict = np.array(upper).reshape(size, size)
    conflict |= conflict.T
    count = lambda item: _mixed_conflicts(conflict, item[None], sources).sum()  # noqa: E731
    changes = _swap_changes(conflict, sources)
    for first, second in itertools.combinations(range(size), 2):
        item = np.arange(size)
        item[[first, second]] = second, first
        assert changes[first, second] == count(item) - count(np.arange(size))


def test_arrangements_stay_what_they_were():
    """Runs that go on with an older checkpoint have the same mixtures."""
    rng = np.random.default_rng(0)
    sha = hashlib.sha256()
    for group in range(200):
        conflict = rng.random((16, 16)) < rng.uniform(0.02, 0.4)
        item = arrange(conflict | conflict.T, 2 + group % 3, hash_key(7, group))
        sha.update(item.astype(np.int64).tobytes())
    assert sha.hexdigest()[:16] == "d4b216885b556904"


def test_mixtures_that_hold_a_sound_twice_become_rare():
    labels = audioset_labels()
    share = {}
    for conflict_free in (False, True):
        grouped = GroupedOrder(
            BalancedOrder(*labels, 0),
            *labels,
            0,
            group_size=16,
            sources=2,
            conflict_free=conflict_free,
        )
        share[conflict_free] = grouped.draw_marked(np.arange(16 * 100))[2].mean()
    assert share[False] > 0.2
    assert share[True] < 0.02
