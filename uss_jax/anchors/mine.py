"""Mining: runs the detector over every clip once to find the anchors of all its labels.

With a query net, the condition of every anchor is computed in the same pass.

A part is the clips of one TFRecord shard. Each host mines every `hosts`-th part on a mesh of its
own devices, so that no host waits for another. Parts are files; existing ones are not mined again.
The host that finishes the last part writes the table.

Letters: `r` records, `k` classes.
"""

import dataclasses
import functools
import os
import pathlib
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
from uss_jax.anchors.parts import Output
from uss_jax.anchors.table import AnchorTable
from uss_jax.audio.pcm import to_float
from uss_jax.bundles import nets
from uss_jax.bundles.bundle import net_hash
from uss_jax.bundles.model import Net
from uss_jax.data.chosen import Chosen
from uss_jax.data.index import RecordIndex
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.devices.mesh import make_mesh, on_all_devices, to_devices
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
    index = reader.index
    mesh = make_mesh(jax.local_devices())
    _require_minable(index, batch_size, mesh.size)
    _require_long_enough(sed, query, settings)
    image = image_of_rule(settings.rule, sed.module, settings.clip_samples, "--rule")
    about = query and query.header()
    output = Output(pathlib.Path(out), _header(sed, index, settings), about, index)
    table = output.table()
    if output.complete(table):
        return True
    parts = output.make_parts(table)
    shards = len(index.shards)
    todo = parts.missing(range(host, shards, hosts))
    ends = np.searchsorted(index.record_shard, np.arange(shards + 1))
    total = int(sum(ends[number + 1] - ends[number] for number in todo))
    find = table or _detection(sed, mesh, image, settings)
    compute = query and _vectors(query, about["width"], mesh, settings, batch_size)
    with jax.set_mesh(mesh), _Progress(total) as progress:
        for number in todo:
            records = np.arange(ends[number], ends[number + 1])
            columns = _mine_part(
                *(reader, records, find, compute, mesh, settings.clip_samples),
                *(batch_size, threads, progress),
            )
            parts.write(number, columns)
            progress.part_done(len(records))
    return parts.finish(table)


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


def _require_long_enough(sed: Net, query: Query | None, settings: MiningSettings) -> None:
    """Raises a UserError if a net cannot compute on clips or anchors as short as these."""
    asked = [("--clip-seconds", settings.clip_samples, "detector", sed)]
    if query:
        asked.append(("--segment-seconds", settings.segment_samples, "query net", query.tagger))
    for option, samples, what, net in asked:
        if not nets.takes_length(net.module, samples):
            raise UserError(
                f"{option} {samples / settings.sample_rate:g} is too short for the {what}, "
                f"{type(net.module).__name__}; give more"
            )


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
        "sed_model": nets.fields_of(sed.module),
        "index_digest": index.digest,
        **dataclasses.asdict(settings),
    }
    if settings.rule == RULES[0]:
        del header["rule"]  # omitted, to match tables older than the key
    return header


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
