"""Runs that start from the parameters of a model."""

import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.tiny import (
    RATE,
    TAGGER,
    finish_run,
    parts_of_query,
    tagger_variables,
    train_words,
    write_place,
    write_separator,
    write_tagger,
)
from uss_jax.bundles.bundle import read_bundle, write_bundle
from uss_jax.bundles.nets import fields_of
from uss_jax.cli.main import main
from uss_jax.training import run, starting
from uss_jax.weights.torch import state_dict_of

QUICK_COMPILATION = True
pytestmark = pytest.mark.usefixtures("one_device")

ADAPTOR = {"query__kind": "embedding", "query__adaptor_width": 9, "query__adaptor_hidden": 7}
ADAPTOR["anchors__source"] = "random"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


def _start(place, workdir, location, config="resunet30.py", perturb=False, **changed):
    """Saves the first state, without training; returns the status and the workdir's variables.

    `perturb` adds 1e-3 to what trains of the query net, so that it is no fresh one.
    """

    def save(step, state, *_, checkpoints, position, **__):
        if perturb:
            query = jax.tree.map(lambda x: x + 1e-3, state.params["query"])
            state = state.replace(params={**state.params, "query": query})
        checkpoints.save(1, state.parts(), position(1))

    changed = {name.replace("__", "."): value for name, value in changed.items()}
    tagger = "tagger" in config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "fit", save)
        status = main(train_words(config, place, workdir, {"init_from": location, **changed}))
    if status:
        return status, None
    return status, read_bundle(workdir).variables("sed" if tagger else "separator")


def _flat(variables):
    return flatten_dict(variables["params"], sep="/")


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory):
    """A run of two steps that averages its parameters."""
    workdir = tmp_path_factory.mktemp("runs") / "first"
    finish_run("resunet30.py", place, workdir, {"ema_decay": 0.5})
    return workdir


@pytest.mark.long
def test_a_run_starts_from_another_ones_average(place, trained, tmp_path, capsys):
    status, variables = _start(place, tmp_path / "run", trained, ema_decay=0.5)
    assert status == 0
    said = capsys.readouterr().out
    arrays = len(jax.tree.leaves(read_bundle(trained).variables("separator")))
    assert f"starting from {trained}: {arrays} arrays taken\n" in said
    wanted = _flat(read_bundle(trained).variables("separator"))
    newest = _flat(read_bundle(trained, averaged=False).variables("separator"))
    for name, value in _flat(variables).items():
        np.testing.assert_array_equal(value, wanted[name])
    assert any((wanted[name] != newest[name]).any() for name in wanted)
    # Resuming does not start again, whatever has become of the model.
    words = {"init_from": tmp_path / "gone", "total_steps": 2, "ema_decay": 0.5}
    assert main(train_words("resunet30.py", place, tmp_path / "run", words)) == 0
    said = capsys.readouterr().out
    assert "resuming after step 1" in said
    assert f"init_from={words['init_from']} has no effect: this run started from {trained}" in said
    assert read_bundle(tmp_path / "run").config["training"]["init_from"] == str(trained)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]


@pytest.mark.long
def test_a_bundle_with_another_head_gives_the_rest(place, trained, tmp_path, capsys):
    wide = {"separator__channels": (4, 6), "separator__condition_norm": 8.0}
    assert _start(place, tmp_path / "run", trained, **wide)[0] == 1
    said = capsys.readouterr().err
    assert "separator.channels=[4, 4], not [4, 6]" in said
    assert "separator.condition_norm=0.0, not 8.0" in said
    status, variables = _start(place, tmp_path / "run", trained, init_partly=True, **wide)
    assert status == 0
    said = capsys.readouterr().out
    taken, new, left = (
        re.search(pattern, said)[1]
        for pattern in (r"(\d+) arrays taken", r"as new: (.*)", r"not taken: (.*)")
    )
    assert int(taken) > 10
    assert "separator/centre_block" in new
    assert "separator/centre_block" in left
    old, made = _flat(read_bundle(trained).variables("separator")), _flat(variables)
    equal = {name for name in made.keys() & old.keys() if np.array_equal(made[name], old[name])}
    assert "encoder_block1/conv_block1/conv1/kernel" in equal
    assert "encoder_block2/conv_block1/conv2/kernel" not in equal


