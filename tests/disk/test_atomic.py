import os

import pytest

from uss_jax.disk.atomic import move, replacing, replacing_folder
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


@pytest.mark.parametrize("make", [replacing, replacing_folder])
def test_a_name_that_is_too_long_is_a_sentence(tmp_path, make):
    target = tmp_path / ("a" * 300)
    with pytest.raises(UserError, match="could not be written"), make(target) as at:
        at.mkdir()
    assert list(tmp_path.iterdir()) == []


def test_folders_above_a_folder_that_failed_are_removed_unless_in_use(tmp_path):
    target = tmp_path / "a" / "b" / "c"

    def fail(temporary):
        temporary.mkdir()
        (tmp_path / "a" / "other").write_text("of another program")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), replacing_folder(target) as temporary:
        fail(temporary)
    assert sorted(os.listdir(tmp_path / "a")) == ["other"]
    with replacing_folder(target) as temporary:
        temporary.mkdir()
    assert target.is_dir()


@pytest.fixture
def calls(monkeypatch):
    """The calls that decide what a power cut leaves, in order: what is flushed, what is moved."""
    made = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        made.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noted_replace(source, target):
        made.append((str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return made


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_anyone_is_told(tmp_path, calls):
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert calls == [str(temporary), (str(temporary), str(tmp_path / "a.txt")), str(tmp_path)]


def test_all_below_a_folder_is_on_the_disk_before_its_name(tmp_path, calls):
    folder = tmp_path / "unfinished"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "d").write_text("bytes")
    (folder / "config.json").write_text("{}")
    move(folder, tmp_path / "bundle")
    flushed, moved, parent = calls[:-2], calls[-2], calls[-1]
    assert set(flushed) == {str(folder / x) for x in ("", "part", "part/d", "config.json")}
    assert moved == (str(folder), str(tmp_path / "bundle"))
    assert parent == str(tmp_path)


def test_what_may_be_lost_is_not_flushed(tmp_path, calls):
    with replacing(tmp_path / "a.txt", flush=False) as temporary:
        temporary.write_text("new")
    assert calls == [(str(temporary), str(tmp_path / "a.txt"))]
