import pytest

from uss_jax.data.indexing import build_index
from uss_jax.data.shards import shards_of_split
from uss_jax.errors import UserError


def test_two_sets_of_shards_are_not_mixed(records):
    (records / "toy-train.tfrecord-00000-of-00001").write_bytes(b"")
    with pytest.raises(UserError, match="several sets of shards"):
        build_index(records, "train")


def test_shards_with_numbers_beyond_their_count_are_no_set(tmp_path):
    names = tuple(f"lab-eval.tfrecord-0000{at}-of-00002" for at in (0, 1, 5))
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r'a shard of split "eval" has the number 5 of 2'):
        shards_of_split(tmp_path, "eval")
