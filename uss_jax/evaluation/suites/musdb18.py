"""MUSDB18-HQ: songs and their four stems (https://zenodo.org/records/3338373).

Layout of the unpacked archive:

    train/<song>/    test/<song>/    each with
        mixture.wav    vocals.wav    drums.wav    bass.wav    other.wav    (stereo, 44.1 kHz)

Metrics: SDR of BSSEval v4 (museval) in windows of 1 s without overlap, the median over the windows
of a song, then over songs. `legacy` adds the published metrics, for the song mixed down to mono at
the model's sampling rate and separated in blocks without overlap. There museval's
reference is the estimate; its estimate is the source or, to get SDRi, also the mixture.

The distortion filters of BSSEval v4 only split the error into parts, whose sum is the same without
them, so the SDR is computed here without filters (a test compares it with museval's). Importing
museval needs ffmpeg.

Letters: `c` channels, `t` samples.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from uss_jax.audio.files import Format, audio_format, read_audio
from uss_jax.audio.resampling import resample
from uss_jax.bundles.model import Model
from uss_jax.errors import UserError, counted
from uss_jax.evaluation.averages import Averages, file_averages
from uss_jax.evaluation.finished import Finished, unfinished_beside
from uss_jax.evaluation.rows import MIXTURE
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.suites.mixing import require_files
from uss_jax.evaluation.suites.whole import Values, answers, identity, report

STEMS = ("vocals", "drums", "bass", "other")
_NAME = "MUSDB18-HQ"


def run(model: Model, data: str, out: str, *, legacy: bool) -> tuple[Results, str]:
    """Evaluates separation on the songs of the test split."""
    folder = pathlib.Path(data)
    _test_songs(folder)
    averages = stem_averages(model, folder)
    rows = score_songs(model, folder, averages, unfinished_beside(out), legacy=legacy)
    figures = ("sdr", "sdri", *(("legacy_sdr", "legacy_sdri") if legacy else ()))
    cells = []
    for row in rows:
        of_stems = (row["stems"][stem]["sdr"] for stem in STEMS)
        cells.append((row["query"], *(row.get(figure) for figure in figures), *of_stems))
    header = ("", *figures, *(f"{stem} sdr" for stem in STEMS))
    results, text = report(model, out, rows, header, cells, "dB; median over songs")
    return {**results, "how": {"legacy": legacy}}, text


def songs(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """Returns the song folders of a split, `train` or `test`.

    Raises:
      UserError: files are missing.
    """
    require_files([folder / split], _NAME)
    found = sorted(path for path in (folder / split).iterdir() if path.is_dir())
    if not found:
        raise UserError(f"{folder / split} has no song; unpack {_NAME} again")
    require_files([s / f"{name}.wav" for s in found for name in ("mixture", *STEMS)], _NAME)
    return found


def _test_songs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the song folders of the test split, whose stems can be compared with estimates.

    Raises:
      UserError: files are missing, or a stem differs from its mixture in sampling rate, channels or
        length.
    """
    found = songs(folder, "test")
    for song in found:
        mixture = audio_format(song / "mixture.wav")
        for stem in STEMS:
            path = song / f"{stem}.wav"
            form = audio_format(path)
            longer = abs(form.samples - mixture.samples)
            alike = form == dataclasses.replace(mixture, samples=form.samples)
            if not alike or longer > mixture.sample_rate // 100:
                raise UserError(
                    f"{path} has {_words(form)}, its mixture.wav {_words(mixture)}; unpack {_NAME} "
                    "again"
                )
    return found


def _words(form: Format) -> str:
    channels = counted(form.channels, "channel")
    return f"{channels} at {form.sample_rate} Hz, {form.samples / form.sample_rate:.2f} s"


def stem_averages(model: Model, folder: pathlib.Path) -> Averages:
    """Averages each stem's condition over the training songs, silence removed, as published."""
    train = songs(folder, "train")
    files = {stem: [song / f"{stem}.wav" for song in train] for stem in STEMS}
    return file_averages(model, files, without_silence=True)


