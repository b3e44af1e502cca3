"""Finds which classes sound when in a recording, and writes that as JSON and as a picture.

Letters: `g` steps of a grid, `k` classes.
"""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from uss_jax.audio.files import audio_format, read_blocks
from uss_jax.audio.resampling import resample_blocks
from uss_jax.bundles.bundle import net_hash
from uss_jax.bundles.model import Model
from uss_jax.disk.atomic import replacing
from uss_jax.ontology import load_ontology
from uss_jax.separation.report import write_json
from uss_jax.separation.windows import classes_heard, detect_sounds

TAGS, STRIPS = "tags.json", "tags.png"
# More columns than a picture shows are reduced to their maxima.
_COLUMNS = 1600


@dataclasses.dataclass(frozen=True)
class Tags:
    """Probabilities of all classes over a recording.

    Attributes:
      path: the recording.
      seconds: its length.
      step_seconds: step of the grid.
      probability: at step g, of class k.
    """

    path: pathlib.Path
    seconds: float
    step_seconds: float
    probability: Float32[np.ndarray, "g k"]

    def heard(self, threshold: float) -> list[int]:
        """Returns the classes that reach the threshold, the most probable first."""
        heard = classes_heard(self.probability, threshold)
        return [k for k in heard if self.probability[:, k].any()]

    def intervals(self, class_index: int, threshold: float) -> list[tuple[float, float]]:
        """Returns when a class reaches the threshold, as (begin, end) in seconds."""
        edges = _edges(self.probability[:, class_index] >= threshold) * self.step_seconds
        edges = np.minimum(edges, self.seconds)
        return [(round(float(a), 3), round(float(b), 3)) for a, b in edges.reshape(-1, 2)]


def tag(model: Model, path: pathlib.Path) -> Tags:
    """Tags a recording of any length in constant memory but for the result.

    Raises:
      UserError: the recording cannot be read.
    """
    form = audio_format(path)
    total = round(form.samples / form.sample_rate, 1)
    with tqdm(total=total, desc=path.name, unit="s", leave=False, disable=None) as progress:

        def read():
            for block in read_blocks(path):
                yield block
                progress.update(block.shape[1] / form.sample_rate)

        blocks = resample_blocks(read(), form.sample_rate, model.sample_rate)
        probability, step_seconds = detect_sounds(model, blocks)
    return Tags(path, form.samples / form.sample_rate, step_seconds, probability)


def write_tags(folder: pathlib.Path, tags: Tags, model: Model, threshold: float, most: int) -> None:
    """Writes tags.json and tags.png; replaces those of an earlier run."""
    with replacing(folder / STRIPS) as temporary:
        draw_strips(temporary, tags, threshold, most)
    write_json(folder / TAGS, tag_facts(tags, model, threshold))


def tag_facts(tags: Tags, model: Model, threshold: float) -> dict[str, Any]:
    """Returns the contents of tags.json."""
    ontology = load_ontology()
    return {
        "recording": os.fspath(tags.path),
        "seconds": tags.seconds,
        "model": model.path,
        "net_hash": net_hash(model.sed.variables),
        "threshold": threshold,
        "step_seconds": tags.step_seconds,
        "sounds": [
            {
                "class_index": k,
                "mid": ontology.class_mids[k],
                "name": ontology.class_names[k],
                "peak": round(float(tags.probability[:, k].max()), 4),
                "intervals": tags.intervals(k, threshold),
                "probability": [round(float(p), 3) for p in tags.probability[:, k]],
            }
            for k in tags.heard(threshold)
        ],
    }


def draw_strips(path: str | os.PathLike, tags: Tags, threshold: float, most: int) -> None:
    """Draws the probability of each class that is heard over time, as a PNG."""
    heard = tags.heard(threshold)[:most] or [int(np.argmax(tags.probability.max(axis=0)))]
    fold = -(-len(tags.probability) // _COLUMNS)
    padded = np.pad(tags.probability[:, heard], ((0, -len(tags.probability) % fold), (0, 0)))
    strips = padded.reshape(-1, fold, len(heard)).max(axis=1).T
    figure = Figure(figsize=(10, 0.32 * len(heard) + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(
        strips,
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=0,
        vmax=1,
        extent=(0, strips.shape[1] * fold * tags.step_seconds, len(heard), 0),
    )
    names = load_ontology().class_names
    axis.set_xlim(0, tags.seconds)
    axis.set_yticks(np.arange(len(heard)) + 0.5, [names[k] for k in heard])
    axis.hlines(np.arange(1, len(heard)), 0, tags.seconds, color="white", linewidth=0.5)
    axis.set_xlabel("s")
    figure.colorbar(image, ax=axis, label="probability", aspect=30)
    figure.savefig(path, dpi=110, format="png")


def _edges(active: Bool[np.ndarray, "g"]) -> np.ndarray:
    """Returns first steps of active runs, each followed by the step after its last."""
    return np.flatnonzero(np.diff(np.r_[False, active, False]))
