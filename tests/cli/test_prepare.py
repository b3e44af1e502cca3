"""`uss-jax prepare` and `uss-jax index`, in a process of their own where exit status matters."""

import csv
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from uss_jax.cli.main import main
from uss_jax.data.index import load_index
from uss_jax.data.tf_example import serialise
from uss_jax.data.tfrecord import RecordWriter
from uss_jax.errors import UserError


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
    assert "2 clips, 0.0 minutes, 3 classes, 1 shard" in printed
    directory = collection.parent / "data sets" / "toy" / "1.0.0"
    digest = load_index(directory, "train").digest
    (directory / "index-train.npz").unlink()
    assert main(["index", str(directory)]) == 0
    assert (
        f"train: 2 records in 1 shard, 0.000 GB, 3 labels of 3 classes, digest {digest[:12]}"
        in (capsys.readouterr().out)
    )
    assert load_index(directory, "train").digest == digest


def test_left_out_clips_are_pointed_at(collection, capsys):
    (collection / "man.wav").write_text("not a sound")
    assert main(["prepare", *_arguments(collection)]) == 0
    assert "1 clip left out (1 unreadable), with reasons in " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "out", "said"),
    [
        ({"labels": "none.csv"}, "", "none.csv cannot be read"),
        ({"audio": "nowhere"}, "", "nowhere is not a folder"),
        ({"version": "one"}, "{labels}: 2 clips for split train\n", '--version cannot be "one"'),
    ],
)
def test_errors_are_one_sentence_and_status_1(collection, capsys, changed, out, said):
    words = ["prepare", *_arguments(collection, **changed)]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert printed.out == out.format(labels=collection / "labels.csv")
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not (collection.parent / "data sets").exists()
    if "labels" not in changed:
        return
    command = [sys.executable, "-m", "uss_jax.cli.main", *words]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, printed.out, printed.err)


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


def test_threads_with_beam_are_refused(collection, capsys):
    words = [*_arguments(collection), "--engine", "beam", "--workers", "4"]
    assert main(["prepare", *words]) == 1
    assert "--workers has no effect with --engine beam" in capsys.readouterr().err


def test_index_of_a_folder_without_shards_is_an_error(tmp_path, capsys):
    assert main(["index", str(tmp_path)]) == 1
    assert "has no shards" in capsys.readouterr().err


def test_a_home_folder_after_an_equals_sign_is_one(collection, monkeypatch):
    monkeypatch.setenv("HOME", str(collection.parent))
    words = [word for word in _arguments(collection) if word not in ("--out",)]
    words.remove(str(collection.parent / "data sets"))
    assert main(["prepare", *words, "--out=~/sets"]) == 0
    assert (collection.parent / "sets" / "toy" / "1.0.0" / "index-train.npz").is_file()


def test_what_is_passed_over_is_told(collection, capsys):
    (collection / "more.OPUS").touch()
    (collection / "notes.txt").touch()
    (collection / "labels.csv").write_text("file,labels\ndog.wav,Dog;Wuff\nman.wav,Mann\n")
    assert main(["prepare", *_arguments(collection)]) == 1
    assert '(unknown labels and how many lines have them: "Wuff" (1), "Mann" (1))' in (
        capsys.readouterr().err
    )
    assert main(["prepare", *_arguments(collection), "--skip-unknown-labels"]) == 0
    told = capsys.readouterr().out
    assert '2 labels are not classes and are skipped: "Wuff" (1), "Mann" (1)' in told
    assert f"{collection}: 1 recording is in no line of the label file (more.OPUS)" in told
    assert f"{collection}: 1 file is not a recording, judging by its name (notes.txt)" in told
    assert "1 clip left out (1 no label)" in told
    (collection / "own.csv").write_text("name,class\nWuff,Bark\nMann,Speech\n")
    words = [*_arguments(collection, **{"label-map": collection / "own.csv"}), "--overwrite"]
    assert main(["prepare", *words]) == 0
    assert "2 clips, 0.0 minutes, 3 classes" in capsys.readouterr().out
    (collection / "list.txt").write_text("dog.wav\n")
    assert main(["prepare", *words, "--files-from", str(collection / "list.txt")]) == 0
    told = capsys.readouterr().out
    assert "1 clip, 0.0 minutes, 2 classes" in told
    assert "not a recording, judging by its name (notes.txt)" in told  # not the map, nor the list


