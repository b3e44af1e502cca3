"""What items are asked with: drawn by position, from mined conditions."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import (
    SEGMENT,
    TAGGER,
    noise,
    quick_jit,
    random_variables,
    tagger_variables,
    tone,
    train_words,
    write_records,
    write_tagger,
)
from uss_jax.anchors.conditions import class_means, folder_of, open_conditions
from uss_jax.anchors.table import Placement, read_table
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.data.index import load_index
from uss_jax.data.orders import BalancedOrder
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.errors import UserError
from uss_jax.models.query import QueryNet
from uss_jax.models.resunet import ResUNet
from uss_jax.training.asking import (
    SOURCES,
    Asking,
    Recordings,
    alone,
    check_shares,
    recording_of,
)
from uss_jax.training.examples import Mixing
from uss_jax.training.losses import l1_waveform
from uss_jax.training.separation_step import Anchoring, Nets, make_separation_step
from uss_jax.training.state import create_state

pytestmark = pytest.mark.usefixtures("one_device")

# Class 0 has four clips of two sessions, class 1 two clips of one session, class 2 one clip.
CLASSES = {"a0": [0], "a1": [0, 1], "b0": [0], "b1": [0], "a2": [1], "c0": [2]}
MANY = np.arange(4000)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Records, taggers, a table of anchors, its conditions, and groups."""
    path = tmp_path_factory.mktemp("place")
    clips = [
        (name, tone(250 + 190 * i, 0.9) + noise(i, 0.9), labels)
        for i, (name, labels) in enumerate(CLASSES.items())
    ]
    write_records(path / "records", "train", clips)
    write_tagger(path / "tagger")
    write_tagger(path / "other", seed=3)
    rows = [f"{name},Speech,{name[0]}" for name in CLASSES]
    (path / "labels.csv").write_text("\n".join(["file,labels,group", *rows]) + "\n")
    _mine(path, path / "anchors.npz")
    return path


def _mine(place, out, query="tagger", *more):
    words = ["mine", "--records", place / "records", "--sed", place / "tagger", "--out", out]
    words += ["--query", place / query, "--batch", 1, "--candidates", 2, *more]
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def mined(place):
    """Index, table and conditions."""
    index = load_index(place / "records", "train")
    table = read_table(place / "anchors.npz", index, SEGMENT)
    return index, table, open_conditions(folder_of(place / "anchors.npz"), table, index)


def _asking(mined, groups="", weighs=False, **shares):
    index, table, conditions = mined
    usable = np.ones(len(table), bool)
    return Asking(
        shares,
        seed=5,
        conditions=conditions,
        placement=Placement(table, index, seed=5, top_k=2),
        recordings=Recordings.of(index, usable, recording_of(index, str(groups or ""))),
        mean=class_means(conditions, index, usable, weighs),
        weighs=weighs,
    )


def _row(index, name, label):
    record = list(CLASSES).index(name)
    return int(index.label_row[record]) + index.labels(record).tolist().index(label)


def _names(index, rows):
    of_row = np.repeat(np.arange(len(index)), np.diff(index.label_row.astype(int)))
    return [list(CLASSES)[of_row[row]] for row in rows]


def test_another_recording_of_the_class_is_drawn_uniformly_and_never_the_same(mined, place):
    index = mined[0]
    uniform = (MANY + 0.5) / len(MANY)
    for name, label, groups, wanted in (
        ("a0", 0, "", {"a1", "b0", "b1"}),
        ("b1", 0, "", {"a0", "a1", "b0"}),
        ("a0", 0, place / "labels.csv", {"b0", "b1"}),
        ("b1", 0, place / "labels.csv", {"a0", "a1"}),
        ("a1", 1, "", {"a2"}),
    ):
        recordings = _asking(mined, groups, own=1.0).recordings
        record = np.full(len(MANY), list(CLASSES).index(name))
        rows = recordings.draw(uniform, record, np.full(len(MANY), label))
        assert (index.label_class[rows] == label).all()
        drawn, count = np.unique(_names(index, rows), return_counts=True)
        assert set(drawn) == wanted
        np.testing.assert_allclose(count, len(MANY) / len(wanted), atol=1)
    # One recording, or one session, is no other.
    for name, label, groups in (("c0", 2, ""), ("a1", 1, place / "labels.csv")):
        recordings = _asking(mined, groups, own=1.0).recordings
        record = np.full(10, list(CLASSES).index(name))
        assert (recordings.draw(uniform[:10], record, np.full(10, label)) == -1).all()
    assert "1 class of 3 have one" in alone(_asking(mined, own=1.0).recordings)
    said = alone(_asking(mined, place / "labels.csv", own=1.0).recordings)
    assert "2 classes of 3 have one recording only" in said
    assert "Male speech, man speaking, Female speech, woman speaking" in said


