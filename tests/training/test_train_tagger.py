"""Every recipe of a tagger, shrunk to two steps; and what is said of those that cannot run."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import CONFIGS, finish_run, noise, tone, train_words, write_place
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("train"))


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
    model = finish_run(config, place, tmp_path / "run", changed)
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
    finish_run(*words, tmp_path / "run", {"total_steps": 2, "clip_norm": 1.0})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"outputs": ("tags",)}, "config.outputs is ('tags',), expected one or more of"),
        ({"outputs": ()}, "config.outputs is (), expected one or more of"),
        ({"tagger.dtype": "int8"}, "config.tagger.dtype is 'int8', expected float32, bfloat16"),
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


def test_fields_that_do_not_fit_each_other_are_said(tmp_path, capsys):
    words = ["train-tagger", "--config", "tagger_htsat", "--workdir", str(tmp_path / "run")]
    assert main([*words, "--config.tagger.mel_bins=15"]) == 1
    assert "uss-jax: the fields of HTSAT are inconsistent: " in capsys.readouterr().err
