"""Which precision every product of every program has, whatever is set around it.

The programs are lowered for CUDA, which needs no GPU. A third precision is in force around them:
what is found to have it, nobody has chosen.
"""

import concurrent.futures
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lowered import precisions, products, products_of
from tests.tiny import (
    RATE,
    SEGMENT,
    TAGGER,
    noise,
    tagger_variables,
    tone,
    train_words,
    write_pairs,
    write_place,
    write_separator,
)
from uss_jax.anchors import of_labels
from uss_jax.audio.files import write_wav
from uss_jax.bundles import model
from uss_jax.bundles.model import Model, Net
from uss_jax.bundles.nets import build_sed, fields_of
from uss_jax.cli.main import main
from uss_jax.devices.precision import PRECISIONS, at_precision
from uss_jax.errors import UserError
from uss_jax.evaluation import clips
from uss_jax.models.tagging import detect
from uss_jax.separation.recordings import Separator
from uss_jax.training import live, plan, train_tagger

DETECTOR = "Cnn14DecisionLevelMax"
SED = build_sed(fields_of(TAGGER))
SHAPE = jax.ShapeDtypeStruct


@pytest.fixture(autouse=True)
def surroundings():
    with jax.default_matmul_precision("high"):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Records, a tagger, a separator, pairs, and a recording."""
    place = write_place(tmp_path_factory.mktemp("place"))
    write_separator(place / "separator")
    write_pairs(place / "pairs", [0, 1, 300])
    write_wav(place / "street.wav", (tone(400, 1.0) + noise(0, 1.0))[None], RATE)
    return place


def _batch(labels=False):
    batch = {"audio": SHAPE((2, RATE), np.int16)}
    names = ("samples", "class_index")
    return batch | {name: SHAPE((2,), np.int32) for name in names}


def test_the_innermost_precision_counts_and_none_is_left_behind():
    square = lambda x: x @ x  # noqa: E731
    inner = at_precision("highest", square)
    both = at_precision("default", lambda x: square(x) + inner(x))
    found = products(both, jnp.ones((2, 2)))
    assert [product.precision for product in found] == ["DEFAULT", "HIGHEST"]
    assert jax.config.jax_default_matmul_precision == "high"


def test_a_precision_holds_in_any_thread():
    square = at_precision("highest", lambda x: x @ x)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = pool.submit(products, square, jnp.ones((2, 2))).result()
    assert precisions(found) == {"HIGHEST"}


def _separation_step(place, monkeypatch, *words):
    """Products of the step of the shipped config, shrunk."""
    seen = {}
    monkeypatch.setattr(plan, "describe", lambda *args, **kwargs: seen.update(args=args) or [])
    changed = dict(word.split("=") for word in words)
    assert main([*train_words("resunet30.py", place, "unused", changed), "--dry-run"]) == 0
    step, state, frozen, batch = seen["args"]
    return products(step, state, frozen, batch, jax.random.key(0))


def test_in_training_the_detector_is_at_highest_and_what_trains_as_the_config_says(
    place, monkeypatch
):
    found = _separation_step(place, monkeypatch)
    # A log-mel is always at the highest too, the query net's as well.
    mels = [product for product in found if "log_mel" in product.where]
    detector = [product for product in found if DETECTOR in product.where]
    rest = [product for product in found if product not in mels + detector]
    assert len(mels) == 2
    assert len(detector) == 1 + 6 + 2
    assert precisions(mels + detector) == {"HIGHEST"}
    assert precisions(rest) == {"DEFAULT"}
    backward = [product for product in rest if "transpose(jvp(ResUNet))" in product.where]
    assert len(backward) > 30


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["accumulate=2", "global_batch=16"],
        ["remat=True"],
        ["query.finetune=True"],
        ["query.adaptor_width=527", "separator.film_gain=True"],
    ],
)
def test_training_at_highest_leaves_no_product_lower(place, monkeypatch, words):
    found = _separation_step(place, monkeypatch, "precision=highest", *words)
    assert any("transpose(jvp(ResUNet))" in product.where for product in found)
    assert precisions(found) == {"HIGHEST"}


def test_a_bfloat16_separator_trains_beside_a_float32_detector(place, monkeypatch):
    found = _separation_step(place, monkeypatch, "separator.dtype=bfloat16")
    assert any("bf16" in product.line for product in found)
    detector = [product for product in found if DETECTOR in product.where]
    assert precisions(detector) == {"HIGHEST"}
    assert not any("bf16" in product.line for product in detector)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_tagger_trains_as_the_config_says(place, monkeypatch, tmp_path, precision):
    seen = {}

    def run(trained, *args):
        state = jax.eval_shape(trained.fresh, *trained.fresh_from)
        seen.update(step=trained.step, state=state, frozen=trained.frozen)

    monkeypatch.setattr(train_tagger, "run", run)
    words = train_words("tagger_cnn14.py", place, tmp_path, {"precision": precision})
    assert main(words) == 0
    batch = {**_batch(), "labels": SHAPE((2, 527), np.uint8)}
    found = products(*seen.values(), batch, jax.random.key(0))
    rest = [product for product in found if "log_mel" not in product.where]
    assert any("transpose" in product.where for product in rest)
    assert precisions(rest) == {precision.upper()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_detector_is_float32_at_highest_in_every_use(dtype):
    sed = SED.clone(dtype=dtype)
    variables = jax.tree.map(jnp.asarray, tagger_variables())
    net = Net(sed, variables, precision="default")
    clip = SHAPE((2, RATE), np.float32)
    labels = {"labels": SHAPE((2, 3), np.int32), "related": SHAPE((2, 527), np.uint8)}
    programs = [
        products(lambda clip: detect(sed, variables, clip), clip),
        products(
            lambda batch: of_labels.mine_batch(sed, variables, batch, None, SEGMENT, 2, -60.0),
            {**_batch(), **labels},
        ),
        products(  # make-pairs, planted, averages
            lambda batch, key: clips.anchors_of_batch(net, batch, key, SEGMENT),
            _batch(),
            jax.random.key(0),
        ),
    ]
    for found in programs:
        assert len(found) >= 9
        assert precisions(found) == {"HIGHEST"}
        assert not any("bf16" in product.line for product in found)


def test_a_detector_trained_in_bfloat16_gives_the_numbers_of_float32():
    waveform = jnp.asarray(noise(0, 1.0)[None])
    variables = jax.tree.map(jnp.asarray, tagger_variables())
    exact, same = (Net(SED.clone(dtype=dtype), variables) for dtype in ("float32", "bfloat16"))
    rough = same(waveform)["framewise"]
    exact, same = (detect(net.module, net.variables, waveform) for net in (exact, same))
    np.testing.assert_array_equal(exact["framewise"], same["framewise"])
    assert np.abs(rough - exact["framewise"]).max() > 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_has_the_precision_it_was_opened_with(place, precision):
    opened = Separator.load(place / "separator", precision).model
    mixture, condition = SHAPE((1, 1, SEGMENT), np.float32), SHAPE((1, 527), np.float32)

    def lowered(net, *arrays, method=None):
        found = products(lambda *arrays: model._apply(net, method, *arrays), *arrays)
        return precisions([product for product in found if "log_mel" not in product.where])

    assert lowered(opened.separator, mixture, condition) == {precision.upper()}
    shared = lowered(opened.separator, mixture, condition, method="separate_with_shared_mask")
    assert shared == {precision.upper()}
    assert lowered(opened.tagger, SHAPE((1, SEGMENT), np.float32)) == {precision.upper()}
    assert lowered(opened.sed, SHAPE((1, SEGMENT), np.float32)) == {"HIGHEST"}


def test_two_models_of_one_process_keep_their_own(place):
    """The compiled programs of one are not taken for the other, whose module is equal."""
    coarse, exact = (Model(place / "separator", word) for word in ("default", "highest"))
    assert coarse.separator.module == exact.separator.module
    mixture, condition = np.zeros((1, 1, SEGMENT), np.float32), np.zeros((1, 527), np.float32)
    texts = [
        model._apply.lower(opened.separator, None, mixture, condition).as_text()
        for opened in (coarse, exact, coarse)
    ]
    found = [precisions(products_of(text)) for text in texts]
    assert found == [{"DEFAULT"}, {"HIGHEST"}, {"DEFAULT"}]


def test_adapting_vectors_has_the_precision_of_the_model(place, monkeypatch):
    seen = []
    opened = Model(place / "separator", "default")

    def apply(*args, **kwargs):
        seen.append(jax.config.jax_default_matmul_precision)
        return np.zeros((1, 527), np.float32)

    monkeypatch.setattr(type(opened.query.module), "apply", apply)
    opened.adapt(np.zeros((1, 527), np.float32))
    assert seen == ["default"]


@pytest.mark.long
def test_evaluation_in_training_is_at_highest(place, monkeypatch, tmp_path, quick_compilation):
    seen = []

    def figures(*args, _figures=live._figures):
        seen.append(jax.config.jax_default_matmul_precision)
        return _figures(*args)

    monkeypatch.setattr(live, "_figures", figures)
    changed = {"eval.pairs": place / "pairs", "eval.every_steps": 1, "total_steps": 1}
    assert main(train_words("resunet30.py", place, tmp_path / "run", changed)) == 0
    assert set(seen) == {"highest"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_exported_function_carries_its_precision(place, tmp_path, precision):
    out = tmp_path / "out"
    words = ["--format", "stablehlo", "--out", out, "--precision", precision]
    assert main(list(map(str, ["export", place / "separator", *words]))) == 0
    for name in ("separate", "condition"):
        stored = (out / f"{name}.stablehlo").read_bytes()
        found = products_of(jax.export.deserialize(bytearray(stored)).mlir_module())
        assert len(found) >= 8
        mel = {"HIGHEST"} if name == "condition" else set()
        assert precisions(found) == {precision.upper()} | mel
    assert json.loads((out / "config.json").read_text())["precision"] == precision
    assert f"the precision `{precision}`" in (out / "README.md").read_text()


def test_forms_without_products_take_no_precision(place, tmp_path, capsys):
    words = ["--format", "orbax", "--out", tmp_path / "out", "--precision", "high"]
    assert main(list(map(str, ["export", place / "separator", *words]))) == 1
    assert "orbax holds parameters, not computations" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_commands_say_what_they_computed_at_and_leave_nothing_set(place, tmp_path, capsys):
    separate = ["separate", place / "street.wav", "--model", place / "separator"]
    separate += ["--classes", "Speech", "--out", tmp_path / "out", "--precision", "default"]
    assert main(list(map(str, separate))) == 0
    report = json.loads((tmp_path / "out" / "street" / "report.json").read_text())
    assert report["settings"]["precision"] == "default"
    assert jax.config.jax_default_matmul_precision == "high"

    evaluate = ["evaluate", "pairs", "--model", place / "separator", "--data", place / "pairs"]
    results = tmp_path / "results.json"
    assert main(list(map(str, [*evaluate, "--out", results, "--oracle-only"]))) == 0
    assert json.loads(results.read_text())["how"]["precision"] == "highest"

    capsys.readouterr()
    tables = []
    for precision in ("highest", "default"):
        tables.append(tmp_path / f"{precision}.npz")
        words = ["mine", "--records", place / "records", "--sed", place / "tagger"]
        words += ["--out", tables[-1], "--batch", "8", "--precision", precision]
        assert main(list(map(str, words))) == 0
    assert capsys.readouterr().out.count("no effect, the detector always computes at highest") == 1
    exact, same = (np.load(table) for table in tables)
    for name in exact.files:
        np.testing.assert_array_equal(exact[name], same[name])


def test_a_stopped_evaluation_does_not_go_on_at_another_precision(place):
    from uss_jax.evaluation.scoring import _identity
    from uss_jax.evaluation.suites.whole import identity

    coarse, exact = (Model(place / "separator", word) for word in ("default", "highest"))
    assert list(_identity(coarse, [], [], 8, True)) != list(_identity(exact, [], [], 8, True))
    about = {}, "legacy: False", [], []
    assert list(identity(coarse, *about)) != list(identity(exact, *about))


@pytest.mark.parametrize(
    "words",
    [
        ["separate", "a.wav", "--model", "b"],
        ["evaluate", "pairs", "--model", "b", "--data", "d"],
        ["evaluate", "musdb18", "--model", "b", "--data", "d"],
        ["mine", "--records", "r", "--sed", "b", "--out", "t.npz"],
        ["make-pairs", "--records", "r", "--sed", "b", "--out", "d"],
        ["export", "b", "--format", "stablehlo", "--out", "d"],
    ],
)
def test_a_misspelt_word_on_the_command_line_is_said(words, capsys):
    with pytest.raises(SystemExit) as exited:
        main([*words, "--precision", "hihgest"])
    assert exited.value.code == 2
    assert "invalid choice: 'hihgest' (choose from" in capsys.readouterr().err


def test_a_misspelt_word_is_said(place, tmp_path, capsys):
    said = "is 'float32', expected highest, high, default"
    for config in ("resunet30.py", "tagger_cnn14.py"):
        words = train_words(config, place, tmp_path / "run", {"precision": "float32"})
        assert main(words) == 1
        assert capsys.readouterr().err == f"uss-jax: config.precision {said}\n"
    with pytest.raises(UserError, match=f"precision {said}"):
        Separator.load(place / "separator", "float32")
    with pytest.raises(UserError, match=f"precision {said}"):
        at_precision("float32", jnp.matmul)
