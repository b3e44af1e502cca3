"""Apache Beam makes the shards that threads make (extra `beam`)."""

import os
import shutil

import numpy as np
import pytest
import soundfile

from uss_jax.data.beam import _make
from uss_jax.data.blocks import Block
from uss_jax.data.conversion import ClipSettings
from uss_jax.data.labels import LabelledFile
from uss_jax.data.prepare import prepare
from uss_jax.errors import UserError


def _prepare(folder, out, **arguments):
    names = [f"{at}.wav" for at in range(9)] + ["missing.wav"]
    labelled = [LabelledFile(name, (at,), at + 2) for at, name in enumerate(names)]
    return prepare(
        labelled,
        folder,
        out,
        name="toy",
        version="1.0.0",
        split="train",
        settings=ClipSettings(sample_rate=8000, clip_seconds=1.0),
        shards=4,
        **arguments,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sounds").mkdir()
    for at in range(9):
        waveform = np.random.default_rng(at).uniform(-0.9, 0.9, 800 + at)
        soundfile.write(tmp_path / "sounds" / f"{at}.wav", waveform, 8000)
    return tmp_path / "sounds"


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # of Beam's own
def test_beam_makes_the_same_shards(folder, tmp_path):
    pytest.importorskip("apache_beam")
    from uss_jax.data.beam import beam_engine

    ours = _prepare(folder, tmp_path / "threads")
    options = ["--runner=DirectRunner", "--direct_num_workers=1"]
    theirs = _prepare(folder, tmp_path / "beam", engine=beam_engine(options))
    assert theirs.index.digest == ours.index.digest
    for shard in ours.index.shards:
        assert (theirs.directory / shard).read_bytes() == (ours.directory / shard).read_bytes()
    assert theirs.report.read_text() == ours.report.read_text()


@pytest.mark.parametrize("kind", ["missing", "not its segment"])
def test_a_worker_takes_clips_that_can_be_used_now(folder, tmp_path, kind):
    """Of blocks that are finished, it makes those again, and keeps the others."""
    (tmp_path / "work").mkdir()
    segment = None if kind == "missing" else (9.0, 9.5)
    items = [LabelledFile("8.wav", (8,), 2), LabelledFile("9.wav", (9,), 3, segment)]
    if segment:  # longer than the segment, too short for the video
        soundfile.write(folder / "9.wav", np.ones(13_000) / 2, 8000)
    block = Block(tmp_path / "work", 0, items, folder, ClipSettings(sample_rate=8000))
    _make(block)
    assert [why.kind for why in block.outcome().skipped.values()] == [kind]
    before = block.path.stat().st_mtime_ns
    _make(block)
    assert block.path.stat().st_mtime_ns == before
    shutil.copy(folder / "8.wav", folder / "9.wav")
    later = block.path.stat().st_mtime + 60
    os.utime(folder / "9.wav", (later, later))
    _make(block)
    assert not block.outcome().skipped


def test_shards_an_engine_did_not_make_are_said(folder, tmp_path):
    with pytest.raises(UserError, match="block-00000 was not written; run the same command again"):
        _prepare(folder, tmp_path / "none", engine=lambda blocks: None)


def test_without_beam_its_extra_is_named(monkeypatch):
    import sys

    from uss_jax.data.beam import beam_engine

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'uss-jax\[beam\]'"):
        beam_engine([])
