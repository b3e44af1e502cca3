import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.weights.test_torch import (
    SEPARATOR_FIELDS,
    TAGGER_FIELDS,
    assert_same_tree,
    separator_variables,
    tagger_variables,
)
from uss_jax.cli.main import main
from uss_jax.training.bundle import read_bundle
from uss_jax.weights.torch import LIGHTNING_PREFIXES, state_dict_of

torch = pytest.importorskip("torch")

SMOOTH = "anchor_segment_detector.anchor_segment_scorer.smooth_filter"


def save(path, state_dict, key="model"):
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in state_dict.items()}
    torch.save({key: tensors}, path)
    return str(path)


def tagger_state_dict(seed):
    return state_dict_of("query", TAGGER_FIELDS, tagger_variables(seed=seed))


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
    assert "CC BY 4.0" in bundle.config["licence"]
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
