"""Bundles of the package: by name, whole, small, and under a licence that is told."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests.tiny import random_variables, write_separator, write_tagger
from uss_jax.bundles.bundle import read_bundle, write_bundle
from uss_jax.bundles.model import Model
from uss_jax.bundles.nets import fields_of
from uss_jax.bundles.packaged import PACKAGED
from uss_jax.bundles.tensors import PARTS_FILE, read_parts, write_tensors
from uss_jax.cli.inspection import inspect
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.models.resunet import ResUNet
from uss_jax.weights.export import export

QUICK_COMPILATION = True

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("name", PACKAGED)
def test_it_opens_by_name_and_matches_its_hashes(name):
    bundle = read_bundle(name)
    for part in bundle.config["hashes"]:
        variables = bundle.variables(part)  # verified
        assert all(leaf.dtype == np.float32 for leaf in _leaves(variables))
    assert inspect(name)[0].startswith(str(PACKAGED[name]))


@pytest.mark.parametrize("name", PACKAGED)
def test_notice_tells_licence_origin_and_checksum(name):
    file = PACKAGED[name] / PARTS_FILE
    assert file.stat().st_size <= 8e6
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    about = notice.partition(f"uss_jax/assets/{PACKAGED[name].name}/\n")[2]
    assert hashlib.sha256(file.read_bytes()).hexdigest() in about
    assert read_bundle(name).config["licence"] in about


def test_a_folder_of_the_same_name_is_opened_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tagger("yamnet")
    with pytest.raises(UserError, match=r"write \./yamnet for the latter"):
        read_bundle("yamnet")
    for path in ("./yamnet", pathlib.Path("yamnet")):
        assert read_bundle(path).config["sed"]["model"]["net"] == "cnn14"
    assert "sed: cnn14" in "\n".join(inspect("./yamnet"))
    shutil.rmtree("yamnet")
    pathlib.Path("yamnet").mkdir()  # of something else
    assert read_bundle("yamnet").config["sed"]["model"]["net"] == "yamnet"


def test_a_net_that_resamples_serves_any_rate_and_another_its_own(tmp_path):
    bundle = read_bundle("yamnet").at_sample_rate(32000)
    assert bundle.config["sample_rate"] == 32000
    assert bundle.sed()[0].sample_rate == bundle.query()[0].tagger.sample_rate == 32000
    other = read_bundle(write_tagger(tmp_path / "tagger"))
    assert other.at_sample_rate(32000) is other


def test_an_export_as_safetensors_is_a_bundle(tmp_path):
    whole = read_bundle(write_separator(tmp_path / "model"))
    export(whole, "safetensors", tmp_path / "export")
    opened = read_bundle(tmp_path / "export")
    for part in ("separator", "query", "sed"):
        found, wanted = opened.variables(part), whole.variables(part)
        for a, b in zip(_leaves(found), _leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b)
    assert opened.separator()[0] == whole.separator()[0]


@pytest.fixture(scope="module")
def on_yamnet(tmp_path_factory):
    """A separator with YAMNet as query net and detector."""
    yamnet = read_bundle("yamnet")
    separator = ResUNet(n_fft=128, hop_samples=64, channels=(4, 4), condition_width=1024)
    inputs = (1, 1, separator.grid_samples), (1, separator.condition_width)
    parts = {part: yamnet.variables(part) for part in ("query", "sed")}
    parts["separator"] = random_variables(separator, *inputs)
    sections = {"query": {"kind": "class_vectors", **yamnet.config["query"]}}
    config = {**yamnet.config, "kind": "separator", "separator": fields_of(separator), **sections}
    path = tmp_path_factory.mktemp("on_yamnet") / "model"
    write_bundle(path, config, parts)
    return path


def test_nets_of_the_package_can_be_left_out_of_an_export(on_yamnet, tmp_path):
    words = ["--format", "safetensors", "--without-packaged", "--out", tmp_path / "export"]
    assert main([str(word) for word in ["export", on_yamnet, *words]]) == 0
    assert set(read_parts(tmp_path / "export" / PARTS_FILE)) == {"separator"}
    assert (tmp_path / "export" / PARTS_FILE).stat().st_size < 1e6
    opened, whole = Model(tmp_path / "export"), Model(on_yamnet)
    assert opened.query_hash == whole.query_hash
    sound = 0.1 * np.random.default_rng(0).standard_normal((1, 32000)).astype(np.float32)
    conditions = [model.condition(sound, np.zeros(1, np.int32)) for model in (opened, whole)]
    np.testing.assert_array_equal(*conditions)
    found, wanted = (model.sed(sound)["framewise"] for model in (opened, whole))
    np.testing.assert_array_equal(found, wanted)


def test_an_export_whose_net_the_package_does_not_have_is_refused(on_yamnet, tmp_path):
    export(read_bundle(on_yamnet), "safetensors", tmp_path / "export", without_packaged=True)
    file = tmp_path / "export" / "config.json"
    config = json.loads(file.read_text())
    config["hashes"]["query"] = "0" * 64
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="was exported without its query"):
        Model(tmp_path / "export").query_hash  # noqa: B018


def test_nets_are_left_out_of_safetensors_only(on_yamnet, tmp_path, capsys):
    words = ["--format", "orbax", "--without-packaged", "--out", tmp_path / "export"]
    assert main([str(word) for word in ["export", on_yamnet, *words]]) == 1
    assert "--without-packaged has no effect" in capsys.readouterr().err


def test_a_changed_tensor_is_refused(tmp_path):
    shutil.copytree(PACKAGED["yamnet"], tmp_path / "copy")
    file = tmp_path / "copy" / PARTS_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"do not match the hash of sed in config\.json"):
        read_bundle(tmp_path / "copy").sed()


def test_whole_numbers_with_a_scale_are_read_as_their_product(tmp_path):
    steps = np.array([[-128, 0], [3, 127]], np.int8)
    scale = np.array([0.5, 2.0], np.float32)
    tensors = {"sed/params/a/kernel": steps, "sed/params/a/kernel.scale": scale}
    write_tensors(tmp_path / "t.safetensors", tensors)
    kernel = read_parts(tmp_path / "t.safetensors")["sed"]["params"]["a"]["kernel"]
    np.testing.assert_array_equal(kernel, np.float32([[-64, 0], [1.5, 254]]))
    assert kernel.dtype == np.float32


_ONE = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a/params/b": _ONE, "a/params/b/c": _ONE},
        {"a/params/b": np.zeros((2, 3), np.int8), "a/params/b.scale": np.zeros(4, np.float32)},
        {"a": _ONE},
        {"a/params": _ONE},
        {"a/foo/b": _ONE},
        {"a/params/b": np.zeros(1, np.int8)},
        {"a/params/b.scale": _ONE},
    ],
)
def test_tensors_that_make_no_tree_are_refused(tmp_path, tensors):
    write_tensors(tmp_path / "t.safetensors", tensors)
    with pytest.raises(UserError, match="holds tensors that are no parts of a model"):
        read_parts(tmp_path / "t.safetensors")


def _leaves(tree):
    return jax.tree.leaves(tree)
