"""What a run may change when it is resumed."""

import dataclasses

import numpy as np
import pytest

from tests.tiny import CONFIGS, noise, write_records
from uss_jax.cli.config import load_config
from uss_jax.errors import UserError
from uss_jax.training import resuming
from uss_jax.training.resuming import config_of_hosts
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


def test_hosts_are_told_of_any_other_config_but_of_their_own_paths():
    same = lambda **changed: config_of_hosts(_config(**changed)) == config_of_hosts(_config())  # noqa: E731
    for changed in (
        *({"loss": "si_snr"}, {"data.order": "uniform"}, {"mixing.order": "conflict_free"}),
        *({"precision": "highest"}, {"separator.dtype": "bfloat16"}, {"batch_norm": "device"}),
        *({"anchors.source": "table"}, {"best_by": "average_sdri"}, {"seed": 3}),
        *({"schedule.learning_rate": 1.0}, {"eval.pairs": ""}, {"query.table": "there"}),
    ):
        assert not same(**changed), changed
    assert same(
        **{"data.records": "/mnt/b", "eval.pairs": "/mnt/pairs"},
        **{"data.threads": 9, "data.verify": "always"},
    )


def _config(**changed):
    config = load_config(str(CONFIGS / "resunet30.py"), [])
    for key, value in {"data.records": "/mnt/a", "eval.pairs": "/home/pairs", **changed}.items():
        config.update_from_flattened_dict({key: value})
    return config
