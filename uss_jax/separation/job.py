"""Separates many recordings one after another; the body of `uss-jax separate`."""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from uss_jax.audio.files import audio_format, read_blocks, truncation
from uss_jax.audio.resampling import resample_blocks
from uss_jax.bundles import nets
from uss_jax.bundles.bundle import net_hash
from uss_jax.bundles.model import Model
from uss_jax.disk.atomic import is_full
from uss_jax.disk.checked_json import either, list_of, nothing, number, read_json, record, text
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError, counted, one_line
from uss_jax.ontology import load_ontology
from uss_jax.separation.input_files import InputFile, Places
from uss_jax.separation.queries import Classes, Query
from uss_jax.separation.recordings import RESIDUAL, Separated, Separator
from uss_jax.separation.report import REPORT, not_heard, recording_facts, write_report
from uss_jax.separation.windows import classes_heard, tag_segments

_HEARD_SHOWN = 20
_MOST_MARKS = 60
# Present in a recording's folder until its sounds and reports are complete.
UNFINISHED = ".unfinished"
# Fields of an earlier run's report.json that are validated.
_TAKEN_OUT = record(
    {"name": text(), "active_share": number(0, 1), "peak": number(0, 1)}, others=True
)
_SOUND = record(
    {
        "name": text(),
        "file": text(),
        "clipped_share": number(0, 1),
        "active_share": either(nothing(), number(0, 1)),
    },
    {"peak": number(0, 1), "without": list_of(_TAKEN_OUT)},
    others=True,
)
_FINISHED = record(
    {"made_of": text(), "sounds": list_of(_SOUND)},
    {"threshold": number(0, 1), "truncated": text(), "settings": record({}, others=True)},
    others=True,
)
_MOST_BYTES = 1 << 28  # limit for report.json: hours of audio have many segments


@dataclasses.dataclass(frozen=True)
class Done:
    """Counts of recordings by outcome.

    Attributes:
      failed: recordings that could not be separated.
      not_heard: recordings that lack a queried class.
      earlier: recordings that an earlier run had separated in the same way.
    """

    failed: int
    not_heard: int
    earlier: int


def separate_all(
    separator: Separator,
    recordings: Sequence[InputFile],
    out: str | os.PathLike,
    query: Query,
    settings: dict[str, Any],
) -> Done:
    """Separates each recording into its own folder; failures are reported and skipped.

    Results of an earlier run with the same recording, model, query and settings are kept. A
    recording during which that run was killed is separated again.

    Args:
      separator: separator with its settings.
      recordings: recordings to separate.
      out: output folder, parent of the recordings' folders.
      query: sounds to separate.
      settings: options to record in the reports.

    Raises:
      UserError: the query does not fit the model.
    """
    query.require_fit(separator.model)
    if isinstance(query, Classes) and (said := query.unheard_of(separator.model)):
        print(said, file=sys.stderr)
    run = _digest_of_run(separator, query, settings)
    taken = Places(out)
    unheard = earlier = 0
    rate = separator.model.sample_rate
    print(
        f"{separator.model.path} works at {rate} Hz: separated sounds contain nothing above "
        f"{rate // 2} Hz"
    )

    def separate(recording: InputFile) -> None:
        nonlocal unheard, earlier
        folder = taken.folder_of(recording)
        digest = _digest_of_recording(run, recording.path)
        facts = finished_facts(folder, digest)
        if facts is None:
            facts = _separate_one(separator, recording.path, folder, query, settings, digest)
            done = f"{_written(facts, separator)} in {folder}, see report.html"
        else:
            done = f"done earlier, in {folder}"
            earlier += 1
        print(one_line(f"{recording.path}: {done}"))
        for remark in _remarks(facts):
            print(f"  {remark}")
        unheard += any(not_heard(sound, facts) for sound in _asked_for(facts))

    failed = for_each(recordings, separate)
    return Done(failed, unheard, earlier)


def for_each(recordings: Sequence[InputFile], act: Callable[[InputFile], None]) -> int:
    """Calls `act` on each recording, reports failures and returns their number.

    A full disk is raised: no other recording could be written either.
    """
    failed = 0
    for recording in recordings:
        try:
            act(recording)
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            if is_full(error):
                raise
            print(f"uss-jax: {one_line(str(error))}", file=sys.stderr)
            failed += 1
    return failed


def _separate_one(
    separator: Separator,
    path: pathlib.Path,
    folder: pathlib.Path,
    query: Query,
    settings: dict[str, Any],
    digest: str,
) -> dict[str, Any]:
    """Writes a recording's sounds and reports; returns the contents of report.json."""
    plan = separator.plan(path, query)
    mark = folder / UNFINISHED
    killed = mark.is_file() and mark.read_bytes() == digest.encode()
    replace = separator.settings.overwrite or killed
    rooms = separator.make_room(plan, folder, replace=replace)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(digest)
    try:
        made = separator.write(plan, rooms)
    except UserError:
        if not any(file.exists() for file in rooms.values()):
            mark.unlink()
        raise
    facts = recording_facts(
        path,
        sounds=_sounds(made, folder, query),
        probabilities=made.probabilities,
        segment_seconds=separator.model.segment_samples / separator.model.sample_rate,
        threshold=getattr(query, "threshold", 0.0),
        settings=settings,
    )
    if cut := truncation(path, decode=False):  # of a FLAC file, reading it has told
        facts["truncated"] = cut
    write_report(folder, {**facts, "made_of": digest}, [(path.name, path), *made.files.items()])
    mark.unlink()
    return facts