@pytest.mark.long
def test_an_adaptor_is_taken_too(place, tmp_path, capsys):
    assert _start(place, tmp_path / "first", "", perturb=True, **ADAPTOR)[0] == 0
    assert _start(place, tmp_path / "run", tmp_path / "first", **ADAPTOR)[0] == 0
    first, again = (
        _flat(read_bundle(tmp_path / name).variables("adaptor")) for name in ("first", "run")
    )
    config = read_bundle(tmp_path / "run").config
    fresh = parts_of_query(config["query"], config["training"]["seed"])["adaptor"]
    fresh = flatten_dict(fresh, sep="/")
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
        np.testing.assert_allclose(value, fresh[name] + 1e-3, atol=1e-6)


@pytest.mark.long
def test_a_trained_query_net_is_taken_too(place, tmp_path):
    changed = {"anchors__source": "random", "query__finetune": True}
    # Frozen are the names of its classes alone.
    changed |= {**ADAPTOR, "query__kind": "text_or_audio", "query__one_class_share": 0.0}
    assert _start(place, tmp_path / "first", "", perturb=True, **changed)[0] == 0
    assert _start(place, tmp_path / "run", tmp_path / "first", **changed)[0] == 0
    first, again, given = (
        _flat(read_bundle(path).variables("query"))
        for path in (tmp_path / "first", tmp_path / "run", place / "tagger")
    )
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
    assert any((first[name] != given[name]).any() for name in first)


@pytest.mark.long
def test_a_tagger_starts_from_a_tagger(place, tmp_path, capsys):
    status, variables = _start(
        place, tmp_path / "run", place / "tagger", "tagger_cnn14.py", optimizer="adamw"
    )
    assert status == 0
    wanted = _flat(read_bundle(place / "tagger").variables("sed"))
    for name, value in _flat(variables).items():
        np.testing.assert_array_equal(value, wanted[name])


@pytest.mark.long
def test_a_tagger_starts_from_a_converted_checkpoint(place, tmp_path):
    """PANNs' Cnn14 becomes a query net alone, of their front end."""
    torch = pytest.importorskip("torch")
    tensors = state_dict_of("query", fields_of(TAGGER), tagger_variables(seed=4))
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    torch.save({"model": tensors}, tmp_path / "net.pth")
    words = ["convert", tmp_path / "net.pth", tmp_path / "bundle", "--kind", "cnn14"]
    assert main(list(map(str, words))) == 0
    assert not read_bundle(tmp_path / "bundle").holds("sed")
    status, variables = _start(
        *(place, tmp_path / "run", tmp_path / "bundle", "tagger_cnn14.py"),
        optimizer="adamw",
        init_partly=True,
    )
    assert status == 0
    for name, value in _flat(tagger_variables(seed=4)).items():
        np.testing.assert_array_equal(_flat(variables)[name], value)


@pytest.mark.long
def test_a_tagger_starts_from_one_of_other_classes_but_for_its_head(place, tmp_path, capsys):
    config = dict(read_bundle(place / "tagger").config)
    other = TAGGER.clone(classes=50)
    about = {"kind": "tagger", "sample_rate": RATE, "segment_seconds": config["segment_seconds"]}
    variables = tagger_variables(seed=4, net=other)
    about["sed"] = {"model": fields_of(other)}
    write_bundle(tmp_path / "fifty", about, {"sed": variables})
    words = (place, tmp_path / "run", tmp_path / "fifty", "tagger_cnn14.py")
    assert _start(*words, optimizer="adamw")[0] == 1
    assert "sed.model.classes=50, not 527" in capsys.readouterr().err
    status, made = _start(*words, optimizer="adamw", init_partly=True)
    assert status == 0
    said = capsys.readouterr().out
    assert "as new: tagger/fc_audioset (2 arrays)" in said
    assert "not taken: tagger/fc_audioset (2 arrays)" in said
    made = _flat(made)
    for name, value in _flat(variables).items():
        if "fc_audioset" in name:
            assert made[name].shape[-1] == 527
        else:
            np.testing.assert_array_equal(made[name], value)


