"""Every recipe, shrunk to two steps; and what is said of those that cannot run."""

import json

import jax
import numpy as np
import pytest

from tests.tiny import (
    RATE,
    SEGMENT,
    finish_run,
    noise,
    tagger_variables,
    tone,
    train_words,
    write_place,
    write_records,
    write_separator,
)
from uss_jax.bundles.bundle import read_bundle
from uss_jax.bundles.checkpoints import Checkpoints, save_tree
from uss_jax.cli.config import load_config
from uss_jax.cli.main import main
from uss_jax.models.query import QueryNet
from uss_jax.training import records as records_module
from uss_jax.training import train_separator
from uss_jax.training.condition_nets import ConditionNets
from uss_jax.training.settings import separator_settings

ADAPTOR = {"query.adaptor_width": 6, "query.adaptor_hidden": 8, "query.shortcut": True}
OPEN = {"anchors.source": "random", "query.kind": "one_hot"}  # needs no other net
EVERY_OTHER_WAY = OPEN | {
    "loss": "snr_threshold",
    "mixing.all_targets": True,
    "mixing.silent_share": 0.5,
    "mixing.group_size": 4,
    "global_batch": 16,
    "accumulate": 2,
    "batch_norm": "replica",
    "remat": True,
    "separator.dtype": "bfloat16",
    "sharding": (("kernel", "fsdp"),),
    "clip_norm": 0.5,
    "ema_decay": 0.5,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("train"))


def _leaves(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ("resunet30.py:condition=soft,data=balanced", {"query.finetune": True}),
        ("resunet30.py:condition=embedding,data=full", ADAPTOR),
        ("resunet30.py", {**OPEN, "mixing.sources": 3, "loss": "l1_wav_l1_sp"}),
        ("resunet30.py", EVERY_OTHER_WAY),
        (
            "quickstart.py:part=separator",
            {
                **{"anchors.source": "device", "sed_net": "cnn14", "query_net": "cnn14"},
                **{"data.order": "uniform", "separator.dtype": "bfloat16"},
            },
        ),
    ],
)
def test_separators_train_and_their_workdir_is_a_bundle(
    place, tmp_path, config, changed, quick_compilation
):
    model = finish_run(config, place, tmp_path / "run", changed)
    waveform, index = np.stack([tone(400, 0.5), noise(3, 0.5)]), np.array([1, 300], np.int32)
    condition = model.condition(waveform, index)
    estimate = model.separate(waveform[::-1].copy(), condition)
    assert estimate.shape == (2, SEGMENT)
    assert np.isfinite(estimate).all()
    assert not np.allclose(estimate[0], estimate[1])

    tagger = model.query.variables["params"].get("tagger")
    if "one_hot" in changed.values():
        assert tagger is None
        np.testing.assert_array_equal(condition.argmax(axis=1), index)
    else:
        moved = np.abs(_leaves(tagger) - _leaves(tagger_variables()["params"])).max()
        assert (moved > 0) == ("query.finetune" in changed)
        np.testing.assert_array_equal(_leaves(model.sed.variables), _leaves(tagger_variables()))
    assert ("adaptor" in model.query.variables["params"]) == ("query.shortcut" in changed)
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=None) as checkpoints:
        used = "ema" if "ema_decay" in changed else "params"
        assert ("ema" in checkpoints.items(2)) == (used == "ema")
        saved = checkpoints.read(2, used)["separator"]
        np.testing.assert_array_equal(_leaves(model.separator.variables["params"]), _leaves(saved))
    if "query.finetune" in changed:  # a run of before, without a checkpoint, had a frozen one
        save_tree(tmp_path / "run" / "frozen" / "query", tagger_variables(seed=9))
        found = read_bundle(tmp_path / "run").variables("query")["params"]
        np.testing.assert_array_equal(_leaves(found), _leaves(tagger))


