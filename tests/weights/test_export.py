import json
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tests.tiny import RATE, SEGMENT, class_means, write_separator
from uss_jax.bundles import tensors
from uss_jax.bundles.bundle import read_bundle, write_bundle
from uss_jax.bundles.checkpoints import Checkpoints, save_tree
from uss_jax.bundles.model import Model
from uss_jax.cli.inspection import inspect
from uss_jax.cli.main import main
from uss_jax.training.state import create_state
from uss_jax.weights import export

QUICK_COMPILATION = True


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_separator(tmp_path_factory.mktemp("bundle") / "soft", "soft")


def _export(bundle, form, out, *words):
    words = ["export", bundle, "--format", form, "--out", out, *words]
    return main([str(word) for word in words])


def _flat(bundle, part="separator"):
    return flatten_dict(read_bundle(bundle).variables(part), sep="/")


def test_safetensors_hold_every_tensor(bundle, tmp_path, capsys):
    assert _export(bundle, "safetensors", tmp_path / "out") == 0
    assert "differs from the model's by" in capsys.readouterr().out
    path = tmp_path / "out" / "model.safetensors"
    assert path.stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode
    stored = load_file(path)
    for part in ("separator", "query", "sed"):
        for name, array in _flat(bundle, part).items():
            np.testing.assert_array_equal(stored.pop(f"{part}/{name}"), array)
    assert not stored
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["separator"] == read_bundle(bundle).config["separator"]
    assert "Licence" in (tmp_path / "out" / "README.md").read_text()
    said = inspect(tmp_path / "out")
    assert said[0].endswith("separator bundle, 8000 Hz, segments of 0.5 s")
    assert any(line.endswith(config["hashes"]["sed"]) for line in said)


def test_orbax_in_bfloat16_is_a_bundle(bundle, tmp_path):
    assert _export(bundle, "orbax", tmp_path / "out", "--dtype", "bfloat16") == 0
    assert any("parameters in bfloat16" in line for line in inspect(tmp_path / "out"))
    assert not any("parameters in" in line for line in inspect(bundle))
    originals = _flat(bundle)
    for name, array in _flat(tmp_path / "out").items():
        original = originals[name]
        if name.startswith("params"):
            assert array.dtype == jax.numpy.bfloat16
            original = original.astype(jax.numpy.bfloat16)
        np.testing.assert_array_equal(array, original)
    mixture = np.random.default_rng(0).standard_normal((1, SEGMENT)).astype(np.float32)
    condition = np.full((1, 527), 0.1, np.float32)
    exact = np.asarray(Model(bundle).separate(mixture, condition))
    close = np.asarray(Model(tmp_path / "out").separate(mixture, condition))
    assert 0 < np.abs(exact - close).max() < 0.05 * np.abs(exact).max()  # 8 bits of mantissa


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_what_is_said_of_bfloat16_is_its_distance_from_the_model(bundle, tmp_path, capsys, form):
    assert _export(bundle, form, tmp_path / "out", "--dtype", "bfloat16") == 0
    said = re.search(r"differs from the model's by (\S+) of", capsys.readouterr().out)
    rng = np.random.default_rng(0)
    mixture = 0.1 * rng.standard_normal((2, SEGMENT)).astype(np.float32)
    condition = rng.uniform(size=(2, 527)).astype(np.float32)
    exact, rounded = (
        np.asarray(Model(path).separate(mixture, condition)) for path in (bundle, tmp_path / "out")
    )
    measured = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert float(said[1]) == pytest.approx(measured, rel=0.5)  # on other noise
    assert float(said[1]) > 1e-4


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_every_net_of_an_export_opens(tmp_path, form):
    """YAMNet has no batch statistics."""
    assert _export("demo", form, tmp_path / "out") == 0
    for part in ("separator", "query", "sed"):
        net, variables = getattr(read_bundle(tmp_path / "out"), part)()
        wanted_net, wanted = getattr(read_bundle("demo"), part)()
        assert net == wanted_net
        jax.tree.map(np.testing.assert_array_equal, variables, wanted)
    assert not any("cannot be used" in line for line in inspect(tmp_path / "out"))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("orbax", ["--dtype", "bfloat16", "--shards", "8"]),
        ("safetensors", []),
        ("stablehlo", []),
    ],
)
def test_means_of_classes_are_exported_as_they_are(tmp_path, form, words):
    means = class_means(3, 5)
    bundle = write_separator(tmp_path / "bundle", means=means)
    assert _export(bundle, form, tmp_path / "out", *words) == 0
    if form == "stablehlo":
        found = np.load(tmp_path / "out" / "class_conditions.npy")
        known = means.any(axis=1)
        np.testing.assert_allclose(found[known], Model(bundle).adapt(means[known]), atol=1e-6)
        assert np.isnan(found[~known]).all()
        return
    np.testing.assert_array_equal(read_bundle(tmp_path / "out").means(), means)
    said = inspect(tmp_path / "out")
    assert "asked for 2 classes with the mean of its training recordings" in said
    assert any(line.startswith("means: means, 2 classes, 277,729 parameters") for line in said)


def test_an_export_that_does_not_open_is_not_kept(bundle, tmp_path, monkeypatch, capsys):
    real = export.write_bundle

    def spoiled(path, config, parts, foreign):
        query = jax.tree.map(lambda x: np.full_like(x, np.nan), parts["query"])
        real(path, config, {**parts, "query": query}, foreign)

    monkeypatch.setattr(export, "write_bundle", spoiled)
    assert _export(bundle, "orbax", tmp_path / "out") == 1
    assert "values that are NaN or infinite" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["orbax", "safetensors", "stablehlo"])
