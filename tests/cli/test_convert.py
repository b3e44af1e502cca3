import hashlib
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.golden.weights import build_state_dict, fixed_buffer
from tests.weights.variables import (
    SEPARATOR_FIELDS,
    TAGGER_FIELDS,
    assert_same_tree,
    separator_variables,
    tagger_variables,
)
from uss_jax.audio.mel import mel_matrix
from uss_jax.bundles.bundle import read_bundle
from uss_jax.cli import convert
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.weights.lightning import LIGHTNING_PREFIXES
from uss_jax.weights.torch import state_dict_of

torch = pytest.importorskip("torch")

SMOOTH = "anchor_segment_detector.anchor_segment_scorer.smooth_filter"


def save(path, state_dict, key="model"):
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}
    torch.save({key: tensors}, path)
    return str(path)


def tagger_state_dict(seed, fields=TAGGER_FIELDS):
    return state_dict_of("query", fields, tagger_variables(fields, seed=seed))


def lightning_state_dict(condition_width=TAGGER_FIELDS["classes"]):
    fields = dict(SEPARATOR_FIELDS, condition_width=condition_width)
    parts = {
        "separator": (fields, separator_variables(fields)),
        "sed": (TAGGER_FIELDS, tagger_variables(seed=1)),
        "query": (TAGGER_FIELDS, tagger_variables(seed=2)),
    }
    state_dict = {SMOOTH: np.full((1, 1, 201), 1 / 201, np.float32)}
    for part, (fields, variables) in parts.items():
        state_dict |= state_dict_of(part, fields, variables, LIGHTNING_PREFIXES[part])
    state_dict["ss_model.base.bn0.num_batches_tracked"] = np.array(7)
    return state_dict


def run(*words):
    return main(["convert", *map(str, words)])


def test_uss_checkpoint_becomes_a_separator_bundle(tmp_path):
    source = save(tmp_path / "uss.ckpt", lightning_state_dict(), "state_dict")
    out = tmp_path / "bundle"
    assert run(source, out) == 0
    bundle = read_bundle(out)
    assert bundle.config["kind"] == "separator"
    assert bundle.config["sample_rate"] == 32000
    assert bundle.config["segment_seconds"] == 2.0
    assert "source" in bundle.config["licence"]
    net, variables = bundle.separator()
    assert net.channels == SEPARATOR_FIELDS["channels"]
    assert_same_tree(variables, separator_variables())
    assert_same_tree(bundle.sed()[1], tagger_variables(seed=1))
    assert_same_tree(bundle.variables("query"), tagger_variables(seed=2))
    assert bundle.query()[0].kind == "soft"
    foreign = load_file(out / "foreign.safetensors")
    np.testing.assert_array_equal(foreign[f"sed/{SMOOTH}"], np.full((1, 1, 201), 1 / 201, "f4"))
    assert foreign["separator/ss_model.base.bn0.num_batches_tracked"] == 7


def test_a_condition_as_wide_as_the_embedding_is_the_embedding(tmp_path):
    source = save(
        tmp_path / "uss.ckpt", lightning_state_dict(TAGGER_FIELDS["channels"][-1]), "state_dict"
    )
    assert run(source, tmp_path / "bundle") == 0
    assert read_bundle(tmp_path / "bundle").query()[0].kind == "embedding"


def test_a_condition_of_another_query_net_is_refused(tmp_path, capsys):
    source = save(tmp_path / "uss.ckpt", lightning_state_dict(9), "state_dict")
    assert run(source, tmp_path / "bundle") == 1
    assert "condition of width 9" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_published_panns_names_become_query_and_detector_of_one_bundle(tmp_path):
    tagging = save(tmp_path / "Cnn14_mAP=0.431.pth", tagger_state_dict(1))
    detector = save(tmp_path / "Cnn14_DecisionLevelMax_mAP=0.385.pth", tagger_state_dict(2))
    assert run(tagging, detector, tmp_path / "panns") == 0
    bundle = read_bundle(tmp_path / "panns")
    assert bundle.config["kind"] == "tagger"
    # Files of these names are not the published ones.
    assert "unknown: see the source of Cnn14_mAP=0.431.pth (MD5 " in bundle.config["licence"]
    assert "CC BY 4.0" not in bundle.config["licence"]
    assert_same_tree(bundle.variables("query"), tagger_variables(seed=1))
    assert_same_tree(bundle.sed()[1], tagger_variables(seed=2))


