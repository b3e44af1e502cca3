"""Every recipe, shrunk to two steps; and what is said of those that cannot run."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import (
    CONFIGS,
    RATE,
    SEGMENT,
    noise,
    tagger_variables,
    tone,
    train_words,
    write_place,
    write_records,
    write_separator,
)
from uss_jax.bundles.checkpoints import Checkpoints
from uss_jax.bundles.model import Model
from uss_jax.bundles.nets import layout
from uss_jax.cli.main import main
from uss_jax.models.resunet import ResUNet
from uss_jax.training import records as records_module
from uss_jax.training.state import parameter_count

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


def _train(config, place, workdir, changed):
    changed = {"total_steps": 2, **changed}
    assert main(train_words(config, place, workdir, changed)) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["grad_norm"] > 0
    return Model(workdir)


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
        ("quickstart.py:part=separator", {"data.order": "uniform", "separator.dtype": "bfloat16"}),
    ],
)
def test_separators_train_and_their_workdir_is_a_bundle(
    place, tmp_path, config, changed, quick_compilation
):
    model = _train(config, place, tmp_path / "run", changed)
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "changed"),
    [
        ("tagger_cnn14.py", {}),
        ("quickstart.py:part=tagger", {"tagger.dtype": "bfloat16"}),
    ],
)
def test_taggers_train_and_their_workdir_is_a_bundle_of_both_nets(
    place, tmp_path, config, changed, quick_compilation
):
    model = _train(config, place, tmp_path / "run", changed)
    waveform = jnp.stack([tone(400, 1.0), noise(3, 1.0)])
    tagged, detected = model.tagger(waveform), model.sed(waveform)
    assert tagged["clipwise"].shape == (2, 527)
    np.testing.assert_allclose(tagged["clipwise"], detected["tagging"], atol=1e-6)
    assert detected["framewise"].shape == (2, 101, 527)


@pytest.mark.long
def test_a_tagger_s_run_of_before_its_newer_keys_goes_on(
    place, tmp_path, monkeypatch, quick_compilation
):
    # Without them: momentum 0.01, no clipping, as runs were when configs did not have them.
    text = (CONFIGS / "tagger_cnn14.py").read_text()
    older = [line for line in text.splitlines() if not re.search("norm_momentum|clip_norm", line)]
    (tmp_path / "tagger_cnn14.py").write_text("\n".join(older))
    words = ("tagger_cnn14.py", place)
    with monkeypatch.context() as patch:
        patch.setattr("tests.tiny.CONFIGS", tmp_path)
        assert main(train_words(*words, tmp_path / "run", {"total_steps": 1})) == 0
    assert main(train_words(*words, tmp_path / "new", {"total_steps": 1})) == 0
    means = [
        Model(tmp_path / name).sed.variables["batch_stats"]["bn0"]["mean"]
        for name in ("run", "new")
    ]
    np.testing.assert_allclose(10 * means[0], means[1], rtol=1e-5)
    _train(*words, tmp_path / "run", {"total_steps": 2, "clip_norm": 1.0})


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
        ({"data.order": "random"}, "config.data.order is 'random', expected balanced or uniform"),
        ({"data.clip_seconds": 0.2}, "config.segment_seconds=0.5 is longer than"),
        (
            {"data.clip_seconds": float("nan")},
            "config.data.clip_seconds: expected a number, not 'nan'",
        ),
        ({"data.clip_seconds": 1e9}, "clip_seconds is 1000000000.0, expected a number from 0.01"),
        ({"data.threads": 0}, "config.data.threads is 0, expected a whole number from 1 to 256"),
        ({"data.workers": -1}, "config.data.workers is -1, expected a whole number from 0 to"),
        ({"data.max_corrupt": -1}, "config.data.max_corrupt is -1, expected a whole number"),
        ({"data.share": 0.0}, "config.data.share is 0.0, expected above 0 and at most 1"),
        ({"data.share": 1e-6}, "config.data.share=1e-06 selects none of 8 clips; raise it"),
        ({"data.class_weights.Drumm": 3}, 'no sound class is called "Drumm"; did you mean "Drum"'),
        ({"data.class_weights.Drum": "many"}, "class_weights['Drum'] is 'many', expected"),
        ({"speed.least": 0.5}, "config.speed has no key 'config.speed.most'"),
        ({"speed": {"least": 2.0, "most": 1.0}}, "config.speed.least=2.0 is above config.speed.mo"),
        ({"speed": {"slow": 1.0}}, "config.speed has no key 'config.speed.least'"),
        ({"speed": "fast"}, "config.speed is 'fast', expected an object with"),
        ({"mixing": None}, "config.mixing is None; give it a value (only speed, noise"),
        ({"anchors.min_dbfs": None}, "config.anchors.min_dbfs is None; give it a value"),
        ({"profile.steps": (3, 2)}, "config.profile.steps is (3, 2), expected (first, last)"),
        ({"profile.steps": "a,b"}, "config.profile.steps is ('a', 'b'), expected (first, last)"),
        ({"eval.pairs": "nowhere"}, "nowhere holds no pairs; expected class_id=K"),
        ({"sample_rate": 16000}, "holds clips of 8000 Hz, config.sample_rate is 16000"),
        ({"sed_bundle": ""}, "config.sed_bundle is empty; give a tagger's bundle"),
        ({"sed_bundle": "nowhere"}, "nowhere is not a bundle or workdir"),
        ({"query_bundle": ""}, "config.query_bundle is empty; give a tagger's bundle"),
        ({"query_bundle": "ONE_HOT"}, "has no tagging net: its conditions are one_hot"),
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
        (
            {"data.class_weights": "{'Dog': 2, 'dog': 3}"},
            "has 'Dog' and 'dog', which are the same class",
        ),
        ({"schedule": "{'name': ['a']}"}, "config.schedule.name is a list of 1, expected a string"),
        ({"log_every_steps": 0}, "config.log_every_steps is 0, expected a whole number from 1"),
        ({"loss": "l2"}, "config.loss is 'l2', expected l1_wav or l1_wav_l1_sp"),
        (
            {"anchors.source": "shelf"},
            "config.anchors.source is 'shelf', expected device or table",
        ),
        ({"anchors.rule": "dice"}, "config.anchors.rule is 'dice', expected uss or htsat"),
        (
            {"anchors.rule": "htsat"},
            "config.anchors.rule=htsat needs an HTS-AT as detector, but the detector is a Cnn14",
        ),
        (
            {"anchors.rule": "htsat", "anchors.source": "random"},
            "config.anchors.rule=htsat has no effect with config.anchors.source=random",
        ),
        ({"query.kind": "words"}, "config.query.kind is 'words', expected one_hot or soft or"),
        ({"query.adaptor_width": 9, "query.shortcut": True}, "needs query.adaptor_width=527"),
        ({"schedule.name": "step"}, "config.schedule.name is 'step', expected constant_warm_up or"),
        (
            {"schedule.name": "cosine"},
            "cosine takes learning_rate, warm_up_steps, total_steps, not",
        ),
        (
            {"separator.dtype": "float8"},
            "separator.dtype is 'float8', expected float32, bfloat16",
        ),
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
        ({"separator.n_fft": 100}, "n_fft / 2 = 50 is not divisible by 2 ** 2 (levels)"),
        ({"separator.audio_channels": 2}, "config.separator.audio_channels is 2, expected 1"),
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
    ("changed", "said"),
    [
        ({"outputs": ("tags",)}, "config.outputs is ('tags',), expected one or more of"),
        ({"outputs": ()}, "config.outputs is (), expected one or more of"),
        ({"tagger.dtype": "int8"}, "sed.model.dtype is 'int8', expected float32, bfloat16"),
        ({"schedule.name": "none"}, "config.schedule.name is 'none'"),
        ({"schedule": {"learning_rate": 0.1}}, "config.schedule has no key 'config.schedule.name'"),
        (
            {"schedule": {"name": "cosine"}},
            "cosine takes learning_rate, warm_up_steps, total_steps",
        ),
        ({"mixup_alpha": 0}, "config.mixup_alpha is 0.0, expected a number from 0.001 to 1000"),
        ({"spec_augment.time_width": 0}, "config.spec_augment.time_width is 0, expected a whole"),
        ({"tagger.classes": 50}, "config.tagger has 50 classes"),
        ({"clip_norm": -1.0}, "config.clip_norm is -1.0, expected a number from 0 to"),
        ({"norm_momentum": 0.0}, "config.norm_momentum is 0.0, expected above 0"),
    ],
)
def test_what_cannot_run_of_a_tagger_is_said_too(place, tmp_path, changed, said, capsys):
    assert main(train_words("tagger_cnn14.py", place, tmp_path / "run", changed)) == 1
    assert said in capsys.readouterr().err


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


@pytest.mark.long
def test_a_dry_run_says_what_a_run_would_need_and_writes_nothing(
    place, tmp_path, capsys, quick_compilation
):
    changed = {"data.records": "", "sed_bundle": place / "tagger", "query_bundle": place / "tagger"}
    words = train_words("resunet30.py", place, tmp_path / "run", changed)
    del words[words.index("--workdir") : words.index("--workdir") + 2]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    separator = parameter_count(
        layout(ResUNet(n_fft=128, hop_samples=64, channels=(4, 4)))["params"]
    )
    tagger = parameter_count(tagger_variables()["params"])
    for part in (
        "mesh: 8 x cpu along data",
        f"{separator / 1e6:.2f} M trained, {2 * tagger / 1e6:.2f} M frozen",
        "8 items, 1 per device",
        "no upper bound on the speed: the peak FLOP/s of cpu is not known (devices/cost.py lists",
    ):
        assert part in said
    assert re.search(r"memory per device: 0\.\d+ GB", said)
    (read,) = re.findall("input: (.*) MB per step", said)
    assert float(read) == pytest.approx(8 * (2 * RATE + 3 * 4 + 2) / 1e6, rel=1e-3)
    assert not (tmp_path / "run").exists()

    assert main(words) == 1
    assert "--workdir is missing" in capsys.readouterr().err
