"""Texts as conditions, from training to the separated sound."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from tests.models.bert import real_folder
from tests.tiny import (
    RATE,
    finish_run,
    noise,
    tone,
    train_words,
    write_pairs,
    write_place,
    write_separator,
)
from uss_jax.bundles import nets
from uss_jax.bundles.model import Model
from uss_jax.bundles.node_vectors import class_texts, load_node_vectors
from uss_jax.bundles.text_encoder import TextEncoder
from uss_jax.cli.main import main
from uss_jax.data.index import load_index
from uss_jax.errors import UserError
from uss_jax.evaluation.rows import left_out
from uss_jax.evaluation.scoring import score
from uss_jax.evaluation.suites.pairs import find_pairs
from uss_jax.evaluation.wording import Wording, read_wording
from uss_jax.models.query import nearest_names
from uss_jax.ontology import load_ontology
from uss_jax.training.texts import NAMED_AS, Texts, load_texts

QUICK_COMPILATION = True
pytestmark = pytest.mark.usefixtures("one_device")

TEXT = {"query.kind": "text", "anchors.source": "random"}
EITHER = {**TEXT, "query.kind": "text_or_audio"}
EITHER |= {"query.adaptor_width": 6, "query.adaptor_hidden": 8}
KINDS = {"text": TEXT, "text_or_audio": EITHER}
DOG = load_ontology().class_names.index("Dog")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(real_folder())


@pytest.fixture(scope="module", params=KINDS)
def bundle(request, tmp_path_factory):
    """A separator of each kind of condition."""
    return write_separator(tmp_path_factory.mktemp(request.param) / "bundle", request.param)


@pytest.fixture(scope="module")
def either(tmp_path_factory):
    """A separator that takes texts and sounds."""
    return write_separator(tmp_path_factory.mktemp("either") / "bundle", "text_or_audio")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recording") / "street.wav"
    soundfile.write(path, tone(500, 1.2) + noise(4, 1.2, amplitude=0.2), RATE)
    return path


def test_the_encoder_gives_the_names_in_every_template(encoder, monkeypatch):
    folder = str(real_folder())
    monkeypatch.setattr("uss_jax.training.texts.NAMED_AS", NAMED_AS[:2])
    bare, phrased = load_texts("", 1.0), load_texts(folder, 1.0)
    assert bare.names.shape == (527, 1, 384)
    assert phrased.names.shape == (527, 2, 384)
    np.testing.assert_allclose(phrased.names[:, 0], bare.names[:, 0], atol=5e-4)  # float16
    wanted = encoder.encode(["the sound of dog"])
    np.testing.assert_allclose(phrased.names[DOG, 1], wanted[0], atol=1e-6)
    assert bare.digest != phrased.digest


def test_templates_and_texts_are_drawn_by_position():
    names = np.arange(527 * 5, dtype=np.float32).reshape(527, 5, 1)
    texts = Texts(names, 0.25, "", "")
    positions, classes = np.arange(4000), np.arange(4000) % 527
    whole = texts.draw(3, positions, classes, classes)
    part = texts.draw(3, *(of[1000:1100] for of in (positions, classes, classes)))
    for name, column in part.items():
        np.testing.assert_array_equal(column, whole[name][1000:1100])
    template = whole["text"][:, 0] - names[classes, 0, 0]
    assert np.bincount(template.astype(int)) / 4000 == pytest.approx([0.2] * 5, abs=0.03)
    assert whole["by_text"].mean() == pytest.approx(0.25, abs=0.03)
    assert not np.array_equal(
        texts.draw(4, positions, classes, classes)["by_text"], whole["by_text"]
    )


def test_a_class_is_asked_for_by_its_name(bundle):
    model = Model(bundle)
    sets = np.zeros((2, 527), np.float32)
    sets[0, DOG] = sets[1, [DOG, 0]] = 1
    by_class = model.of_classes(sets)
    names = load_node_vectors().of_classes()
    both = names[DOG] + names[0]
    by_name = model.of_texts(np.stack([names[DOG], both / np.linalg.norm(both)]))
    np.testing.assert_allclose(by_class, by_name, atol=2e-3)
    assert np.abs(by_class[0] - by_class[1]).max() > 1e-4


def test_names_stay_and_other_vectors_become_a_mean_of_names():
    rng = np.random.default_rng(0)
    names = rng.standard_normal((40, 384)).astype(np.float32)
    names /= np.linalg.norm(names, axis=1, keepdims=True)

    def found(vectors, names=names):
        return nearest_names(jnp.asarray(vectors, jnp.float32), jnp.asarray(names))

    np.testing.assert_allclose(found(3 * names), names, atol=2e-5)

    mixed = names[3] + 0.5 * names[7]
    cosines = names @ mixed / np.linalg.norm(mixed)
    five = np.argsort(-cosines)[:5]
    weights = np.exp(cosines[five] / 0.05)
    wanted = weights @ names[five]
    np.testing.assert_allclose(found(mixed[None])[0], wanted / np.linalg.norm(wanted), atol=2e-5)
    np.testing.assert_allclose(found(mixed[None], names[:1]), names[:1], atol=2e-5)
    assert np.isfinite(found(np.zeros((1, 384)))).all()


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_with_texts_and_resumes(place, encoder, tmp_path, capsys, kind):
    model = finish_run("resunet30.py", place, tmp_path / "run", KINDS[kind])
    names = load_node_vectors().of_classes()
    np.testing.assert_array_equal(model.query.variables["params"]["names"], names)
    for name in nets.parts_of_query(model.query.module).keys() - {"names"}:
        fresh = nets.init_adaptors(model.query.module, jax.random.key(1234))[name]
        assert not np.array_equal(
            model.query.variables["params"][name]["fc1"]["kernel"], fresh["fc1"]["kernel"]
        )

    if kind == "text":
        _is_asked_with_the_names_nearest(place, encoder, tmp_path, model, capsys)
        return
    longer = {**EITHER, "total_steps": 3}
    other = {**longer, "query.text_share": 1}
    assert main(train_words("resunet30.py", place, tmp_path / "run", other)) == 1
    assert "other conditions; resume with the keys of config.query" in capsys.readouterr().err
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    trained = config["query"].pop("trained")
    del config["query"]["by_names"]  # as older versions wrote it
    path.write_text(json.dumps(config))
    assert main(train_words("resunet30.py", place, tmp_path / "run", longer)) == 0
    assert json.loads(path.read_text())["query"]["trained"] == trained


def _is_asked_with_the_names_nearest(place, encoder, folder, model, capsys):
    """A model that was trained by names alone is asked with those nearest to a text."""
    named = model.query.module.trained
    assert model.query.module.by_names
    assert named == tuple(np.unique(load_index(place / "records", "train").label_class))
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["query"]["trained"] == list(named)

    vector = encoder.encode(["a puppy whines"])
    names = load_node_vectors().of_classes()[list(named)]
    wanted = nearest_names(jnp.asarray(vector), jnp.asarray(names))
    np.testing.assert_allclose(model.of_texts(vector), wanted, atol=1e-6)
    assert np.abs(wanted - vector).max() > 1e-2

    soundfile.write(folder / "street.wav", tone(500, 1.2), RATE)
    words = ["separate", str(folder / "street.wav"), "--model", str(folder / "run")]
    words += ["--text", "a puppy whines", "--text-encoder", str(real_folder())]
    words += ["--out", str(folder / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "asked with sentence vectors of the trained names nearest to texts" in said
    shown = re.findall(r'"([^"]+)" 0\.\d\d', said)
    assert 1 <= len(shown) <= 5
    assert set(shown) <= {load_ontology().class_names[k] for k in named}

    exported = str(folder / "model")
    assert main(["export", str(folder / "run"), "--format", "safetensors", "--out", exported]) == 0
    np.testing.assert_allclose(Model(exported).of_texts(vector), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"query.text_encoder": "nowhere"}, "config.query.text_encoder has no effect with"),
        ({**TEXT, "query.text_encoder": "nowhere"}, "nowhere is not the folder of a sentence"),
        ({"query.kind": "text_or_audio"}, "needs query.adaptor_width above 0"),
        ({**EITHER, "query.shortcut": True}, "and no query.shortcut"),
        ({**TEXT, "query.source.own": 0.5, "query.source.other": 0.5}, "needs mined conditions"),
        ({**TEXT, "query.one_class_share": 0.1}, "query.one_class_share needs probabilities"),
        ({**EITHER, "query.text_share": 1.5}, "config.query.text_share"),
        ({**TEXT, "query.text_share": 0.2}, "config.query.text_share=0.2 has no effect"),
        ({**EITHER, "query.text_share": 0, "query.captions": "c"}, "asks with no text; raise it"),
    ],
)
def test_what_cannot_run_is_said(place, tmp_path, changed, said, capsys):
    assert main(train_words("resunet30.py", place, tmp_path / "run", changed)) == 1
    assert said in capsys.readouterr().err


def test_text_is_a_row_of_an_evaluation(either, tmp_path):
    write_pairs(tmp_path / "pairs", [DOG, DOG, 0])
    words = ["evaluate", "pairs", "--model", str(either), "--data", str(tmp_path / "pairs")]
    rows, encoder = [], ["--text-encoder", str(real_folder())]
    for name, more in (("by_name", []), ("by_encoder", encoder)):
        out = tmp_path / f"{name}.json"
        assert main([*words, "--out", str(out), *more]) == 0
        found = json.loads(out.read_text())
        rows.append({row["query"]: row for row in found["rows"]}["text"])
    assert rows[0]["pairs"] == rows[1]["pairs"] == 3
    assert rows[0]["sdri"] == pytest.approx(rows[1]["sdri"], abs=0.02)
    assert found["how"]["text_encoder"] == str(real_folder())


def test_items_of_a_label_take_its_texts_in_turn(encoder, tmp_path):
    write_pairs(tmp_path / "pairs", [DOG, DOG, DOG, 0])
    wording = Wording(encoder, {"Dog": ["woof", "a hound barks"]})
    asked = wording.of(find_pairs(tmp_path / "pairs"))
    assert asked == ["speech", "woof", "a hound barks", "woof"]


@pytest.mark.parametrize("kind", ["soft", "one_hot", "embedding"])
def test_other_models_are_asked_for_the_classes_of_a_text(kind, encoder, tmp_path):
    """The text row of a class's own name is the row of the class; embeddings have none."""
    write_pairs(tmp_path / "pairs", [DOG, 0])
    model = Model(write_separator(tmp_path / kind, kind))
    if kind == "embedding":
        with pytest.raises(UserError, match="takes recordings only; leave out --text-encoder"):
            read_wording(model, str(real_folder()), None)
        return
    wording = Wording(encoder, {"Speech": ["zxqv"]})
    pairs = find_pairs(tmp_path / "pairs")
    assert wording.remark(pairs) == "--texts has none for 1 label of 2, asked by name, such as Dog"
    _, rows = score(model, pairs, wording=wording)
    assert left_out(rows, 2).startswith("the row text leaves out 1 item of 2: ")
    alone = rows["class alone" if kind == "soft" else "oracle"]
    np.testing.assert_allclose(rows["text"].conditions[1], alone.conditions[1], atol=1e-7)
    assert rows["text"].exists.tolist() == [False, True]


