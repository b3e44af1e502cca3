"""Mining: runs the detector over every clip once to find the anchors of all its labels.

With a query net, the condition of every anchor is computed in the same pass.

A part is the clips of one TFRecord shard. Each host mines every `hosts`-th part on a mesh of its
own devices, so that no host waits for another. Parts are files; existing ones are not mined again.
The host that finishes the last part writes the table.

Letters: `r` records, `k` classes.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Integer
from tqdm import tqdm

from uss_jax.anchors import conditions
from uss_jax.anchors.detect import RULES, image_of_rule
from uss_jax.anchors.of_labels import mine_batch
from uss_jax.anchors.table import COLUMNS, AnchorTable, read_header, read_table, typed, write_table
from uss_jax.audio.pcm import to_float
from uss_jax.bundles import nets
from uss_jax.bundles.bundle import net_hash
from uss_jax.bundles.model import Net
from uss_jax.data.chosen import Chosen
from uss_jax.data.index import RecordIndex
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.devices.mesh import make_mesh, on_all_devices, to_devices
from uss_jax.disk.atomic import flush_below, move, owner, replacing
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.disk.folder import make_folder
from uss_jax.disk.lock import InUse, only_one
from uss_jax.errors import UserError, counted
from uss_jax.ontology import load_ontology


@dataclasses.dataclass(frozen=True)
class MiningSettings:
    """Settings of the mining.

    Attributes:
      sample_rate: sampling rate, in Hz.
      segment_samples: length of an anchor, in samples.
      clip_samples: length to which clips are padded or cut, in samples, as in training.
      candidates: number of anchors per label.
      min_dbfs: lowest level of an anchor, in dB of full scale; None for no limit.
      rule: rule that finds anchors, "uss" or "htsat", see `choose_anchors`.
    """

    sample_rate: int
    segment_samples: int
    clip_samples: int
    candidates: int
    min_dbfs: float | None
    rule: str = RULES[0]


@dataclasses.dataclass(frozen=True)
class Query:
    """The query net that computes conditions, and the output that they are.

    Attributes:
      tagger: the tagging net of the query net.
      output: the output that is the condition, one of `conditions.OUTPUTS`.
    """

    tagger: Net
    output: str

    def header(self) -> dict[str, Any]:
        """Returns what identifies the conditions of these anchors, less the anchors' digest."""
        return {
            "format_version": conditions.FORMAT_VERSION,
            "query_hash": net_hash(self.tagger.variables),
            "query_model": nets.fields_of(self.tagger.module),
            "output": self.output,
            "width": nets.output_shapes(self.tagger.module)[self.output].shape[1],
        }


def mine(
    reader: ClipReader,
    sed: Net,
    out: str | os.PathLike,
    settings: MiningSettings,
    *,
    query: Query | None = None,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    threads: int = 2,
) -> bool:
    """Mines this host's missing parts; the last host to finish writes the table.

    If the table is there, and only its conditions are missing or damaged, the detector is not run
    again and the table stays.

    Args:
      reader: reader of the records.
      sed: the detector.
      out: path of the table; until it is written, parts are in a folder beside it.
      settings: mining settings.
      query: computes the conditions, which are written beside `out`; None for no conditions.
      batch_size: clips per batch, over all devices of this host.
      host, hosts: index of this host, from 0, and number of hosts that share `out`.
      threads: number of threads that read batches.

    Returns:
      Whether everything is written; if not, another host still mines or writes.
    """
    index, out = reader.index, pathlib.Path(out)
    mesh = make_mesh(jax.local_devices())
    _require_minable(index, batch_size, mesh.size)
    image = image_of_rule(settings.rule, sed.module, settings.clip_samples, "--rule")
    header = _header(sed, index, settings)
    about = query and query.header()
    table = _table_made(out, header, index)
    if _complete(out, about, table, index):
        return True
    parts = _make_parts_folder(out, header, about, table)
    find = table or _detection(sed, mesh, image, settings)
    places = [_part(parts, number) for number in range(len(index.shards))]
    todo = [number for number in range(host, len(places), hosts) if not places[number].exists()]
    ends = np.searchsorted(index.record_shard, np.arange(len(places) + 1))
    total = int(sum(ends[number + 1] - ends[number] for number in todo))
    compute = query and _vectors(query, about["width"], mesh, settings, batch_size)
    with jax.set_mesh(mesh), _Progress(total) as progress:
        for number in todo:
            records = np.arange(ends[number], ends[number + 1])
            columns = _mine_part(
                *(reader, records, find, compute, mesh, settings.clip_samples),
                *(batch_size, threads, progress),
            )
            more = {}
            if compute:
                vectors = columns.pop("vector")
                more[_DIGEST] = conditions.write_shard(_conditions(parts), number, vectors)
            with replacing(places[number]) as temporary:
                np.savez(temporary, **typed(columns), **more)
            progress.part_done(len(records))
    if not all(place.exists() for place in places):
        return _all_made(out, header, index, about)
    try:
        with only_one(parts, "it writes the table"):
            _assemble(out, parts, header, index, about, table)
    except InUse:
        return False
    except FileNotFoundError:  # another host has just assembled and removed the parts
        if not _all_made(out, header, index, about):
            raise
    return True


