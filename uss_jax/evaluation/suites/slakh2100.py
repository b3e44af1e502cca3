"""Slakh2100: songs of virtual instruments (https://zenodo.org/records/4599666).

Layout of the unpacked archive (https://github.com/ethman/slakh-utils):

    train/TrackXXXXX/    validation/TrackXXXXX/    test/TrackXXXXX/    each with
        mix.flac    stems/SNN.flac    metadata.yaml

Under `stems`, `metadata.yaml` gives for each SNN its `plugin_name` (a synthesiser patch) and
`midi_program_name` (a General MIDI instrument). Some stems were never rendered and have no file.
Published: SDRi by plugin name, over 2 s windows of the original mixtures in which the source peaks
above 0.1; up to 100 windows per name, and only names with more than 10.
"""

import collections
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from uss_jax.audio.files import audio_format, read_blocks
from uss_jax.bundles.model import Model
from uss_jax.errors import UserError
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.suites.mixing import (
    PER_CLASS,
    SECONDS,
    SEED,
    Window,
    class_index_of,
    require_files,
    score_splits,
)

NAMES = {"plugin": "plugin_name", "instrument": "midi_program_name"}
_LEAST_PEAK = 0.1
_LEAST_WINDOWS = 10


def run(
    model: Model, data: str, out: str, *, by: str, text_encoder: str | None, texts: str | None
) -> tuple[Results, str]:
    """Evaluates separation on the windows of the test split."""
    of_split = functools.partial(items, pathlib.Path(data), by=by)
    return score_splits(model, out, of_split, {"by": by}, text_encoder=text_encoder, texts=texts)


def items(folder: pathlib.Path, split: str, *, by: str = "plugin") -> list[Window]:
    """Returns the windows of a split.

    Args:
      folder: folder of the data set.
      split: `train` or `test`.
      by: key of NAMES: which name defines the classes.

    Raises:
      UserError: files are missing, or no source is loud enough.
    """
    require_files([folder / split], "Slakh2100")
    tracks = sorted(path for path in (folder / split).iterdir() if path.is_dir())
    require_files([t / name for t in tracks for name in ("metadata.yaml", "mix.flac")], "Slakh2100")
    found: dict[str, list[Window]] = collections.defaultdict(list)
    for track in tqdm(tracks, f"windows of {split}", disable=None):
        for stem, about in _stems(track / "metadata.yaml").items():
            source = track / "stems" / f"{stem}.flac"
            label = about.get(NAMES[by])
            if label and source.is_file():
                found[label] += _windows(source, track / "mix.flac", label, by)
    random = np.random.RandomState(SEED)
    chosen: list[Window] = []
    for windows in found.values():
        if len(windows) >= PER_CLASS:
            places = random.choice(np.arange(len(windows)), size=PER_CLASS, replace=False)
            windows = [windows[place] for place in places]
        if len(windows) > _LEAST_WINDOWS:
            chosen += windows
    if not chosen:
        raise UserError(
            f"no source in {folder / split} peaks above {_LEAST_PEAK} in more than "
            f"{_LEAST_WINDOWS} windows; is this Slakh2100?"
        )
    return chosen


def _stems(path: pathlib.Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        stems = yaml.safe_load(path.read_text(encoding="utf-8"))["stems"]
        if not isinstance(stems, Mapping) or not all(map(_is_stem, stems.values())):
            raise TypeError("stems is no mapping from names to mappings")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path} has no readable list of stems; unpack the track again") from error
    return stems


def _is_stem(about: Any) -> bool:
    """Returns whether an entry holds names, which may be absent, as texts."""
    if not isinstance(about, Mapping):
        return False
    return all(isinstance(about.get(key) or "", str) for key in NAMES.values())


def _windows(source: pathlib.Path, mixture: pathlib.Path, label: str, by: str) -> list[Window]:
    """Cuts a stem into consecutive windows; returns those in which it is loud enough."""
    rate = audio_format(source).sample_rate
    length = int(SECONDS * rate)
    windows = []
    for number, block in enumerate(read_blocks(source, length)):
        whole = block.shape[1] == length
        if whole and np.abs(block.mean(axis=0)).max() > _LEAST_PEAK:
            begin = number * SECONDS
            index = class_index_of(label) if by == "instrument" else None
            windows.append(Window(f"{source}@{begin:g}", label, index, source, mixture, begin))
    return windows
