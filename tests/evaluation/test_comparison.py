import json
import os
import re
import shutil

import pytest

from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.evaluation import run
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
    header, rows, _ = compare([runs / "a", runs / "b"])
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
    assert f"{b}/pairs.json (evaluated without --train-pairs TRAIN_PAIRS)" in printed
    assert f"--model {a} --data PAIRS" not in printed
    text = out.read_text()
    assert "| AudioSet, 527 classes | SDRi, dB | class average | 5.00 | - | 5.57 | 7.74 |" in text
    assert command in text


def test_figures_of_other_classes_are_not_passed_off_as_comparable(runs, capsys):
    few = {"group": "all", "sdri": 7.0, "classes": {"number": 32}}
    _write(runs / "a" / "pairs.json", "pairs", oracle=few)
    _write(runs / "b" / "pairs.json", "pairs", oracle={**few, "classes": {"number": 527}})
    _, _, remarks = compare([runs / "a", runs / "b"])
    unlike = remarks["not comparable"]
    assert unlike == [f"{runs / 'a'}: pairs (oracle) averaged over 32 classes, published over 527"]
    out = runs / "table.md"
    assert main(["compare", str(runs / "a"), "--out", str(out)]) == 0
    assert f"not comparable:\n  {unlike[0]}\n" in capsys.readouterr().out
    assert f"Not comparable:\n\n    {unlike[0]}\n" in out.read_text()


def test_results_of_another_protocol_are_not_passed_off_as_comparable(runs):
    path = runs / "a" / "results" / "v.json"
    content = json.loads(path.read_text())
    said = f"{runs / 'a'}: voicebank_demand computed with --blocks windows, published with --blocks"
    for blocks, unlike in (("windows", [said + " reference"]), ("reference", [])):
        path.write_text(json.dumps({**content, "how": {"blocks": blocks}}))
        assert compare([runs / "a"])[2].get("not comparable", []) == unlike
    # Averages over training clips, where the paper's are over sources of training pairs.
    path = runs / "a" / "pairs.json"
    content = json.loads(path.read_text())
    for how, lines in (({"train_records": "r", "split": "train"}, 1), ({"train_pairs": "p"}, 0)):
        path.write_text(json.dumps({**content, "how": how}))
        assert len(compare([runs / "a"])[2].get("not comparable", [])) == lines


def test_results_of_other_classes_have_rows_of_their_own(runs):
    few = {"group": "all", "sdri": 7.0, "classes": {"number": 32}}
    average = {"group": "all", "sdri": 5.0, "classes": {"number": 32}}
    _write(runs / "a" / "pairs.json", "pairs", oracle=few, class_average=average)
    _, rows, _ = compare([runs / "a", runs / "b"])
    assert rows[0] == ["AudioSet, 527 classes", "SDRi, dB", "class average", None, None, 5.57, 7.74]
    assert rows[1] == ["", "SDRi, dB", "oracle", None, 6.5, None, None]
    own = "pairs, 32 classes of your own"
    assert rows[2] == [own, "SDRi, dB", "class average", 5.0, None, None, None]
    assert rows[3] == ["", "SDRi, dB", "oracle", 7.0, None, None, None]


def test_each_row_counts_its_own_classes(runs):
    """An average over the few classes that training recordings have is not over all."""
    oracle = {"group": "all", "sdri": 7.0, "classes": {"number": 527}}
    average = {"group": "all", "sdri": 12.0, "classes": {"number": 3}}
    _write(runs / "a" / "pairs.json", "pairs", oracle=oracle, class_average=average)
    _, rows, remarks = compare([runs / "a"])
    assert rows[0] == ["AudioSet, 527 classes", "SDRi, dB", "class average", None, 5.57, 7.74]
    assert rows[1] == ["", "SDRi, dB", "oracle", 7.0, None, None]
    own = "pairs, 3 classes of your own"
    assert rows[2] == [own, "SDRi, dB", "class average", 12.0, None, None]
    (unlike,) = remarks["not comparable"]
    assert "pairs (class average) averaged over 3 classes" in unlike


def test_a_damaged_newer_file_is_told_beside_the_older_results(runs, capsys):
    (runs / "a" / "new.json").write_text('{"suite": "pairs", "rows": [{"query"')
    with open(runs / "a" / "huge.json", "wb") as file:
        file.truncate(1 << 34)
    assert main(["compare", str(runs / "a")]) == 0
    unread = capsys.readouterr().out.partition("not read:\n")[2]
    assert f"{runs / 'a' / 'new.json'}: is not JSON" in unread
    assert f"{runs / 'a' / 'huge.json'}: holds more than" in unread


