"""Writes the report on a separated recording: report.json and the page report.html.

The page is one file that opens offline: spectrograms, activity over time of every class heard, and
a player with the beginning of every sound. It is made from the written files, in constant memory.

Letters: `c` channels, `t` samples, `f` bands, `x` picture columns, `s` segments, `k` classes.
"""

import base64
import html
import importlib.resources
import io
import json
import os
import pathlib
import string
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from matplotlib.image import imsave

import uss_jax
from uss_jax.audio.files import audio_format, read_blocks
from uss_jax.audio.in_memory import MP3_SAMPLE_RATES, mp3_bytes
from uss_jax.audio.mel import mel_matrix
from uss_jax.audio.resampling import resample
from uss_jax.disk.atomic import replacing
from uss_jax.errors import one_line
from uss_jax.ontology import load_ontology
from uss_jax.separation.windows import classes_heard

REPORT = "report.json"
_N_FFT = 2048
_BANDS, _COLUMNS = 80, 900
_RANGE_DB = 70.0
# The page holds the first minute of every sound; the files hold all of it.
_PLAYED_SECONDS = 60.0
_CLASSES_SHOWN = 40


def write_report(
    folder: pathlib.Path, facts: dict[str, Any], files: Sequence[tuple[str, pathlib.Path]]
) -> None:
    """Writes report.json and report.html.

    Args:
      folder: output folder.
      facts: report contents, from `recording_facts`.
      files: names and audio files; the recording comes first.
    """
    page = _page(folder, facts, files)
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    # report.json comes last: it marks the recording as done.
    write_json(folder / REPORT, facts, indent=1)


