"""Describes bundles, workdirs, exports, checkpoints, banks, records, anchors, sentence encoders."""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from uss_jax.anchors.captions import VECTORS as CAPTIONS
from uss_jax.anchors.captions import read_captions_header
from uss_jax.anchors.conditions import read_conditions_header
from uss_jax.anchors.table import COLUMNS, read_header
from uss_jax.bundles import nets
from uss_jax.bundles.bundle import MEANS, OF_QUERY, Bundle, Variables, net_hash, read_bundle
from uss_jax.bundles.card import read_card
from uss_jax.bundles.packaged import find_bundle
from uss_jax.bundles.tensors import read_tensors
from uss_jax.bundles.text_encoder import TOKENIZER, read_encoder
from uss_jax.data.index import RecordIndex, indexed_splits, load_index
from uss_jax.data.metadata import read_encoding, read_sample_rate
from uss_jax.data.shards import splits
from uss_jax.data.storage import open_folder, versions_below
from uss_jax.disk.checked_json import number, parse_json, record, whole
from uss_jax.disk.checked_npz import names_in_npz, read_npz
from uss_jax.disk.folder import HEADER
from uss_jax.disk.opening import absence, at_once
from uss_jax.errors import UserError, counted
from uss_jax.ontology import load_ontology
from uss_jax.separation.banks import load_bank

_TAIL_BYTES = 1 << 16  # read from the end of metrics.jsonl: many lines
_PARTS = ("separator", "query", *OF_QUERY, MEANS, "sed")
_OPENED = ("separator", "query", "sed")
_CLASSES_SHOWN = 8
_KINDS = (
    "a bundle, workdir, export, sentence encoder, checkpoint, folder of records or of mined "
    "conditions, captions, anchor table or query bank"
)


def inspect(path: str | os.PathLike) -> list[str]:
    """Returns lines of text that describe a path.

    Raises:
      UserError: the path is missing, unreadable, or not written by this program.
    """
    path = find_bundle(path)
    if not path.exists():
        raise UserError(f"{path} {absence(path)}; give {_KINDS}")
    if path.suffix == ".npz" and path.is_file():
        return _of_npz(path)
    if (path / "separate.stablehlo").is_file():
        return _of_export(path)
    if (path / TOKENIZER).is_file():
        return _of_encoder(path)
    of_checkpoint = path.parent.name == "checkpoints" and path.name.isdigit()
    if of_checkpoint or (path / "config.json").is_file():
        return _of_model(path)
    if (path / CAPTIONS).is_file():
        return _of_captions(path)
    if (path / HEADER).is_file():
        return _of_conditions(path)
    if (path / "metadata.json").is_file():
        return list(_of_records(path))
    raise UserError(f"{path} cannot be inspected; give {_KINDS}{versions_below(path)}")


def _of_export(path: pathlib.Path) -> list[str]:
    config = read_bundle(path).config
    files = sorted(file for file in path.glob("*.stablehlo") if file.is_file())
    return [
        f"{path}: exported separator, {config['sample_rate']} Hz, condition "
        f"{config.get('query', {}).get('kind', 'soft')}",
        *(f"  {file.name}: {file.stat().st_size / 1e6:.1f} MB" for file in files),
        *(f"  {part}: sha256 {digest}" for part, digest in config.get("hashes", {}).items()),
    ]


def _of_encoder(path: pathlib.Path) -> list[str]:
    files = read_encoder(path)
    values = sum(leaf.size for leaf in flatten_dict(files.params).values())
    return [
        f"{path}: {'text_encoder bundle' if files.is_bundle else 'published sentence encoder'}, "
        f"sentences to vectors of width {files.module.width}",
        *([f"licence: {files.licence}"] if files.licence else []),
        f"encoder: MiniLM with {counted(files.module.layers, 'layer')}, "
        f"{counted(values, 'parameter')}, sha256 {files.hash}",
        f"tokenizer: sha256 {files.tokenizer_hash}",
    ]


