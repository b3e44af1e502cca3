import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from tests import tiny
from uss_jax.assets import FOLDER
from uss_jax.audio.files import read_blocks
from uss_jax.bundles.model import Model
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.separation.tags import Tags
from uss_jax.separation.windows import detect_sounds

DOG, PIANO, ROOSTER = (load_ontology().resolve(n) for n in ("Dog", "Music", "Chicken, rooster"))
RATE = 16000


@pytest.fixture(scope="module")
def yamnet():
    return Model("yamnet")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """26 s at 32 kHz with a dog from second 3 to 8 and a piano from 14 to 19, over faint noise."""
    samples = 1e-3 * np.random.default_rng(0).standard_normal(26 * 32000)
    for name, second in (("ovos-dog", 3), ("fluid-gm000-piano-0", 14)):
        sound = soundfile.read(FOLDER / "demo" / f"{name}.ogg")[0][: 5 * 32000]
        sound *= 0.1 / np.sqrt(np.mean(np.square(sound)))
        samples[second * 32000 : second * 32000 + len(sound)] += sound
    path = tmp_path_factory.mktemp("planted") / "planted.wav"
    soundfile.write(path, samples.astype(np.float32), 32000)
    return path


def test_planted_sounds_are_found_where_they_are(planted, tmp_path, capsys):
    assert main(["tag", str(planted), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{planted}: 26.0 s\n")
    folder = tmp_path / "out" / "planted"
    facts = json.loads((folder / "tags.json").read_text())
    assert (folder / "tags.png").read_bytes().startswith(b"\x89PNG")
    sounds = {sound["class_index"]: sound for sound in facts["sounds"]}
    for label, begin, end in ((DOG, 3, 8), (PIANO, 14, 19)):
        assert sounds[label]["peak"] > 0.9
        assert sounds[label]["mid"] == load_ontology().class_mids[label]
        (interval,) = sounds[label]["intervals"]
        assert interval == pytest.approx([begin, end], abs=0.7)
        assert f"  {sounds[label]['name']:<40}  {interval[0]:.1f}-{interval[1]:.1f}\n" in text
    peaks = [sound["peak"] for sound in facts["sounds"]]
    assert peaks == sorted(peaks, reverse=True)
    assert all(len(s["probability"]) == 261 for s in facts["sounds"])


def test_windows_agree_with_one_pass(yamnet):
    rng = np.random.default_rng(0)
    samples = 0.1 * rng.standard_normal((1, 25 * RATE)).astype(np.float32)
    samples *= 1 + np.sin(np.arange(samples.size) / 9000)
    pieces = np.array_split(samples, 7, axis=1)
    found, step = detect_sounds(yamnet, pieces)
    assert step == pytest.approx(0.1)
    framewise = np.asarray(yamnet.sed(samples)["framewise"])[0]
    padded = np.pad(framewise, ((0, -len(framewise) % 10), (0, 0)))
    wanted = padded.reshape(-1, 10, 527).max(axis=1)
    assert found.shape == wanted.shape
    last = -10  # one pass ends with its last whole patch; a window is followed by silence
    np.testing.assert_allclose(found[:last], wanted[:last], atol=1e-5)


@pytest.mark.parametrize("seconds", [0.01, 0.5, 11.0, 12.0, 12.01, 23.0])
def test_a_recording_of_any_length_has_a_value_every_tenth_of_a_second(yamnet, seconds):
    samples = np.zeros((1, round(seconds * RATE)), np.float32)
    found, _ = detect_sounds(yamnet, [samples])
    assert len(found) == -(-(samples.shape[1] // 160 + 1) // 10)


def test_intervals_end_with_the_recording():
    probability = np.zeros((11, 527), np.float32)
    probability[[0, 1, 5, 10], 3] = 0.5
    tags = Tags(pathlib.Path("a.wav"), 1.05, 0.1, probability)
    assert tags.heard(0.4) == [3]
    assert tags.heard(0.6) == []
    assert tags.intervals(3, 0.4) == [(0, 0.2), (0.5, 0.6), (1.0, 1.05)]


def test_bad_recordings_are_told_and_the_others_tagged(tmp_path, capsys):
    soundfile.write(tmp_path / "quiet.wav", np.zeros(RATE), RATE)
    (tmp_path / "text.wav").write_text("no sound")
    words = [tmp_path / "missing.wav", tmp_path / "text.wav", tmp_path / "quiet.wav"]
    assert main(["tag", *map(str, words), "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert "quiet.wav: 1.0 s\n  1.00  Silence " in out
    lines = [line for line in err.splitlines() if line.startswith("uss-jax: ")]
    assert len(lines) == 3
    assert "missing.wav does not exist" in lines[0]
    assert lines[2] == "uss-jax: 2 of 3 recordings could not be tagged"
    assert (
        json.loads((tmp_path / "out" / "quiet" / "tags.json").read_text())["sounds"][0]["name"]
        == "Silence"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["quiet"]


def test_two_recordings_of_one_place_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.wav", "x.flac"):
        soundfile.write(name, np.zeros(RATE), RATE)
    assert main(["tag", "x.wav", "x.flac", "--out", "out"]) == 1
    assert "x.flac would share an output folder with x.wav, out/x" in capsys.readouterr().err
    assert main(["tag", "x.wav", "x.flac"]) == 0


def test_a_name_that_is_no_unicode_is_written(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.wav")
    soundfile.write(os.fsencode(path), np.zeros(RATE), RATE)
    assert main(["tag", str(path), "--out", str(tmp_path / "out")]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert json.loads((folder / "tags.json").read_text())["recording"] == str(path)


def test_what_cannot_tag_is_told_before_the_first_recording(tmp_path, capsys):
    soundfile.write(tmp_path / "x.wav", np.zeros(RATE), RATE)
    (tmp_path / "file").write_text("")
    words = ["tag", str(tmp_path / "x.wav"), "--out", str(tmp_path / "file")]
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be created" in line


def test_a_diverged_detector_is_no_silence(tmp_path):
    model = Model(tiny.write_tagger(tmp_path / "tagger"))
    model.sed.variables["params"]["fc_audioset"]["bias"] = jnp.full(527, jnp.nan)
    with pytest.raises(UserError, match="gives probabilities that are NaN"):
        detect_sounds(model, [np.zeros((1, tiny.RATE), np.float32)])


@pytest.mark.parametrize("net", [tiny.TAGGER, tiny.TINY_HTSAT])
def test_other_detectors_hear_a_short_recording_whole(tmp_path, net):
    model = Model(tiny.write_tagger(tmp_path / "tagger", net=net))
    found, step = detect_sounds(model, [tiny.tone(500, 3.0)[None]])
    assert found.shape == (31, 527)
    assert step == pytest.approx(0.1)


def test_a_stereo_file_is_tagged_as_its_mean(yamnet, planted, tmp_path):
    samples, rate = soundfile.read(planted)
    soundfile.write(tmp_path / "stereo.wav", np.stack([samples, samples], axis=1), rate, "FLOAT")
    (block,) = [np.concatenate(list(read_blocks(tmp_path / "stereo.wav")), axis=1)]
    one, _ = detect_sounds(yamnet.at_sample_rate(32000), [block[:1]])
    both, _ = detect_sounds(yamnet.at_sample_rate(32000), [block])
    np.testing.assert_allclose(both, one, atol=1e-5)
