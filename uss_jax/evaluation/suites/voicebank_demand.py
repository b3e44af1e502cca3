"""Voicebank-Demand: noisy sentences (https://datashare.ed.ac.uk/handle/10283/2791).

Layout of the unpacked archives:

    clean_trainset_28spk_wav/*.wav    noisy_trainset_28spk_wav/*.wav
    clean_testset_wav/*.wav           noisy_testset_wav/*.wav    (the same names, 48 kHz)

The paper's copy names the first two `clean_trainset_wav`, `noisy_trainset_wav`; both are accepted.
Sentences are separated at the model's sampling rate, with the condition averaged over the training
sentences, silence removed. Metrics, after resampling to 16 kHz: PESQ (wide band), SSNR, CSIG, CBAK
and COVL. As published, they are medians over sentences, NaN left out; means, which others report,
are also given.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from uss_jax.audio.files import read_alike
from uss_jax.audio.resampling import resample
from uss_jax.bundles.model import Model
from uss_jax.errors import UserError
from uss_jax.evaluation.averages import Averages, file_averages
from uss_jax.evaluation.finished import Finished, unfinished_beside
from uss_jax.evaluation.rows import MIXTURE
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.suites.mixing import require_files
from uss_jax.evaluation.suites.speech import RATE, speech_figures
from uss_jax.evaluation.suites.whole import Values, answers, identity, report, require_package

SPEECH = "Speech"
_NAME = "Voicebank-Demand"


def run(model: Model, data: str, out: str, *, blocks: str) -> tuple[Results, str]:
    """Evaluates enhancement on the sentences of the test set."""
    require_package("pesq", _NAME)
    folder = pathlib.Path(data)
    sentences(folder)
    rows = score_sentences(
        model,
        folder,
        speech_average(model, folder),
        unfinished_beside(out),
        reference_blocks=blocks == "reference",
    )
    figures = ("pesq", "ssnr", "csig", "cbak", "covl")
    cells = [(row["query"], *(row[figure] for figure in figures)) for row in rows]
    explanation = "medians over sentences, as published; means are in the JSON file; SSNR in dB"
    if absent := {row["query"]: row["without_pesq"] for row in rows if row["without_pesq"]}:
        counts = ", ".join(f"{number} of {query}" for query, number in absent.items())
        explanation += (
            f"; sentences without PESQ, too short or without speech to it, left out: {counts}"
        )
    results, text = report(model, out, rows, ("", *figures), cells, explanation)
    return {**results, "how": {"blocks": blocks}}, text


def sentences(folder: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Returns the (clean, noisy) files of the test set.

    Raises:
      UserError: files are missing.
    """
    clean = folder / "clean_testset_wav"
    require_files([clean, folder / "noisy_testset_wav"], _NAME)
    found = [
        (path, folder / "noisy_testset_wav" / path.name) for path in sorted(clean.glob("*.wav"))
    ]
    if not found:
        raise UserError(f"{clean} has no sentence; unpack {_NAME} again")
    require_files([noisy for _, noisy in found], _NAME)
    return found


def speech_average(model: Model, folder: pathlib.Path) -> Averages:
    """Averages the condition of the clean training sentences, silence removed, as published."""
    folders = sorted(folder.glob("clean_trainset*_wav"))
    files = sorted(folders[0].glob("*.wav")) if folders else []
    if not files:
        raise UserError(
            f"{folder} has no clean_trainset_28spk_wav/*.wav to average the condition of speech "
            f"over; unpack {_NAME} again"
        )
    return file_averages(model, {SPEECH: files}, without_silence=True)


def score_sentences(
    model: Model,
    folder: pathlib.Path,
    averages: Averages,
    unfinished: pathlib.Path,
    *,
    reference_blocks: bool,
) -> list[dict[str, object]]:
    """Returns for each row the median and mean of every metric and of its gain over the mixture.

    Args:
      model: the separator.
      folder: folder of the data set.
      averages: averaged condition of speech.
      unfinished: file that stores the metrics of finished sentences, to resume an interrupted run.
      reference_blocks: separate in blocks without overlap, as published.
    """
    test = sentences(folder)
    names, files = [str(clean) for clean, _ in test], [file for pair in test for file in pair]
    about = identity(model, averages, f"blocks: {reference_blocks}", names, files)
    finished = Finished(unfinished, about)
    for clean, noisy in tqdm(test, "sentences", disable=None):
        if clean.name not in finished.done:
            figures = _score_sentence(model, clean, noisy, averages, reference_blocks)
            finished.add(clean.name, figures)
    per_sentence = [finished.done[clean.name] for clean, _ in test]
    return _summary(per_sentence)


def _score_sentence(
    model: Model,
    clean: pathlib.Path,
    noisy: pathlib.Path,
    averages: Averages,
    reference_blocks: bool,
) -> dict[str, Values]:
    """Returns row -> metrics."""
    rate = model.sample_rate
    source, mixture = read_alike((clean, noisy), rate)
    if abs(len(source) - len(mixture)) > rate // 100:
        raise UserError(f"{clean} and {noisy} differ in length; unpack {_NAME} again")
    length = min(len(source), len(mixture))
    source, mixture = source[:length], mixture[:length]
    found = answers(
        model,
        mixture[None],
        {SPEECH: source[None]},
        rate,
        averages,
        {SPEECH: source},
        reference_blocks=reference_blocks,
    )
    heard = resample(source, rate, RATE)
    return {
        row: speech_figures(heard, resample(estimate[0], rate, RATE))
        for (row, _), estimate in found.items()
    }


def _summary(per_sentence: Sequence[dict[str, Values]]) -> list[dict[str, object]]:
    summaries = []
    for row in per_sentence[0]:
        figures: dict[str, object] = {"query": row}
        for figure in per_sentence[0][row]:
            values = np.array([sentence[row][figure] for sentence in per_sentence])
            before = np.array([sentence[MIXTURE][figure] for sentence in per_sentence])
            for name, of in ((figure, values), (f"{figure}_gain", values - before)):
                figures[name], figures[f"{name}_mean"] = _middle(of)
        of_noisy = [list(sentence[MIXTURE].values()) for sentence in per_sentence]
        figures["silent"] = int(np.isnan(of_noisy).all(axis=1).sum())
        absent = np.isnan([list(sentence[row].values()) for sentence in per_sentence])
        figures["without_pesq"] = int((absent.any(axis=1) & ~absent.all(axis=1)).sum())
        summaries.append(figures)
    return summaries


def _middle(values: Float[np.ndarray, " n"]) -> tuple[float | None, float | None]:
    """Returns median and mean of the values that are not NaN; None if there are none."""
    numbers = values[~np.isnan(values)]
    return (float(np.median(numbers)), float(np.mean(numbers))) if numbers.size else (None, None)