@pytest.mark.parametrize(("kind", "part"), [("cnn14", "query"), ("decision-level-max", "sed")])
def test_kind_says_what_a_file_with_its_own_name_is(tmp_path, kind, part):
    source = save(tmp_path / "mine.pth", tagger_state_dict(1))
    assert run(source, tmp_path / "bundle", "--kind", kind) == 0
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert {"query", "sed"} & config.keys() == {part}
    assert config[part]["model"]["channels"] == list(TAGGER_FIELDS["channels"])


def test_a_separator_alone_becomes_a_bundle(tmp_path):
    source = save(
        tmp_path / "separator.pth",
        state_dict_of("separator", SEPARATOR_FIELDS, separator_variables()),
    )
    assert run(source, tmp_path / "bundle") == 0
    assert_same_tree(read_bundle(tmp_path / "bundle").separator()[1], separator_variables())


def test_the_licence_of_a_published_file_is_known_by_its_hash(tmp_path, monkeypatch):
    source = save(tmp_path / "mine.pth", tagger_state_dict(1))
    digest = hashlib.md5(pathlib.Path(source).read_bytes()).hexdigest()
    monkeypatch.setitem(convert._LICENCES, digest, "CC BY 4.0")
    assert run(source, tmp_path / "bundle", "--kind", "cnn14") == 0
    assert read_bundle(tmp_path / "bundle").config["licence"] == "CC BY 4.0"


def test_a_tagging_net_of_other_classes_is_for_runs_to_start_from(tmp_path, capsys):
    fields = {**TAGGER_FIELDS, "classes": 50}
    source = save(tmp_path / "net.pth", tagger_state_dict(1, fields))
    assert run(source, tmp_path / "bundle", "--kind", "decision-level-max") == 0
    assert "sed has 50 classes, not AudioSet's 527: a run can start" in capsys.readouterr().out
    bundle = read_bundle(tmp_path / "bundle")
    assert_same_tree(bundle.variables("sed"), tagger_variables(fields, seed=1))
    with pytest.raises(UserError, match=r"sed\.model has 50 classes; "):
        bundle.sed()
    assert main(["inspect", str(tmp_path / "bundle")]) == 0


def test_a_separator_with_a_net_of_other_classes_is_refused(tmp_path, capsys):
    fields = {**TAGGER_FIELDS, "classes": 50}
    tensors = lightning_state_dict(50)
    for part in ("sed", "query"):
        prefix = LIGHTNING_PREFIXES[part]
        tensors |= state_dict_of(part, fields, tagger_variables(fields, seed=1), prefix)
    source = save(tmp_path / "uss.ckpt", tensors, "state_dict")
    assert run(source, tmp_path / "bundle") == 1
    assert "has 50 classes; " in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_kind_has_no_effect_on_a_bundle(tmp_path, capsys):
    assert run(tmp_path, tmp_path / "back.ckpt", "--kind", "uss") == 1
    assert "--kind has no effect" in capsys.readouterr().err


def test_a_tagging_net_of_unknown_kind_is_asked_for(tmp_path, capsys):
    source = save(tmp_path / "mine.pth", tagger_state_dict(1))
    assert run(source, tmp_path / "bundle") == 1
    assert "--kind cnn14 or --kind decision-level-max" in capsys.readouterr().err


def test_two_nets_of_one_kind_are_refused(tmp_path, capsys):
    source = save(tmp_path / "mine.pth", tagger_state_dict(1))
    kinds = ("--kind", "cnn14") * 2
    assert run(source, source, tmp_path / "bundle", *kinds) == 1
    assert "second query net" in capsys.readouterr().err


def test_errors_name_the_file_and_leave_nothing(tmp_path, capsys):
    state_dict = tagger_state_dict(1)
    del state_dict["fc1.bias"]
    source = save(tmp_path / "mine.pth", state_dict)
    assert run(source, tmp_path / "bundle", "--kind", "cnn14") == 1
    error = capsys.readouterr().err
    assert "mine.pth: " in error
    assert "fc1.bias is missing" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.pth"]


def test_an_existing_folder_is_not_written_into(tmp_path, capsys):
    source = save(tmp_path / "mine.pth", tagger_state_dict(1))
    assert run(source, tmp_path, "--kind", "cnn14") == 1
    assert "exists already" in capsys.readouterr().err


