import sys
import types

from uss_jax.errors import UserError, counted, tell


def test_a_sentence_stays_one_line_whatever_the_input_holds():
    error = UserError("a\nb\r\x1b[31m\u2028c: é 狗 \udcff is no file")
    assert str(error) == "a\\nb\\r\\x1b[31m\\u2028c: é 狗 \udcff is no file"


def test_the_last_sentence_is_one_write(monkeypatch):
    """Two hosts' lines in one log stay two lines."""
    written = []
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=written.append))
    tell("stopped")
    assert written == ["uss-jax: stopped\n"]


def test_one_and_many():
    assert counted(1, "file") == "1 file"
    assert counted(0, "file") == "0 files"
    assert counted(2, "class", "classes") == "2 classes"
    assert counted(1, "clip has", "clips have") == "1 clip has"
    assert counted(12345, "clip has", "clips have") == "12,345 clips have"