def _sounds(made: Separated, folder: pathlib.Path, query: Query) -> list[dict[str, Any]]:
    """Returns the report's entry for each file."""
    peaks = query.peaks(made.probabilities) if isinstance(query, Classes) else {}
    heard = {target.name: {} for target in made.targets}
    if query.needs_tags:
        heard = {t.name: {"active_share": float(t.active.mean())} for t in made.targets}
    for name in heard.keys() & peaks.keys():
        heard[name]["peak"] = peaks[name]
        heard[name]["classes"] = [load_ontology().class_names[k] for k in query.sets[name]]
    sounds = []
    for name, file in made.files.items():
        about = {"active_share": None, **heard.pop(name, {})}
        place = os.path.relpath(file, folder)
        levels = {"rms": made.rms[name], "clipped_share": made.clipped[name]}
        sounds.append({"name": name, "file": place, **levels, **about})
    if heard:  # what has no file is what the only file lacks
        sounds[0]["without"] = [{"name": name, **about} for name, about in heard.items()]
    return sounds


def _asked_for(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields what was asked for: the sounds that were written, or that were taken out."""
    for sound in facts["sounds"]:
        yield from sound.get("without", [sound])


def _written(facts: dict[str, Any], separator: Separator) -> str:
    """Names what was written, for a line of the log."""
    if separator.settings.only_residual:
        return facts["sounds"][0]["name"]
    residual = separator.settings.residual
    sounds = counted(len(facts["sounds"]) - residual, "sound")
    return f"{sounds} and the residual" if residual else sounds


def _remarks(facts: dict[str, Any]) -> Iterator[str]:
    """Yields warnings about the sounds that were written."""
    if all(sound["name"] == RESIDUAL for sound in facts["sounds"]):
        yield "none of the requested classes is heard"
    if why := facts.get("truncated"):
        yield f"the recording is cut off ({why})"
    for sound in _asked_for(facts):
        if words := not_heard(sound, facts):
            yield one_line(f"{sound['name']}: {words}")
    heard = [s["name"] for s in facts["sounds"] if s["active_share"] != 0]
    shared = facts.get("settings", {}).get("sum_to_mixture")
    if shared and len(heard) == 1:
        yield one_line(
            f"{heard[0]}: nothing else is heard, so --sum-to-mixture makes it the whole recording"
        )
    for sound in facts["sounds"]:
        if share := sound["clipped_share"]:
            yield (
                f"{sound['file']}: {100 * share:.2g} % of its samples are beyond full scale and "
                "were clipped; --format wav keeps them"
            )


def _digest_of_run(separator: Separator, query: Query, settings: dict[str, Any]) -> str:
    """Returns a SHA-256 digest of the model, the query and the settings."""
    digest = hashlib.sha256()
    model = separator.model
    asked = query.sets if isinstance(query, Classes) else sorted(query.vectors)
    settings = {key: value for key, value in settings.items() if key != "text"}  # in the sets
    words = [model.digest, asked, settings]
    if query.needs_tags and model.query.module.tagger is None:  # the tags are the detector's
        words.append([nets.completed(model.config)["sed"], net_hash(model.sed.variables)])
    if settings.get("sum_to_mixture"):
        words.append("heard sounds share the residual")  # once all did: those results are others
    digest.update(json.dumps(words, default=str, sort_keys=True).encode())
    if not isinstance(query, Classes):
        for name in sorted(query.vectors):
            digest.update(np.asarray(query.vectors[name], np.float32).tobytes())
    return digest.hexdigest()


def _digest_of_recording(run: str, path: pathlib.Path) -> str:
    """Returns a digest of the run and of the recording's file size and modification time."""
    try:
        about = path.stat()
    except OSError:
        return run  # the error is reported when the file is read
    return hashlib.sha256(f"{run} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()


def finished_facts(folder: pathlib.Path, digest: str) -> dict[str, Any] | None:
    """Returns report.json of an earlier run with this digest if it is complete, else None."""
    try:
        with open(folder / REPORT, "rb", opener=at_once) as file:
            facts = read_json(file, _FINISHED, max_bytes=_MOST_BYTES)
    except (OSError, ValueError):  # absent, or written by another program
        return None
    if facts["made_of"] != digest or (folder / UNFINISHED).exists():
        return None
    return facts if all((folder / s["file"]).is_file() for s in facts["sounds"]) else None


def heard(model: Model, path: pathlib.Path, threshold: float) -> str:
    """Returns text that lists the classes heard in a recording and where, without separating."""
    form = audio_format(path)
    blocks = resample_blocks(read_blocks(path), form.sample_rate, model.sample_rate)
    probabilities = tag_segments(model, blocks)
    peaks = probabilities.max(axis=0)
    # The marks of a long recording cover several segments each.
    width = -(-len(probabilities) // _MOST_MARKS)
    reached = np.maximum.reduceat(probabilities, np.arange(0, len(probabilities), width))
    seconds = width * model.segment_samples / model.sample_rate
    title = f"{one_line(str(path))}: {form.samples / form.sample_rate:.1f} s"
    if cut := truncation(path, decode=False):  # of a FLAC file, reading it has told
        title += f" (the recording is cut off: {cut})"
    lines = [title]
    found = classes_heard(probabilities, threshold)
    for k in found[:_HEARD_SHOWN]:
        marks = "".join("#" if p >= threshold else "." for p in reached[:, k])
        name = load_ontology().class_names[k]
        lines.append(f"  {100 * peaks[k]:3.0f} %  {name:<32} {marks}")
    if not found:
        lines.append(f"  no class reaches {threshold:g}")
    elif len(found) > _HEARD_SHOWN:
        lines.append(f"  and {len(found) - _HEARD_SHOWN} more")
    lines.append(f"  (each mark is {seconds:g} s, # where the class reaches the threshold)")
    return "\n".join(lines)