def test_labels_that_are_not_drawn_are_nobodys_example(mined):
    index, table, _ = mined
    usable = np.ones(len(table), bool)
    usable[[_row(index, "a1", 0), _row(index, "b0", 0)]] = False
    recordings = Recordings.of(index, usable, recording_of(index, ""))
    rows = recordings.draw(np.linspace(0, 0.999, 50), np.zeros(50, int), np.zeros(50, int))
    assert set(_names(index, rows)) == {"b1"}


def test_each_source_gives_its_vector(mined):
    index, table, conditions = mined
    records = np.resize(np.arange(len(CLASSES)), len(MANY))
    classes = np.array([labels[-1] for labels in CLASSES.values()])[records]
    placement = Placement(table, index, seed=5, top_k=2)
    own = conditions.read(*placement.choose(MANY, records, classes))
    best = conditions.read(np.arange(len(table)), np.zeros(len(table), int))

    def asked(**shares):
        return _asking(mined, **shares).ask(MANY, records, classes)

    np.testing.assert_array_equal(asked(own=1.0)["vector"], own)
    assert "masked" not in asked(own=1.0)

    means = np.stack([best[index.label_class == label].mean(axis=0) for label in range(3)])
    np.testing.assert_allclose(asked(mean=1.0)["vector"], means[classes], rtol=1e-6)

    other = asked(other=1.0)["vector"]
    for at in range(200):
        same = np.flatnonzero(index.label_class == classes[at])
        others = [
            row
            for row, name in zip(same, _names(index, same), strict=True)
            if name != list(CLASSES)[records[at]]
        ]
        wanted = best[others] if others else own[at : at + 1]
        assert (wanted == other[at]).all(axis=1).any()

    mixed = asked(mix=1.0)["vector"]
    weight = np.sum((mixed - other) * (own - other), axis=1)
    there = np.sum((own - other) ** 2, axis=1) > 0
    weight = weight[there] / np.sum((own - other)[there] ** 2, axis=1)
    line = other[there] + weight[:, None] * (own - other)[there]
    np.testing.assert_allclose(mixed[there], line, atol=1e-6)
    assert weight.min() < 0.05 < 0.95 < weight.max()
    assert abs(weight.mean() - 0.5) < 0.05

    masked = asked(own=0.25, masked=0.75)
    np.testing.assert_array_equal(masked["vector"], own)
    assert masked["masked"].mean() == pytest.approx(0.75, abs=0.03)


def test_means_and_mixtures_are_those_of_conditions_that_weigh_class_vectors(mined, place):
    index, table, conditions = mined
    query, variables = QueryNet(TAGGER, "class_vectors"), tagger_variables()
    variables = {name: {"tagger": tree} for name, tree in variables.items()}

    def condition(vectors):
        return np.asarray(query.apply(variables, jnp.asarray(vectors), method="adapt"))

    best = conditions.read(np.arange(len(table)), np.zeros(len(table), int))
    means = class_means(conditions, index, np.ones(len(table), bool), weighs=True)
    for label in range(3):
        of_class = condition(best[index.label_class == label])
        found = condition(means[label : label + 1])[0]
        np.testing.assert_allclose(found, of_class.mean(axis=0), atol=1e-5 * np.abs(found).max())
    assert not means[3:].any()

    records, classes = np.zeros(len(MANY), int), np.zeros(len(MANY), int)
    ask = lambda **shares: _asking(mined, weighs=True, **shares).ask(MANY, records, classes)  # noqa: E731
    own, other, mixed = (
        condition(ask(**{name: 1.0})["vector"]) for name in ("own", "other", "mix")
    )
    weight = np.sum((mixed - other) * (own - other), axis=1, keepdims=True)
    weight /= np.sum((own - other) ** 2, axis=1, keepdims=True)
    line = other + weight * (own - other)
    np.testing.assert_allclose(mixed, line, atol=1e-5 * np.abs(line).max())
    assert weight.min() < 0.05 < 0.95 < weight.max()