def _of_model(path: pathlib.Path) -> list[str]:
    bundle = read_bundle(path)
    config = bundle.config
    stored_as = "workdir" if bundle.is_run else "bundle"
    if bundle.at_step is not None:
        stored_as = "checkpoint"
    lines = [
        f"{path}: {config['kind']} {stored_as}, "
        f"{config['sample_rate']} Hz, segments of {config['segment_seconds']:g} s"
    ]
    if "query" in config:
        lines.append(f"condition: {config['query'].get('kind', 'soft')}{_adaptor(config)}")
        if trained := config["query"].get("trained"):
            lines.append(f"trained on: {counted(len(trained), 'class', 'classes')}")
    if known := config.get(MEANS, {}).get("classes"):
        known = counted(known, "class", "classes")
        lines.append(f"asked for {known} with the mean of its training recordings")
    if "licence" in config:
        lines.append(f"licence: {config['licence']}")
    stored = {part: _read(bundle, part) for part in _PARTS if bundle.holds(part)}
    for part, (variables, digest) in stored.items():
        lines += _of_part(bundle, part, variables, digest)
    lines += _opened(bundle, stored)
    foreign = bundle.path / "foreign.safetensors"
    if foreign.is_file():
        count = len(read_tensors(foreign))
        lines.append(
            f"{foreign.name}: {counted(count, 'tensor')} of the converted checkpoint, unchanged"
        )
    if "training" in config:
        lines += _history(bundle)
    if card := read_card(bundle.path):
        lines += ["model card:", *(f"  {line}" for line in card.splitlines())]
    return lines


def _read(bundle: Bundle, part: str) -> tuple[Variables, str]:
    """Returns a part's variables and their hash."""
    variables = bundle.read_unverified(part)
    return variables, net_hash(variables)


def _opened(bundle: Bundle, stored: Mapping[str, tuple[Variables, str]]) -> Iterator[str]:
    """Yields why nets cannot be opened, and which query banks fit the query net."""

    def verified(part: str) -> Variables:
        variables, digest = stored[part]
        bundle.require_hash(part, digest)
        return variables

    for part in _OPENED:
        if bundle.config.get(part) is None:
            continue
        try:
            _, variables = getattr(bundle, part)(verified)
        except UserError as error:
            yield f"cannot be used: {error}"
            continue
        if part == "query" and bundle.config["kind"] == "separator":
            taken = f"those made with query net {net_hash(variables)}"  # as `query list` prints
            yield f"query banks: {taken}"
    try:
        bundle.means(verified)
    except UserError as error:
        yield f"cannot be used: {error}"


def _adaptor(config: dict[str, Any]) -> str:
    width = config["query"].get("adaptor_width")
    return f" through an adaptor of width {width}" if width else ""


def _of_part(bundle: Bundle, part: str, variables: Variables, found: str) -> Iterator[str]:
    """Yields a part's parameter counts by module, and its hash, compared with the config's."""
    section = bundle.config["query" if part in OF_QUERY else part]
    sizes: dict[str, int] = {}
    dtypes = set()
    for name, leaf in flatten_dict(variables["params"]).items():
        dtypes.add(str(leaf.dtype))
        sizes[name[0]] = sizes.get(name[0], 0) + int(np.size(leaf))
    said = bundle.config.get("hashes", {}).get(part, found)
    fields = section.get("model", section) if part not in OF_QUERY else {}
    tables = {"separator": nets.SEPARATORS, "query": nets.TAGGERS, "sed": nets.TAGGERS}
    net = nets.name_of(tables[part], fields) if part in tables else part
    stored = f" in {'/'.join(sorted(dtypes))}" if dtypes != {"float32"} else ""
    classes = f", {counted(fields['classes'], 'class', 'classes')}" if "classes" in fields else ""
    where = " in the package" if bundle.packaged(part) else ""
    yield (
        f"{part}: {net}{classes}, {sum(sizes.values()):,} parameters{stored}{where}, sha256 {found}"
    )
    if said != found:
        yield f"  differs from config.json ({said}): the bundle was changed or is damaged"
    yield from (f"  {name:<18}{size:>12,}" for name, size in sizes.items())


def _history(bundle: Bundle) -> Iterator[str]:
    training = bundle.config["training"]
    step = bundle.config.get("step") or bundle.step or 0
    total, batch = training.get("total_steps"), training.get("global_batch")
    total = counted(total, "step") if isinstance(total, int) else "an unknown number of steps"
    yield f"trained: {step:,} of {total}, global batch {batch}"
    data = training.get("data")
    if isinstance(data, dict):
        yield f"data: {data.get('records')} ({data.get('split')}), seed {training.get('seed')}"
    metrics = bundle.path / "metrics.jsonl"
    if metrics.is_file() and (last := _last_metrics(metrics, bundle.at_step)):
        values = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k != "step")
        yield f"metrics of step {last['step']}: {values}"


_METRICS = record({"step": whole(0, 1 << 53)}, others=True)


