import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.tiny import (
    RATE,
    TAGGER,
    TINY_YAMNET,
    WIDTHS,
    random_variables,
    tagger_variables,
    write_separator,
    write_tagger,
)
from uss_jax.bundles.bundle import net_hash, read_bundle, write_bundle
from uss_jax.bundles.checkpoints import Checkpoints, save_tree
from uss_jax.bundles.model import Model
from uss_jax.bundles.nets import fields_of
from uss_jax.errors import UserError
from uss_jax.models.query import KINDS
from uss_jax.models.resunet import ResUNet

ABOUT = {"kind": "tagger", "sample_rate": RATE, "segment_seconds": 0.5}


def test_a_checkpoint_stays_the_same_at_another_sampling_rate(tmp_path):
    path = write_tagger(tmp_path / "run", net=TINY_YAMNET)
    variables = read_bundle(path).variables("sed")
    for part in ("query", "sed"):
        shutil.rmtree(path / part)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hashes": {}}))
    with Checkpoints(path / "checkpoints", keep=2) as checkpoints:
        for step in (300, 500):
            scaled = jax.tree.map(lambda x, by=step: x * np.float32(by), variables)
            parts = {item: {"tagger": tree} for item, tree in scaled.items()}
            checkpoints.save(step, parts, {"next": step})
    for step in (300, 500):
        model = Model(path / "checkpoints" / str(step)).at_sample_rate(2 * RATE)
        assert model.sample_rate == 2 * RATE
        scaled = jax.tree.map(lambda x, by=step: x * np.float32(by), variables)
        assert net_hash(model.sed.variables) == net_hash(scaled)


def _same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_nets_come_back_as_they_were(tmp_path):
    bundle = read_bundle(write_tagger(tmp_path / "tagger", seed=3))
    sed, variables = bundle.sed()
    query, query_variables = bundle.query()
    _same(variables, tagger_variables(seed=3))
    _same(query_variables, {k: {"tagger": v} for k, v in tagger_variables(seed=3).items()})
    assert fields_of(sed) == fields_of(TAGGER)
    assert query.tagger == TAGGER
    assert query.kind == "soft"


@pytest.mark.parametrize("kind", KINDS)
def test_a_separator_knows_its_condition(tmp_path, kind):
    bundle = read_bundle(write_separator(tmp_path / "s", kind))
    separator, _ = bundle.separator()
    query, variables = bundle.query()
    assert query.kind == kind
    assert bool(variables["params"]) == (kind != "one_hot")
    assert separator.condition_width == WIDTHS[kind]


HOSTILE_CONFIGS = {
    "rate": ({"sample_rate": 1e300}, "sample_rate is 1e+300, expected a whole number"),
    "text": ({"sample_rate": "8000"}, "sample_rate is '8000'"),
    "nan": ({"segment_seconds": float("nan")}, "segment_seconds is nan"),
    "no part": ({"sed": None}, "sed is None"),
    "hashes": ({"hashes": {"sed": 5}}, "hashes.sed is 5, expected a string"),
    "fft": ({"sed": {"model": {"n_fft": 2**40}}}, "sed.model.n_fft is 1099511627776"),
    "blocks": ({"separator": {"blocks_per_level": 10**6}}, "separator.blocks_per_level is 1000000"),
    "kind": ({"query": {"kind": "both"}}, "query.kind is 'both', expected one_hot, soft"),
    "net": ({"sed": {"model": {"net": "resnet"}}}, "sed.model.net is 'resnet'"),
    "channels": ({"sed": {"model": {"channels": "4"}}}, "sed.model.channels is '4'"),
    "version": ({"format_version": "1"}, "format_version is '1'"),
    "newer": ({"format_version": 9}, "has format version 9"),
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_a_config_with_other_values_is_refused_with_the_key(tmp_path, case):
    changed, said = HOSTILE_CONFIGS[case]
    path = write_separator(tmp_path / "s")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(UserError) as error:
        read_bundle(path)
    assert said in str(error.value)
    assert str(path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{" * 100_000, '{"kind": 1, "kind": 2}', "\xff", ""]
)
def test_a_config_that_is_no_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is not the config of a bundle"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("sed", "classes", 50, "sed.model has 50 classes; "),
        ("query", "classes", 50, "query.model has 50 classes; "),
        ("sed", "sample_rate", 16000, "sed.model.sample_rate is 16000, the bundle's sample_rate"),
        ("sed", "f_max", 5000.0, "at most half of sample_rate 8000"),
        ("sed", "n_fft", 255, "n_fft is 255, expected an even number"),
        ("separator", "condition_width", 9, "its query net gives conditions of width 527"),
        ("separator", "condition_witdh", 9, "did you mean condition_width"),
    ],
)
def test_nets_that_do_not_fit_are_refused_when_they_are_opened(tmp_path, section, key, value, said):
    path = write_separator(tmp_path / "s")
    config = json.loads((path / "config.json").read_text())
    config[section].get("model", config[section])[key] = value
    if value in (9, 50):
        narrow = ResUNet(n_fft=128, hop_samples=64, channels=(4, 4), condition_width=9)
        variables = (
            random_variables(narrow, (1, 1, 640), (1, 9))
            if section == "separator"
            else random_variables(TAGGER.clone(classes=50), (1, RATE))
        )
        save_tree(path / section, variables)
        del config["hashes"][section]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        getattr(read_bundle(path), section)()