def score_songs(
    model: Model,
    folder: pathlib.Path,
    averages: Averages,
    unfinished: pathlib.Path,
    *,
    legacy: bool,
) -> list[dict[str, object]]:
    """Returns the median SDR and SDRi over songs, for each row and stem.

    Args:
      model: the separator.
      folder: folder of the data set.
      averages: stem -> averaged condition.
      unfinished: file that stores the metrics of finished songs, to resume an interrupted run.
      legacy: whether to add the published metrics.
    """
    test = _test_songs(folder)
    files = [song / f"{stem}.wav" for song in test for stem in ("mixture", *STEMS)]
    about = identity(model, averages, f"legacy: {legacy}", [str(song) for song in test], files)
    finished = Finished(unfinished, about)
    for song in tqdm(test, "songs", disable=None):
        if song.name not in finished.done:
            finished.add(song.name, _score_song(model, song, averages, legacy))
    per_song = [finished.done[song.name] for song in test]
    return _summary(per_song)


def _score_song(
    model: Model, song: pathlib.Path, averages: Averages, legacy: bool
) -> dict[str, Values]:
    """Returns "row/stem" -> metric -> median over the song's windows."""
    mixture, rate = read_audio(song / "mixture.wav")
    sources = {stem: read_audio(song / f"{stem}.wav")[0] for stem in STEMS}
    length = min(side.shape[1] for side in (mixture, *sources.values()))
    mixture = mixture[:, :length]
    sources = {stem: source[:, :length] for stem, source in sources.items()}
    alone = {
        stem: resample(source.mean(axis=0), rate, model.sample_rate)
        for stem, source in sources.items()
    }
    found = {
        f"{row}/{stem}": {"sdr": median_sdr(sources[stem], estimate, rate)}
        for (row, stem), estimate in answers(model, mixture, sources, rate, averages, alone).items()
    }
    if legacy:
        mono = resample(mixture.mean(axis=0), rate, model.sample_rate)
        for name, values in _legacy(model, mono, alone, averages).items():
            found[name] |= values
    return found


def _legacy(
    model: Model,
    mixture: Float32[np.ndarray, " t"],
    sources: Mapping[str, Float32[np.ndarray, " t"]],
    averages: Averages,
) -> dict[str, Values]:
    """Returns "row/stem" -> the published metrics of a mono song at the model's sampling rate."""
    rate, rows = model.sample_rate, {stem: source[None] for stem, source in sources.items()}
    estimates = answers(model, mixture[None], rows, rate, averages, sources, reference_blocks=True)
    found = {}
    for (row, stem), estimate in estimates.items():
        values = {"legacy_sdr": median_sdr(estimate, rows[stem], rate)}
        if row != MIXTURE:  # its SDR against itself is infinite
            of_mixture = median_sdr(estimate, mixture[None], rate)
            values["legacy_sdri"] = values["legacy_sdr"] - of_mixture
        found[f"{row}/{stem}"] = values
    return found


def median_sdr(
    reference: Float32[np.ndarray, "c t"], estimate: Float32[np.ndarray, "c t"], sample_rate: int
) -> float:
    """Median over whole windows of 1 s of 10 log10 of sum(ref^2) / sum((est - ref)^2), in dB.

    Leaves out windows in which the channels of either signal sum to zero; NaN if none is left.
    """
    count = reference.shape[1] // sample_rate
    sides = [
        side[:, : count * sample_rate].astype(np.float64).reshape(len(side), count, sample_rate)
        for side in (reference, estimate)
    ]
    heard = np.all([np.any(side.sum(axis=0), axis=1) for side in sides], axis=0)
    signal = np.square(sides[0]).sum(axis=(0, 2))[heard]
    error = np.square(sides[1] - sides[0]).sum(axis=(0, 2))[heard]
    with np.errstate(divide="ignore"):  # the SDR of a perfect estimate is infinite
        return float(np.median(10 * np.log10(signal / error))) if heard.any() else float("nan")


def _summary(per_song: Sequence[dict[str, Values]]) -> list[dict[str, object]]:
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name in per_song[0]:
        row, stem = name.split("/")
        figures = {}
        for figure in per_song[0][name]:
            values = [song[name][figure] for song in per_song]
            figures[figure] = float(np.nanmedian(values))
        of_mixture = [song[f"{MIXTURE}/{stem}"]["sdr"] for song in per_song]
        gains = np.array([song[name]["sdr"] for song in per_song]) - np.array(of_mixture)
        figures["sdri"] = float(np.nanmedian(gains))
        rows.setdefault(row, {})[stem] = figures
    return [
        {
            "query": row,
            "stems": stems,
            **{
                figure: float(np.nanmean([of[figure] for of in stems.values()]))
                for figure in next(iter(stems.values()))
            },
            "silent": sum(
                bool(np.isnan(song[f"{MIXTURE}/{stem}"]["sdr"]))
                for song in per_song
                for stem in stems
            ),
        }
        for row, stems in rows.items()
    ]