def _detection(
    sed: Net, mesh: jax.sharding.Mesh, image: np.ndarray | None, settings: MiningSettings
) -> Callable[..., dict[str, Any]]:
    """Returns `mine_batch` with the detector on the devices."""
    return functools.partial(
        mine_batch,
        sed.module,
        on_all_devices(sed.variables, mesh),
        image=image,
        segment_samples=settings.segment_samples,
        candidates=settings.candidates,
        min_dbfs=settings.min_dbfs,
    )


def _vectors(
    query: Query,
    width: int,
    mesh: jax.sharding.Mesh,
    settings: MiningSettings,
    batch_size: int,
) -> Callable[..., np.ndarray]:
    """Returns `vectors_of_anchors` with the query net on the devices."""
    tagger = query.tagger.on(mesh)

    def compute(segments: np.ndarray) -> np.ndarray:
        placed = to_devices({"audio": segments}, mesh)["audio"]
        return np.asarray(tagger(to_float(placed))[query.output])

    return functools.partial(
        conditions.vectors_of_anchors,
        compute,
        width=width,
        segment_samples=settings.segment_samples,
        batch_size=batch_size,
    )


def _require_minable(index: RecordIndex, batch_size: int, devices: int) -> None:
    """Raises a UserError if devices cannot share a batch, or the records have no labels."""
    if batch_size % devices:
        raise UserError(
            f"--batch {batch_size} is not divisible by {devices} devices; use "
            f"{-(-batch_size // devices) * devices}"
        )
    if not len(index.label_class):
        raise UserError("the records have no labels, so there is nothing to mine")


class _Progress(tqdm):
    """A bar on a terminal; elsewhere, prints a line after each part."""

    def __init__(self, clips: int):
        super().__init__(total=clips, desc="mine", unit="clip", disable=None)
        self._done, self._began = 0, time.monotonic()

    def part_done(self, clips: int) -> None:
        """Reports that a part with this number of clips is done, unless there is a bar."""
        if self.disable:
            self._done += clips
            rate = self._done / (time.monotonic() - self._began)
            left = (self.total - self._done) / rate
            print(
                f"mine: {self._done} of {counted(self.total, 'clip')}, {rate:.1f} clips/s, "
                f"{left:.0f} s left",
                flush=True,
            )


def _header(sed: Net, index: RecordIndex, settings: MiningSettings) -> dict[str, Any]:
    """Returns the header of the table that these would give."""
    header = {
        "sed_hash": net_hash(sed.variables),
        "index_digest": index.digest,
        **dataclasses.asdict(settings),
    }
    if settings.rule == RULES[0]:
        del header["rule"]  # omitted, to match tables older than the key
    return header