def test_texts_of_no_label_are_refused(either, tmp_path, capsys):
    write_pairs(tmp_path / "pairs", [DOG])
    words = ["evaluate", "pairs", "--model", str(either), "--data", str(tmp_path / "pairs")]
    words += ["--out", str(tmp_path / "r.json"), "--text-encoder", str(real_folder())]
    for content, said in (
        ('{"Dogg": "woof"}', "--texts has none of the labels that are evaluated"),
        ('{"Dog": []}', "expected a label and its texts"),
        ("[1]", "expected a label and its texts"),
    ):
        (tmp_path / "texts.json").write_text(content)
        assert main([*words, "--texts", str(tmp_path / "texts.json")]) == 1
        assert said in capsys.readouterr().err
    assert main([*words[:-2], "--texts", str(tmp_path / "texts.json")]) == 1
    assert "without --text-encoder" in capsys.readouterr().err


def test_separate_asks_with_the_text_itself(either, recording, tmp_path, capsys):
    words = ["separate", str(recording), "--model", str(either), "--text", "a puppy whines"]
    out = tmp_path / "out"
    assert main([*words, "--text-encoder", str(real_folder()), "--out", str(out)]) == 0
    assert "asked with sentence vectors of texts" in capsys.readouterr().out
    (report,) = out.rglob("report.json")
    (said,) = json.loads(report.read_text())["settings"]["text"]
    assert said["asked_with"] == "sentence vectors of texts"
    sound, rate = soundfile.read(next(out.rglob("*.wav")))
    assert rate == RATE
    assert np.abs(sound).max() > 0