def test_sources_are_drawn_by_position_in_their_shares(mined):
    records, classes = np.zeros(len(MANY), int), np.zeros(len(MANY), int)
    shares = dict(own=0.3, mean=0.5, masked=0.2)
    asking = _asking(mined, **shares)
    columns = asking.ask(MANY, records, classes)
    is_mean = (columns["vector"] == asking.mean[0]).all(axis=1)
    assert is_mean.mean() == pytest.approx(0.5, abs=0.03)
    assert columns["masked"].mean() == pytest.approx(0.2, abs=0.03)
    assert not (is_mean & (columns["masked"] != 0)).any()
    some = MANY[1000:1013][::-1]
    for name, column in asking.ask(some, records[:13], classes[:13]).items():
        np.testing.assert_array_equal(column, columns[name][some])


def test_hosts_and_workers_are_asked_the_same(mined, place):
    index, table, _ = mined
    order = BalancedOrder(index.label_row, index.label_class, seed=5)
    placement = Placement(table, index, seed=5, top_k=2)
    asks = _asking(mined, own=0.2, other=0.3, mean=0.2, mix=0.1, masked=0.2)

    def feed(**arguments):
        steps = batches(
            ClipReader(place / "records", index),
            order,
            start_step=0,
            stop_step=3,
            batch_size=8,
            clip_samples=SEGMENT,
            places=placement,
            asks=asks,
            **arguments,
        )
        return [{name: batch[name] for name in ("vector", "masked")} for batch in steps]

    whole = feed()
    assert np.unique(np.concatenate([batch["vector"] for batch in whole]), axis=0).shape[0] > 5
    for parts in (
        zip(feed(host=0, hosts=2), feed(host=1, hosts=2), strict=True),
        zip(feed(workers=1), strict=True),
    ):
        for step, same in zip(parts, whole, strict=True):
            for name in same:
                joined = np.concatenate([part[name] for part in step])
                np.testing.assert_array_equal(joined, same[name])


BATCH, STEP_SAMPLES = 4, 1600


def _step(kind, **fields):
    """A separation step on anchors of a table; returns metrics of a batch."""
    width = {"soft": 527, "embedding": 6, "class_vectors": 6}[kind]
    separator = ResUNet(n_fft=64, hop_samples=32, channels=(4,), condition_width=width)
    query = QueryNet(TAGGER, kind, **fields)
    optimizer = optax.sgd(0.1)
    step = make_separation_step(
        Nets(separator, query),
        optimizer,
        l1_waveform,
        Anchoring(STEP_SAMPLES, min_dbfs=None),
        Mixing(sources=2, group_size=BATCH, match_energy=True),
    )
    variables = random_variables(separator, (1, 1, STEP_SAMPLES), (1, width))
    variables_of_tagger = jax.tree.map(jnp.asarray, tagger_variables())
    tagger = {item: {"tagger": tree} for item, tree in variables_of_tagger.items()}
    trees = ({"separator": variables[k], "query": {}} for k in ("params", "batch_stats"))
    state = create_state(*jax.tree.map(jnp.asarray, tuple(trees)), optimizer)
    jitted = quick_jit(step)

    def run(batch):
        _, metrics = jitted(state, {"query": tagger}, batch, jax.random.key(0))
        return jax.device_get(metrics)

    return run, query, tagger


def _batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "audio": (0.1 * rng.standard_normal((BATCH, STEP_SAMPLES))).astype(np.float32),
        "samples": np.full(BATCH, STEP_SAMPLES, np.int32),
        "class_index": np.array([3, 70, 5, 9], np.int32),
        "begin_sample": np.zeros(BATCH, np.int32),
        "anchor_sample": np.zeros(BATCH, np.int32),
        "score": np.zeros(BATCH, np.float32),
    }


