"""What the suites compute, computed again plainly, one item or recording at a time."""

import csv
import json

import numpy as np
import soundfile

from tests.evaluation.suites import imitations
from tests.evaluation.tones import sdr
from tests.tiny import RATE
from uss_jax.audio.files import read_mono
from uss_jax.cli.main import main
from uss_jax.evaluation.rows import AVERAGE, ORACLE
from uss_jax.separation.example_vectors import recording_vector, remove_silence

SAMPLES = 2 * imitations.RATE


def run_suite(sets, suite, out, *more, kind="soft"):
    words = ["evaluate", suite, "--model", sets / kind, "--data", sets / suite, "--out", out]
    return main([str(word) for word in [*words, *more]])


def results_of(sets, suite, kind, out, *more):
    assert run_suite(sets, suite, out, *more, kind=kind) == 0
    return json.loads(out.read_text())


def recomputed_gains(model, pairs, averages):
    """Row -> mean over classes of the median SDRi, from (label, source, mixture), one at a time."""
    gains = {ORACLE: {}, AVERAGE: {}}
    for label, source, mixture in pairs:
        oracle = np.asarray(model.condition(source[None], np.zeros(1, np.int32)))[0]
        for row, condition in ((ORACLE, oracle), (AVERAGE, averages[label])):
            estimate = np.asarray(model.separate(mixture[None], condition[None]))[0]
            gain = sdr(source, estimate) - sdr(source, mixture)
            gains[row].setdefault(label, []).append(gain)
    return {row: np.mean([np.median(v) for v in of.values()]) for row, of in gains.items()}


def recomputed_averages(model, sources):
    """Label -> mean over (label, source) of the mean over half-second segments."""
    vectors = {}
    for label, source in sources:
        segments = source.reshape(-1, model.segment_samples)
        found = np.asarray(model.condition(segments, np.zeros(len(segments), np.int32)))
        vectors.setdefault(label, []).append(found.mean(axis=0))
    return {label: np.mean(of, axis=0) for label, of in vectors.items()}


def rows_of_all(results):
    return {row["query"]: row for row in results["rows"] if row["group"] == "all"}


def read_fitted(path):
    return np.resize(soundfile.read(path, dtype="float32")[0], SAMPLES)


def published_pairs(audio, names, count):
    """The reference's pairs of (file, label) rows, in the order in which it makes them."""
    random = np.random.RandomState(1234)
    counts, pairs = dict.fromkeys((label for _, label in names), 0), []
    while min(counts.values()) < count:
        for i in random.permutation(len(names)):
            (name, label), (other, other_label) = names[i], names[(i + 1) % len(names)]
            if label != other_label and counts[label] < count:
                a, b = (read_fitted(audio / n) for n in (name, other))
                ratio = (np.mean(a**2) / max(np.mean(b**2), 1e-10)) ** 0.5
                pairs.append((label, a, a + b * np.clip(ratio, 0.02, 50)))
                counts[label] += 1
    return pairs


def kaggle_pairs(folder, split, count):
    name = {"train": "train_post_competition", "test": "test_post_competition_scoring_clips"}[split]
    lines = (folder / "FSDKaggle2018.meta" / f"{name}.csv").read_text().splitlines()[1:]
    names = [line.split(",")[:2] for line in lines]
    return published_pairs(folder / f"FSDKaggle2018.audio_{split}", names, count)


def fsd50k_pairs(folder, split, count):
    part = {"train": "dev", "test": "eval"}[split]
    with open(folder / "FSD50K.ground_truth" / f"{part}.csv", newline="") as file:
        names = [(f"{r['fname']}.wav", r["labels"].split(",")[0]) for r in csv.DictReader(file)]
    return published_pairs(folder / f"FSD50K.{part}_audio", names, count)


def recomputed_average(model, files):
    waveforms = [remove_silence(read_mono(file, RATE), RATE) for file in files]
    return np.mean([recording_vector(model, waveform) for waveform in waveforms], axis=0)


def recomputed_median(reference, estimate, rate):
    """The median over windows, silent ones left out; [channels, samples]."""
    values = []
    for begin in range(0, reference.shape[1], rate):
        a, b = (x[:, begin : begin + rate].astype(np.float64) for x in (reference, estimate))
        if a.sum(axis=0).any() and b.sum(axis=0).any():
            values.append(10 * np.log10(np.sum(a**2) / np.sum((b - a) ** 2)))
    return np.median(values)


def separated_in_blocks(model, mixture, condition):
    """The reference's separation of one channel: blocks of a segment, the last padded."""
    size, blocks = model.segment_samples, []
    for begin in range(0, len(mixture), size):
        block = np.pad(mixture[begin : begin + size], (0, max(begin + size - len(mixture), 0)))
        blocks.append(np.asarray(model.separate(block[None], condition[None]))[0])
    return np.concatenate(blocks)[: len(mixture)]