def test_a_text_need_not_be_near_a_class_but_must_mean_something(
    either, recording, tmp_path, capsys
):
    def separate(text, *more):
        words = ["separate", str(recording), "--model", str(either), "--text", text, *more]
        words += ["--text-encoder", str(real_folder()), "--out", str(tmp_path / text)]
        return main(words), capsys.readouterr()

    status, said = separate("a vase falls and breaks")
    assert status == 0
    assert "is nearest to" in said.out
    for text, why in (("xqvzz wqpk", "does not know"), ("silence", "is silence")):
        status, said = separate(text)
        assert status == 1
        assert why in said.err
    for idle in ("--nearest", "--similarity", "--threshold"):
        status, said = separate("a dog", idle, "1")
        assert status == 1
        assert f"{idle} has no effect" in said.err


def test_without_an_encoder_the_nearest_names_ask(either, recording, tmp_path, capsys):
    words = ["separate", str(recording), "--model", str(either), "--text", "a dog barks"]
    assert main([*words, "--out", str(tmp_path / "out")]) in (0, 3)  # 3: it hears no dog
    assert "asked with the classes of these nodes" in capsys.readouterr().out


def test_a_bank_holds_texts(either, recording, tmp_path, capsys):
    bank = str(tmp_path / "bank.npz")
    words = [
        "query",
        "make",
        bank,
        "--model",
        str(either),
        "--text",
        "a puppy whines",
        "a car passes",
    ]
    assert main([*words, "--text-encoder", str(real_folder())]) == 0
    assert main(["query", "list", bank]) == 0
    said = capsys.readouterr().out
    assert "sentence vectors of texts" in said
    assert "a car passes" in said
    words = ["separate", str(recording), "--model", str(either), "--query", bank]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    (report,) = (tmp_path / "out").rglob("report.json")
    assert "sentence vectors" in json.loads(report.read_text())["settings"]["query_how"]