@pytest.mark.parametrize("kind", ["soft", "embedding", "class_vectors"])
def test_a_step_with_the_nets_own_vectors_is_the_same_step(kind):
    run, query, tagger = _step(kind)
    batch = _batch()
    heard = quick_jit(
        lambda audio: query.tagger.apply({item: tagger[item]["tagger"] for item in tagger}, audio)
    )(batch["audio"])
    vector = np.asarray(heard[query.takes.reads])
    online, mined = run(batch), run({**batch, "vector": vector})
    for name in ("loss", "sdri", "grad_norm"):
        assert mined[name] == pytest.approx(online[name], rel=1e-6), name
    rounded = run({**batch, "vector": vector.astype(np.float16).astype(np.float32)})
    assert rounded["loss"] == pytest.approx(online["loss"], rel=1e-4)
    drawn = np.random.default_rng(1).random(vector.shape) ** 8
    other = run({**batch, "vector": drawn.astype(np.float32)})
    assert other["loss"] != pytest.approx(online["loss"], rel=1e-6)


def test_masked_items_are_asked_with_their_class_in_the_mixture():
    run, query, tagger = _step("soft")
    batch = _batch()
    audio = batch["audio"]
    power = np.sqrt(np.mean(audio**2, axis=1, keepdims=True))
    following = np.roll(audio, -1, axis=0)
    mixture = audio + following * power / np.roll(power, -1, axis=0)
    probabilities = [
        np.asarray(
            query.tagger.apply(
                {item: tagger[item]["tagger"] for item in tagger}, jnp.asarray(sound)
            )["clipwise"]
        )
        for sound in (audio, mixture)
    ]
    own = probabilities[0]
    alone = probabilities[1] * np.eye(527, dtype=np.float32)[batch["class_index"]]
    marks = np.array([1, 0, 0, 1], np.uint8)
    wanted = run({**batch, "vector": np.where(marks[:, None] != 0, alone, own)})
    for given in ({"masked": marks}, {"masked": marks, "vector": own}):
        assert run({**batch, **given})["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert run(batch)["loss"] != pytest.approx(wanted["loss"], rel=1e-5)


def test_shares_that_cannot_be_drawn_are_refused():
    check_shares(dict.fromkeys(SOURCES, 0.2), mined=True)
    check_shares({"own": 0.4, "masked": 0.6}, mined=False)
    for shares, said in (
        ({"own": 0.5}, "sum to 0.5, expected 1: own=0.5"),
        ({"own": 0.5, "others": 0.5}, "source.others: expected own, other, mean, mix, masked"),
        ({}, "sum to 0, expected 1"),
    ):
        with pytest.raises(UserError, match=said):
            check_shares(shares, mined=True)
    with pytest.raises(UserError, match=r"source\.mean needs mined conditions"):
        check_shares({"own": 0.5, "mean": 0.5}, mined=False)


def _train(place, workdir, **changed):
    leaves = {
        "anchors.source": "table",
        "anchors.table": place / "anchors.npz",
        "query.table": place / "anchors.conditions",
        "total_steps": 2,
    }
    leaves |= {key.replace("__", "."): value for key, value in changed.items()}
    return main(train_words("resunet30.py", place, workdir, leaves))


def _metrics(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "loss", "grad_norm")} for line in lines]