def _table_made(
    out: pathlib.Path, header: dict[str, Any], index: RecordIndex
) -> AnchorTable | None:
    """Returns the table with these settings, if it exists already."""
    if not out.exists():
        return None
    there = read_header(out)
    if not index.has_digest(there["index_digest"]):
        return None
    if {**there, "index_digest": index.digest} != header:
        return None
    return read_table(out, index, header["segment_samples"])


def _conditions_made(
    out: pathlib.Path, about: dict[str, Any], table: AnchorTable, index: RecordIndex
) -> bool:
    """Returns whether undamaged conditions of a table by this query net exist."""
    folder = conditions.folder_of(out)
    try:
        found = conditions.open_conditions(folder, table, index, verify=True).header
    except UserError:
        return False
    return {**found, **about} == found


def _all_made(
    out: pathlib.Path, header: dict[str, Any], index: RecordIndex, about: dict[str, Any] | None
) -> bool:
    """Returns whether the table, and its conditions if `about` is given, exist."""
    return _complete(out, about, _table_made(out, header, index), index)


def _complete(
    out: pathlib.Path, about: dict[str, Any] | None, table: AnchorTable | None, index: RecordIndex
) -> bool:
    """Returns whether nothing beside a table is left to mine."""
    return table is not None and (about is None or _conditions_made(out, about, table, index))


def _make_parts_folder(
    out: pathlib.Path,
    header: dict[str, Any],
    about: dict[str, Any] | None,
    table: AnchorTable | None,
) -> pathlib.Path:
    """Creates the folder of parts, whose name includes a digest of what is mined."""
    what = dict(header)
    if about:
        what |= {"query": about, "anchors_digest": table and table.digest}
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    parts = out.with_name(f".{out.name}.parts-{digest}")
    make_folder(parts, "choose another --out")
    if about:
        make_folder(_conditions(parts), "choose another --out")
        there = conditions.folder_of(out)
        if there.is_symlink() or (there.exists() and not there.is_dir()):
            raise UserError(
                f"{there} is where the conditions must be, but is not a folder; remove it or "
                "choose another --out"
            )
    return parts


def _part(parts: pathlib.Path, number: int) -> pathlib.Path:
    return parts / f"{number:05d}.npz"


# Array in a part: the digest of its conditions.
_DIGEST = "conditions_digest"


def _conditions(parts: pathlib.Path) -> pathlib.Path:
    return parts / "conditions"


def _mine_part(
    reader: ClipReader,
    records: Integer[np.ndarray, " r"],
    find: Callable[..., dict[str, Any]] | AnchorTable,
    compute: Callable[..., np.ndarray] | None,
    mesh: jax.sharding.Mesh,
    clip_samples: int,
    batch_size: int,
    threads: int,
    progress: tqdm,
) -> dict[str, np.ndarray]:
    """Mines some records and returns their table rows, with `vector` if `compute` is given.

    `find` is `mine_batch` of a batch, or the table that has the anchors; `compute` is
    `vectors_of_anchors` of its rows.
    """
    table = find if isinstance(find, AnchorTable) else None
    found: list[tuple[np.ndarray, np.ndarray, Any]] = []
    rows: list[dict[str, np.ndarray]] = []

    def fetch(clips: np.ndarray, audio: np.ndarray, mined: Any) -> None:
        columns = table.rows(reader.index, clips) if table else _rows(reader.index, clips, mined)
        if compute:
            at = np.searchsorted(clips, columns["record"])
            columns["vector"] = compute(audio, at, columns["begin_sample"], columns["score"])
        rows.append(columns)
        progress.update(len(clips))

    left = len(records)
    for batch in _label_batches(reader, records, clip_samples, batch_size, threads):
        clips = batch.pop("record")[:left]
        left -= len(clips)
        mined = None if table else find(to_devices(batch, mesh))
        found.append((clips, batch["audio"], mined))
        # Fetch the previous batch's results while this one runs.
        if len(found) > 1:
            fetch(*found.pop(0))
    for some in found:
        fetch(*some)
    return {name: np.concatenate([some[name] for some in rows]) for name in rows[0]}


