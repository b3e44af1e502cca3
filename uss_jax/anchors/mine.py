"""Mining: runs the detector over every clip once to find the anchors of all its labels.

A part is the clips of one TFRecord shard. Each host mines every `hosts`-th part on a mesh of its
own devices, so that no host waits for another. Parts are files; existing ones are not mined again.
The host that finishes the last part writes the table.

Letters: `b` clips of a batch, `t` samples, `n` frames, `k` classes, `l` labels of a clip, `c`
anchors of a label, `i` frames of a detector's image.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped
from tqdm import tqdm

from uss_jax.anchors.detect import RULES, choose_anchors, image_of_rule, segment_loudness
from uss_jax.anchors.table import COLUMNS, read_header, typed, write_table
from uss_jax.audio.pcm import to_float
from uss_jax.bundles.bundle import net_hash
from uss_jax.bundles.model import Net
from uss_jax.data.index import RecordIndex
from uss_jax.data.pipeline import batches
from uss_jax.data.reader import ClipReader
from uss_jax.devices.mesh import make_mesh, on_all_devices, to_devices
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_npz import read_npz
from uss_jax.errors import UserError
from uss_jax.models.tagging import detect
from uss_jax.ontology import load_ontology
from uss_jax.wording import counted


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


def anchors_of_labels(
    framewise: Float[Array, "b n k"],
    clip: Float[Array, "b t"],
    samples: Int[Array, "b"],
    labels: Int[Array, "b l"],
    related: Shaped[Array, "b k"],
    *,
    hop_samples: int,
    segment_samples: int,
    candidates: int,
    min_dbfs: float | None,
    image: Int[Array, "i"] | None,
) -> dict[str, Array]:
    """Finds the anchors of every label of every clip; measures purity and level of the best ones.

    Args:
      framewise: framewise probabilities of all classes.
      clip: waveforms.
      samples: true samples of each clip; the rest is padding.
      labels: class indices; rows of clips with fewer labels are filled with any class.
      related: nonzero for a clip's labels, their ancestors and their descendants.
      hop_samples: samples between frames.
      segment_samples: length of an anchor, in samples.
      candidates: number of anchors per label.
      min_dbfs: see MiningSettings.
      image: for HTS-AT's own rule, see `choose_anchors`.

    Returns:
      begin_sample and score [b, l, c], purity and rms_db [b, l].
    """
    batch, width = labels.shape
    loudness = segment_loudness(
        clip, samples, segment_samples=segment_samples, hop_samples=hop_samples
    )
    of_label = jnp.take_along_axis(framewise, labels[:, None, :], axis=2).swapaxes(1, 2)
    begin, score = choose_anchors(
        of_label.reshape(batch * width, -1),
        jnp.repeat(samples, width),
        count=candidates,
        clip_samples=clip.shape[1],
        segment_samples=segment_samples,
        hop_samples=hop_samples,
        loudness=None if min_dbfs is None else jnp.repeat(loudness, width, axis=0),
        min_dbfs=0.0 if min_dbfs is None else min_dbfs,
        image=image,
    )
    begin = begin.reshape(batch, width, candidates)
    best = begin[:, :, 0]

    at = jnp.arange(framewise.shape[1]) * hop_samples
    end = jnp.minimum(best + segment_samples, samples[:, None])[:, :, None]
    inside = ((at >= best[:, :, None]) & (at <= end)).astype(framewise.dtype)
    total = jnp.einsum("bln,bnk->blk", inside, framewise, precision=jax.lax.Precision.HIGHEST)
    mean = total / jnp.sum(inside, axis=2, keepdims=True)
    return {
        "begin_sample": begin,
        "score": score.reshape(batch, width, candidates),
        "purity": jnp.max(jnp.where(related[:, None, :] > 0, 0.0, mean), axis=2),
        "rms_db": jnp.take_along_axis(loudness, best // hop_samples, axis=1),
    }


@functools.partial(jax.jit, static_argnames=("module", "segment_samples", "candidates", "min_dbfs"))
def _mine_batch(
    module: Any,
    variables: Any,
    batch: dict[str, Array],
    image: Int[np.ndarray | Array, "i"] | None,
    segment_samples: int,
    candidates: int,
    min_dbfs: float | None,
) -> dict[str, Array]:
    clip = to_float(batch["audio"])
    return anchors_of_labels(
        detect(module, variables, clip)["framewise"],
        clip,
        batch["samples"],
        batch["labels"],
        batch["related"],
        hop_samples=module.frame_hop_samples,
        segment_samples=segment_samples,
        candidates=candidates,
        min_dbfs=min_dbfs,
        image=image,
    )


def mine(
    reader: ClipReader,
    sed: Net,
    out: str | os.PathLike,
    settings: MiningSettings,
    *,
    batch_size: int,
    host: int = 0,
    hosts: int = 1,
    threads: int = 2,
) -> bool:
    """Mines this host's missing parts; the last host to finish writes the table.

    Args:
      reader: reader of the records.
      sed: the detector.
      out: path of the table; until it is written, parts are in a folder beside it.
      settings: mining settings.
      batch_size: clips per batch, over all devices of this host.
      host, hosts: index of this host, from 0, and number of hosts that share `out`.
      threads: number of threads that read batches.

    Returns:
      Whether the table is written; if not, other hosts still have parts to mine.
    """
    index, out = reader.index, pathlib.Path(out)
    mesh = make_mesh(jax.local_devices())
    if batch_size % mesh.size:
        raise UserError(
            f"--batch {batch_size} is not divisible by {mesh.size} devices; use "
            f"{-(-batch_size // mesh.size) * mesh.size}"
        )
    if not len(index.label_class):
        raise UserError("the records have no labels, so there is nothing to mine")
    image = image_of_rule(settings.rule, sed.module, settings.clip_samples, "--rule")
    header = {
        "sed_hash": net_hash(sed.variables),
        "index_digest": index.digest,
        **dataclasses.asdict(settings),
    }
    if settings.rule == RULES[0]:
        del header["rule"]  # omitted, to match tables older than the key
    if _is_made(out, header, index):
        return True
    parts = _make_parts_folder(out, header)
    todo = [
        part for part in range(host, len(index.shards), hosts) if not _part(parts, part).exists()
    ]
    variables = on_all_devices(sed.variables, mesh)
    shard_ends = np.searchsorted(index.record_shard, np.arange(len(index.shards) + 1))
    total = int(sum(shard_ends[part + 1] - shard_ends[part] for part in todo))
    done, began = 0, time.monotonic()
    with jax.set_mesh(mesh), tqdm(total=total, desc="mine", unit="clip", disable=None) as progress:
        for part in todo:
            records = np.arange(shard_ends[part], shard_ends[part + 1])
            columns = _mine_part(
                reader,
                records,
                sed.module,
                variables,
                settings,
                image,
                mesh,
                batch_size,
                threads,
                progress,
            )
            with replacing(_part(parts, part)) as temporary:
                np.savez(temporary, **typed(columns))
            if progress.disable:  # not a terminal: print lines instead
                done += len(records)
                rate = done / (time.monotonic() - began)
                left = (total - done) / rate
                print(
                    f"mine: {done} of {counted(total, 'clip')}, {rate:.1f} clips/s, "
                    f"{left:.0f} s left",
                    flush=True,
                )
    if not all(_part(parts, part).exists() for part in range(len(index.shards))):
        return False
    _assemble(out, parts, header, index)
    return True


def _is_made(out: pathlib.Path, header: dict[str, Any], index: RecordIndex) -> bool:
    """Returns whether a table with these settings already exists."""
    if not out.exists():
        return False
    there = read_header(out)
    if not index.has_digest(there["index_digest"]):
        return False
    return {**there, "index_digest": index.digest} == header


def _make_parts_folder(out: pathlib.Path, header: dict[str, Any]) -> pathlib.Path:
    """Creates the folder of parts, whose name includes a digest of the settings."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
    parts = out.with_name(f".{out.name}.parts-{digest}")
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{parts} cannot be created ({error.strerror}); choose another --out"
        ) from error
    return parts


