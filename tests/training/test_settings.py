"""Configs that are read, and what is said of those that are invalid."""

import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.tiny import CONFIGS, train_words
from uss_jax.cli.config import load_config
from uss_jax.errors import UserError
from uss_jax.training.settings import separator_settings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.clear(), "config.seed is missing"),
        (lambda config: config.pop("global_batch"), "config.global_batch is missing"),
        (lambda config: config.update(data=3), "config.data is 3, expected a section of keys"),
        (lambda config: config.update(total_steps="9"), "config.total_steps is '9', expected"),
        (lambda config: config.update(total_steps=True), "config.total_steps is True, expected"),
        (lambda config: config.update(weight_decay=np.nan), "config.weight_decay is nan, expected"),
    ],
)
def test_a_config_file_of_other_keys_or_types_is_said(change, said):
    values = load_config(str(CONFIGS / "resunet30.py"), []).to_dict()
    change(values)
    with pytest.raises(UserError, match=said):
        separator_settings(ConfigDict(values))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data.order": "random"}, "config.data.order is 'random', expected balanced or uniform"),
        ({"data.clip_seconds": 0.2}, "config.segment_seconds=0.5 is longer than"),
        ({"data.clip_seconds": 1e9}, "clip_seconds is 1000000000.0, expected a number from 0.01"),
        ({"data.threads": 0}, "config.data.threads is 0, expected a whole number from 1 to 256"),
        ({"data.workers": -1}, "config.data.workers is -1, expected a whole number from 0 to"),
        ({"init_partly": True}, "config.init_partly has no effect without config.init_from"),
        ({"data.max_corrupt": -1}, "config.data.max_corrupt is -1, expected a whole number"),
        ({"data.share": 0.0}, "config.data.share is 0.0, expected above 0 and at most 1"),
        ({"data.class_weights.Drum": "many"}, "class_weights['Drum'] is 'many', expected"),
        ({"speed.least": 0.5}, "config.speed has no key 'config.speed.most'"),
        ({"speed": {"least": 2.0, "most": 1.0}}, "config.speed.least=2.0 is above config.speed.mo"),
        ({"speed": {"slow": 1.0}}, "config.speed has no key 'config.speed.least'"),
        ({"speed": "fast"}, "config.speed is 'fast', expected an object with"),
        ({"anchors.min_dbfs": None}, "config.anchors.min_dbfs is None; give it a value"),
        ({"profile.steps": (3, 2)}, "config.profile.steps is (3, 2), expected (first, last)"),
        ({"profile.steps": "a,b"}, "config.profile.steps is ('a', 'b'), expected (first, last)"),
        ({"global_batch": 12}, "not divisible by 8 devices; use 8 or 16"),
        ({"global_batch": 24, "mixing.group_size": 16}, "config.mixing.group_size=16; change one"),
        ({"mixing.sources": 9}, "config.mixing.sources=9 is not between 1 and"),
        ({"total_steps": 0}, "config.total_steps is 0, expected a whole number from 1 to"),
        ({"total_steps": 2**31}, "config.total_steps is 2147483648, expected a whole number"),
        ({"seed": -1}, "config.seed is -1, expected a whole number from 0 to"),
        ({"seed": 2**32}, "config.seed is 4294967296, expected a whole number from 0 to"),
        ({"keep_checkpoints": 0}, "config.keep_checkpoints is 0, expected a whole number from 1"),
        ({"keep_best": -1}, "config.keep_best is -1, expected a whole number from 0 to"),
        ({"weight_decay": -1.0}, "config.weight_decay is -1.0, expected a number from 0 to"),
        ({"schedule.learning_rate": -1.0}, "config.schedule.learning_rate is -1.0, expected"),
        ({"schedule.warm_up_steps": -3}, "config.schedule.warm_up_steps is -3, expected"),
        ({"segment_seconds": 0.0}, "config.segment_seconds is 0.0, expected a number from 0.01"),
        ({"mixing.group_size": 0}, "config.mixing.group_size is 0, expected a whole number from 1"),
        ({"mixing.gain_db": 1e6}, "config.mixing.gain_db is 1000000.0, expected a number from 0"),
        ({"anchors.min_dbfs": 5.0}, "config.anchors.min_dbfs is 5.0, expected a number from -1000"),
        ({"log_every_steps": 0}, "config.log_every_steps is 0, expected a whole number from 1"),
        ({"loss": "l2"}, "config.loss is 'l2', expected l1_wav or l1_wav_l1_sp"),
        (
            {"anchors.source": "shelf"},
            "config.anchors.source is 'shelf', expected device or table",
        ),
        ({"anchors.rule": "dice"}, "config.anchors.rule is 'dice', expected uss or htsat"),
        (
            {"anchors.rule": "htsat", "anchors.source": "random"},
            "config.anchors.rule=htsat has no effect with config.anchors.source=random",
        ),
        ({"query.kind": "words"}, "config.query.kind is 'words', expected one_hot or soft or"),
        ({"batch_norm": "local"}, "expected global, replica or a number of items that divides 8"),
        ({"batch_norm": "3"}, "config.batch_norm is '3', expected global"),
        ({"accumulate": 3}, "not divisible by 8 devices times config.accumulate=3; use"),
        (
            {"accumulate": 2, "global_batch": 16, "mixing.group_size": 16},
            "not divisible by config.mixing.group_size=16 times config.accumulate=2; change",
        ),
        (
            {"mixing.all_targets": True, "mixing.sources": 3},
            "group_size=8 to be a multiple of config.mixing.sources=3",
        ),
        ({"mixing.silent_share": 1.5}, "config.mixing.silent_share is 1.5, expected at least 0"),
        (
            {"mixing.silent_share": 0.1, "mixing.sources": 8},
            "config.mixing.silent_share=0.1 needs a config.mixing.group_size above",
        ),
        ({"ema_decay": 1.0}, "config.ema_decay is 1.0, expected at least 0 and below 1"),
        ({"clip_norm": -1.0}, "config.clip_norm is -1.0, expected a number from 0 to"),
        ({"sharding": (("kernel", "half"),)}, "config.sharding has the rule ('kernel', 'half')"),
        ({"separator.audio_channels": 2}, "config.separator.audio_channels is 2; change one"),
        ({"mixing.pan": 0.5}, "config.mixing.pan=0.5 makes mixtures of 2 channels"),
        (
            {"best_by": "loss"},
            "config.best_by is 'loss', expected sdri or si_sdri, or one of these",
        ),
        (
            {"best_by": "shuffled_sdri"},
            "needs shuffled in config.eval.queries, which is average, cl",
        ),
        ({"eval.queries": ("class", "class")}, "expected names of queries, none of them twice"),
        (
            {"eval.queries": ("recordings_0",)},
            "has 'recordings_0', expected average, mean, class, text, shuf",
        ),
        ({"mixing.pan": 1.5}, "config.mixing.pan is 1.5, expected"),
        ({"best_by": "si_sdri"}, "config.best_by=si_sdri has no effect without config.eval.pairs"),
        (
            {"anchors.source": "device", "anchors.table": "a.npz"},
            "config.anchors.table has no effect with config.anchors.source=device; set it to table",
        ),
    ],
)
def test_what_is_invalid_is_said_with_what_is_expected(changed, said):
    words = train_words("resunet30.py", pathlib.Path("place"), "run", changed)
    config = load_config(str(CONFIGS / "resunet30.py"), words[words.index("run") + 1 :])
    with pytest.raises(UserError) as raised:
        separator_settings(config)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("section", "key", "said"),
    [
        ("", "total_step", "did you mean config.total_steps?"),
        ("mixing", "slient_share", "did you mean config.mixing.silent_share?"),
        ("anchors", "jitter_sample", "did you mean config.anchors.jitter_samples?"),
        ("eval", "querys", "did you mean config.eval.queries?"),
        ("", "note", "config.note is no key of this run; remove it"),
    ],
)
def test_a_misspelt_key_of_a_file_is_refused(section, key, said):
    """The command line refuses keys that a file lacks; this is of the file itself."""
    values = load_config(str(CONFIGS / "resunet30.py"), []).to_dict()
    (values[section] if section else values)[key] = 1
    with pytest.raises(UserError) as raised:
        separator_settings(ConfigDict(values))
    assert said in str(raised.value)


@pytest.mark.parametrize("draws", [-1, 10**9, 1.5, True, "2"])
def test_class_weights_have_a_range(draws):
    values = load_config(str(CONFIGS / "resunet30.py"), []).to_dict()
    values["data"]["class_weights"] = {"Dog": draws}
    with pytest.raises(UserError, match=r"class_weights\['Dog'\] is .*, expected a whole number"):
        separator_settings(ConfigDict(values))


@pytest.mark.parametrize(
    ("source", "speed", "read"),
    [
        ("device", None, 10.0),
        ("device", {"least": 0.7, "most": 1.4}, 10.0),
        ("table", None, 2.0),
        ("table", {"least": 0.7, "most": 1.4}, 2.8),
        ("table", {"least": 0.5, "most": 0.9}, 2.0),
        ("table", {"least": 1.0, "most": 8.0}, 10.0),
    ],
)
def test_as_much_is_read_as_an_anchor_at_another_speed_needs(source, speed, read):
    config = load_config(str(CONFIGS / "resunet30.py"), [])
    config.anchors.source, config.speed = source, ConfigDict(speed) if speed else None
    settings = separator_settings(config)
    assert settings.read_samples == round(read * settings.sample_rate)