@pytest.mark.parametrize("form", ["orbax", "safetensors"])
def test_an_export_takes_texts(bundle, tmp_path, form):
    out = tmp_path / form
    assert main(["export", str(bundle), "--out", str(out), "--format", form]) == 0
    vector = np.ones((1, 384), np.float32) / 384**0.5
    np.testing.assert_allclose(
        Model(out).of_texts(vector), Model(bundle).of_texts(vector), rtol=1e-6
    )
    assert main(["inspect", str(out)]) == 0


@pytest.mark.long
def test_exported_functions_take_texts(bundle, tmp_path):
    assert (
        main(["export", str(bundle), "--out", str(tmp_path / "out"), "--format", "stablehlo"]) == 0
    )
    names = np.load(tmp_path / "out" / "names.npy")
    stored = (tmp_path / "out" / "text_condition.stablehlo").read_bytes()
    found = jax.export.deserialize(bytearray(stored)).call(names[:3])
    np.testing.assert_allclose(found, Model(bundle).of_texts(names[:3]), atol=1e-5)
    assert "text_condition.stablehlo" in (tmp_path / "out" / "README.md").read_text()


def test_another_encoder_is_refused(either, monkeypatch, recording, tmp_path, capsys):
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: encode(self, texts)[:, ::-1])
    words = ["separate", str(recording), "--model", str(either), "--text", class_texts()[DOG]]
    words += ["--text-encoder", str(real_folder()), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert "is another sentence encoder than that which" in capsys.readouterr().err
