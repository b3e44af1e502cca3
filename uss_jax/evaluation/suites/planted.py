"""Tests whether the detector finds events planted at known places.

A clip is 10 s of digital silence or noise with one event from a labelled recording. An anchor
contains the event if at least 90 % of the event's energy lies inside it; the stricter count
requires the whole event, with a tolerance of one hop (10 ms) at either end. Mined anchors are
compared with random ones and with all places, the expectation over random anchors.

Letters: `n` planted clips, `t` samples of a clip, `p` anchors of a clip.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from uss_jax.bundles.model import Model, Net
from uss_jax.bundles.nets import arbitrary_anchors
from uss_jax.data.orders import BalancedOrder
from uss_jax.data.reader import ClipReader
from uss_jax.devices.batching import in_batches
from uss_jax.errors import UserError
from uss_jax.evaluation.clips import BATCH_SIZE, anchors_of_batch, open_clips
from uss_jax.evaluation.metrics import is_silent
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.text_table import format_table, silent_note

CLIP_SECONDS = 10.0
EVENT_SECONDS = 1.0
SNR_DB = 20.0
BACKGROUNDS = ("silence", "white noise", "pink noise")
_ENERGY_SHARE = 0.9
_HOP_SECONDS = 0.01
_TRIM_DB = 40.0


@dataclasses.dataclass(frozen=True)
class Planted:
    """Clips with one event each.

    Attributes:
      audio: [n, t] float32.
      class_index: [n] class of the event.
      begin_sample, end_sample: [n] first sample of the event, and first sample after it.
      heard: [n] False where the event is silent, so that there is nothing to find.
    """

    audio: Float[np.ndarray, "n t"]
    class_index: Integer[np.ndarray, " n"]
    begin_sample: Integer[np.ndarray, " n"]
    end_sample: Integer[np.ndarray, " n"]
    heard: Bool[np.ndarray, " n"]


def run(
    model: Model, data: str, out: str, *, split: str, clips: int, seed: int
) -> tuple[Results, str]:
    """Plants events of a split of the records and evaluates the anchors found."""
    reader, model = open_clips(data, split, model)
    summaries = evaluate_planted(model, reader, clips=clips, seed=seed)
    how = {
        "split": split,
        "clips": clips,
        "seed": seed,
        "event_seconds": EVENT_SECONDS,
        "snr_db": SNR_DB,
    }
    text = format_planted(summaries)
    if said := arbitrary_anchors(model.sed.module, reader.index.label_class):
        text += f"\n\n{said}"
    return {"rows": summaries, "how": how}, text


def evaluate_planted(
    model: Model, reader: ClipReader, *, clips: int, seed: int
) -> list[dict[str, Any]]:
    """Measures the share of mined and of random anchors that contain the event, per background.

    Args:
      model: model with the detector.
      reader: reader of the records that events are taken from.
      clips: number of clips per background; classes are balanced.
      seed: seed of all random choices; events and places are the same for all backgrounds.
    """
    summaries = []
    length = round(CLIP_SECONDS * model.sample_rate)
    places = np.arange(
        0, length - model.segment_samples + 1, round(_HOP_SECONDS * model.sample_rate)
    )
    for background in BACKGROUNDS:
        planted = plant(reader, background, sample_rate=model.sample_rate, clips=clips, seed=seed)
        heard = planted.heard
        if not heard.any():
            raise UserError("every planted recording is silent; check the split's recordings")
        begins = {
            "mined": _find(model.sed, planted, model.segment_samples, seed)[:, None],
            "random": _find(None, planted, model.segment_samples, seed)[:, None],
            "all places": np.broadcast_to(places, (clips, len(places))),
        }
        for anchors, begin in begins.items():
            share = energy_share(planted, begin, model.segment_samples)
            whole = contains_whole(planted, begin, model.segment_samples, model.sample_rate)
            summaries.append(
                {
                    "background": background,
                    "anchors": anchors,
                    "contain": float(np.mean(share[heard] >= _ENERGY_SHARE)),
                    "contain_whole": float(np.mean(whole[heard])),
                    "mean_energy_inside": float(np.mean(share[heard])),
                    "clips": int(heard.sum()),
                    "silent": int((~heard).sum()),
                }
            )
    return summaries


def plant(
    reader: ClipReader, background: str, *, sample_rate: int, clips: int, seed: int
) -> Planted:
    """Plants events from the records; events and places do not depend on the background."""
    order = BalancedOrder(reader.index.label_row, reader.index.label_class, seed)
    records, classes = order.draw(np.arange(clips))
    length = round(CLIP_SECONDS * sample_rate)
    audio, begins, ends, heard = np.zeros((clips, length), np.float32), [], [], []
    for row, record in enumerate(records.tolist()):
        rng = np.random.default_rng([seed, row])
        event = energetic_part(reader.read(record) / np.float32(32768), sample_rate)
        begins.append(int(rng.integers(length - len(event) + 1)))
        ends.append(begins[-1] + len(event))
        heard.append(not is_silent(event))
        if background != "silence":
            noise = coloured_noise(rng, length, 1.0 if background == "pink noise" else 0.0)
            audio[row] = noise * np.sqrt(np.mean(np.square(event)) * 10 ** (-SNR_DB / 10))
        audio[row, begins[-1] : ends[-1]] += event
    return Planted(
        audio, classes.astype(np.int32), np.array(begins), np.array(ends), np.array(heard)
    )


def energetic_part(waveform: Float[np.ndarray, " t"], sample_rate: int) -> Float[np.ndarray, "_"]:
    """Returns the second with the most energy, less quiet ends.

    Quiet frames (10 ms) are those 40 dB below the loudest one.
    """
    window = min(round(EVENT_SECONDS * sample_rate), len(waveform))
    energy = np.concatenate([[0.0], np.cumsum(np.square(waveform, dtype=np.float64))])
    begin = int(np.argmax(energy[window:] - energy[:-window]))
    part = waveform[begin : begin + window]
    frame = round(_HOP_SECONDS * sample_rate)
    frames = np.square(np.pad(part, (0, -window % frame))).reshape(-1, frame).sum(axis=1)
    loud = np.flatnonzero(frames >= frames.max() * 10 ** (-_TRIM_DB / 10))
    return part[loud[0] * frame : (loud[-1] + 1) * frame]


def coloured_noise(
    rng: np.random.Generator, samples: int, exponent: float
) -> Float[np.ndarray, " t"]:
    """Generates noise of mean square 1 and power 1 / frequency**exponent: 0 white, 1 pink."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** (-exponent / 2)
    noise = np.fft.irfft(spectrum, samples)
    return (noise / np.sqrt(np.mean(np.square(noise)))).astype(np.float32)


