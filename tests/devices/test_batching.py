import pytest

from uss_jax.devices.batching import filled, in_batches


@pytest.mark.parametrize("count", range(8))
def test_batches_are_full_and_hold_every_row_once_in_order(count):
    batches = list(in_batches(iter(range(count)), 3))
    assert len(batches) == -(-count // 3)
    assert [len(some) for some, _ in batches] == [3] * len(batches)
    assert [row for some, rows in batches for row in some[:rows]] == list(range(count))
    for some, rows in batches:
        assert set(some[rows:]) <= {some[rows - 1]}


def test_no_row_is_read_before_its_batch():
    rows = iter(range(100))
    next(in_batches(rows, 3))
    assert next(rows) == 3


def test_the_last_row_is_repeated_up_to_a_size():
    assert filled([1, 2], 4) == [1, 2, 2, 2]
    assert filled((1, 2), 2) == [1, 2]
