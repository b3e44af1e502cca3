import json
import pathlib
import shutil

import numpy as np
import pytest

from tests.evaluation.tones import BARK, DOG, SPEECH
from tests.tiny import RATE, noise
from uss_jax.audio.files import write_wav
from uss_jax.cli.main import main
from uss_jax.evaluation.rows import SHUFFLED
from uss_jax.evaluation.suites.pairs import Pair
from uss_jax.evaluation.summary import bootstrap_interval, format_summaries, summarise

QUICK_COMPILATION = True


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, inside = np.random.default_rng(0), 0
    classes = np.repeat(np.arange(4), 40)
    for _ in range(60):
        low, high = bootstrap_interval(rng.standard_normal(160), classes)
        inside += low <= 0 <= high
    assert inside >= 51  # 57 of 60 expected


def test_shares_are_of_all_items_that_have_a_figure():
    items = [Pair(pathlib.Path("m.wav"), pathlib.Path("s.wav"), DOG, group="")] * 5
    sdri = np.array([5.0, 5.1, -3.0, 9.0, np.nan])
    figures = {"sdri": sdri, "sdr": sdri, "si_sdr": sdri, "si_sdri": sdri, "level": sdri}
    figures["level_error"] = np.array([-3.0, 3.1, 0.0, -20.0, np.nan])
    alone = {"sdr": sdri, "si_sdr": sdri, "level": sdri}
    rows = summarise(items, {"oracle": figures, "target alone": alone})
    assert rows[0]["shares"] == {"sdri_above_5_db": 0.5, "level_within_3_db": 0.5}
    assert rows[1]["shares"] == {}
    lines = format_summaries(rows).splitlines()
    assert lines[1].split()[-4:] == ["50", "%", "4", "1"]
    assert lines[2].split()[-4:] == ["-", "-", "4", "1"]


def test_silent_targets_are_left_out_and_counted(place, tmp_path, capsys):
    """Also where they are all of a class, and where files of averages are silent."""
    folder = tmp_path / "pairs"
    shutil.copytree(place / "pairs", folder)
    silence = np.zeros((1, RATE // 2), np.float32)
    for label, name in ((SPEECH, "1"), (DOG, "9"), (BARK, "0")):
        (folder / f"class_id={label}").mkdir(exist_ok=True)
        write_wav(folder / f"class_id={label}/{name}.source.wav", silence, RATE)
        write_wav(folder / f"class_id={label}/{name}.mixture.wav", noise(1, 0.5)[None], RATE)
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("9.*", f"class_id={BARK}"))
    for path in (kept / f"class_id={SPEECH}").glob("1.*"):
        path.unlink()
    results = {}
    for data in (folder, kept):
        out = str(tmp_path / f"{data.name}.json")
        words = ["--model", place / "soft", "--train-pairs", data, "--out", out]
        words += ["--examples", "2", "--out-dir", tmp_path / f"examples_{data.name}"]
        assert main(["evaluate", "pairs", "--data", str(data), *map(str, words)]) == 0
        results[data.name] = json.loads((tmp_path / f"{data.name}.json").read_text())
    assert "left out: 3 with a silent target" in capsys.readouterr().out
    assert "left out: 3" in (tmp_path / "pairs.md").read_text()
    assert results["pairs"].pop("silent_targets") == 3
    assert results["kept"].pop("silent_targets") == 0
    for key in ("sdr", "sdri"):
        assert results["pairs"][key] == pytest.approx(results["kept"][key], abs=1e-3), key
    unshuffled = [[r for r in of["rows"] if r["query"] != SHUFFLED] for of in results.values()]
    for one, other in zip(*unshuffled, strict=True):
        assert one["pairs"] == other["pairs"]
        assert one["classes"]["number"] == other["classes"]["number"]
        assert one["plain_mean"] == pytest.approx(other["plain_mean"], abs=1e-3)
    assert len(list((tmp_path / "examples_pairs").glob("*.png"))) == 2