def _find(
    sed: Net | None, planted: Planted, segment_samples: int, seed: int
) -> Integer[np.ndarray, " n"]:
    """Finds anchors in batches of one shape; returns their begin samples."""
    begins = []
    for places, _ in in_batches(range(len(planted.audio)), BATCH_SIZE):
        at = np.array(places)
        batch = {
            "audio": jnp.asarray(planted.audio[at]),
            "samples": jnp.full(BATCH_SIZE, planted.audio.shape[1], jnp.int32),
            "class_index": jnp.asarray(planted.class_index[at]),
        }
        key = jax.random.fold_in(jax.random.key(seed), places[0])
        begins.append(anchors_of_batch(sed, batch, key, segment_samples).begin_sample)
    return np.concatenate(begins)[: len(planted.audio)]


def energy_share(
    planted: Planted, begin: Integer[np.ndarray, "n p"], segment_samples: int
) -> Float[np.ndarray, "n p"]:
    """Returns the share of each event's energy that lies inside each of its p anchors.

    Includes the background during the event, which is 20 dB lower or silent.
    """
    share = np.empty(begin.shape)
    for row, at in enumerate(begin):
        event_begin, event_end = planted.begin_sample[row], planted.end_sample[row]
        squares = np.square(planted.audio[row, event_begin:event_end], dtype=np.float64)
        energy = np.concatenate([[0.0], np.cumsum(squares)])
        first, last = (
            np.clip(edge - event_begin, 0, len(squares)) for edge in (at, at + segment_samples)
        )
        share[row] = (energy[last] - energy[first]) / max(energy[-1], 1e-20)
    return share


def contains_whole(
    planted: Planted, begin: Integer[np.ndarray, "n p"], segment_samples: int, sample_rate: int
) -> Bool[np.ndarray, "n p"]:
    """Tells whether the event begins and ends inside each of its anchors, within one hop."""
    hop = round(_HOP_SECONDS * sample_rate)
    late = planted.begin_sample[:, None] + hop >= begin
    return late & (planted.end_sample[:, None] <= begin + segment_samples + hop)


def format_planted(summaries: list[dict[str, Any]]) -> str:
    """Formats the shares as a table, in percent."""
    rows = [
        (
            f"{summary['background']}: {summary['anchors']}",
            *(
                f"{100 * summary[key]:.1f} %"
                for key in ("contain", "contain_whole", "mean_energy_inside")
            ),
            summary["clips"],
        )
        for summary in summaries
    ]
    table = format_table(("anchors", ">= 90 % inside", "all inside", "mean energy", "clips"), rows)
    note = (
        "share of clips with at least 90 % of the event's energy, or the whole event, inside the "
        f"anchor; mean share of its energy inside; noise {SNR_DB:.0f} dB below the event"
    )
    silent = summaries[0]["silent"]
    return "\n\n".join([table, note, *([silent_note(silent)] if silent else [])])
