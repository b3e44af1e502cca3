import dataclasses

import jax
import numpy as np
import pytest

from tests.tiny import (
    ONE_BLOCK,
    RATE,
    SEGMENT,
    TAGGER,
    noise,
    tagger_variables,
    tone,
    write_records,
)
from uss_jax.anchors import mine as mine_module
from uss_jax.anchors.find import find_anchors
from uss_jax.anchors.mine import MiningSettings, mine
from uss_jax.anchors.table import read_header, read_table
from uss_jax.bundles.model import Net
from uss_jax.bundles.nets import build_sed, fields_of
from uss_jax.data.index import load_index
from uss_jax.data.indexing import build_index
from uss_jax.data.metadata import write_metadata
from uss_jax.data.reader import ClipReader
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import RecordWriter
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

LENGTH = int(1.6 * RATE)
SETTINGS = MiningSettings(RATE, SEGMENT, LENGTH, candidates=3, min_dbfs=-60.0)
SED = Net(build_sed(fields_of(TAGGER)), tagger_variables())
SPEECH, DOG, BARK, MUSIC = (
    load_ontology().resolve(name) for name in ("Speech", "Dog", "Bark", "Music")
)
LABELS = [[SPEECH], [DOG, SPEECH], [BARK], [MUSIC, DOG, SPEECH], []]


