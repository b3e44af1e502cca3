"""What a run says of itself is what `evaluate pairs` says of its checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import (
    RATE,
    TAGGER,
    tagger_variables,
    tone,
    train_words,
    write_pairs,
    write_place,
)
from uss_jax.audio.files import write_wav
from uss_jax.bundles.checkpoints import Checkpoints
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.devices.mesh import make_mesh
from uss_jax.errors import UserError
from uss_jax.evaluation.averages import averaged, by_name, class_vectors
from uss_jax.evaluation.clips import open_clips
from uss_jax.evaluation.metrics import class_medians
from uss_jax.evaluation.rows import Drawn
from uss_jax.evaluation.scoring import score
from uss_jax.evaluation.suites.pairs import find_pairs
from uss_jax.evaluation.summary import summarise
from uss_jax.models.query import QueryNet
from uss_jax.models.resunet import ResUNet
from uss_jax.training.live import make_evaluation
from uss_jax.training.live_conditions import (
    AVERAGES,
    RECORDINGS,
    Asked,
    other_pairs,
    training_conditions,
)
from uss_jax.training.state import TrainState

QUICK_COMPILATION = True

# Of the last two classes there are no training clips, and so no averages.
CLASSES = (0, 0, 0, 1, 1, 300, 300, 301, 301, 72, 400, 401)
QUERIES = ("average", "class", "shuffled", "recordings_2", "recordings_1", "recordings_100")
# Prefix of the metrics -> row of `evaluate pairs`; no class has a hundred clips.
ROWS = {
    "": "oracle",
    "average_": "class average",
    "class_": "class alone",
    "shuffled_": "shuffled oracle",
    "recordings_2_": "2 recordings",
    "recordings_1_": "1 recording",
}


@pytest.mark.long
def test_a_run_evaluates_itself_as_evaluate_does(tmp_path):
    place = write_place(tmp_path / "place")
    write_pairs(tmp_path / "pairs", CLASSES)
    pairs = find_pairs(tmp_path / "pairs")
    changed = {"eval.pairs": tmp_path / "pairs", "eval.every_steps": 2, "total_steps": 4}
    changed |= {"checkpoint_every_steps": 3, "schedule.learning_rate": 1.0}
    changed |= {"eval.queries": QUERIES, "best_by": "recordings_1_si_sdri"}
    assert main(train_words("resunet30.py", place, tmp_path / "run", changed)) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    said = {line["step"]: line for line in map(json.loads, lines) if "eval/sdri" in line}
    assert sorted(said) == [2, 4]
    assert said[2]["eval/sdri"] != said[4]["eval/sdri"]
    assert (tmp_path / "run" / AVERAGES).exists()

    model = Model(tmp_path / "run")
    reader, _ = open_clips(place / "records", "train", model)
    vectors = class_vectors(model, reader, sorted(set(CLASSES)))
    assert sorted(vectors) == [0, 1, 72, 300, 301]
    assert max(map(len, vectors.values())) < 100
    averages, drawn = by_name(averaged(vectors)), Drawn(by_name(vectors), (1, 2))
    figures, _ = score(model, pairs, averages, drawn=drawn)
    rows = {row["query"]: row for row in summarise(pairs, figures)}
    for name, row in ROWS.items():
        for figure in ("sdri", "si_sdri"):
            # One program or another, in float32.
            wanted = pytest.approx(rows[row][figure], abs=1e-3)
            assert said[4][f"eval/{name}{figure}"] == wanted
    source, mixture = (np.stack([p.read(s, RATE) for p in pairs]) for s in ("source", "mixture"))
    classes = np.array([pair.class_index for pair in pairs], np.int32)
    estimate = model.separate(mixture, model.condition(source, classes))
    medians = class_medians(np.abs(estimate - source).mean(axis=1), classes)
    assert said[4]["eval/l1"] == pytest.approx(np.mean(list(medians.values())), rel=1e-4)
    assert said[4]["eval/half_sdri"] == pytest.approx(rows["half the mixture"]["sdri"], abs=1e-4)
    assert not any("recordings_100" in name for name in said[4])

    # The conditions are computed once, and anew for other pairs, records or nets.
    arguments = tmp_path / "run", str(place / "records"), "train"
    written = [(tmp_path / "run" / name).stat().st_mtime_ns for name in (AVERAGES, RECORDINGS)]
    whole = training_conditions(*arguments, pairs, QUERIES)
    again = [(tmp_path / "run" / name).stat().st_mtime_ns for name in (AVERAGES, RECORDINGS)]
    assert again == written
    with open(tmp_path / "run" / RECORDINGS, "rb") as file:
        np.testing.assert_array_equal(np.load(file)["vectors"][0], whole["recordings_2"])
    fewer = training_conditions(*arguments, pairs[:4], ["average", "recordings_1", "recordings_2"])
    assert list(fewer) == ["average", "recordings_1"]  # these classes have one clip each
    for name, vectors in fewer.items():
        np.testing.assert_array_equal(vectors, whole[name][:4])
    strangers = [pair for pair in pairs if pair.class_index >= 400]  # of no training clip
    assert training_conditions(*arguments, strangers, ["average", "recordings_1"]) == {}
    more = training_conditions(*arguments, pairs, QUERIES)
    for name, vectors in whole.items():
        np.testing.assert_array_equal(more[name], vectors)
    old = dict(np.load(tmp_path / "run" / AVERAGES)) | {"digest": "of another net"}
    np.savez(tmp_path / "run" / AVERAGES, **{**old, "vectors": old["vectors"] + 1})
    (same,) = training_conditions(*arguments, pairs, ["average"]).values()
    np.testing.assert_array_equal(same, whole["average"])
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.figures(4)["sdri"] == said[4]["eval/sdri"]
        best = max((2, 4), key=lambda step: said[step]["eval/recordings_1_si_sdri"])
        assert checkpoints.figures(best)["recordings_1_si_sdri"] > -np.inf
        assert np.isfinite(list(checkpoints.figures(2).values())).all()


class Echo(ResUNet):
    """Gives back the number of the class that it is asked for."""

    mask = None

    def __call__(self, mixture, condition, train=False):
        asked = jnp.argmax(condition, axis=1) + jnp.sum(condition, axis=1) - 1  # NaN if it is
        return jnp.broadcast_to(asked[:, None, None] / 1000, mixture.shape)


def test_each_query_asks_with_its_own_conditions(tmp_path):
    write_pairs(tmp_path, CLASSES)
    pairs = find_pairs(tmp_path)
    others = other_pairs(pairs, RATE, 2)
    vectors = np.eye(527, dtype=np.float32)[np.arange(len(pairs))]
    vectors[3] = np.nan
    evaluate = make_evaluation(
        Echo(),
        QueryNet(None, "one_hot"),
        {},
        pairs,
        Asked({"recordings_1": vectors}, np.where(np.arange(len(pairs)) == 1, -1, others)),
        mesh=make_mesh(),
        sample_rate=RATE,
        batch_size=8,
        threads=2,
    )
    nothing = {"separator": {}, "query": {}}
    assert evaluate(TrainState(0, nothing, nothing, ()), lambda: True) is None  # broken off
    figures = evaluate(TrainState(0, nothing, nothing, ()))
    classes = np.array([pair.class_index for pair in pairs])
    source = np.stack([pair.read("source", RATE) for pair in pairs])

    def l1(asked, left_out):
        rows = np.delete(np.arange(len(pairs)), left_out)
        errors = np.abs(asked[rows, None] / 1000 - source[rows]).mean(axis=1)
        return np.mean(list(class_medians(errors, classes[rows]).values()))

    assert figures["l1"] == pytest.approx(l1(classes, []), rel=1e-5)
    assert figures["shuffled_l1"] == pytest.approx(l1(classes[others], [1]), rel=1e-5)
    assert figures["recordings_1_l1"] == pytest.approx(l1(np.arange(len(pairs)), [3]), rel=1e-5)
    assert (classes[others] != classes).all()


def test_a_class_is_asked_for_by_its_mean_or_by_itself(tmp_path):
    write_pairs(tmp_path, CLASSES)
    pairs, variables = find_pairs(tmp_path), tagger_variables()
    classes, means = np.array([p.class_index for p in pairs]), np.zeros((527, 527), np.float32)
    for label in (0, 1, 300):
        means[label, label + 100] = 1
    evaluate = make_evaluation(
        Echo(),
        QueryNet(TAGGER, "soft"),
        {"query": {item: {"tagger": tree} for item, tree in variables.items()}},
        pairs,
        Asked(known=np.ones(len(pairs), bool), means=means),
        mesh=make_mesh(),
        sample_rate=RATE,
        batch_size=8,
        threads=2,
    )
    nothing = {"separator": {}, "query": {}}
    figures = evaluate(TrainState(0, nothing, nothing, ()))
    source, mixture = (np.stack([p.read(s, RATE) for p in pairs]) for s in ("source", "mixture"))
    heard = np.asarray(jax.jit(TAGGER.apply)(variables, mixture)["clipwise"])
    asked = np.where(
        means[classes].any(axis=1), classes + 100, classes + heard[range(len(pairs)), classes] - 1
    )
    errors = np.abs(asked[:, None] / 1000 - source).mean(axis=1)
    wanted = np.mean(list(class_medians(errors, classes).values()))
    assert figures["mean_l1"] == pytest.approx(wanted, rel=1e-4)


def test_pairs_of_classes_that_the_net_lacks_are_not_asked_by_class():
    known = np.array([True, False])
    means = np.ones((2, 2), np.float32)
    assert Asked(known=known, alone=True).names == ["class"]
    assert Asked(known=known, alone=True, means=means).names == ["mean", "class"]
    assert Asked(known=~known & known, alone=True, means=means).names == []
    for name in ("mean", "class"):
        assert Asked(known=known).exists(name, 2).tolist() == [True, False]
    assert Asked(known=known).names == []


def test_an_estimate_that_is_no_number_is_not_left_out(tmp_path):
    """`evaluate pairs` refuses such a checkpoint; a mean of the other pairs would hide it."""
    write_pairs(tmp_path, [3, 5, 5, 7])
    pairs = find_pairs(tmp_path)
    write_wav(pairs[3].source, 0 * tone(300, 0.5)[None], RATE)
    vectors = np.eye(527, dtype=np.float32)[[3, 5, 5, 7]]
    vectors[0] = np.nan  # this pair has no such condition
    asked = {"recordings_1": vectors, "average": vectors.copy()}
    asked["recordings_1"][1] *= np.float32(3e38)
    evaluate = make_evaluation(
        Echo(),
        QueryNet(None, "one_hot"),
        {},
        pairs,
        Asked(asked),
        mesh=make_mesh(),
        sample_rate=RATE,
        batch_size=8,
        threads=1,
    )
    nothing = {"separator": {}, "query": {}}
    figures = evaluate(TrainState(0, nothing, nothing, ()))
    assert (figures["silent"], figures["not_finite"]) == (1, 1)
    for name in ("sdri", "si_sdri", "l1", "average_sdri", "average_l1", "half_sdri"):
        assert np.isfinite(figures[name]), name
    assert np.isnan(figures["recordings_1_sdri"])


def test_a_silent_source_is_not_asked_with(tmp_path):
    write_pairs(tmp_path, CLASSES)
    pairs = find_pairs(tmp_path)
    before = other_pairs(pairs, RATE, 1)
    silent = int(before[0])
    write_wav(pairs[silent].source, 0 * tone(300, 0.5)[None], RATE)
    after = other_pairs(pairs, RATE, 1)
    assert (after[before == silent] != silent).all()
    assert silent not in after


def _evaluation(query, pairs):
    separator = ResUNet(n_fft=128, hop_samples=64, channels=(4, 4), condition_width=527)
    sizes = {"mesh": make_mesh(), "sample_rate": RATE, "batch_size": 8, "threads": 1}
    return make_evaluation(separator, query, {}, pairs, Asked(), **sizes)


def test_pairs_of_another_length_are_said(tmp_path):
    write_pairs(tmp_path, [3, 5])
    write_wav(tmp_path / "class_id=5" / "1_mixture.wav", tone(300, 0.4)[None], RATE)
    write_wav(tmp_path / "class_id=5" / "1_source.wav", tone(300, 0.4)[None], RATE)
    with pytest.raises(
        UserError, match=r"5/1_mixture.wav lasts 0.4 s, other pairs 0.5 s; all config"
    ):
        _evaluation(QueryNet(None, "one_hot"), find_pairs(tmp_path))


def test_pairs_too_short_for_the_query_net_are_said_before_the_run(tmp_path):
    write_pairs(tmp_path, [3])
    for path in (tmp_path / "class_id=3").glob("*.wav"):
        write_wav(path, tone(300, 0.01)[None], RATE)
    with pytest.raises(UserError, match=r"_mixture.wav lasts 0.01 s, too short for the query net;"):
        _evaluation(QueryNet(TAGGER, "soft"), find_pairs(tmp_path))