def write_json(path: pathlib.Path, facts: dict[str, Any], indent: int | None = None) -> None:
    """Writes facts of a recording; bytes of names that are not UTF-8 become escapes."""
    with replacing(path) as temporary:
        text = json.dumps(facts, indent=indent, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def recording_facts(
    path: str | os.PathLike,
    *,
    sounds: list[dict[str, Any]],
    probabilities: Float32[np.ndarray, "s k"] | None,
    segment_seconds: float,
    threshold: float,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Returns the contents of report.json.

    Args:
      path: the recording.
      sounds: one dict per separated sound.
      probabilities: [s, k] tagging probabilities; classes that reach `threshold` in any segment
        are kept.
      segment_seconds: length of a segment, in seconds.
      threshold: probability in [0, 1].
      settings: options of the run.
    """
    form = audio_format(path)
    facts: dict[str, Any] = {
        "recording": os.path.basename(path),
        "sample_rate": form.sample_rate,
        "channels": form.channels,
        "seconds": form.samples / form.sample_rate,
        "sounds": sounds,
        "settings": settings,
        "uss_jax": uss_jax.__version__,
    }
    if probabilities is not None:
        names = load_ontology().class_names
        heard = classes_heard(probabilities, threshold)
        facts["segment_seconds"] = segment_seconds
        facts["threshold"] = threshold
        facts["classes"] = {
            names[k]: [round(float(p), 4) for p in probabilities[:, k]] for k in heard
        }
    return facts


def _page(
    folder: pathlib.Path, facts: dict[str, Any], files: Sequence[tuple[str, pathlib.Path]]
) -> str:
    pictures = [band_levels(path) for _, path in files]
    top = max(float(pictures[0].max()), -100.0)
    notes = ["the recording", *(_note(sound, facts) for sound in facts["sounds"])]
    rows = []
    for (name, path), picture, note in zip(files, pictures, notes, strict=True):
        sound, whole = _player(path)
        link = urllib.parse.quote(os.fsencode(os.path.relpath(path, folder)))
        rows.append(
            _ROW.substitute(
                name=html.escape(one_line(name)),
                note=html.escape(note),
                picture=_png(picture, top - _RANGE_DB, top, "magma"),
                sound=sound,
                seconds=f"{facts['seconds']:.3f}",
                file=html.escape(link, quote=True),
                part="" if whole else f" (first {_PLAYED_SECONDS:.0f} s)",
            )
        )
    page = importlib.resources.files("uss_jax") / "assets" / "report.html"
    return string.Template(page.read_text(encoding="utf-8")).substitute(
        title=html.escape(one_line(facts["recording"])),
        form=f"{facts['seconds']:.1f} s, {facts['sample_rate']} Hz, {facts['channels']} "
        f"channel{'s' if facts['channels'] > 1 else ''}; spectrograms: mel scale up to "
        f"{facts['sample_rate'] / 2000:g} kHz, range {_RANGE_DB:.0f} dB",
        rows="\n".join(rows),
        classes=_classes(facts),
        details=html.escape(json.dumps(facts["settings"], indent=1, ensure_ascii=False)),
        version=uss_jax.__version__,
    )


_ROW = string.Template(
    """<section class="sound" data-seconds="$seconds">
<h2>$name</h2><p>$note &middot; <a href="$file">file</a>$part</p>
<div class="picture"><img src="$picture" alt="Spectrogram of $name"><i></i></div>
<audio controls preload="metadata" src="$sound"></audio>
</section>"""
)


def not_heard(sound: dict[str, Any], facts: dict[str, Any]) -> str:
    """Returns a remark on a class that is below the threshold everywhere, else an empty text."""
    if "peak" not in sound or sound["active_share"] > 0:
        return ""
    peak, threshold = 100 * sound["peak"], 100 * facts["threshold"]
    return f"not heard (peak {peak:.3g} %, threshold {threshold:.3g} %)"


def _note(sound: dict[str, Any], facts: dict[str, Any]) -> str:
    if words := not_heard(sound, facts):
        return words
    if "without" in sound:
        absent = [one["name"] for one in sound["without"] if not_heard(one, facts)]
        if absent:
            return f"the recording: {', '.join(absent)} is not heard"
    level = f"{20 * np.log10(max(sound['rms'], 1e-10)):.1f} dBFS" if sound["rms"] else "silent"
    if sound["clipped_share"]:
        level += f", {100 * sound['clipped_share']:.2g} % of the samples clipped"
    if sound.get("active_share") is None:
        return level
    return f"{level}, active in {100 * sound['active_share']:.0f} % of the segments"


def _classes(facts: dict[str, Any]) -> str:
    """Returns an HTML strip for each class heard, darker where it is more probable."""
    if "classes" not in facts:
        return ""
    strips = []
    for name, row in list(facts["classes"].items())[:_CLASSES_SHOWN]:
        strip = _png(np.array([row]), 0.0, 1.0, "Blues")
        strips.append(
            f'<tr><th>{html.escape(name)}</th><td><img src="{strip}" alt=""></td>'
            f"<td>{100 * max(row):.0f} %</td></tr>"
        )
    more = len(facts["classes"]) - len(strips)
    heading = f"<h2>Classes heard, by {facts['segment_seconds']:g}-second segment</h2>"
    if not strips:
        return f"{heading}<p>No class reaches {100 * facts['threshold']:g} %.</p>"
    end = f"<p>and {more} more in report.json</p>" if more else ""
    return f'{heading}<table class="classes">{"".join(strips)}</table>{end}'


def band_levels(path: str | os.PathLike) -> Float[np.ndarray, "f x"]:
    """Returns mel band levels over a file's length, in dB, averaged over channels."""
    form = audio_format(path)
    top = form.sample_rate / 2
    weights = mel_matrix(form.sample_rate, _N_FFT, _BANDS, min(40.0, top / 4), top)
    weights /= np.maximum(weights.sum(axis=0), 1e-12)  # mean of a band's bins, not their sum
    frames = max(-(-form.samples // _N_FFT), 1)
    columns = min(frames, _COLUMNS)
    power, counts = np.zeros((columns, _BANDS)), np.zeros(columns)
    window, at = np.hanning(_N_FFT), 0
    for block in read_blocks(path, 256 * _N_FFT, any_scale=True):
        padded = np.pad(block, ((0, 0), (0, -block.shape[1] % _N_FFT)))
        pieces = padded.reshape(len(block), -1, _N_FFT) * window
        spectra = np.mean(np.square(np.abs(np.fft.rfft(pieces))), axis=0) / (window.sum() / 2) ** 2
        place = np.minimum((at + np.arange(len(spectra))) * columns // frames, columns - 1)
        np.add.at(power, place, spectra @ weights)
        np.add.at(counts, place, 1)
        at += len(spectra)
    return 10 * np.log10(np.maximum(power / np.maximum(counts, 1)[:, None], 1e-12)).T


def _png(values: Float[np.ndarray, "f x"], low: float, high: float, colours: str) -> str:
    """Returns a PNG picture as a data URL; the first row is at the bottom."""
    file = io.BytesIO()
    imsave(file, values, vmin=low, vmax=high, cmap=colours, origin="lower", format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _player(path: pathlib.Path) -> tuple[str, bool]:
    """Returns the beginning of a file as an MP3 data URL, and whether it is the whole file."""
    form = audio_format(path)
    samples = max(round(_PLAYED_SECONDS * form.sample_rate), 1)
    block = next(read_blocks(path, samples, any_scale=True))
    rate = form.sample_rate
    stereo = block[:2] if len(block) == 2 else block.mean(axis=0, keepdims=True)
    if rate not in MP3_SAMPLE_RATES:
        stereo, rate = resample(stereo, rate, 44100), 44100
    peak = max(float(np.abs(stereo).max(initial=0)), 1.0)
    data = base64.b64encode(mp3_bytes(stereo / peak, rate)).decode()
    return f"data:audio/mpeg;base64,{data}", block.shape[1] == form.samples