def test_what_does_not_fit_is_said(place, tmp_path, capsys):
    bundle = write_separator(tmp_path / "bundle", "one_hot")
    config = dict(read_bundle(bundle).config)
    parts = {"separator": read_bundle(bundle).variables("separator")}
    del config["hashes"]
    faster = {**config, "sample_rate": 16000}
    write_bundle(tmp_path / "faster", faster, parts)
    fewer = {"params": dict(parts["separator"]["params"]), "batch_stats": {}}
    fewer["params"].pop("after_conv")
    write_bundle(tmp_path / "fewer", config, {"separator": fewer})
    diverged = jax.tree.map(np.copy, parts["separator"])
    diverged["params"]["after_conv"]["bias"][0] = np.nan
    write_bundle(tmp_path / "diverged", config, {"separator": diverged})
    for location, changed, said in (
        ("nothing", {}, "nothing"),
        (place / "tagger", {}, "tagger has no separator, from which a separator starts"),
        (bundle, {"query__kind": "soft"}, "query.kind=one_hot, not soft"),
        (bundle, {"separator__hop_samples": 32}, "separator.hop_samples=64, not 32"),
        (tmp_path / "faster", {}, "sample_rate=16000, not 8000"),
        (tmp_path / "fewer", {}, "no array of its shape for separator/after_conv, separator/bn0, "),
        (tmp_path / "fewer", {}, "and 3 more (28 arrays); take what fits"),
        (tmp_path / "diverged", {}, "diverged: separator/params/after_conv/bias has values that"),
    ):
        changed = {"anchors__source": "random", "query__kind": "one_hot", **changed}
        status, _ = _start(place, tmp_path / "run", location, **changed)
        assert status == 1
        assert said in capsys.readouterr().err
        assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_separator_of_other_conditions_is_said(place, tmp_path, capsys):
    bundle = write_separator(tmp_path / "bundle", "soft")  # with the tagger of `place`
    write_tagger(place / "other", seed=9)
    for changed, said in (
        ({"query__adaptor_width": 8}, "query.adaptor_width=0, not 8"),
        ({"query__kind": "embedding"}, "condition_width=527, not 6, query.kind=soft, not emb"),
        ({"query_bundle": place / "other"}, "this run: the arrays of its query net, so that"),
    ):
        status, _ = _start(place, tmp_path / "run", bundle, **changed)
        assert status == 1
        assert said in capsys.readouterr().err


def test_a_tagger_starts_from_yamnet_at_its_own_rate_and_hop():
    bundle = read_bundle("yamnet").at_sample_rate(32000)
    model = {**bundle.config["sed"]["model"], "sample_rate": 32000, "patch_hop_frames": 12}
    about = {**bundle.config, "sample_rate": 32000, "sed": {"model": model}}
    assert not list(starting._differences(bundle, about, {}))
    other = {**model, "channels": [*model["channels"][:-1], 512]}
    assert list(starting._differences(bundle, {**about, "sed": {"model": other}}, {}))
    # Of a query net, it changes the conditions.
    demo = read_bundle("demo")
    query = {**demo.config["query"], "model": {**demo.config["query"]["model"]}}
    query["model"]["patch_hop_frames"] = 12
    (said,) = starting._differences(demo, {**demo.config, "query": query}, {})
    assert said.startswith("query.model.patch_hop_frames=")


def test_a_tagger_starts_from_the_query_net_of_a_bundle_without_detector(tmp_path):
    model, variables = {"model": fields_of(TAGGER)}, tagger_variables()
    about = {"kind": "tagger", "sample_rate": RATE, "segment_seconds": 0.5, "sed": model}
    query_alone = {**about, "query": model}
    del query_alone["sed"]
    write_bundle(tmp_path / "alone", query_alone, {"query": variables})
    bundle = read_bundle(tmp_path / "alone")
    assert not list(starting._differences(bundle, about, {}))
    wider = {**about, "sed": {"model": {**model["model"], "mel_bins": 32}}}
    assert list(starting._differences(bundle, wider, {})) == ["sed.model.mel_bins=16, not 32"]
    found = starting._stored(bundle, {"tagger/fc1/kernel": None})["params"]
    for name, value in _flat(variables).items():
        np.testing.assert_array_equal(found.pop(f"tagger/{name}"), value)
    assert not found