def test_a_separator_alone_is_exported(bundle, tmp_path, form):
    source = read_bundle(bundle)
    config = {k: v for k, v in source.config.items() if k not in ("query", "sed", "hashes")}
    write_bundle(tmp_path / "alone", config, {"separator": source.variables("separator")})
    assert _export(tmp_path / "alone", form, tmp_path / "out") == 0
    said = (tmp_path / "out" / "README.md").read_text()
    assert ("its query net is gone" in said) == (form == "stablehlo")
    assert inspect(tmp_path / "out")


def test_a_full_disk_is_one_sentence(bundle, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    assert _export(bundle, "safetensors", tmp_path / "out") == 1
    assert "no space is left to write" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sharded_orbax_holds_the_same_in_pieces(bundle, tmp_path):
    assert _export(bundle, "orbax", tmp_path / "out", "--shards", "4") == 0
    for part in ("separator", "query", "sed"):
        stored = _flat(tmp_path / "out", part)
        for name, array in _flat(bundle, part).items():
            np.testing.assert_array_equal(stored[name], array)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(tmp_path / "out" / "separator").item_metadata.tree
    kernel = tree["params"]["encoder_block1"]["conv_block1"]["conv2"]["kernel"]
    assert kernel.shape == (3, 3, 4, 4)
    assert kernel.storage.write_shape == (3, 3, 1, 4)


def test_a_run_gives_its_average_or_its_last_parameters(bundle, tmp_path):
    run, source = tmp_path / "run", read_bundle(bundle)
    for part in ("query", "sed"):
        save_tree(run / "frozen" / part, source.variables(part))
    (run / "config.json").write_text((bundle / "config.json").read_text())
    params = {"separator": source.variables("separator")["params"]}
    stats = {"separator": source.variables("separator")["batch_stats"]}
    averaged = jax.tree.map(lambda x: x / 2, params)
    state = create_state(params, stats, optax.sgd(0.1), ema=True).replace(ema=averaged)
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(7, state.parts(), {})
    assert _export(run, "orbax", tmp_path / "last", "--parameters", "last") == 0
    name = "params/after_conv/kernel"
    expected = params["separator"]["after_conv"]["kernel"]
    np.testing.assert_array_equal(_flat(run)[name], expected / 2)
    np.testing.assert_array_equal(_flat(tmp_path / "last")[name], expected)
    assert json.loads((tmp_path / "last" / "config.json").read_text())["step"] == 7
    assert "checkpoints" not in [path.name for path in (tmp_path / "last").iterdir()]


def test_the_step_is_that_of_the_parameters_while_the_run_goes_on(tmp_path):
    run = tmp_path / "run"
    config = {"format_version": 1, "kind": "separator", "sample_rate": RATE, "segment_seconds": 0.5}
    run.mkdir()
    (run / "config.json").write_text(json.dumps({**config, "separator": {}}))
    state = create_state({"separator": {"a": np.ones(3, np.float32)}}, {}, optax.sgd(0.1))
    with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(7, state.parts(), {})
        checkpoints.wait()
        opened = read_bundle(run)
        assert opened.variables("separator")["params"]["a"].tolist() == [1, 1, 1]
        checkpoints.save(8, state.parts(), {})
    assert export._config(opened)["step"] == 7
    assert export._config(read_bundle(run))["step"] == 8


def test_stablehlo_runs_without_this_package(bundle, tmp_path):
    assert _export(bundle, "stablehlo", tmp_path / "out", "--window-seconds", "0.75") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "condition.stablehlo", "config.json", "separate.stablehlo"),
    ]
    rng = np.random.default_rng(3)
    recording = rng.standard_normal((3, SEGMENT)).astype(np.float32)
    mixture = rng.standard_normal((3, int(0.75 * RATE))).astype(np.float32)
    np.savez(tmp_path / "in.npz", recording=recording, mixture=mixture)
    program = (
        "import sys, numpy, jax\n"
        "folder = sys.argv[1]\n"
        "arrays = numpy.load(folder + '/in.npz')\n"
        "read = lambda n: jax.export.deserialize(bytearray(open(folder + n, 'rb').read()))\n"
        "condition = read('/out/condition.stablehlo').call(arrays['recording'])\n"
        "estimate = read('/out/separate.stablehlo').call(arrays['mixture'], condition)\n"
        "numpy.save(folder + '/out.npy', estimate)\n"
        "assert 'uss_jax' not in sys.modules\n"
    )
    # In isolation the repository is not on the path either.
    subprocess.run([sys.executable, "-I", "-c", program, str(tmp_path)], check=True)
    model = Model(bundle)
    condition = model.condition(recording, np.zeros(3, np.int32))
    expected = np.asarray(model.separate(mixture, condition))
    found = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_an_export_that_gives_something_else_is_not_kept(bundle, tmp_path, monkeypatch, capsys):
    real = export.read_tensors

    def spoiled(path):
        return {name: array * np.float32(1.1) for name, array in real(path).items()}

    monkeypatch.setattr(export, "read_tensors", spoiled)
    assert _export(bundle, "safetensors", tmp_path / "out") == 1
    assert "differs from the model by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said(bundle, tmp_path, capsys):
    assert _export(bundle, "orbax", bundle) == 1
    assert "already exists" in capsys.readouterr().err
    assert _export(bundle, "orbax", tmp_path / "out", "--shards", "99") == 1
    assert "JAX_NUM_CPU_DEVICES=99" in capsys.readouterr().err
    assert _export(bundle, "stablehlo", tmp_path / "out", "--dtype", "bfloat16") == 1
    assert "--dtype has no effect with stablehlo" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