def _records(path, **metadata):
    write_records(path, "train", [("a", tone(300, 1.0), [1]), ("b", noise(1, 1.0), [2])])
    (path / "metadata.json").write_text(
        json.dumps({"sample_rate": RATE, "encoding": "pcm_s16le", **metadata})
    )
    return path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data.records": ""}, "config.data.records is empty; give the folder"),
        ({"data.records": "nowhere"}, "nowhere cannot be read (No such file or directory)"),
        ({"data.split": "test"}, 'has no shards of split "test" (it has shards of "train")'),
        (
            {"data.clip_seconds": float("nan")},
            "config.data.clip_seconds: expected a number, not 'nan'",
        ),
        ({"data.share": 1e-6}, "config.data.share=1e-06 selects none of 8 clips; raise it"),
        ({"data.class_weights.Drumm": 3}, 'no sound class is called "Drumm"; did you mean "Drum"'),
        ({"mixing": None}, "config.mixing is None; give it a value (only speed, noise"),
        ({"eval.pairs": "nowhere"}, "nowhere holds no pairs; expected class_id=K"),
        ({"sample_rate": 16000}, "holds clips of 8000 Hz, config.sample_rate is 16000"),
        ({"sed_bundle": ""}, "config.sed_bundle is empty; give a tagger's bundle"),
        ({"sed_bundle": "nowhere"}, "nowhere is not a bundle or workdir"),
        ({"query_bundle": ""}, "config.query_bundle is empty; give a tagger's bundle"),
        ({"query_bundle": "ONE_HOT"}, "has no tagging net: its conditions are one_hot"),
        (
            {"data.class_weights": "{'Dog': 2, 'dog': 3}"},
            "has 'Dog' and 'dog', which are the same class",
        ),
        ({"schedule": "{'name': ['a']}"}, "config.schedule.name is a list of 1, expected a string"),
        (
            {"anchors.rule": "htsat"},
            "config.anchors.rule=htsat needs an HTS-AT as detector, but the detector is a Cnn14",
        ),
        ({"query.adaptor_width": 9, "query.shortcut": True}, "needs query.adaptor_width=527"),
        ({"query.shortcut": True}, "config.query.shortcut has no effect without an adaptor; set"),
        (
            {"query.kind": "one_hot", "query.finetune": True},
            "config.query.finetune has no effect with config.query.kind=one_hot",
        ),
        ({"schedule.name": "step"}, "config.schedule.name is 'step', expected constant_warm_up or"),
        (
            {"schedule.name": "cosine"},
            "cosine takes learning_rate, warm_up_steps, total_steps, not",
        ),
        (
            {"separator.dtype": "float8"},
            "separator.dtype is 'float8', expected float32, bfloat16",
        ),
        ({"separator.n_fft": 132}, "n_fft / 2 = 66 is not divisible by 2 ** 2 (levels)"),
        ({"separator.hop_samples": 65}, "hop_samples=65 is more than half of n_fft=128"),
    ],
)
def test_what_cannot_run_is_said_before_the_first_step(place, tmp_path, changed, said, capsys):
    if changed.get("query_bundle") == "ONE_HOT":
        changed = {"query_bundle": write_separator(tmp_path / "one_hot", "one_hot")}
    assert main(train_words("resunet30.py", place, tmp_path / "run", changed)) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("uss-jax: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("command", "config", "said"),
    [
        ("train-tagger", "quickstart", "config.optimizer is missing; give a tagger's config"),
        ("train", "tagger_htsat", "config.loss is missing; give a separator's config"),
    ],
)
def test_a_config_of_the_other_command_is_refused(tmp_path, capsys, command, config, said):
    assert main([command, "--config", config, "--workdir", str(tmp_path / "run")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_bundle_for_another_rate_or_without_the_part_is_refused(place, tmp_path, capsys):
    separator = write_separator(tmp_path / "s", "soft")
    content = json.loads((separator / "config.json").read_text())
    content["sample_rate"] = content["sed"]["model"]["sample_rate"] = 16000
    (separator / "config.json").write_text(json.dumps(content))
    words = train_words("resunet30.py", place, tmp_path / "run", {"sed_bundle": separator})
    assert main(words) == 1
    assert "config.sed_bundle is a net for 16000 Hz, config.sample_rate is 8000" in (
        capsys.readouterr().err
    )
    del content["sed"]
    (separator / "config.json").write_text(json.dumps(content))
    assert main(words) == 1
    assert "has no sed; it is a separator bundle" in capsys.readouterr().err


def test_a_workdir_that_is_a_file_is_refused(place, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(train_words("resunet30.py", place, workdir)) == 1
        assert f"--workdir {workdir} cannot be created" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def _flip_last_bytes(shard):
    data = bytearray(shard.read_bytes())
    data[-40:] = bytes(40)
    shard.write_bytes(data)


def _cut(shard):
    shard.write_bytes(shard.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "said"), [(_flip_last_bytes, "has a wrong checksum"), (_cut, "copy the shard again")]
)
def test_records_damaged_while_training_stop_it(tmp_path, place, monkeypatch, capsys, damage, said):
    records = _records(tmp_path / "records")

    def batches(*args, _read=records_module.batches, **kwargs):
        damage(next(records.glob("*.tfrecord-*")))
        return _read(*args, **kwargs)

    monkeypatch.setattr(records_module, "batches", batches)
    changed = {**OPEN, "data.records": records}
    assert main(train_words("resunet30.py", place, tmp_path / "run", changed)) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "toy-train.tfrecord-00000-of-00001" in error


@pytest.mark.parametrize(
    ("config", "changed", "said"),
    [
        ("resunet30", {}, []),
        (
            "resunet30",
            {"accumulate": 2},
            ["batch norms use the statistics of 16 items, not"],
        ),
        ("resunet30", {"accumulate": 2, "batch_norm": "replica"}, []),
        ("bandsplit", {"accumulate": 2}, []),
        ("bandsplit", {"batch_norm": "replica"}, ["config.batch_norm=replica has no effect: the "]),
    ],
)
def test_batch_norms_are_spoken_of_where_there_are_any(config, changed, said, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    words = [f"--config.{key}={value}" for key, value in (changed | {"global_batch": 32}).items()]
    settings = separator_settings(load_config(config, words))
    around = ConditionNets(None, False, QueryNet(None, "one_hot"), {}, {})
    separator = train_separator.build_separator(settings, around)
    remarks = list(train_separator._remarks(settings, separator, around, np.arange(3)))
    assert len(remarks) == len(said)
    for remark, start in zip(remarks, said, strict=True):
        assert remark.startswith(start)