def _part(parts: pathlib.Path, number: int) -> pathlib.Path:
    return parts / f"{number:05d}.npz"


@dataclasses.dataclass(frozen=True)
class _InOrder:
    """An order of records in sequence; the last record fills up the last batch."""

    records: Integer[np.ndarray, " r"]

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.minimum(positions, len(self.records) - 1)
        return self.records[at], np.zeros(len(at), np.int64)


def _mine_part(
    reader: ClipReader,
    records: Integer[np.ndarray, " r"],
    module: Any,
    variables: Any,
    settings: MiningSettings,
    image: Int[np.ndarray, "i"] | None,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    threads: int,
    progress: tqdm,
) -> dict[str, np.ndarray]:
    """Mines some records and returns their table rows."""
    found: list[tuple[np.ndarray, Any]] = []
    rows: list[dict[str, np.ndarray]] = []
    for batch in _label_batches(reader, records, settings, batch_size, threads):
        clips = batch.pop("record")
        mined = _mine_batch(
            module,
            variables,
            to_devices(batch, mesh),
            image,
            settings.segment_samples,
            settings.candidates,
            settings.min_dbfs,
        )
        found.append((clips, mined))
        # Fetch the previous batch's results while this one runs.
        if len(found) > 1:
            rows.append(_rows(reader.index, *found.pop(0)))
            progress.update(batch_size)
    for clips, mined in found:
        some = clips[: len(records) - batch_size * (-(-len(records) // batch_size) - 1)]
        rows.append(_rows(reader.index, some, mined))
        progress.update(len(some))
    return {name: np.concatenate([some[name] for some in rows]) for name in COLUMNS}


def _label_batches(
    reader: ClipReader,
    records: Integer[np.ndarray, " r"],
    settings: MiningSettings,
    batch_size: int,
    threads: int,
) -> Iterator[dict[str, np.ndarray]]:
    index = reader.index
    most = int(np.diff(index.label_row.astype(np.int64)).max())
    for batch in batches(
        reader,
        _InOrder(records),
        start_step=0,
        stop_step=-(-len(records) // batch_size),
        batch_size=batch_size,
        clip_samples=settings.clip_samples,
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
    out: pathlib.Path, parts: pathlib.Path, header: dict[str, Any], index: RecordIndex
) -> None:
    rows = []
    try:
        for part in range(len(index.shards)):
            with open(_part(parts, part), "rb") as file:
                rows.append(read_npz(file, COLUMNS))
    except FileNotFoundError:  # another host has just assembled and removed them
        if _is_made(out, header, index):
            return
        raise
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
    write_table(out, header, columns)
    shutil.rmtree(parts, ignore_errors=True)
