import pytest

from uss_jax.atomic import replacing
from uss_jax.errors import UserError


def test_file_appears_when_the_block_succeeds(tmp_path):
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text(f"half, then {1 / 0}" if temporary.write_text("half") else "")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_missing_folder_is_a_sentence(tmp_path):
    target = tmp_path / "nowhere" / "a.txt"
    with pytest.raises(UserError, match="could not be written"), replacing(target) as temporary:
        temporary.write_text("new")