def test_results_of_many_groups_are_read_and_may_be_replaced(runs):
    path = runs / "a" / "pairs.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "more": "x" * 17_000_000}))
    assert "pairs" in find_results(runs / "a")[0]
    run._require_replaceable(str(path))


def test_a_table_has_a_name_of_its_own(runs, capsys):
    results = (runs / "a" / "pairs.json").read_bytes()
    assert main(["compare", str(runs / "a"), "--out", str(runs / "a" / "pairs.json")]) == 1
    assert "give a name that ends in .md" in capsys.readouterr().err
    assert (runs / "a" / "pairs.json").read_bytes() == results


def test_only_a_table_of_an_earlier_comparison_is_replaced(runs, capsys):
    words = ["compare", str(runs / "a"), "--out"]
    (runs / "README.md").write_text("# Mine\n")
    (runs / "folder.md").mkdir()
    (runs / "link.md").symlink_to(runs / "nothing")
    for name in ("README.md", "folder.md", "link.md"):
        assert main([*words, str(runs / name)]) == 1
        printed = capsys.readouterr()
        assert f"{name} exists and is no table of this command; give another" in printed.err
        assert printed.out == ""
    assert (runs / "README.md").read_text() == "# Mine\n"
    for value in (7.0, 6.25):
        _write(runs / "a" / "pairs.json", "pairs", oracle={"group": "all", "sdri": value})
        assert main([*words, str(runs / "table.md")]) == 0
        assert f"| oracle | {value:.2f} |" in (runs / "table.md").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"suite": "pairs", "rows": [{"sdri": 10**400}]}, "rows[0].sdri is a whole number of more"),
        (
            {"suite": "pairs", "rows": [{"sdri": 1e308}]},
            "rows[0].sdri is 1e+308, expected a number",
        ),
        ({"suite": 3, "rows": []}, "suite is 3, expected a string"),
        ({"suite": "pairs", "rows": {}}, "rows is an object of 0, expected a list"),
        ({"suite": "pairs", "rows": [7]}, "rows[0] is 7"),
        ({"suite": "pairs", "rows": [{"sdri": "good"}]}, "rows[0].sdri is 'good'"),
        ({"suite": "pairs", "rows": [{"sdri": float("nan")}]}, "rows[0].sdri is nan"),
        ({"suite": "pairs", "rows": [{"classes": 32}]}, "rows[0].classes is 32"),
        ({"suite": "pairs", "rows": [{"classes": {"number": "x"}}]}, "classes.number is 'x'"),
    ],
)
def test_malformed_results_are_one_sentence(runs, capsys, content, said):
    (runs / "a" / "pairs.json").write_text(json.dumps(content))
    assert main(["compare", str(runs / "a")]) == 1
    printed = capsys.readouterr().err
    assert f"a/pairs.json: {said}" in printed or said in printed
    assert printed.endswith("run the evaluation again or remove the file\n")


def test_files_of_others_do_not_matter(runs, capsys):
    (runs / "a" / "dangling.json").symlink_to(runs / "nothing")
    os.mkfifo(runs / "a" / "pipe.json")
    (runs / "a" / "deep.json").write_text("[" * 100_000)
    (runs / "a" / "bytes.json").write_bytes(b"\xff\xfe")
    (runs / "a" / "list.json").write_text("[1]")
    strange = runs / "two\nlines | c"
    shutil.copytree(runs / "b", strange)
    assert main(["compare", str(runs / "a"), str(strange), "--out", str(runs / "t.md")]) == 0
    printed = capsys.readouterr().out
    assert "two\\nlines | c" in printed
    for name, why in (("deep", "nested deeper than 32"), ("bytes", "not text in UTF-8")):
        assert re.search(
            rf"^  \S+/{name}\.json: \S+ {why}", printed.partition("not read:")[2], re.M
        )
    assert "list.json" not in printed
    first = next(line for line in (runs / "t.md").read_text().splitlines() if "| metric" in line)
    assert first.count("|") - first.count("\\|") == 8


def test_the_newest_results_of_a_suite_count(runs):
    _write(runs / "a" / "again" / "p.json", "pairs", oracle={"group": "all", "sdri": 9.0})
    assert find_results(runs / "a")[0]["pairs"]["rows"][0]["sdri"] == 9.0
    with pytest.raises(UserError, match="is not a folder"):
        find_results(runs / "c")
