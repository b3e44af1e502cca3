import json
import os
import shutil
import sys

import pytest
import soundfile

from tests.evaluation.tones import evaluate_pairs
from uss_jax.cli.main import main
from uss_jax.evaluation import run

QUICK_COMPILATION = True


@pytest.mark.parametrize("out", ["results", "results.csv", "run.v1", ".json"])
def test_results_are_json_so_that_no_file_beside_takes_their_place(place, tmp_path, out, capsys):
    assert evaluate_pairs(place, "soft", tmp_path / out) == 1
    assert "give a file name that ends in .json" in capsys.readouterr().err


def test_inputs_and_files_of_others_are_not_replaced(place, tmp_path, capsys):
    shutil.copytree(place / "soft", tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()
    assert evaluate_pairs(place, "soft", tmp_path / "model" / "config.json") == 1
    assert "config.json exists and holds no results; give --out" in capsys.readouterr().err
    assert (tmp_path / "model" / "config.json").read_bytes() == before
    (tmp_path / "manifest.csv").write_text("file,group\n")
    assert evaluate_pairs(place, "soft", tmp_path / "manifest.json") == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'manifest.csv'} exists, but no results" in said
    assert (tmp_path / "manifest.csv").read_text() == "file,group\n"
    for _ in range(2):  # results are replaced
        assert evaluate_pairs(place, "soft", tmp_path / "results.json") == 0
        assert not list(tmp_path.glob(".*unfinished"))


def test_a_run_that_was_stopped_while_it_wrote_goes_on(place, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_results", stopped)
        assert evaluate_pairs(place, "soft", tmp_path / "results.json") == 130
    assert (tmp_path / "results.csv").exists()
    assert evaluate_pairs(place, "soft", tmp_path / "results.json") == 0
    assert not list(tmp_path.glob(".*unfinished"))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are any bytes on Linux only")
def test_a_folder_whose_name_is_not_text_is_evaluated(place, tmp_path):
    data, out = os.fsdecode(os.fsencode(tmp_path) + b"/d\xff"), tmp_path / "results.json"
    shutil.copytree(place / "pairs", data)
    words = ["--data", data, "--out", str(out)]
    model = ["--model", str(place / "soft")]
    assert main(["evaluate", "pairs", *model, "--oracle-only", *words]) == 0
    assert os.fsencode(json.loads(out.read_text())["how"]["data"]).endswith(b"d\xff")


def test_the_group_of_all_pairs_is_no_name(place, tmp_path, capsys):
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    mixture = next((tmp_path / "pairs").glob("class_id=*/*mixture.wav"))
    name = f"{mixture.parent.name}/{mixture.name.removesuffix('mixture.wav').rstrip('._')}"
    (tmp_path / "pairs" / "manifest.csv").write_text(f"file,group\n{name},all\n")
    words = ["--data", str(tmp_path / "pairs"), "--out", str(tmp_path / "r.json")]
    assert main(["evaluate", "pairs", "--model", str(place / "soft"), *words]) == 1
    assert 'is "all", which stands for all pairs in tables; name it' in capsys.readouterr().err


def test_a_silent_mixture_of_a_sound_is_refused(place, tmp_path, capsys):
    shutil.copytree(place / "pairs", tmp_path / "pairs")
    mixture = next((tmp_path / "pairs").glob("class_id=*/*mixture.wav"))
    samples, rate = soundfile.read(mixture)
    soundfile.write(mixture, 0 * samples, rate)
    words = ["--data", str(tmp_path / "pairs"), "--out", str(tmp_path / "r.json")]
    assert main(["evaluate", "pairs", "--model", str(place / "soft"), *words]) == 1
    assert f"{mixture} is silent, but its source is not" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()
