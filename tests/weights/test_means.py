import numpy as np
import pytest

from tests.tiny import SEGMENT, class_means, tagger_variables, write_place, write_separator
from uss_jax.anchors.conditions import folder_of, open_conditions
from uss_jax.anchors.table import read_table
from uss_jax.bundles.bundle import net_hash, read_bundle, write_bundle
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.data.index import load_index

QUICK_COMPILATION = True


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Records, a tagger, separators with its nets, and a table of anchors with conditions."""
    place = write_place(tmp_path_factory.mktemp("place"))
    words = ["--records", place / "records", "--sed", place / "tagger", "--batch", 1]
    assert run("mine", *words, "--query", place / "tagger", "--out", place / "anchors.npz") == 0
    return place


def export(place, out, *words, bundle="soft", records="records"):
    given = ["--class-means", place / "anchors.npz", "--records", place / records]
    return run("export", place / bundle, "--format", "orbax", "--out", out, *given, *words)


@pytest.mark.parametrize("kind", ["soft", "class_vectors"])
def test_means_of_mined_conditions_join_a_model(place, tmp_path, kind):
    write_separator(place / kind, kind)
    assert export(place, tmp_path / "out", bundle=kind) == 0
    model = Model(tmp_path / "out")
    index = load_index(place / "records", "train")
    table = read_table(place / "anchors.npz", index, SEGMENT)
    vectors = open_conditions(folder_of(place / "anchors.npz"), table, index).read(
        np.arange(len(table)), np.zeros(len(table), int)
    )
    conditions = model.adapt(vectors)
    classes = np.unique(index.label_class)
    for label in classes.tolist():
        one = np.zeros((1, 527), np.float32)
        one[0, label] = 0.3
        wanted = conditions[index.label_class == label].mean(axis=0)
        found = model.of_probabilities(one)[0]
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert model.means.any(axis=1).sum() == len(classes)
    assert model.config["means"] == {"classes": len(classes)}
    # Banks are of the query net, whatever its classes' means.
    assert model.query_hash == Model(place / kind).query_hash
    assert net_hash(read_bundle(tmp_path / "out").variables("query")) == net_hash(
        tagger_variables()
    )


def test_means_of_something_else_are_said(place, tmp_path, capsys):
    for kind, seed in (("soft", 0), ("embedding", 0), ("other", 5)):
        if not (place / kind).exists():
            write_separator(place / kind, "soft" if kind == "other" else kind, seed=seed)
    for words, said in (
        (dict(bundle="other"), "was mined with another query net than that of"),
        (dict(bundle="embedding"), "embedding, which means of probabilities are none of"),
        (dict(records="none"), "none"),
    ):
        assert export(place, tmp_path / "out", **words) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    soft = read_bundle(place / "soft")
    hostile = {**soft.config, "training": {"anchors": {"min_score": "x"}}}
    held = {part: soft.variables(part) for part in ("separator", "query", "sed")}
    write_bundle(place / "hostile", hostile, held)
    assert export(place, tmp_path / "out", bundle="hostile") == 1
    assert "training.anchors.min_score of its config is 'x'" in capsys.readouterr().err
    other = read_bundle(place / "embedding")
    parts = {part: other.variables(part) for part in ("separator", "query", "sed")}
    parts["means"] = {"params": {"means": class_means(3)}}
    config = {**other.config, "means": {"classes": 1}}
    write_bundle(tmp_path / "strange", config, parts)  # its conditions are no probabilities
    assert Model(tmp_path / "strange").means is None
    assert run("export", place / "soft", "--format", "orbax", "--out", tmp_path / "out") == 0
    assert Model(tmp_path / "out").means is None
    words = ["export", place / "soft", "--format", "orbax", "--out", tmp_path / "again"]
    assert run(*words, "--split", "train") == 1
    assert "--split has no effect without --class-means" in capsys.readouterr().err
    assert run(*words, "--class-means", place / "anchors.npz") == 1
    assert "--class-means needs --records" in capsys.readouterr().err