def test_a_bundle_without_a_part_says_so(tmp_path):
    with pytest.raises(UserError, match="has no separator; it is a tagger bundle"):
        read_bundle(write_tagger(tmp_path / "tagger")).separator()


@pytest.mark.parametrize("part", ["separator", "query", "sed"])
def test_an_array_that_is_not_finite_is_refused_where_a_net_is_opened(tmp_path, part):
    source = read_bundle(write_separator(tmp_path / "good", "soft"))
    parts = {name: source.variables(name) for name in ("separator", "query", "sed")}
    leaves, tree = jax.tree.flatten(parts[part])
    leaves[0] = leaves[0].copy()
    leaves[0].flat[0] = np.inf if part == "sed" else np.nan
    config = {k: v for k, v in source.config.items() if k != "hashes"}
    write_bundle(tmp_path / "bad", config, {**parts, part: jax.tree.unflatten(tree, leaves)})
    with pytest.raises(UserError, match=rf"bad: {part}/\S+ has values that are NaN or infinite"):
        getattr(read_bundle(tmp_path / "bad"), part)()


def test_arrays_that_are_not_those_of_the_hash_are_refused(tmp_path):
    bundle = read_bundle(write_tagger(tmp_path / "tagger"))
    changed = tagger_variables()
    first = next(iter(changed["params"]))
    changed["params"][first] = jax.tree.map(lambda x: x + 1e-3, changed["params"][first])
    save_tree(tmp_path / "tagger" / "sed", changed)
    with pytest.raises(UserError, match=r"tagger/sed: the arrays do not match the hash of"):
        bundle.sed()
    assert net_hash(bundle.read_unverified("sed")) == net_hash(changed)
    config = json.loads((tmp_path / "tagger" / "config.json").read_text())
    del config["hashes"]
    (tmp_path / "tagger" / "config.json").write_text(json.dumps(config))
    read_bundle(tmp_path / "tagger").sed()


def test_hashes_are_of_names_shapes_and_values(tmp_path):
    bundle = read_bundle(write_tagger(tmp_path / "tagger"))
    assert bundle.config["hashes"]["sed"] == net_hash(tagger_variables())
    assert net_hash(bundle.variables("query")) == net_hash(tagger_variables())
    values = np.arange(6, dtype=np.float32)
    trees = [
        {"a": values},
        {"b": values},
        {"a": values.reshape(2, 3)},
        {"a": values.astype(np.float64)},
        {"a": values + np.float32(1e-7)},
        {"a": values[:3], "b": values[3:]},
    ]
    assert len({net_hash(tree) for tree in trees}) == len(trees)
    assert net_hash({"b": values, "a": values}) == net_hash({"a": values, "b": values})


def test_foreign_tensors_are_kept_verbatim(tmp_path):
    foreign = {"sed/stft.window": np.arange(3, dtype=np.float16), "x": np.zeros((0, 2))}
    write_bundle(tmp_path / "b", ABOUT, {}, foreign)
    found = load_file(tmp_path / "b" / "foreign.safetensors")
    _same(found, foreign)
    assert {name: array.dtype for name, array in found.items()} == {
        name: array.dtype for name, array in foreign.items()
    }


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path):
    write_tagger(tmp_path / "b")
    with pytest.raises(UserError, match="exists already"):
        write_tagger(tmp_path / "b")
    with pytest.raises(TypeError):
        write_bundle(tmp_path / "c", {**ABOUT, "licence": object()}, {"sed": tagger_variables()})
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_parameters_of_another_net_name_the_first_that_differs(tmp_path):
    model = {"model": {**fields_of(TAGGER), "channels": [4, 4, 8]}}
    write_bundle(tmp_path / "b", {**ABOUT, "sed": model}, {"sed": tagger_variables()})
    said = r"sed/batch_stats/conv_block3/bn1/mean is \(6,\), the config's model has \(8,\)"
    with pytest.raises(UserError, match=said):
        read_bundle(tmp_path / "b").sed()


def _write_config(text):
    return lambda path: (path / "config.json").write_text(text)


def _change_config(**changed):
    def damage(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changed}))

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda path: (path / "config.json").unlink(),
            r"is not a bundle or workdir: .*config.json cannot be read \(No such",
        ),
        (_write_config('{"format_version": 1, "ki'), "is not the config of a bundle or workdir"),
        (_write_config("\xff\xfe"), "is not the config of a bundle or workdir"),
        (_write_config("[1, 2]"), "is not the config of a bundle or workdir"),
        (_write_config('{"format_version": 1, "kind": "tagger"}'), "has no key 'sample_rate'"),
        (
            _change_config(format_version=2),
            "format version 2 .* this version reads format version 1 ",
        ),
        (_change_config(kind="poem"), "kind poem"),
    ],
)
def test_what_is_no_bundle_is_said_in_one_sentence(tmp_path, damage, said):
    path = write_tagger(tmp_path / "b")
    damage(path)
    with pytest.raises(UserError, match=said) as raised:
        read_bundle(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("truncate", [True, False])
def test_damaged_or_missing_parameters_are_said_in_one_sentence(tmp_path, truncate):
    path = write_tagger(tmp_path / "b")
    for file in [file for file in (path / "sed").rglob("*") if file.is_file()]:
        if truncate:
            file.write_bytes(file.read_bytes()[:7])
        else:
            file.unlink()
    with pytest.raises(UserError, match="b/sed is not a readable set of parameters") as raised:
        read_bundle(path).sed()
    assert "\n" not in str(raised.value)
    read_bundle(path).query()  # the other part is whole