def _clips():
    """Sounds that change, of many lengths, one of them mostly silent."""
    clips = []
    for i in range(10):
        quiet = np.zeros(int(0.1 * i * RATE), np.float32)
        sound = np.concatenate([tone(300 + 200 * i, 0.35), quiet, noise(i, 0.3)])
        clips.append((f"clip{i}", sound, LABELS[i % 5]))
    clips[3] = ("short", tone(500, 0.2), [DOG])
    return clips


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Three shards."""
    directory = tmp_path_factory.mktemp("records")
    clips = _clips()
    shards = [clips[:4], clips[4:5], clips[5:]]
    for number, some in enumerate(shards):
        path = directory / f"toy-train.tfrecord-{number:05d}-of-00003"
        with RecordWriter(path) as writer:
            for id, waveform, labels in some:
                samples = np.rint(waveform * 32767).astype(np.int16)
                writer.write(serialise(id.encode(), samples, labels))
    index = build_index(directory, "train")
    write_metadata(
        directory,
        name="toy",
        version="1.0.0",
        split="train",
        shard_records=[4, 1, 5],
        shard_bytes=int(index.shard_bytes.sum()),
        sample_rate=RATE,
    )
    return directory


@pytest.fixture(scope="module")
def reader(records):
    return ClipReader(records, load_index(records, "train"))


@pytest.fixture(scope="module")
def table(reader, tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "anchors.npz"
    assert mine(reader, SED, out, SETTINGS, batch_size=8)
    return read_table(out, reader.index, SEGMENT)


def test_a_table_of_another_rule_says_so_and_holds_its_anchors(reader, tmp_path):
    sed = Net(ONE_BLOCK, tagger_variables(net=ONE_BLOCK))
    settings = dataclasses.replace(SETTINGS, min_dbfs=None)
    tables = {}
    for rule in ("uss", "htsat"):
        out = tmp_path / f"{rule}.npz"
        assert mine(reader, sed, out, dataclasses.replace(settings, rule=rule), batch_size=8)
        tables[rule] = read_table(out, reader.index, SEGMENT)
    uss, htsat = (read_header(tmp_path / f"{rule}.npz") for rule in tables)
    assert htsat == {**uss, "rule": "htsat"}
    assert "rule" not in uss
    assert set(uss) == {
        *("sed_hash", "index_digest", "sample_rate", "segment_samples", "clip_samples"),
        *("candidates", "min_dbfs"),
    }

    hop, index, row = ONE_BLOCK.hop_samples, reader.index, 0
    width, image = SEGMENT // hop, ONE_BLOCK.frames_of_image(LENGTH // hop + 1)
    begins = tables["htsat"].begin_sample[:, 0]
    for record in range(len(index)):
        framewise = np.asarray(sed(_padded(reader, record)[None] / np.float32(32768))["framewise"])
        latest = max(int(index.samples[record]) - SEGMENT, 0)
        at = np.arange(len(image)) * LENGTH // (hop * len(image))
        for label in index.labels(record).tolist():
            curve = np.where(at * hop <= index.samples[record], framewise[0, image, label], 0)
            scores = np.convolve(curve, np.ones(width), mode="same") / width
            tied = at[scores >= scores.max() - 2e-6]
            assert begins[row] in np.clip((tied - width // 2) * hop, 0, latest)
            assert tables["htsat"].score[row, 0] == pytest.approx(scores.max(), abs=2e-6)
            row += 1
    assert (begins != tables["uss"].begin_sample[:, 0]).any()


def test_another_rule_asks_for_htsat_and_clips_that_fill_its_image(reader, tmp_path):
    settings = dataclasses.replace(SETTINGS, rule="htsat")
    with pytest.raises(UserError, match="--rule=htsat needs an HTS-AT as detector, but the det"):
        mine(reader, SED, tmp_path / "a.npz", settings, batch_size=8)
    sed = Net(ONE_BLOCK, tagger_variables(net=ONE_BLOCK))
    for seconds in (1.2, 2.56):
        settings = dataclasses.replace(settings, clip_samples=round(seconds * RATE))
        with pytest.raises(UserError, match=f"least 1.28 and less than 2.56 s, not {seconds} s"):
            mine(reader, sed, tmp_path / "a.npz", settings, batch_size=8)
    assert not list(tmp_path.iterdir())


def _padded(reader, record):
    samples = reader.read(record)
    return np.pad(samples, (0, LENGTH - len(samples)))


def test_the_anchors_are_those_the_training_step_finds(reader, table):
    index = reader.index
    counts = np.diff(index.label_row.astype(int))
    records = np.repeat(np.arange(len(index)), counts)
    batch = {
        "audio": np.stack([_padded(reader, record) for record in records.tolist()]),
        "samples": index.samples[records].astype(np.int32),
        "class_index": index.label_class.astype(np.int32),
    }
    anchors = jax.jit(
        lambda variables, batch: find_anchors(
            SED.module,
            variables,
            batch,
            jax.random.key(0),
            segment_samples=SEGMENT,
            min_dbfs=SETTINGS.min_dbfs,
        )
    )(SED.variables, batch)
    np.testing.assert_array_equal(table.begin_sample[:, 0], anchors.begin_sample)
    np.testing.assert_allclose(table.score[:, 0], anchors.score, atol=1e-5)
    assert len(set(table.begin_sample[:, 0].tolist())) >= 3  # not all at the same place


def test_runners_up_overlap_none_before_and_score_no_higher(reader, table):
    rows = np.repeat(np.arange(len(reader.index)), np.diff(reader.index.label_row.astype(int)))
    found = 0
    for row, record in enumerate(rows):
        begin, score = table.begin_sample[row].astype(int), table.score[row]
        there = score >= 0
        found += there.sum()
        apart = np.abs(np.subtract.outer(begin[there], begin[there]))
        assert (apart[~np.eye(there.sum(), dtype=bool)] >= SEGMENT).all()
        assert (np.diff(score) <= 1e-6).all()
        assert (begin[~there] == begin[0]).all()
        assert (begin + SEGMENT <= max(reader.index.samples[record], SEGMENT)).all()
    assert found > len(rows)  # some have one


def test_level_and_purity_are_of_the_best_anchor(reader, table):
    index, ontology = reader.index, load_ontology()
    row = 0
    for record in range(len(index)):
        clip = _padded(reader, record) / np.float32(32768)
        framewise = np.asarray(SED(clip[None])["framewise"][0])
        labels = index.labels(record).tolist()
        related = sorted(set().union(*(ontology.relatives(label) for label in labels)))
        for _ in labels:
            begin = int(table.begin_sample[row, 0])
            end = min(begin + SEGMENT, int(index.samples[record]))
            level = 10 * np.log10(np.mean(np.square(clip[begin:end], dtype=np.float64)))
            # Levels are of segments that begin on the hop, which a short clip's end need not.
            assert table.rms_db[row] == pytest.approx(level, abs=0.5)
            hop = SED.module.hop_samples
            mean = framewise[-(-begin // hop) : end // hop + 1].mean(axis=0)
            mean[related] = 0
            assert table.purity[row] == pytest.approx(mean.max(), rel=2e-3)
            row += 1


def test_hosts_and_kills_give_the_same_table(reader, table, tmp_path, monkeypatch):
    out = tmp_path / "anchors.npz"
    assert not mine(reader, SED, out, SETTINGS, batch_size=8, host=1, hosts=2)
    assert not out.exists()

    done = []
    whole = mine_module._mine_part

    def killed_at_the_second(reader, records, *rest):
        if done:
            raise KeyboardInterrupt
        done.append(records)
        return whole(reader, records, *rest)

    monkeypatch.setattr(mine_module, "_mine_part", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        mine(reader, SED, out, SETTINGS, batch_size=8, host=0, hosts=2)
    # What was done is not done again.
    left = []
    monkeypatch.setattr(
        mine_module,
        "_mine_part",
        lambda r, records, *rest: left.append(0) or whole(r, records, *rest),
    )
    assert mine(reader, SED, out, SETTINGS, batch_size=8, host=0, hosts=2)
    assert len(left) == 1
    again = read_table(out, reader.index, SEGMENT)
    assert again.digest == table.digest
    assert [path.name for path in tmp_path.iterdir()] == ["anchors.npz"]
    # Nor a table that is there.
    assert mine(reader, SED, out, SETTINGS, batch_size=8)
    assert len(left) == 1


def test_a_batch_the_devices_cannot_share_is_refused(reader, tmp_path):
    with pytest.raises(UserError, match="--batch 12 is not divisible by 8 devices; use 16"):
        mine(reader, SED, tmp_path / "a.npz", SETTINGS, batch_size=12)


def test_a_place_that_cannot_be_written_and_no_labels_are_said(reader, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --out"):
        mine(reader, SED, tmp_path / "file" / "a.npz", SETTINGS, batch_size=8)
    write_records(tmp_path / "bare", "train", [("a", tone(300, 0.5), [])])
    bare = ClipReader(tmp_path / "bare", load_index(tmp_path / "bare", "train"))
    with pytest.raises(UserError, match="no labels"):
        mine(bare, SED, tmp_path / "a.npz", SETTINGS, batch_size=8)
