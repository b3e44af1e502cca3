import os
import pathlib

import pytest

from uss_jax.errors import UserError
from uss_jax.separation.input_files import find_input_files


def places(words, lists=()):
    return [str(recording.place) for recording in find_input_files(words, lists)]


def test_folders_and_patterns(recordings, monkeypatch):
    monkeypatch.chdir(recordings)
    found = find_input_files([".", "*.wav", "./a.wav", "more/../a.wav"])
    assert [one.path for one in found] == list(map(pathlib.Path, ("a.wav", "b.flac", "more/a.wav")))


def test_what_is_named_itself_is_marked(recordings, monkeypatch, tmp_path):
    monkeypatch.chdir(recordings)
    (tmp_path / "list.txt").write_text("more/a.wav\n")
    found = find_input_files([".", "*.wav", "./b.flac"], [tmp_path / "list.txt"])
    assert {str(one.path): one.named for one in found} == {
        "a.wav": False,
        "b.flac": True,
        "more/a.wav": True,
    }


def test_a_place_is_the_path_as_given_whatever_the_other_files(recordings, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert places(["recordings/a.wav", "recordings/more/a.wav"]) == [
        "recordings/a",
        "recordings/more/a",
    ]
    assert places(["recordings"]) == ["recordings/a", "recordings/b", "recordings/more/a"]
    assert places([str(recordings)]) == places(["recordings"])
    assert places([str(recordings / "more/a.wav")]) == ["a"]
    assert places([str(recordings / "m*/*.wav")]) == ["recordings/more/a"]
    assert places([str(recordings / "m*/a.wav")]) == ["recordings/more/a"]
    assert places([str(recordings / "**/more/a.wav")]) == ["recordings/more/a"]
    monkeypatch.chdir(recordings / "more")
    assert places(["../b.flac"]) == ["b"]
    monkeypatch.chdir(recordings)
    (recordings / "日本 語.wav").touch()
    (recordings / "take.1").touch()
    assert places(["日本 語.wav", "take.1"]) == ["日本 語", "take.1"]
    (recordings / "a[1].wav").touch()
    assert places(["a[1].wav"]) == places(["*1*.wav"]) == ["a[1]"]
    assert places(["mor*"]) == ["more/a"]


def test_what_is_passed_over_is_named(recordings, capsys):
    (recordings / "._a.wav").touch()
    (recordings / "Thumbs.db").touch()
    assert len(find_input_files([str(recordings)])) == 3
    said = capsys.readouterr().out
    assert said == f"{recordings}: skipped 1 file that is not an audio file (notes.txt)\n"


def test_a_name_of_two_lines_is_printed_on_one(recordings, capsys):
    folder = recordings.rename(recordings.with_name("two\nlines"))
    (folder / "more\nnotes.txt").touch()
    assert len(find_input_files([str(folder)])) == 3
    (said,) = capsys.readouterr().out.splitlines()
    assert said.endswith(
        r"two\nlines: skipped 2 files that are not audio files (more\nnotes.txt, notes.txt)"
    )


def test_lists_of_recordings(recordings, monkeypatch, tmp_path):
    monkeypatch.chdir(recordings)
    (tmp_path / "list").write_bytes(b"b.flac\r\n\nmore\n\xff.wav\n")
    found = find_input_files(["a.wav"], [tmp_path / "list"])
    names = ["a.wav", "b.flac", "more/a.wav", os.fsdecode(b"\xff.wav")]
    assert [str(one.path) for one in found] == names


def test_a_pattern_that_is_also_a_folder_s_name(tmp_path):
    for name in ("t", "[t]"):
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "below" / "a.wav").touch()
    assert places([str(tmp_path / "[t]/below/*.wav")]) == ["t/below/a"]


def test_lines_of_a_list_are_no_patterns(tmp_path):
    """Names of downloads have brackets: one that is missing is that file, and no other."""
    (tmp_path / "song 1.wav").touch()
    lines = [str(tmp_path / name) for name in ("song [12].wav", "Dog barks [dQw4w9].wav")]
    (tmp_path / "list").write_text("\n".join(lines))
    assert [str(one.path) for one in find_input_files([], [tmp_path / "list"])] == lines
    with pytest.raises(UserError, match="no file matches"):
        find_input_files(lines[1:])


def test_a_list_of_another_program(recordings, monkeypatch, tmp_path):
    monkeypatch.chdir(recordings)
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbfb.flac\r\n")
    assert places([], [tmp_path / "list"]) == ["b"]
    (tmp_path / "list").write_bytes(b"b.flac\n\0/?\n")
    with pytest.raises(UserError, match="holds a zero byte"):
        places([], [tmp_path / "list"])


def test_links_to_folders_elsewhere_are_followed_each_place_once(recordings, tmp_path):
    for folder in (tmp_path / "elsewhere", recordings / ".hidden"):
        folder.mkdir()
        (folder / "c.wav").touch()
    links = {
        recordings / "linked": tmp_path / "elsewhere",
        recordings / "linked_too": tmp_path / "elsewhere",
        recordings / "of_hidden": recordings / ".hidden",
        recordings / "more" / "back": recordings,
        recordings / "more" / "far_back": tmp_path,
        recordings / "latest": recordings / "more",
        tmp_path / "elsewhere" / "there": recordings / "more",
        tmp_path / "elsewhere" / "again": tmp_path / "elsewhere",
    }
    for link, target in links.items():
        link.symlink_to(target)
    found = [str(one.path.relative_to(recordings)) for one in find_input_files([str(recordings)])]
    assert found == ["a.wav", "b.flac", "linked/c.wav", "more/a.wav", "of_hidden/c.wav"]


def test_a_folder_that_cannot_be_read_is_named(recordings, monkeypatch, capsys):
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert places([str(recordings)]) == ["recordings/a", "recordings/b"]
    said = capsys.readouterr().err
    assert said == f"passed over {recordings / 'more'}: it cannot be read (Permission denied)\n"


def test_links_into_a_linked_folder_are_followed_once(recordings, tmp_path):
    (tmp_path / "elsewhere" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere" / "c.wav").touch()
    (tmp_path / "elsewhere" / "sub" / "d.wav").touch()
    links = {"inner": "elsewhere/sub", "outer": "elsewhere", "x_inner": "elsewhere/sub"}
    for link, target in links.items():
        (recordings / link).symlink_to(tmp_path / target)
    found = [str(one.path.relative_to(recordings)) for one in find_input_files([str(recordings)])]
    assert found == ["a.wav", "b.flac", "inner/d.wav", "more/a.wav", "outer/c.wav"]