@pytest.mark.long
def test_a_run_on_mined_conditions_is_the_run_that_computes_them(
    place, tmp_path, capsys, quick_compilation
):
    drawn = {"anchors__top_k": 2}
    assert _train(place, tmp_path / "mined", **drawn) == 0
    assert "asked with: own 1" in capsys.readouterr().out
    assert _train(place, tmp_path / "online", query__table="", **drawn) == 0
    others = {"query__source__own": 0.0, "query__source__other": 1.0}
    assert _train(place, tmp_path / "others", **drawn, **others) == 0
    mined, online, others = (_metrics(tmp_path / name) for name in ("mined", "online", "others"))
    for one, other in zip(mined, online, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    # Which vectors they are matters more than that.
    assert others[0] != pytest.approx(online[0], rel=5e-4)
    config = json.loads((tmp_path / "mined" / "config.json").read_text())
    # A run on mined conditions keeps the mean of each class, with which `separate` asks.
    assert config["means"] == {"classes": 3}
    assert "means" not in json.loads((tmp_path / "online" / "config.json").read_text())
    index = load_index(place / "records", "train")
    table = read_table(place / "anchors.npz", index, SEGMENT)
    conditions = open_conditions(folder_of(place / "anchors.npz"), table, index)
    means = class_means(conditions, index, np.ones(len(table), bool))
    np.testing.assert_array_equal(Model(tmp_path / "mined").means, means)
    # It is that of the first start; a run that an older version began has none.
    assert _train(place, tmp_path / "mined", **drawn, total_steps=3) == 0
    assert json.loads((tmp_path / "mined" / "config.json").read_text())["means"] == {"classes": 3}
    shutil.rmtree(tmp_path / "mined" / "frozen" / "means")
    config = json.loads((tmp_path / "mined" / "config.json").read_text())
    del config["means"]
    (tmp_path / "mined" / "config.json").write_text(json.dumps(config))
    assert _train(place, tmp_path / "mined", **drawn, total_steps=4) == 0
    assert Model(tmp_path / "mined").means is None
    assert config["query"].keys() == {
        *("kind", "finetune", "adaptor_width", "adaptor_hidden", "shortcut"),
        *("one_class_share", "dropout", "model", "trained", "by_names"),
    }


@pytest.mark.long
def test_a_run_of_every_source_resumes_and_is_refused_with_others(
    place, tmp_path, capsys, quick_compilation
):
    asked = {f"query__source__{name}": 0.2 for name in SOURCES}
    asked |= {"query__groups": place / "labels.csv", "mixing__silent_share": 0.3}
    assert _train(place, tmp_path / "whole", total_steps=4, **asked) == 0
    assert "2 classes of 3 have one recording only" in capsys.readouterr().out
    assert _train(place, tmp_path / "parts", **asked) == 0
    moved = shutil.copytree(place / "anchors.conditions", tmp_path / "moved.conditions")
    again = {**asked, "total_steps": 4, "query__table": moved}
    assert _train(place, tmp_path / "parts", **again) == 0
    assert _metrics(tmp_path / "parts") == _metrics(tmp_path / "whole")
    fewer = {f"query__source__{name}": 0.0 for name in ("other", "mean", "mix")}
    for other in (
        {"query__source__own": 0.4, "query__source__mean": 0.0},
        {"query__groups": ""},
        {"query__table": "", "query__groups": "", "query__source__own": 0.8, **fewer},
    ):
        assert _train(place, tmp_path / "parts", **{**again, **other, "total_steps": 6}) == 1
        assert "this run was started with other conditions" in capsys.readouterr().err


def test_conditions_that_do_not_suit_the_run_are_refused_before_it(place, tmp_path, capsys):
    _mine(place, tmp_path / "other.npz", "other")
    _mine(place, tmp_path / "hidden.npz", "tagger", "--query-output", "embedding")
    (tmp_path / "labels.csv").write_text("file,labels,group\nnone.wav,Speech,a\n")
    shutil.copytree(place / "anchors.conditions", tmp_path / "flipped")
    shard = tmp_path / "flipped" / "00000.npy"
    *most, low, high = shard.read_bytes()
    shard.write_bytes(bytes([*most, low ^ 1, high]))  # a float16 that is valid, but another
    for changed, said in (
        ({"query__table": tmp_path / "flipped"}, "does not match its digest"),
        ({"query__table": tmp_path / "other.conditions"}, "mined with another query net"),
        (
            {"query__table": tmp_path / "hidden.conditions"},
            "holds the output embedding of its query net, config.query.kind=soft needs clipwise",
        ),
        ({"query__table": place / "records"}, "is not a folder of mined conditions"),
        ({"query__finetune": True}, "the conditions of a net that config.query.finetune=True"),
        ({"query__kind": "one_hot"}, "config.query.table has no effect with config.query.kind"),
        ({"anchors__source": "random"}, "holds the conditions of mined anchors; set"),
        ({"query__source__own": 0.5}, "sum to 0.5, expected 1"),
        ({"query__source__own": 2.0}, "config.query.source.own is 2.0, expected"),
        (
            {"query__kind": "embedding", "query__source__masked": 1.0, "query__source__own": 0.0},
            "config.query.source.masked needs conditions of probabilities",
        ),
        (
            {
                "query__groups": tmp_path / "labels.csv",
                "query__source__other": 1.0,
                "query__source__own": 0.0,
            },
            "has no line for any record (the first is a0)",
        ),
    ):
        assert _train(place, tmp_path / "run", **changed) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_only_recordings_have_conditions_to_mine(place, tmp_path, capsys):
    words = ["mine", "--records", place / "records", "--sed", place / "tagger"]
    words = [str(word) for word in [*words, "--out", tmp_path / "a.npz"]]
    assert main([*words, "--query-output", "embedding"]) == 1
    assert "--query-output has no effect without --query" in capsys.readouterr().err
