"""What a run says of itself is what `evaluate pairs` says of its checkpoint."""

import json

import numpy as np
import pytest

from tests.tiny import RATE, tone, train_words, write_pairs, write_place
from uss_jax.audio.files import write_wav
from uss_jax.bundles.checkpoints import Checkpoints
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.devices.mesh import make_mesh
from uss_jax.errors import UserError
from uss_jax.evaluation.averages import by_name, class_averages
from uss_jax.evaluation.clips import open_clips
from uss_jax.evaluation.metrics import class_medians
from uss_jax.evaluation.scoring import score
from uss_jax.evaluation.suites.pairs import find_pairs
from uss_jax.evaluation.summary import summarise
from uss_jax.models.query import QueryNet
from uss_jax.models.resunet import ResUNet
from uss_jax.training.live import AVERAGES, make_evaluation
from uss_jax.training.settings import BEST_BY
from uss_jax.training.state import TrainState

# Of the last two classes there are no training clips, and so no averages.
CLASSES = (0, 0, 0, 1, 1, 300, 300, 301, 301, 72, 400, 401)


@pytest.mark.long
def test_a_run_evaluates_itself_as_evaluate_does(tmp_path, quick_compilation):
    place = write_place(tmp_path / "place")
    write_pairs(tmp_path / "pairs", CLASSES)
    pairs = find_pairs(tmp_path / "pairs")
    changed = {"eval.pairs": tmp_path / "pairs", "eval.every_steps": 2, "total_steps": 4}
    changed |= {"checkpoint_every_steps": 3, "schedule.learning_rate": 1.0}
    assert main(train_words("resunet30.py", place, tmp_path / "run", changed)) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    said = {line["step"]: line for line in map(json.loads, lines) if "eval/sdri" in line}
    assert sorted(said) == [2, 4]
    assert said[2]["eval/sdri"] != said[4]["eval/sdri"]
    assert {f"eval/{name}" for name in BEST_BY} <= said[4].keys()
    assert (tmp_path / "run" / AVERAGES).exists()

    model = Model(tmp_path / "run")
    reader, _ = open_clips(place / "records", "train", model)
    averages = class_averages(model, reader, sorted(set(CLASSES)))
    assert sorted(averages) == [0, 1, 72, 300, 301]
    figures, _ = score(model, pairs, by_name(averages))
    rows = {row["query"]: row for row in summarise(pairs, figures)}
    for name, row in (("", "oracle"), ("average_", "class average"), ("class_", "class alone")):
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
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=None) as checkpoints:
        assert checkpoints.figures(4)["sdri"] == said[4]["eval/sdri"]
        assert np.isfinite(list(checkpoints.figures(2).values())).all()


def test_pairs_of_another_length_are_said(tmp_path):
    write_pairs(tmp_path, [3, 5])
    write_wav(tmp_path / "class_id=5" / "1_mixture.wav", tone(300, 0.4)[None], RATE)
    write_wav(tmp_path / "class_id=5" / "1_source.wav", tone(300, 0.4)[None], RATE)
    separator = ResUNet(n_fft=128, hop_samples=64, channels=(4, 4), condition_width=527)
    evaluate = make_evaluation(
        separator,
        QueryNet(None, "one_hot"),
        {},
        find_pairs(tmp_path),
        mesh=make_mesh(),
        sample_rate=RATE,
        batch_size=8,
        threads=1,
    )
    with pytest.raises(
        UserError, match=r"5/1_mixture.wav lasts 0.4 s, other pairs 0.5 s; all config"
    ):
        evaluate(TrainState(0, {}, {}, ()))
