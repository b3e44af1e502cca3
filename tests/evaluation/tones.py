"""Tiny pairs of three classes, and models of every kind of condition to score them with."""

import numpy as np

from tests.tiny import RATE, noise, tone
from uss_jax.audio.files import write_wav
from uss_jax.cli.main import main
from uss_jax.ontology import load_ontology

SPEECH, DOG, BARK, PIANO = (load_ontology().resolve(n) for n in ("Speech", "Dog", "Bark", "Piano"))
SOURCES = {SPEECH: lambda i: tone(200 + 50 * i, 0.5), DOG: lambda i: noise(i, 0.5)}
SOURCES[PIANO] = lambda i: tone(1000 + 100 * i, 0.5)


def sdr(reference, estimate):
    reference, estimate = reference.astype(np.float64), estimate.astype(np.float64)
    return 10 * np.log10(np.mean(reference**2) / np.mean((estimate - reference) ** 2))


def write_pairs(folder, per_class=3):
    for label, source in SOURCES.items():
        (folder / f"class_id={label}").mkdir(parents=True)
        for i in range(per_class):
            other = tone(2000 + 300 * i, 0.5)
            other *= np.sqrt(np.mean(source(i) ** 2) / np.mean(other**2))
            stem = folder / f"class_id={label}" / f"{i}."
            write_wav(f"{stem}source.wav", source(i)[None], RATE)
            write_wav(f"{stem}mixture.wav", (source(i) + other)[None], RATE)
    rows = ["file,group", *(f"class_id={DOG}/{i},rare" for i in range(per_class))]
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def write_tones(tmp_path, *names, seconds=0.5):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_wav(tmp_path / name, tone(300, seconds)[None], RATE)
    return tmp_path


def evaluate_pairs(place, kind, out, *more):
    words = ["pairs", "--model", place / kind, "--data", place / "pairs", "--out", out, *more]
    return main(["evaluate", *map(str, words)])