def test_every_file_with_remarks_is_listed(collection, capsys):
    loud = np.random.default_rng(0).uniform(-1.5, 1.5, 4000)
    for name in ("loud.wav", "hot.wav"):
        soundfile.write(collection / name, loud, 16000, subtype="FLOAT")
    names = [f"more{at:02d}.wav" for at in range(12)]
    for name in names:
        (collection / name).touch()
    lines = ["dog.wav,Dog;Wuff;Küche", "man.wav,Mann", "loud.wav,Speech", "hot.wav,Speech"]
    (collection / "labels.csv").write_text("\n".join(["file,labels", *lines]), encoding="utf-8")
    assert main(["prepare", *_arguments(collection), "--skip-unknown-labels"]) == 0
    told = capsys.readouterr().out
    directory = collection.parent / "data sets" / "toy" / "1.0.0"
    report = directory / "remarks-train.csv"
    assert (
        f"{report} lists each file with remarks (12 unlisted, 2 unknown labels, 2 clipped)" in told
    )
    assert "12 recordings are in no line of the label file (more00.wav, more01.wav, more02" in told
    assert "2 clips have more than 0.1 % of the samples above full scale" in told
    with open(report, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = [(row["file"], row["line"], row["kind"]) for row in rows]
    assert found == [
        ("dog.wav", "2", "unknown labels"),
        ("man.wav", "3", "unknown labels"),
        *((name, "", "unlisted") for name in names),
        ("loud.wav", "4", "clipped"),
        ("hot.wav", "5", "clipped"),
    ]
    assert rows[0]["text"] == "Wuff; Küche"
    assert re.fullmatch(r"\d\d % of its samples are above full scale .*", rows[-1]["text"])
    for name in (*names, "loud.wav", "hot.wav"):
        (collection / name).unlink()
    (collection / "labels.csv").write_text("file,labels\ndog.wav,Dog\nman.wav,Speech\n")
    assert main(["prepare", *_arguments(collection), "--overwrite"]) == 0
    assert "with remarks" not in capsys.readouterr().out
    assert not report.exists()


def test_the_folder_without_its_version_is_pointed_to(collection, capsys):
    assert main(["prepare", *_arguments(collection)]) == 0
    directory = collection.parent / "data sets" / "toy"
    for command in ("index", "inspect"):
        assert main([command, str(directory)]) == 1
        assert f"did you mean {directory / '1.0.0'}?" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"did you mean {re.escape(str(directory / '1.0.0'))}"):
        load_index(directory, "train")  # as training does
    assert main(["inspect", str(directory / "nothing")]) == 1
    assert "nothing does not exist" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("moment", ["they start", "they read"])
def test_ctrl_c_while_processes_index_prints_no_traceback(tmp_path, start, moment):
    # Links to one shard: minutes of work.
    samples = np.random.default_rng(0).integers(-9999, 9999, 4_000_000).astype(np.int16)
    name = "toy-train.tfrecord-{:05d}-of-01000"
    with RecordWriter(tmp_path / name.format(0)) as writer:
        for at in range(8):
            writer.write(serialise(b"%d" % at, samples, [at]))
    for number in range(1, 1000):
        os.link(tmp_path / name.format(0), tmp_path / name.format(number))
    (tmp_path / "metadata.json").write_text('{"sample_rate": 8000, "encoding": "pcm_s16le"}')
    words = [sys.executable, "-m", "uss_jax.cli.main", "index", str(tmp_path), "--workers", "2"]
    run = start(words, stderr=subprocess.PIPE, text=True)
    children = pathlib.Path(f"/proc/{run.pid}/task/{run.pid}/children")

    def there():
        if moment == "they start":
            return len(children.read_text().split()) >= 2
        return list(tmp_path.glob(".shards-of-train/*.npz"))

    while run.poll() is None and not there():
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said = run.communicate(timeout=60)[1]
    assert "Traceback" not in said
    assert run.returncode in (130, -signal.SIGINT)
