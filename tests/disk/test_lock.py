import os
import pathlib
import subprocess
import sys

import pytest

from uss_jax.disk import lock
from uss_jax.disk.lock import only_one
from uss_jax.errors import UserError

HOLD = """
import multiprocessing, sys, time
from uss_jax.disk.lock import only_one

with only_one(sys.argv[1], "wait"):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path, start):
    process = start([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_is_refused_and_told_who_has_it(tmp_path, holder):
    with (
        pytest.raises(UserError, match=rf"is in use by process {holder.pid} on .*; choose another"),
        only_one(tmp_path, "choose another"),
    ):
        pass


def test_a_killed_process_leaves_no_lock_behind_though_its_child_lives(tmp_path, holder):
    holder.kill()
    holder.wait()
    with only_one(tmp_path, "wait"):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_a_lock_given_back_can_be_had_again(tmp_path):
    for _ in range(2):
        with only_one(tmp_path, "wait"):
            pass


def test_what_was_in_the_file_does_not_matter(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\x00" * 500)
    with only_one(tmp_path, "wait"):
        pass


def test_processes_take_turns(tmp_path, start):
    program = """
import sys
from uss_jax.disk.lock import in_turn

for _ in range(50):
    with in_turn(sys.argv[1]):
        count = int(open(sys.argv[1] + "/count").read())
        open(sys.argv[1] + "/count", "w").write(str(count + 1))
"""
    (tmp_path / "count").write_text("0")
    words = [sys.executable, "-c", program, tmp_path]
    for process in [start(words) for _ in range(3)]:
        assert process.wait() == 0
    assert (tmp_path / "count").read_text() == "150"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_a_lock_of_another_user_is_said(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock, "open", refuse, raising=False)
    said = r"\.lock cannot be opened for writing \(Permission denied\); if another user"
    with pytest.raises(UserError, match=said), only_one(tmp_path, "wait"):
        pass


def test_a_link_to_nowhere_is_said(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "none" / "lock")
    with pytest.raises(UserError, match=r"\.lock cannot be opened"), only_one(tmp_path, "wait"):
        pass


@pytest.mark.parametrize("make", [pathlib.Path.mkdir, os.mkfifo])
def test_something_else_of_its_name_is_said(tmp_path, make):
    make(tmp_path / ".lock")
    said = "is where the lock file must be, but is not a file"
    with pytest.raises(UserError, match=said), only_one(tmp_path, "wait"):
        pass