def _last_metrics(path: pathlib.Path, step: int | None) -> dict[str, int | float] | None:
    """Returns the metrics of the last step in metrics.jsonl, up to a step if given.

    Skips a line that was cut off when a run was killed. An evaluation that was made up for after a
    stop has a line of its own.
    """
    with path.open("rb") as file:
        if step is None:
            file.seek(max(file.seek(0, 2) - _TAIL_BYTES, 0))
        lines = file.read().splitlines()
    last: dict[str, int | float] = {}
    for line in reversed(lines):
        try:
            found = parse_json(line, _METRICS)
        except ValueError:
            continue
        if step is not None and found["step"] > step:
            continue
        if last and found["step"] != last["step"]:
            break
        last = {k: v for k, v in found.items() if _is_number(v)} | last
    return last or None


def _is_number(value: Any) -> bool:
    try:
        number()(value, "")
    except ValueError:
        return False
    return True


def _of_records(path: pathlib.Path) -> Iterator[str]:
    rate = read_sample_rate(path)
    yield f"{path}: records at {rate} Hz, {read_encoding(path)}"
    for split in sorted({*splits(path), *indexed_splits(open_folder(path))}):
        index = load_index(path, split)
        seconds = int(index.samples.astype(np.int64).sum()) / rate
        units = (("h", 3600), ("minutes", 60), ("s", 1))
        unit, size = next((pair for pair in units if seconds >= 2 * pair[1]), units[-1])
        yield (
            f"  {split}: {counted(len(index), 'clip')}, {seconds / size:,.1f} {unit}, "
            f"{counted(len(index.label_class), 'label')} of "
            f"{counted(len(np.unique(index.label_class)), 'class', 'classes')}, "
            f"{counted(len(index.shards), 'shard')}, index "
            f"digest {index.digest}"
        )
        yield from _of_split(index, rate)


def _of_split(index: RecordIndex, rate: int) -> Iterator[str]:
    """Yields the lengths of a split's clips, and how many clips its classes have."""
    if not len(index):
        return
    seconds = index.samples / rate
    yield (
        f"    lengths: {seconds.min():.2f} to {seconds.max():.2f} s, median "
        f"{np.median(seconds):.2f} s"
    )
    names = load_ontology().class_names
    clips = np.bincount(index.label_class, minlength=len(names))  # a clip has a label only once
    order = np.argsort(-clips, kind="stable")
    order = order[clips[order] > 0].tolist()
    said = [f"{names[k]} ({clips[k]:,})" for k in order]
    if len(said) <= 2 * _CLASSES_SHOWN:
        yield f"    clips of each class: {'; '.join(said)}"
        return
    yield f"    classes with the most clips: {'; '.join(said[:_CLASSES_SHOWN])}"
    yield f"    with the fewest: {'; '.join(said[-_CLASSES_SHOWN:])}"
    without = len(names) - len(said)
    yield f"    {len(said)} classes with clips, {without} of {len(names)} without"


def _of_conditions(path: pathlib.Path) -> list[str]:
    header = read_conditions_header(path)
    shards = counted(len(header["shard_digests"]), "record shard")
    return [
        f"{path}: mined conditions of {shards}, {header['output']} of width {header['width']}",
        f"  query net: {header['query_model'].get('net')}, {header['query_hash']}",
        f"  anchors: {header['anchors_digest']}",
    ]


def _of_captions(path: pathlib.Path) -> list[str]:
    header = read_captions_header(path)
    return [
        f"{path}: {counted(header['captions'], 'caption')} of clips, vectors of width "
        f"{header['width']}",
        f"  sentence encoder: {header['encoder']}",
        f"  records: {header['index_digest']}",
    ]


def _of_npz(path: pathlib.Path) -> list[str]:
    try:
        with open(path, "rb", opener=at_once) as file:
            names = names_in_npz(file)
            column = {"record": COLUMNS["record"]}
            rows = len(read_npz(file, column)["record"]) if "header" in names else 0
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give {_KINDS}") from error
    if "net_hash" in names:
        bank = load_bank(path)
        lines = [f"{path}: query bank, {bank.kind}, {counted(len(bank.name), 'vector')} of width "]
        lines[0] += f"{bank.vectors.shape[1]}, query net {bank.net_hash}"
        return [*lines, *([bank.how] if bank.how else []), *(f"  {name}" for name in bank.name)]
    if "header" in names:
        header = read_header(path)
        lines = [f"{path}: anchor table, {counted(rows, 'row')}"]
        return [*lines, *(f"  {key}: {value}" for key, value in header.items())]
    raise UserError(f"{path} is neither an anchor table nor a query bank; give {_KINDS}")
