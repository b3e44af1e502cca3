"""Many recordings, one after another: what `uss-jax separate` does."""

import glob
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from uss_jax.audio.files import AUDIO_SUFFIXES, audio_format, read_blocks, resample_blocks
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.separation.names import safe_name
from uss_jax.separation.queries import Query
from uss_jax.separation.recordings import Separator
from uss_jax.separation.report import recording_facts, write_report
from uss_jax.separation.separator import tag_segments
from uss_jax.training.model import Model

_HEARD_SHOWN = 20


def find_recordings(words: Sequence[str]) -> list[pathlib.Path]:
    """The recordings that files, folders and patterns name; in folders, all audio files below."""
    found: list[pathlib.Path] = []
    for word in words:
        path = pathlib.Path(word)
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
            if not below:
                suffixes = ", ".join(sorted(AUDIO_SUFFIXES))
                raise UserError(f"{word} is a folder without audio files ({suffixes})")
            found += below
        elif path.exists() or not glob.has_magic(word):
            found.append(path)  # a missing one is said when its turn comes
        else:
            matches = sorted(glob.glob(word, recursive=True))
            if not matches:
                raise UserError(f"no file matches {word}")
            found += map(pathlib.Path, matches)
    return list(dict.fromkeys(found))


def separate_all(
    separator: Separator,
    paths: Sequence[pathlib.Path],
    out: str | os.PathLike,
    query: Query,
    settings: dict[str, Any],
) -> int:
    """Separates recordings into a folder each; a bad one is said, and the rest goes on.

    Args:
      separator: with its settings.
      paths: the recordings.
      out: the folder of the folders.
      query: what to ask for.
      settings: what the reports say of how it was asked.

    Returns:
      How many could not be separated.
    """
    failed = 0
    for path, folder in zip(paths, _folders(paths, pathlib.Path(out)), strict=True):
        try:
            made = separator.separate_file(path, folder, query)
            active = {target.name: float(target.active.mean()) for target in made.targets}
            sounds = [
                {
                    "name": name,
                    "file": os.path.relpath(file, folder),
                    "rms": made.rms[name],
                    "active_share": active.get(name) if query.needs_tags else None,
                }
                for name, file in made.files.items()
            ]
            folder.mkdir(parents=True, exist_ok=True)
            facts = recording_facts(
                path,
                sounds=sounds,
                probabilities=made.probabilities,
                segment_seconds=separator.model.segment_samples / separator.model.sample_rate,
                threshold=getattr(query, "threshold", 0.0),
                settings=settings,
            )
            write_report(folder, facts, {path.name: path, **made.files})
        except UserError as error:
            print(f"uss-jax: {error}", file=sys.stderr)
            failed += 1
        else:
            print(f"{path}: {len(made.files)} sounds in {folder}, see report.html there")
    return failed


def _folders(paths: Sequence[pathlib.Path], out: pathlib.Path) -> list[pathlib.Path]:
    """A folder for each recording, named after it; with its suffix or number where names repeat."""
    names: list[str] = []
    for path in paths:
        wishes = [safe_name(path.stem), safe_name(path.name)]
        wishes += [f"{wishes[0]}-{number}" for number in range(2, len(paths) + 2)]
        names.append(next(wish for wish in wishes if wish not in names))
    return [out / name for name in names]


def heard(model: Model, path: pathlib.Path, threshold: float) -> str:
    """Which classes sound in a recording, and where, without separating anything."""
    form = audio_format(path)
    blocks = resample_blocks(read_blocks(path), form.sample_rate, model.sample_rate)
    probabilities = tag_segments(model, blocks)
    peaks = probabilities.max(axis=0)
    seconds = model.segment_samples / model.sample_rate
    lines = [f"{path}: {form.samples / form.sample_rate:.1f} s"]
    found = [k for k in np.argsort(-peaks, kind="stable").tolist() if peaks[k] >= threshold]
    for k in found[:_HEARD_SHOWN]:
        marks = "".join("#" if p >= threshold else "." for p in probabilities[:60, k])
        name = load_ontology().class_names[k]
        lines.append(f"  {100 * peaks[k]:3.0f} %  {name:<32} {marks}")
    if not found:
        lines.append(f"  no class reaches {threshold:g}")
    elif len(found) > _HEARD_SHOWN:
        lines.append(f"  and {len(found) - _HEARD_SHOWN} more")
    lines.append(f"  (a mark is a segment of {seconds:g} s, # where the class sounds)")
    return "\n".join(lines)
