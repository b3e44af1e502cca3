"""The separator in the package: one line takes a recording apart."""

import importlib.resources
import json
import pathlib

import numpy as np
import pytest
import soundfile

from uss_jax.bundles.bundle import read_bundle
from uss_jax.cli.main import main
from uss_jax.cli.separate import _not_separated_before
from uss_jax.separation.input_files import find_input_files

ASSETS = importlib.resources.files("uss_jax") / "assets"
RATE = 32000
# File, begin in seconds, level-1 name.
SOUNDS = [
    ("ovos-dog.ogg", 2, "Animal"),
    ("fluid-gm000-piano-0.ogg", 10, "Music"),
    ("opensfx-03-factory-whistle.ogg", 18, "Sounds of things"),
]


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """A stereo recording of three sounds one after another in noise, and the sounds."""
    place = tmp_path_factory.mktemp("demo")
    recording = 1e-3 * np.random.default_rng(0).standard_normal((25 * RATE, 2))
    sounds = {}
    for file, begin, name in SOUNDS:
        sound, _ = soundfile.read(str(ASSETS / "demo" / file), dtype="float32")
        sound = 0.1 * sound[: 5 * RATE] / np.sqrt(np.mean(sound**2))
        span = slice(begin * RATE, begin * RATE + len(sound))
        recording[span] += sound[:, None]
        sounds[name] = span, sound
    soundfile.write(place / "street.wav", recording.astype(np.float32), RATE)
    return place, sounds


def test_one_line_takes_a_recording_apart(street, monkeypatch, capsys):
    place, sounds = street
    monkeypatch.chdir(place)
    (place / "demo").mkdir()
    (place / "demo/config.json").touch()  # another bundle, not meant
    assert main(["separate", "street.wav", "--levels", "1"]) == 0
    assert "model demo: a demonstration" in capsys.readouterr().err
    report = json.loads((place / "separated/street/report.json").read_text())
    assert report["settings"]["model"] == "demo"
    for name, (span, sound) in sounds.items():
        estimate, rate = soundfile.read(place / f"separated/street/level=1/{name}.wav")
        assert (len(estimate), rate) == (25 * RATE, RATE)
        inside = np.sum(estimate[span] ** 2)
        assert inside > 0.9 * np.sum(estimate**2), name
        assert abs(10 * np.log10(inside / 2 / np.sum(sound**2))) < 6, name


def test_results_of_earlier_runs_are_separated_only_if_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = pathlib.Path("separated/street/level=1/Music.wav")
    result.parent.mkdir(parents=True)
    for file in ("street.wav", result, "separated/street/report.json", "list.txt"):
        pathlib.Path(file).write_text(f"./{result}")

    def left(*words, lists=()):
        found = _not_separated_before(find_input_files(words, lists), "separated")
        return sorted(str(one.path) for one in found)

    assert left(".") == left("*.wav", "separated/*/*/*.wav") == ["street.wav"]
    assert left(f"./{result}") == left(lists=["list.txt"]) == [str(result)]
    assert left("separated", f"{result}") == [str(result)]


def test_its_tagging_nets_are_those_of_yamnet():
    demo, yamnet = read_bundle("demo"), read_bundle("yamnet")
    for part in ("query", "sed"):
        assert demo.config["hashes"][part] == yamnet.config["hashes"][part]
    assert not (demo.path / "query").exists()
