import json

import pytest

from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.evaluation.comparison import compare, find_results


def _write(path, suite, **rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [{"query": name.replace("_", " "), **figures} for name, figures in rows.items()]
    path.write_text(json.dumps({"suite": suite, "rows": content}))


@pytest.fixture
def runs(tmp_path):
    _write(
        tmp_path / "a" / "pairs.json",
        "pairs",
        oracle={"group": "all", "sdri": 7.0},
        class_average={"group": "all", "sdri": 5.0},
        half_the_mixture={"group": "all", "sdri": 3.01},
    )
    _write(tmp_path / "a" / "results" / "v.json", "voicebank_demand", class_average={"ssnr": 8.5})
    _write(tmp_path / "b" / "pairs.json", "pairs", oracle={"group": "all", "sdri": 6.5})
    (tmp_path / "b" / "config.json").write_text('{"kind": "separator"}')
    (tmp_path / "b" / "other.json").write_text("not JSON")
    return tmp_path


def test_a_column_for_each_workdir_beside_the_published_figures(runs):
    header, rows, _, _ = compare([runs / "a", runs / "b"])
    assert header[3:] == [str(runs / "a"), str(runs / "b"), "paper", "AudioSep"]
    assert rows[0][2:] == ["class average", 5.0, None, 5.57, 7.74]
    assert rows[1][2:] == ["oracle", 7.0, 6.5, None, None]
    assert rows[2][2:] == ["half the mixture", 3.01, None, None, None]
    last = rows[-1]
    assert last[0] == "Voicebank-Demand"
    assert last[1:] == ["SSNR, dB", "class average", 8.5, None, 9.0, None]
    published = {row[0]: row[5] for row in rows if row[0]}
    assert list(published.values()) == [5.57, 10.57, None, 8.12, 7.28, 9.0]


def test_what_is_missing_says_how_to_get_it(runs, capsys):
    out = runs / "table.md"
    assert main(["compare", str(runs / "a"), str(runs / "b"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    a, b = runs / "a", runs / "b"
    command = (
        f"uss-jax evaluate musdb18 --model {a} --data FOLDER_OF_MUSDB18 --legacy "
        f"--out {a}/musdb18.json"
    )
    assert command in printed
    assert f"{b}/pairs.json (it was scored without --train-pairs TRAIN_PAIRS)" in printed
    assert f"--model {a} --data PAIRS" not in printed
    text = out.read_text()
    assert "| AudioSet, 527 classes | SDRi, dB | class average | 5.00 | - | 5.57 | 7.74 |" in text
    assert command in text


def test_figures_of_other_classes_are_not_passed_off_as_comparable(runs, capsys):
    few = {"group": "all", "sdri": 7.0, "classes": {"number": 32}}
    _write(runs / "a" / "pairs.json", "pairs", oracle=few)
    _write(runs / "b" / "pairs.json", "pairs", oracle={**few, "classes": {"number": 527}})
    _, _, unlike, _ = compare([runs / "a", runs / "b"])
    assert unlike == [f"{runs / 'a'}: pairs of 32 classes, not of 527 as published"]
    out = runs / "table.md"
    assert main(["compare", str(runs / "a"), "--out", str(out)]) == 0
    assert f"not to be compared:\n  {unlike[0]}\n" in capsys.readouterr().out
    assert f"Not to be compared:\n\n    {unlike[0]}\n" in out.read_text()


def test_the_newest_results_of_a_suite_count(runs):
    _write(runs / "a" / "again" / "p.json", "pairs", oracle={"group": "all", "sdri": 9.0})
    assert find_results(runs / "a")["pairs"]["rows"][0]["sdri"] == 9.0
    with pytest.raises(UserError, match="is not a folder"):
        find_results(runs / "c")