def _label_batches(
    reader: ClipReader,
    records: Integer[np.ndarray, " r"],
    clip_samples: int,
    batch_size: int,
    threads: int,
) -> Iterator[dict[str, np.ndarray]]:
    index = reader.index
    most = int(np.diff(index.label_row.astype(np.int64)).max())
    for batch in batches(
        reader,
        Chosen(records, np.zeros_like(records)),  # the class is not used
        start_step=0,
        stop_step=-(-len(records) // batch_size),
        batch_size=batch_size,
        clip_samples=clip_samples,
        threads=threads,
    ):
        labels = np.zeros((batch_size, most), np.int32)
        related = np.zeros((batch_size, len(load_ontology().class_mids)), np.uint8)
        for row, record in enumerate(batch["record"].tolist()):
            of_clip = index.labels(record)
            labels[row, : len(of_clip)] = of_clip
            related[row] = _related(tuple(of_clip.tolist()))
        del batch["class_index"]
        yield {**batch, "labels": labels, "related": related}


@functools.lru_cache(maxsize=100_000)
def _related(labels: tuple[int, ...]) -> Bool[np.ndarray, "k"]:
    """Returns a mask of the labels, their ancestors and their descendants."""
    ontology = load_ontology()
    related = np.zeros(len(ontology.class_mids), bool)
    for label in labels:
        related[list(ontology.relatives(label))] = True
    return related


def _rows(
    index: RecordIndex, records: Integer[np.ndarray, " r"], mined: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Flattens mined arrays to one row per label of each record."""
    counts = np.diff(index.label_row.astype(np.int64))[records]
    at = np.arange(mined["purity"].shape[1]) < counts[:, None]
    columns = {name: np.asarray(column)[: len(records)][at] for name, column in mined.items()}
    classes = [index.labels(record) for record in records.tolist()]
    return {
        "record": np.repeat(records, counts).astype(np.uint32),
        "class": np.concatenate([*classes, np.zeros(0, np.uint16)]),
        **columns,
    }


def _assemble(
    out: pathlib.Path,
    parts: pathlib.Path,
    header: dict[str, Any],
    index: RecordIndex,
    about: dict[str, Any] | None,
    table: AnchorTable | None,
) -> None:
    """Writes the table, unless it is there, and its conditions, from all parts."""
    rows, wanted = [], {**COLUMNS, **({_DIGEST: Column("U")} if about else {})}
    try:
        for part in range(len(index.shards)):
            with open(_part(parts, part), "rb") as file:
                rows.append(read_npz(file, wanted))
    except ValueError as error:
        raise UserError(
            f"{_part(parts, part)} is damaged ({error}); remove it and run the same command again"
        ) from error
    columns = {name: np.concatenate([some[name] for some in rows]) for name in COLUMNS}
    if not np.array_equal(columns["class"], index.label_class):
        raise UserError(
            f"{parts} holds parts that do not match the records; remove that folder and run the "
            "same command again"
        )
    if about:
        digests = [str(some[_DIGEST]) for some in rows]
        anchors = table or AnchorTable.of(header, columns)
        about = {**about, "anchors_digest": anchors.digest, "shard_digests": digests}
        # An interrupted assembly may have moved them already.
        if not _conditions_made(out, about, anchors, index):
            conditions.write_header(_conditions(parts), about)
            _replace_folder(_conditions(parts), conditions.folder_of(out))
    if table is None:
        write_table(out, header, columns)
    shutil.rmtree(parts, ignore_errors=True)


def _replace_folder(new: pathlib.Path, place: pathlib.Path) -> None:
    """Moves a folder to a place, whose old folder is removed.

    Raises:
      FileNotFoundError: `new` is gone; the old folder stays.
      UserError: in place of another OSError.
    """
    aside = place.with_name(f".{place.name}.{owner()}")
    try:
        flush_below(new)
        if place.is_dir():
            os.rename(place, aside)
        try:
            move(new, place)
        except FileNotFoundError:
            if aside.exists():
                os.rename(aside, place)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{place} could not be written ({error.strerror or error}); mend it and run the same "
            "command again"
        ) from error
