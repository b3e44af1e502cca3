"""Many recordings through the command line: folders, reports, bad files among good ones."""

import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from tests import tiny
from uss_jax.cli.main import main
from uss_jax.separation.job import find_recordings
from uss_jax.separation.report import band_levels

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(tiny.write_separator(tmp_path_factory.mktemp("separator") / "bundle"))


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    (folder / "more").mkdir(parents=True)
    for name, seed in (("a.wav", 0), ("b.flac", 1), ("more/a.wav", 2)):
        soundfile.write(folder / name, tiny.noise(seed, 1.2), tiny.RATE)
    (folder / "notes.txt").write_text("not audio")
    return folder


def separate(bundle, out, *words):
    return main(["separate", "--model", bundle, "--out", str(out), "--threshold", "0.0", *words])


def test_every_recording_gets_a_folder_and_a_report(bundle, recordings, tmp_path, capsys):
    out = tmp_path / "out"
    assert separate(bundle, out, str(recordings), "--classes", "Dog", "Music+Speech") == 0
    assert sorted(p.name for p in out.iterdir()) == ["a", "a.wav", "b"]
    for folder in out.iterdir():
        assert {p.name for p in folder.iterdir()} == {
            "Dog.wav",
            "Music_Speech.wav",
            "report.json",
            "report.html",
        }
    facts = json.loads((out / "b" / "report.json").read_text())
    assert (facts["recording"], facts["sample_rate"], facts["channels"]) == ("b.flac", 8000, 1)
    assert facts["seconds"] == pytest.approx(1.2)
    assert [sound["name"] for sound in facts["sounds"]] == ["Dog", "Music + Speech"]
    dog, _ = soundfile.read(out / "b" / facts["sounds"][0]["file"])
    assert facts["sounds"][0]["rms"] == pytest.approx(np.sqrt(np.mean(dog**2)), rel=1e-4)
    assert facts["settings"]["classes"] == ["Dog", "Music+Speech"]
    assert len(facts["classes"]) == 527  # with a threshold of 0
    assert {len(row) for row in facts["classes"].values()} == {3}
    assert "3 of" not in capsys.readouterr().err


def test_a_bad_file_is_said_and_the_rest_goes_on(bundle, recordings, tmp_path, capsys):
    (recordings / "b.flac").write_bytes(b"fLaC but no more")
    assert separate(bundle, tmp_path / "out", str(recordings), "--classes", "Dog") == 1
    said = capsys.readouterr()
    assert "b.flac cannot be read as audio" in said.err
    assert "1 of 3 recordings could not be separated" in said.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "a.wav"]


def test_levels_of_the_ontology(bundle, recordings, tmp_path):
    assert separate(bundle, tmp_path / "out", str(recordings / "a.wav"), "--levels", "1") == 0
    files = sorted(p.name for p in (tmp_path / "out/a/level_1").iterdir())
    assert len(files) == 7
    assert "Human_sounds.wav" in files


def test_example_recordings_and_residual(bundle, recordings, tmp_path):
    words = (str(recordings / "a.wav"), "--query", str(recordings / "more"), "--residual")
    assert separate(bundle, tmp_path / "out", *words, "--format", "flac") == 0
    sounds = [soundfile.read(tmp_path / f"out/a/{name}.flac")[0] for name in ("more", "residual")]
    mixture, _ = soundfile.read(recordings / "a.wav")
    np.testing.assert_allclose(sum(sounds), mixture, atol=2**-22)


def test_dry_run_says_what_is_heard_and_writes_nothing(bundle, recordings, tmp_path, capsys):
    words = ["separate", "--model", bundle, str(recordings / "*.wav"), "--dry-run"]
    assert main([*words, "--threshold", "0.0"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"a\.wav: 1\.2 s\n +\d+ %  .* ###\n", said)
    assert "and 507 more" in said
    assert main([*words, "--threshold", "1.0"]) == 0
    assert "no class reaches 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.wav", "--classes", "Dog"], "missing.wav does not exist"),
        (["*.nothing", "--classes", "Dog"], "no file matches"),
        (["a.wav"], "--classes, --levels or --query"),
        (["a.wav", "--classes", "Dgo"], 'did you mean "Dog"'),
        (["a.wav", "--classes", "Dog", "dog"], "asked for twice"),
        (["a.wav", "--levels", "9"], "the ontology has no level 9"),
        (["a.wav", "--levels", "1", "--classes", "Dog"], "--levels finds out"),
        (["a.wav", "--query", "more", "--classes", "Dog"], "use one"),
        (["a.wav", "--query", "nothing.npz"], "nothing.npz cannot be read"),
        (["a.wav", "--query", "nothing"], "nothing does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    bundle, recordings, monkeypatch, tmp_path, capsys, words, said
):
    monkeypatch.chdir(recordings)
    assert separate(bundle, tmp_path / "out", *words) == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("out/**/*.wav"))


def test_an_out_that_cannot_be_made(bundle, recordings, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert separate(bundle, tmp_path / "out", str(recordings / "a.wav"), "--classes", "Dog") == 1
    assert "cannot be made" in capsys.readouterr().err


def test_folders_and_patterns(recordings, monkeypatch):
    monkeypatch.chdir(recordings)
    found = find_recordings([".", "*.wav", "a.wav"])
    assert found == [pathlib.Path(name) for name in ("a.wav", "b.flac", "more/a.wav")]


def test_picture_shows_tones_where_they_are(tmp_path):
    tone = np.concatenate([tiny.tone(1000, 2), np.zeros(2 * tiny.RATE, np.float32)])
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, 0 * tone], axis=1), tiny.RATE)
    levels = band_levels(tmp_path / "tone.wav")
    loud, quiet = levels[:, : levels.shape[1] // 2 - 1], levels[:, levels.shape[1] // 2 + 1 :]
    assert (quiet.max(axis=0) < -100).all()
    place = loud.mean(axis=1).argmax()
    assert 0.2 < place / len(levels) < 0.6
    assert -25 < loud.max() < -13  # -13.5 dB, less what its band has beside it


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium browser")
def test_report_works_in_a_browser(bundle, recordings, tmp_path):
    assert separate(bundle, tmp_path / "out", str(recordings / "a.wav"), "--classes", "Dog") == 0
    page = tmp_path / "out" / "a" / "report.html"
    command = (
        f"{CHROMIUM} --headless --no-sandbox --disable-gpu --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --virtual-time-budget=5000 "
        f"--user-data-dir={tmp_path / 'profile'} --dump-dom"
    )
    made = subprocess.run(
        [*command.split(), page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    playable = re.findall(r'data-playable="([\d.]+)"', made.stdout)
    assert len(playable) == 2  # the recording and one sound, both decoded
    assert all(abs(float(seconds) - 1.2) < 0.15 for seconds in playable)
    assert "http://" not in page.read_text().replace("http://www.w3.org", "")
    assert "https://" not in page.read_text()
