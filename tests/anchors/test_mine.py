import dataclasses

import numpy as np
import pytest

from tests.anchors.toy import LENGTH, SED, SETTINGS, padded
from tests.tiny import ONE_BLOCK, RATE, SEGMENT, tagger_variables, tone, write_records
from uss_jax.anchors import mine as mine_module
from uss_jax.anchors.mine import Query, mine
from uss_jax.anchors.table import read_header, read_table, write_table
from uss_jax.bundles.bundle import net_hash
from uss_jax.bundles.model import Net
from uss_jax.data.index import load_index
from uss_jax.data.reader import ClipReader
from uss_jax.errors import UserError


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
        *("candidates", "min_dbfs", "sed_model"),
    }

    hop, index, row = ONE_BLOCK.hop_samples, reader.index, 0
    width, image = SEGMENT // hop, ONE_BLOCK.frames_of_image(LENGTH // hop + 1)
    begins = tables["htsat"].begin_sample[:, 0]
    for record in range(len(index)):
        framewise = np.asarray(sed(padded(reader, record)[None] / np.float32(32768))["framewise"])
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


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"clip_samples": 80}, "--clip-seconds 0.01 is too short for the detector, Cnn14Decision"),
        (
            {"segment_samples": 80},
            "--segment-seconds 0.01 is too short for the query net, Cnn14Dec",
        ),
    ],
)
def test_what_is_too_short_for_a_net_is_said_at_once(reader, tmp_path, changed, said):
    settings = dataclasses.replace(SETTINGS, **changed)
    with pytest.raises(UserError, match=said):
        mine(reader, SED, tmp_path / "a.npz", settings, query=Query(SED, "clipwise"), batch_size=8)
    assert not list(tmp_path.iterdir())


def test_a_detector_with_another_field_is_another_one(reader, tmp_path, monkeypatch):
    out, variables = tmp_path / "anchors.npz", tagger_variables(net=ONE_BLOCK)
    first, other = (Net(ONE_BLOCK.clone(repeat_short=short), variables) for short in (True, False))
    assert mine(reader, first, out, SETTINGS, batch_size=8)
    table, digest = read_table(out, reader.index, SEGMENT), net_hash(variables)
    assert table.mined_with(first.module.clone(dtype="bfloat16"), digest)
    assert not table.mined_with(other.module, digest)
    assert mine(reader, other, out, SETTINGS, batch_size=8)
    assert read_table(out, reader.index, SEGMENT).mined_with(other.module, digest)

    # Tables of before state no fields, are complete, and resume the same runs.
    header = {name: value for name, value in table.header.items() if name != "sed_model"}
    write_table(out, header, table.rows(reader.index, np.arange(len(reader.index))))
    old = read_table(out, reader.index, SEGMENT)
    assert (old.digest, old.mined_with(other.module, digest)) == (table.digest, True)
    monkeypatch.setattr(mine_module, "_detection", None)
    assert mine(reader, other, out, SETTINGS, batch_size=8)


def test_a_file_that_is_no_table_stays(reader, tmp_path):
    out = tmp_path / "anchors.npz"
    assert mine(reader, SED, out, SETTINGS, batch_size=8)
    for content in (b"my sounds", out.read_bytes()[:-50]):
        out.write_bytes(content)
        with pytest.raises(UserError, match="but first remove this file or choose another --out"):
            mine(reader, SED, out, SETTINGS, batch_size=8)
        assert out.read_bytes() == content


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