def whole_state_dict():
    """As `lightning_state_dict`, with the tensors that have no counterpart here."""
    whole = lightning_state_dict()
    for name in list(whole):
        if name.endswith("running_mean"):
            whole[name.replace("running_mean", "num_batches_tracked")] = np.array(5)
    for prefix in ("query_net.base.", "anchor_segment_detector.sed_model."):
        kernel = fixed_buffer((513, 1, 1024), "stft_real")
        whole[f"{prefix}spectrogram_extractor.stft.conv_real.weight"] = kernel
        whole[f"{prefix}spectrogram_extractor.stft.conv_imag.weight"] = kernel + 1
        front_end = ("sample_rate", "n_fft", "mel_bins", "f_min", "f_max")
        melw = mel_matrix(**{name: TAGGER_FIELDS[name] for name in front_end})
        whole[f"{prefix}logmel_extractor.melW"] = melw.astype(np.float32)
    n_fft = SEPARATOR_FIELDS["n_fft"]
    real = fixed_buffer((n_fft // 2 + 1, 1, n_fft), "stft_real")
    whole["ss_model.base.stft.conv_real.weight"] = real
    for at, name in enumerate(("stft.conv_imag", "istft.conv_real", "istft.conv_imag")):
        whole[f"ss_model.base.{name}.weight"] = real + at
    whole["ss_model.base.istft.ola_window"] = np.ones(n_fft, np.float32)
    for i in range(1, len(SEPARATOR_FIELDS["channels"]) + 1):
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            whole[f"ss_model.base.decoder_block{i}.bn2.{leaf}"] = np.full(3, i, np.float32)
        for leaf in ("weight", "bias"):
            whole[f"ss_model.film.decoder_block{i}->beta2.{leaf}"] = np.full(2, i, np.float32)
    return whole


def test_a_bundle_of_a_uss_checkpoint_becomes_the_same_checkpoint(tmp_path):
    state_dict = whole_state_dict()
    source = save(tmp_path / "uss.ckpt", state_dict, "state_dict")
    assert run(source, tmp_path / "bundle") == 0
    assert run(tmp_path / "bundle", tmp_path / "back.ckpt") == 0
    content = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert {"epoch", "global_step", "pytorch-lightning_version"} < content.keys()
    back = content["state_dict"]
    assert back.keys() == state_dict.keys()
    for name, array in state_dict.items():
        assert back[name].numpy().tobytes() == np.array(array).tobytes(), name
        assert tuple(back[name].shape) == np.shape(array)


def test_bundles_that_cannot_be_whole_again_are_refused(tmp_path, capsys):
    state_dict = whole_state_dict()
    source = save(tmp_path / "uss.ckpt", state_dict, "state_dict")
    assert run(source, tmp_path / "bundle") == 0
    assert run(tmp_path / "bundle", tmp_path / "back") == 1
    assert "does not end in .ckpt" in capsys.readouterr().err
    kept = load_file(tmp_path / "bundle" / "foreign.safetensors")
    kept.pop("query/query_net.base.logmel_extractor.melW")
    save_file(kept, tmp_path / "bundle" / "foreign.safetensors")
    assert run(tmp_path / "bundle", tmp_path / "back.ckpt") == 1
    assert (
        "lacks query_net.base.logmel_extractor.melW (1 missing tensor in all)"
        in capsys.readouterr().err
    )
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert config["separator"].setdefault("net", "resunet") == "resunet"  # as training writes it
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(config))
    assert run(tmp_path / "bundle", tmp_path / "back.ckpt") == 1
    assert "lacks query_net" in capsys.readouterr().err  # and not: has a resunet
    (tmp_path / "bundle" / "foreign.safetensors").unlink()
    assert run(tmp_path / "bundle", tmp_path / "back.ckpt") == 1
    assert "has no foreign.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "back.ckpt").exists()


@pytest.mark.long
def test_the_golden_checkpoint_comes_back_bit_by_bit(tmp_path):
    state_dict = build_state_dict("lit_separation_cond2048")
    assert len(state_dict) == 501
    source = save(tmp_path / "uss.ckpt", state_dict, "state_dict")
    assert run(source, tmp_path / "bundle") == 0
    assert run(tmp_path / "bundle", tmp_path / "back.ckpt") == 0
    back = torch.load(tmp_path / "back.ckpt", weights_only=True, mmap=True)["state_dict"]
    assert back.keys() == state_dict.keys()
    for name, array in state_dict.items():
        assert back[name].shape == array.shape, name  # counters have none
        assert back[name].numpy().tobytes() == array.tobytes(), name
