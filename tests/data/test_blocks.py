import pytest

from tests.data.toy import GOOD, files_of, prepare_toy
from uss_jax.data import blocks


def test_any_number_of_workers_gives_the_same_files(audio, tmp_path, monkeypatch):
    one = prepare_toy(audio, tmp_path / "one", shards=2)
    monkeypatch.setattr(blocks, "_CLIPS_IN_FLIGHT", 3)
    many = prepare_toy(audio, tmp_path / "many", shards=2, workers=5)
    ours, theirs = files_of(one.directory), files_of(many.directory)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith(".npz"):  # a zip file holds the time
            assert ours[name] == theirs[name], name
    assert one.index.digest == many.index.digest


def test_a_job_that_was_stopped_goes_on_with_the_shards_that_are_left(audio, tmp_path, monkeypatch):
    names = ["none.wav", *GOOD, "silent.wav"]
    whole = prepare_toy(audio, tmp_path / "whole", names, shards=4)
    made, make = [], blocks.prepare_clip

    def stopped(path, id, *more):
        made.append(id)
        if id == "7.wav":
            raise KeyboardInterrupt
        return make(path, id, *more)

    monkeypatch.setattr(blocks, "prepare_clip", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare_toy(audio, tmp_path / "out", names, shards=4)
    assert not [name for name in files_of(tmp_path / "out" / "toy" / "1.0.0") if "tfrecord" in name]
    stopped_at = len(made)

    def counted(path, id, *more):
        made.append(id)
        return make(path, id, *more)

    monkeypatch.setattr(blocks, "prepare_clip", counted)
    again = prepare_toy(audio, tmp_path / "out", names, shards=4)
    assert made[stopped_at:] == names[7:]  # the first two blocks of four hold three and four
    assert again.index.digest == whole.index.digest
    assert again.report.read_text() == whole.report.read_text().replace("whole", "out")
    assert not [path for path in again.directory.iterdir() if path.name.startswith(".")]

    # Other settings are another job.
    del made[:]
    prepare_toy(audio, tmp_path / "out", names, shards=3, overwrite=True)
    assert len(made) == len(names)
