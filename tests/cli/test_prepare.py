"""`uss-jax prepare` and `uss-jax index`, in a process of their own where exit status matters."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile

from uss_jax.cli.main import main
from uss_jax.data.index import load_index


@pytest.fixture
def collection(tmp_path):
    folder = tmp_path / "a collection"
    folder.mkdir()
    for name in ("dog.wav", "man.wav"):
        waveform = np.random.default_rng(0).uniform(-0.5, 0.5, 4000)
        soundfile.write(folder / name, waveform, 16000)
    (folder / "labels.csv").write_text("file,labels\ndog.wav,Dog;Bark\nman.wav,Speech\n")
    return folder


def _arguments(collection, **changed):
    options = {
        "audio": collection,
        "labels": collection / "labels.csv",
        "out": collection.parent / "data sets",
        "name": "toy",
        "version": "1.0.0",
        "split": "train",
    }
    options |= changed
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def test_prepare_then_index_says_what_it_made(collection, capsys):
    assert main(["prepare", *_arguments(collection), "--sample-rate", "8000"]) == 0
    printed = capsys.readouterr().out
    assert "2 clips, 0.0 minutes, 3 classes, 1 shards" in printed
    directory = collection.parent / "data sets" / "toy" / "1.0.0"
    digest = load_index(directory, "train").digest
    (directory / "index-train.npz").unlink()
    assert main(["index", str(directory)]) == 0
    assert (
        f"train: 2 records in 1 shards, 0.000 GB, 3 labels of 3 classes, digest {digest[:12]}"
        in (capsys.readouterr().out)
    )
    assert load_index(directory, "train").digest == digest


def test_left_out_clips_are_pointed_at(collection, capsys):
    (collection / "man.wav").write_text("not a sound")
    assert main(["prepare", *_arguments(collection)]) == 0
    assert "1 clips left out (1 unreadable), with reasons in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"labels": "none.csv"}, "none.csv cannot be read"),
        ({"audio": "nowhere"}, "nowhere is not a folder"),
        ({"version": "one"}, '--version cannot be "one"'),
    ],
)
def test_errors_are_one_sentence_and_status_1(collection, changed, said):
    ran = subprocess.run(
        [sys.executable, "-m", "uss_jax.cli.main", "prepare", *_arguments(collection, **changed)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert ran.stdout == "" or "2 clips" in ran.stdout
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not (collection.parent / "data sets").exists()


def test_numbers_that_make_no_sense_are_refused(collection, capsys):
    for option, value in (
        *(("--shards", "0"), ("--shards", "100000"), ("--workers", "10000000")),
        *(("--clip-seconds", bad) for bad in ("nan", "inf", "1e9", "0", "-1", "ten")),
        *(("--sample-rate", bad) for bad in ("32k", "9" * 11, "9" * 5000, "0", "-8000", "٣٢٠٠٠")),
    ):
        with pytest.raises(SystemExit):
            main(["prepare", *_arguments(collection), option, value])
        said = capsys.readouterr().err
        assert f"expected a {'number' if 'seconds' in option else 'whole number'} from" in said
        assert len(said) < 3000


def test_index_of_a_folder_without_shards_is_an_error(tmp_path, capsys):
    assert main(["index", str(tmp_path)]) == 1
    assert "has no shards" in capsys.readouterr().err
