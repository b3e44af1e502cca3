"""Training on mined anchors gives what training with the detector inside gives, for less."""

import json
import math
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest

import uss_jax
from tests.tiny import (
    RATE,
    SEGMENT,
    TAGGER,
    tagger_variables,
    train_words,
    write_place,
    write_tagger,
)
from uss_jax.anchors.find import find_anchors
from uss_jax.anchors.mine import MiningSettings, mine
from uss_jax.anchors.table import Placement, read_table
from uss_jax.bundles.model import Net
from uss_jax.bundles.nets import build_sed, fields_of
from uss_jax.cli.main import main
from uss_jax.data.conversion import ClipSettings
from uss_jax.data.index import load_index
from uss_jax.data.labels import read_labels
from uss_jax.data.orders import BalancedOrder
from uss_jax.data.pipeline import batches
from uss_jax.data.prepare import prepare
from uss_jax.data.reader import ClipReader
from uss_jax.training.augment import at_other_speed

pytestmark = pytest.mark.usefixtures("one_device")

DEMO = pathlib.Path(uss_jax.__file__).parent / "assets" / "demo"
LENGTH = 5 * SEGMENT
SED = Net(build_sed(fields_of(TAGGER)), tagger_variables())


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Records of bundled recordings that are as long as a clip, and their table."""
    path = tmp_path_factory.mktemp("real")
    labelled = read_labels(DEMO / "manifest.csv", DEMO, "train").clips[::3]
    settings = ClipSettings(sample_rate=RATE, clip_seconds=LENGTH / RATE)
    made = prepare(
        labelled, DEMO, path, name="demo", version="1.0.0", split="train", settings=settings
    )
    index = load_index(made.directory, "train")
    mining = MiningSettings(RATE, SEGMENT, LENGTH, candidates=2, min_dbfs=-60.0)
    mine(ClipReader(made.directory, index), SED, path / "anchors.npz", mining, batch_size=16)
    return made.directory, index, read_table(path / "anchors.npz", index, SEGMENT)


def _feed(real, length, **arguments):
    directory, index, _ = real
    order = BalancedOrder(index.label_row, index.label_class, seed=1)
    return batches(
        ClipReader(directory, index),
        order,
        start_step=0,
        stop_step=4,
        batch_size=16,
        clip_samples=length,
        **arguments,
    )


def test_anchors_of_the_table_are_those_the_detector_finds_in_the_step(real):
    @jax.jit
    def found(variables, batch):
        return find_anchors(
            SED.module, variables, batch, jax.random.key(0), segment_samples=SEGMENT, min_dbfs=-60.0
        )

    begins = []
    places = Placement(real[2], real[1], seed=1)
    for clips, anchors in zip(
        _feed(real, LENGTH), _feed(real, SEGMENT, places=places), strict=True
    ):
        inside = found(SED.variables, clips)
        np.testing.assert_array_equal(anchors["record"], clips["record"])
        np.testing.assert_array_equal(anchors["begin_sample"], inside.begin_sample)
        np.testing.assert_allclose(anchors["score"], inside.score, atol=1e-5)
        outside = find_anchors(
            None,
            None,
            {name: jax.numpy.asarray(column) for name, column in anchors.items()},
            jax.random.key(0),
            segment_samples=SEGMENT,
            min_dbfs=None,
        )
        np.testing.assert_array_equal(outside.segment, inside.segment)
        np.testing.assert_array_equal(outside.samples, inside.samples)
        begins += anchors["begin_sample"].tolist()
    assert len(set(begins)) > 10


def test_rows_longer_than_an_anchor_hold_it_and_what_is_around_it(real):
    places, around, near_ends = Placement(real[2], real[1], seed=1), SEGMENT // 2, 0
    wide = _feed(real, SEGMENT + around, places=places, around_samples=around)
    for anchors, rows in zip(_feed(real, SEGMENT, places=places), wide, strict=True):
        assert (anchors["anchor_sample"] == 0).all()
        np.testing.assert_array_equal(rows["begin_sample"], anchors["begin_sample"])
        length = real[1].samples[rows["record"]].astype(int)
        first = rows["begin_sample"] - rows["anchor_sample"]
        latest = np.maximum(length - SEGMENT - around, 0)
        np.testing.assert_array_equal(first, np.clip(rows["begin_sample"] - around // 2, 0, latest))
        np.testing.assert_array_equal(rows["samples"], np.minimum(length, SEGMENT + around))
        near_ends += (rows["anchor_sample"] != around // 2).sum()
        for row, at in enumerate(rows["anchor_sample"]):
            inside = rows["audio"][row, at : at + SEGMENT]
            np.testing.assert_array_equal(inside, anchors["audio"][row])
    assert 0 < near_ends < 64


def test_anchors_of_a_table_at_another_speed_are_full(real):
    speed, around = {"least": 0.7, "most": 1.4}, math.ceil(0.4 * SEGMENT)
    places = Placement(real[2], real[1], seed=1)
    for batch in _feed(real, SEGMENT + around, places=places, around_samples=around):
        rows = {name: jax.numpy.asarray(column) for name, column in batch.items()}
        changed = at_other_speed(rows, jax.random.key(0), speed, SEGMENT)
        assert changed["audio"].shape == (16, SEGMENT)
        long = real[1].samples[batch["record"]] >= SEGMENT + around
        assert long.sum() > 8
        assert (changed["samples"][long] == SEGMENT).all()


def test_only_the_anchors_are_read(real, monkeypatch):
    read, preadv = [], os.preadv

    def noted(*arguments):  # in several threads
        count = preadv(*arguments)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", noted)
    sizes = []
    places = Placement(real[2], real[1], seed=1)
    for length, arguments in ((LENGTH, {}), (SEGMENT, {"places": places})):
        read.clear()
        drawn = np.concatenate([batch["record"] for batch in _feed(real, length, **arguments)])
        sizes.append(sum(read))
        clips = real[1].samples[drawn].astype(int)
        assert sizes[-1] >= 2 * np.minimum(clips, length).sum()
    assert (real[1].samples == LENGTH).mean() > 0.5
    whole = np.minimum(clips, LENGTH).sum()
    # 0.2 of a clip of full length; nothing can be saved of what is shorter than an anchor.
    assert sizes[1] / sizes[0] <= 1.05 * np.minimum(clips, SEGMENT).sum() / whole


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = write_place(tmp_path_factory.mktemp("place"))
    words = ["mine", "--records", path / "records", "--sed", path / "tagger"]
    assert main([str(word) for word in [*words, "--out", path / "anchors.npz", "--batch", 1]]) == 0
    return path


def _train(place, workdir, **changed):
    leaves = {
        "anchors.source": "table",
        "anchors.table": place / "anchors.npz",
        "mixing.order": "conflict_free",
        "total_steps": 2,
        "query.kind": "one_hot",
    }
    leaves |= {key.replace("__", "."): value for key, value in changed.items()}
    return main(train_words("resunet30.py", place, workdir, leaves))


@pytest.mark.long
def test_a_run_on_a_table_needs_no_detector_and_resumes(place, tmp_path, capsys, quick_compilation):
    policies = {"anchors__top_k": 2, "anchors__jitter_samples": 40, "anchors__min_score": 1e-4}
    policies["speed"] = {"least": 0.7, "most": 1.4}
    assert _train(place, tmp_path / "run", sed_bundle="", **policies) == 0
    said = capsys.readouterr().out
    assert "top_k 2, jitter_samples 40" in said
    assert "labels usable (min_score 0.0001, min_dbfs -60.0)" in said
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 2
    assert last["anchor_score"] > 0
    assert 0 <= last["conflict_share"] <= 1
    assert not (tmp_path / "run" / "frozen" / "sed").exists()
    # Another place for the anchors is other data.
    again = {"sed_bundle": "", "total_steps": 3}
    again |= {"anchors__source": "random", "anchors__table": ""}
    assert _train(place, tmp_path / "run", **again) == 1
    assert "started with another anchor source or table" in capsys.readouterr().err


def test_what_does_not_fit_a_table_is_said_before_the_first_step(place, tmp_path, capsys):
    write_tagger(place / "other", seed=1)
    for changed, said in (
        ({"sed_bundle": place / "other"}, "was mined with another detector"),
        ({"segment_seconds": 0.25}, "anchors of 4000 samples, the config asks for 2000"),
        ({"anchors__top_k": 9}, "config.anchors.top_k=9 is not between 1 and 4"),
        ({"anchors__min_score": 1.0}, "no anchor reaches config.anchors.min_score=1"),
        ({"anchors__table": ""}, "config.anchors.table is empty"),
        ({"anchors__jitter_samples": -1}, "jitter_samples is -1, expected a whole number from 0"),
        ({"mixing__order": "random"}, "config.mixing.order is 'random'"),
    ):
        assert _train(place, tmp_path / "run", **changed) == 1
        assert said in capsys.readouterr().err


def test_a_clips_anchors_are_drawn(place, tmp_path, capsys):
    words = ["mine", "--records", place / "records", "--sed", place / "tagger"]
    words += ["--out", place / "anchors.npz", "--picture", tmp_path / "a.png", "--show"]
    assert main([str(word) for word in [*words, "tone2"]]) == 0
    picture = (tmp_path / "a.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert main([str(word) for word in [*words, "tone1"]]) == 1
    assert "a.png exists; remove it or give another --picture" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == picture
    shutil.copy(place / "anchors.npz", tmp_path / "b.npz")
    default = [str(x) for x in (*words[:5], "--out", tmp_path / "b.npz", "--show")]
    assert main([*default, "tone2"]) == main([*default, "tone1"]) == 0  # the second replaces it
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "a.png").unlink()
    assert main([str(word) for word in [*words, "nothing"]]) == 1
    assert 'no clip of these records has the id "nothing"' in capsys.readouterr().err
