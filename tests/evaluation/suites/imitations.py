"""Tiny imitations of data sets of the bundled sounds, laid out as their publishers do."""

import csv
import pathlib

import numpy as np
import soundfile

import uss_jax
from uss_jax.audio.files import read_mono
from uss_jax.ontology import load_ontology

_DEMO = pathlib.Path(uss_jax.__file__).parent / "assets" / "demo"
# Real sounds, two of each class.
SOUNDS = {
    "Piano": ("fluid-gm000-piano-0", "fluid-gm000-piano-1"),
    "Cello": ("fluid-gm042-cello-0", "fluid-gm042-cello-1"),
    "Flute": ("fluid-gm072-flute-0", "fluid-gm073-flute-1"),
    "Bark": ("ovos-dog", "ovos-dog"),
}
RATE = 8000


def sound(name, seconds=None, begin=0.0, rate=RATE) -> np.ndarray:
    """A bundled sound at a low rate, repeated to a length if one is given."""
    waveform = read_mono(_DEMO / f"{name}.ogg", rate)
    if seconds is None:
        return waveform
    return np.resize(waveform[int(begin * rate) :], int(seconds * rate))


def _write(path, waveform, rate=RATE, **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform.T, rate, **how)


def _table(path, header, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def fsdkaggle2018(folder) -> pathlib.Path:
    """Three recordings of each class in either split, of 1 to 3 s."""
    tables = {
        "train": "train_post_competition.csv",
        "test": "test_post_competition_scoring_clips.csv",
    }
    for split, table in tables.items():
        rows = []
        for number in range(3):
            for label, names in SOUNDS.items():
                at = len(rows)
                begin = 0.3 * number + (0.1 if split == "test" else 0.0)
                waveform = sound(names[number % 2], 1.0 + number, begin)
                _write(folder / f"FSDKaggle2018.audio_{split}" / f"{at:08x}.wav", waveform)
                rows.append((f"{at:08x}.wav", label, "Public"))
        _table(folder / "FSDKaggle2018.meta" / table, ("fname", "label", "usage"), rows)
    return folder


def fsd50k(folder) -> pathlib.Path:
    """As FSDKaggle2018, with the labels above, one of which AudioSet's classes have not."""
    nodes = load_ontology()._by_label
    above = {"Piano": ("Keyboard_(musical)",), "Bark": ("Dog", "Animal")}
    for part in ("dev", "eval"):
        rows = []
        for number in range(2):
            for label, names in SOUNDS.items():
                labels = (label, *above.get(label, ()))
                mids = [nodes[x.replace("_", " ").casefold()].mid for x in labels]
                fname = str(1000 + len(rows))
                begin = 0.3 * number + (0.1 if part == "eval" else 0.0)
                waveform = sound(names[number], 1.5, begin)
                _write(folder / f"FSD50K.{part}_audio" / f"{fname}.wav", waveform)
                rows.append((fname, ",".join(labels), ",".join(mids)))
        path = folder / "FSD50K.ground_truth" / f"{part}.csv"
        _table(path, ("fname", "labels", "mids"), rows)
    return folder


def slakh2100(folder) -> pathlib.Path:
    """Two songs of 26 s in either split; one stem was never rendered, one is mostly quiet."""
    stems = {
        "S00": ("Piano", "the_grand", "Acoustic Grand Piano"),
        "S01": ("Cello", "cello_ensemble", "Cello"),
        "S02": ("Flute", "flute_solo", "Flute"),
        "S03": (None, "lost", "Tuba"),
    }
    for split in ("train", "test"):
        for number in range(2):
            track = folder / split / f"Track{number:05d}"
            mixture = np.zeros(26 * RATE, np.float32)
            lines = ["UUID: x", "stems:"]
            for stem, (label, plugin, program) in stems.items():
                lines += [f"  {stem}:", f"    plugin_name: {plugin}.nkm"]
                lines += [f"    midi_program_name: {program}", "    inst_class: Some"]
                if label is None:
                    continue
                waveform = sound(SOUNDS[label][number], 26, 0.2 * (split == "test"))
                waveform *= 0.5 / np.abs(waveform).max()
                if label == "Flute":
                    waveform[4 * RATE :] *= 0.1  # loud in the first two windows only
                _write(track / "stems" / f"{stem}.flac", waveform)
                mixture += waveform
            _write(track / "mix.flac", mixture / 2)
            (track / "metadata.yaml").write_text("\n".join(lines) + "\n")
    return folder


def musdb18(folder) -> pathlib.Path:
    """One song of 4 s in train and two in test, stereo, one with silent vocals for a second."""
    of_stem = {"vocals": "Flute", "drums": "Bark", "bass": "Cello", "other": "Piano"}
    for split, songs in (("train", ["a"]), ("test", ["b", "c"])):
        for at, song in enumerate(songs):
            mixture = np.zeros((2, 4 * RATE), np.float32)
            for n, (stem, label) in enumerate(of_stem.items()):
                left = sound(SOUNDS[label][at], 4, 0.1 * at + 0.2 * (split == "test"))
                waveform = np.stack([left, left * (0.5 + 0.1 * n)])
                if song == "c" and stem == "vocals":
                    waveform[:, :RATE] = 0
                _write(folder / split / song / f"{stem}.wav", waveform, subtype="PCM_16")
                mixture += waveform
            _write(folder / split / song / "mixture.wav", mixture, subtype="FLOAT")
    return folder


def voicebank_demand(folder, train="clean_trainset_28spk_wav") -> pathlib.Path:
    """Two sentences in either set, at 16 kHz; for speech barks and meows, for noise an engine."""
    noise = sound("ovos-pig", 2.5, rate=16000)
    for name in (train, "clean_testset_wav"):
        for at, who in enumerate(("ovos-dog", "ovos-cat")):
            clean = sound(who, 2.5, 0.1 * at, rate=16000)
            _write(folder / name / f"p{at}_001.wav", clean, 16000)
            noisy = folder / name.replace("clean", "noisy") / f"p{at}_001.wav"
            _write(noisy, clean + 0.3 * noise, 16000, subtype="FLOAT")
    return folder
