"""Plots mined anchors: a clip's label probabilities over time, and the anchors chosen.

Letters: `t` samples, `c` anchors of a label.
"""

import os

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from uss_jax.anchors.table import AnchorTable
from uss_jax.audio.picture import spectrogram_db
from uss_jax.bundles.bundle import net_hash
from uss_jax.bundles.model import Net
from uss_jax.data.reader import ClipReader
from uss_jax.disk.atomic import replacing
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

_RANGE_DB = 80.0


def draw_anchors(
    reader: ClipReader, table: AnchorTable, sed: Net, id: str, path: str | os.PathLike
) -> None:
    """Writes a PNG of a clip's spectrogram and, below it, each label's probability and anchors.

    Args:
      reader: reader of the records.
      table: mined anchors of these records.
      sed: the detector that mined the table.
      id: clip id.
      path: PNG file to write.

    Raises:
      UserError: the table was mined with another detector, or no clip has this id.
    """
    if not table.mined_with(sed.module, net_hash(sed.variables)):
        raise UserError("the table was mined with another detector; give that one as --sed")
    index = reader.index
    found = np.flatnonzero(index.ids == id.encode(errors="surrogateescape"))
    if not found.size:
        raise UserError(
            f'no clip of these records has the id "{id}"; an existing id is '
            f"{index.ids[0].decode(errors='replace')}"
        )
    record = int(found[0])
    rate, length = table.header["sample_rate"], table.header["clip_samples"]
    samples = min(int(index.samples[record]), length)
    clip = reader.read(record, 0, samples) / np.float32(32768)
    framewise = np.asarray(sed(np.pad(clip, (0, length - samples))[None])["framewise"][0])

    labels = index.labels(record).tolist()
    figure = Figure(figsize=(10, 2.8 + 1.5 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [2.2] + [1.0] * len(labels)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    _draw_spectrogram(axes[0], clip, rate)
    axes[0].set_title(id, fontsize=11, parse_math=False)
    first = int(index.label_row[record])
    seconds = table.header["segment_samples"] / rate
    times = np.arange(len(framewise)) * sed.module.frame_hop_samples / rate
    for number, (axis, label) in enumerate(zip(axes[1:], labels, strict=True)):
        row, colour = first + number, f"C{number % 10}"
        axis.plot(times, framewise[:, label], color=colour, linewidth=1.5)
        # Scaled to each label's maximum, so that the curve of an unlikely label is not flat.
        axis.set_ylim(0, min(max(1.4 * float(framewise[:, label].max()), 0.01), 1.0))
        _draw_spans(axis, table.begin_sample[row] / rate, table.score[row], seconds, colour)
        best = int(table.begin_sample[row, 0]) / rate
        for edge in (best, best + seconds):
            axes[0].axvline(edge, color=colour, linewidth=1.5, linestyle=(3 * number, (4, 4)))
        axis.set_title(
            f"{load_ontology().class_names[label]} (in the anchor: strongest unrelated class "
            f"{float(table.purity[row]):.3f}, {float(table.rms_db[row]):.1f} dBFS)",
            fontsize=10,
        )
    axes[-1].set_xlim(0, max(samples, table.header["segment_samples"]) / rate)
    axes[-1].set_xlabel("s")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _draw_spans(
    axis,
    begin_seconds: Float[np.ndarray, " c"],
    scores: Float[np.ndarray, " c"],
    seconds: float,
    colour: str,
) -> None:
    """Shades a label's anchors with their scores, the best one darker."""
    for rank, (at, score) in enumerate(zip(begin_seconds.tolist(), scores.tolist(), strict=True)):
        if score < 0:
            continue
        axis.axvspan(at, at + seconds, color=colour, alpha=0.12 if rank else 0.35, linewidth=0)
        words = f"{score:.3f}" if rank else f"anchor: {score:.3f}"
        height = axis.get_ylim()[1] * 0.94
        axis.text(at + seconds / 2, height, words, ha="center", va="top", fontsize=8)


def _draw_spectrogram(axis, clip: Float[np.ndarray, " t"], rate: int) -> None:
    spectrogram = spectrogram_db(clip, rate)
    top = float(spectrogram.max())
    axis.imshow(
        spectrogram,
        origin="lower",
        aspect="auto",
        cmap="gray_r",
        vmin=top - _RANGE_DB,
        vmax=top,
        extent=(0, len(clip) / rate, 0, rate / 2000),
    )
    axis.set_ylabel("kHz")
