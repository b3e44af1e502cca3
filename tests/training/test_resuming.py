"""What a run may change when it is resumed."""

import dataclasses

import numpy as np
import pytest

from tests.tiny import noise, write_records
from uss_jax.errors import UserError
from uss_jax.training import resuming
from uss_jax.training.settings import SeparatorSettings, TaggerSettings


def test_records_of_other_labels_are_not_resumed(tmp_path):
    clips = [("a", noise(1, 0.9), [72, 3])]
    index = write_records(tmp_path / "records", "train", clips)
    position = {"seed": 1, "global_batch": 8, "index_digest": index.digest}
    resuming._require_same_data(position, position, index)
    # A run of before the digest covered labels goes on.
    resuming._require_same_data(
        {**position, "index_digest": index._digest_of_shards}, position, index
    )
    relabelled = dataclasses.replace(index, label_class=index.label_class + np.uint16(1))
    now = {**position, "index_digest": relabelled.digest}
    with pytest.raises(UserError, match="the records have changed since this run was started"):
        resuming._require_same_data(position, now, relabelled)


def test_another_anchor_source_is_not_taken_for_damaged_nets(tmp_path):
    """The step runs no detector with a table, so that its frozen nets differ too."""
    index = write_records(tmp_path / "records", "train", [("a", noise(1, 0.9), [72, 3])])
    position = {"seed": 1, "global_batch": 8, "index_digest": index.digest}
    device = {**position, "frozen_digest": "with detector"}
    table = {**position, "frozen_digest": "without", "anchors_digest": "of a table"}
    for saved, now in ((device, table), (table, device)):
        with pytest.raises(UserError, match="started with another anchor source or table"):
            resuming._require_same_data(saved, now, index)
    with pytest.raises(UserError, match="the nets in the workdir's folder `frozen` are not"):
        resuming._require_same_data(device, {**device, "frozen_digest": "damaged"}, index)


OLD = {"anchors": {"min_dbfs": -60.0}, "mixing": {"sources": 2}, "data": {"class_weights": None}}


@pytest.mark.parametrize(
    ("section", "key", "default", "other"),
    [
        ("anchors", "rule", "uss", "htsat"),
        ("data", "share", 1.0, 0.5),
        ("data", "class_weights", {}, {"Dog": 2}),
        ("mixing", "all_targets", False, True),
    ],
)
def test_a_run_of_before_a_key_goes_on_with_its_default(section, key, default, other):
    now = {**OLD, section: {**OLD[section], key: default}}
    resuming._require_same_drawing(SeparatorSettings, OLD, now)
    now[section][key] = other
    with pytest.raises(UserError, match=rf"config\.{section}\.{key}=.*, not ") as raised:
        resuming._require_same_drawing(SeparatorSettings, OLD, now)
    assert f"{default}, not {other}" in str(raised.value)


def test_what_does_not_determine_the_data_may_change():
    before = {"data": {"threads": 2, "records": "/a"}, "mixing": {"gain_db": 0.0}}
    after = {"data": {"threads": 8, "records": "/b"}, "mixing": {"gain_db": 3.0}}
    resuming._require_same_drawing(SeparatorSettings, before, after)


def test_a_tagger_s_run_keeps_its_mixup():
    with pytest.raises(UserError, match=r"config\.mixup_alpha=1\.0, not None"):
        resuming._require_same_drawing(TaggerSettings, {"mixup_alpha": 1.0}, {"mixup_alpha": None})
