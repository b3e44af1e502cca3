"""How well a separator gives back the sources of pairs, `class_id=K/*source.wav, *mixture.wav`.

The same mixtures are separated with several queries: the condition of the clean source ("oracle"),
one vector for each class averaged over training clips ("class average"), and the oracle of another
pair ("shuffled"), which tells whether the query matters. Two answers that need no model stand
beside them: the mixture, and half the mixture, which scores +3 dB SDRi at equal energies.

Letters: `n` pairs, `b` batch, `t` samples of a pair, `d` width of the condition, `k` classes.
"""

import csv
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer
from tqdm import tqdm

from uss_jax.audio.files import read_mono, write_wav
from uss_jax.data.tfrecord import ClipReader
from uss_jax.errors import UserError
from uss_jax.evaluation.clips import MIN_DBFS, Chosen, mine, read_segments
from uss_jax.evaluation.make_pairs import MANIFEST, samples_digest
from uss_jax.evaluation.metrics import SEPARATION_FIGURES, class_medians, separation_figures
from uss_jax.evaluation.picture import write_picture
from uss_jax.evaluation.table import format_table
from uss_jax.ontology import load_ontology
from uss_jax.separation.names import safe_name
from uss_jax.separation.queries import Bank
from uss_jax.training.model import Model

BATCH_SIZE = 8
ORACLE, AVERAGE, SHUFFLED = "oracle", "class average", "shuffled oracle"
MIXTURE, HALF = "the mixture", "half the mixture"
# A class average is settled long before this many clips; AudioSet's largest classes have a million.
_CLIPS_OF_AVERAGE = 100

Figures = dict[str, Float[np.ndarray, " n"]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A mixture and the source to give back.

    Attributes:
      mixture, source: files.
      class_index: of the source.
      group: as in the manifest; empty without.
    """

    mixture: pathlib.Path
    source: pathlib.Path
    class_index: int
    group: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A condition for each pair.

    Attributes:
      name: for the table.
      conditions: [n, d].
      exists: [n] False where the pair has none.
    """

    name: str
    conditions: Float[np.ndarray, "n d"]
    exists: Bool[np.ndarray, " n"]


def find_pairs(directory: str | os.PathLike) -> list[Pair]:
    """The pairs of a folder, by class and name."""
    directory = pathlib.Path(directory)
    groups = _groups(directory / MANIFEST)
    pairs = []
    for folder in sorted(directory.glob("class_id=*")):
        match = re.fullmatch(r"class_id=(\d+)", folder.name)
        if not match or int(match[1]) >= len(load_ontology().class_mids):
            raise UserError(f"{folder} is not named class_id=K with a class index K from 0 to 526")
        for mixture in sorted(folder.glob("*mixture.wav")):
            stem = mixture.name.removesuffix("mixture.wav")
            source = mixture.with_name(stem + "source.wav")
            if not source.is_file():
                raise UserError(f"{mixture} has no source beside it; expected {source.name}")
            group = groups.get(f"{folder.name}/{stem.rstrip('._')}", "")
            pairs.append(Pair(mixture, source, int(match[1]), group))
    if not pairs:
        raise UserError(
            f"{directory} holds no pairs; expected class_id=K/*mixture.wav and *source.wav, as "
            "`uss-jax make-pairs` writes them"
        )
    return sorted(pairs, key=lambda pair: (pair.class_index, pair.mixture.name))


def _groups(manifest: pathlib.Path) -> dict[str, str]:
    if not manifest.is_file():
        return {}
    with open(manifest, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return {row.get("file", ""): row.get("group") or "" for row in csv.DictReader(file)}


def evaluate_pairs(
    model: Model,
    pairs: list[Pair],
    averages: dict[int, Float[np.ndarray, " d"]] | None = None,
) -> tuple[dict[str, Figures], dict[str, Row]]:
    """Figures of every pair under every query, in dB.

    Args:
      model: the separator with its query net.
      pairs: what to separate.
      averages: a condition for each class, if there are any.

    Returns:
      row name -> figure name -> [n], NaN where a pair has no condition; and the rows that were
      separated, by name.
    """
    conditions, digests = oracle_conditions(model, pairs)
    rows = [Row(ORACLE, conditions, np.ones(len(pairs), bool))]
    if averages:
        exists = np.array([pair.class_index in averages for pair in pairs])
        zeros = np.zeros(conditions.shape[1], np.float32)
        vectors = [averages.get(pair.class_index, zeros) for pair in pairs]
        rows.append(Row(AVERAGE, np.stack(vectors), exists))
    others = unrelated_pairs([pair.class_index for pair in pairs], digests)
    rows.append(Row(SHUFFLED, conditions[np.maximum(others, 0)], others >= 0))
    rows = [row for row in rows if row.exists.any()]

    parts: dict[str, dict[str, list]] = {}
    for batch, mixture, source in tqdm(
        _batches(model, pairs), "evaluate", -(-len(pairs) // BATCH_SIZE), disable=None
    ):
        at = np.minimum(np.arange(batch.start, batch.start + BATCH_SIZE), len(pairs) - 1)
        estimates = {
            row.name: np.where(
                row.exists[at, None], model.separate(mixture, row.conditions[at]), np.nan
            )
            for row in rows
        }
        for name, estimate in {**estimates, HALF: mixture / 2, MIXTURE: mixture}.items():
            for figure, values in separation_figures(source, estimate, mixture).items():
                parts.setdefault(name, {}).setdefault(figure, []).append(values)
    figures = {
        name: {figure: np.concatenate(of)[: len(pairs)] for figure, of in by_figure.items()}
        for name, by_figure in parts.items()
    }
    _require_numbers(model, pairs, rows, figures)
    return figures, {row.name: row for row in rows}


def _batches(
    model: Model, pairs: list[Pair]
) -> Iterator[tuple[range, Float[np.ndarray, "b t"], Float[np.ndarray, "b t"]]]:
    """Yields (which pairs, mixtures, sources); the last batch repeats the last pair."""
    samples = None
    for start in range(0, len(pairs), BATCH_SIZE):
        which = range(start, min(start + BATCH_SIZE, len(pairs)))
        sides = []
        for side in ("mixture", "source"):
            waveforms = []
            for at in which:
                path = getattr(pairs[at], side)
                waveform = read_mono(path, model.sample_rate)
                samples = samples or len(waveform)
                if len(waveform) != samples:
                    raise UserError(
                        f"{path} lasts {len(waveform) / model.sample_rate:.4g} s, the pairs before "
                        f"{samples / model.sample_rate:.4g} s; all must be equally long"
                    )
                waveforms.append(waveform)
            waveforms += waveforms[-1:] * (BATCH_SIZE - len(waveforms))
            sides.append(np.stack(waveforms))
        yield which, *sides


def oracle_conditions(
    model: Model, pairs: list[Pair]
) -> tuple[Float[np.ndarray, "n d"], list[str]]:
    """The conditions of the clean sources, and a digest of each source's samples."""
    conditions, digests = [], []
    for which, _, source in _batches(model, pairs):
        classes = np.array([pairs[at].class_index for at in which], np.int32)
        padded = np.pad(classes, (0, BATCH_SIZE - len(classes)), mode="edge")
        conditions.append(np.asarray(model.condition(source, padded))[: len(which)])
        digests += [samples_digest(row) for row in source[: len(which)]]
    return np.concatenate(conditions), digests


def unrelated_pairs(classes: Sequence[int], digests: Sequence[str]) -> Integer[np.ndarray, " n"]:
    """For each pair another one whose query asks for something else, -1 where there is none.

    Its class is not the pair's, above or below it in the ontology, nor a class that some source of
    the pair's class also stands for (a clip may have several labels). Always the same choice.
    """
    classes_of: dict[str, set[int]] = {}
    for label, digest in zip(classes, digests, strict=True):
        classes_of.setdefault(digest, set()).add(label)
    related = {label: set(load_ontology().relatives(label)) for label in set(classes)}
    for labels in classes_of.values():
        for label in labels:
            related[label] |= labels
    unrelated = {
        label: np.flatnonzero(~np.isin(classes, sorted(others)))
        for label, others in related.items()
    }
    chosen = np.full(len(classes), -1)
    for at, label in enumerate(classes):
        if len(unrelated[label]):
            chosen[at] = np.random.default_rng(at).choice(unrelated[label])
    return chosen


def class_averages(
    model: Model, reader: ClipReader, classes: Sequence[int]
) -> dict[int, Float[np.ndarray, " d"]]:
    """The mean condition of each class's clips' anchors; classes without clips are left out.

    At most 100 clips of a class, always the same; anchors below -60 dBFS do not count.
    """
    index = reader.index
    labels_of_record = np.diff(index.label_row.astype(np.int64))
    record_of_label = np.repeat(np.arange(len(index)), labels_of_record)
    records = []
    for label in classes:
        clips = record_of_label[index.label_class == label]
        keep = np.random.default_rng(label).permutation(len(clips))[:_CLIPS_OF_AVERAGE]
        records.append(clips[np.sort(keep)])
    if not sum(map(len, records)):
        return {}
    chosen = Chosen(np.concatenate(records), np.repeat(classes, [len(some) for some in records]))
    anchors = mine(reader, chosen, model.sed, model.segment_samples)

    conditions, loud = [], []
    for first in range(0, len(chosen.records), BATCH_SIZE):
        at = np.minimum(np.arange(first, first + BATCH_SIZE), len(chosen.records) - 1)
        segments = read_segments(reader, chosen.records[at], anchors.at(at), model.segment_samples)
        conditions.append(model.condition(segments, chosen.classes[at].astype(np.int32)))
        loud.append(np.mean(np.square(segments), axis=1) >= 10 ** (MIN_DBFS / 10))
    conditions = np.concatenate(conditions)[: len(chosen.records)]
    loud = np.concatenate(loud)[: len(chosen.records)]
    counts = {label: loud & (chosen.classes == label) for label in classes}
    return {label: conditions[rows].mean(axis=0) for label, rows in counts.items() if rows.any()}


def bank_of_averages(model: Model, averages: dict[int, Float[np.ndarray, " d"]]) -> Bank:
    """The averages as a query bank, named by class."""
    return Bank(
        name=tuple(load_ontology().class_names[label] for label in averages),
        vectors=np.stack(list(averages.values())),
        kind=model.query.module.kind,
        net_hash=model.query_hash,
        how="averaged over anchors of a split's clips, at most 100 of a class",
    )


def _require_numbers(
    model: Model, pairs: list[Pair], rows: list[Row], figures: dict[str, Figures]
) -> None:
    for row in rows:
        wrong = row.exists & ~np.isfinite(figures[row.name]["sdr"])
        if wrong.any():
            pair = pairs[int(np.argmax(wrong))]
            raise UserError(
                f"{model.path} gives an estimate that is not a number for {pair.mixture}; its "
                "training has diverged"
            )


def summarise(
    pairs: list[Pair], figures: dict[str, Figures], group: str | None = None
) -> list[dict[str, Any]]:
    """A summary of each row: median within a class, then mean over classes; and plain means.

    Args:
      pairs: as evaluated.
      figures: as evaluated.
      group: only the pairs of this group.
    """
    classes = np.array([pair.class_index for pair in pairs])
    of_group = np.array([group is None or pair.group == group for pair in pairs])
    names = load_ontology().class_names
    summaries = []
    for name, by_figure in figures.items():
        use = of_group & np.isfinite(by_figure["sdr"])
        if not use.any():
            continue
        medians = {
            figure: class_medians(by_figure[figure][use], classes[use])
            for figure in SEPARATION_FIGURES
        }
        summaries.append(
            {
                "query": name,
                "group": group or "all",
                "pairs": int(use.sum()),
                **{figure: float(np.mean(list(of.values()))) for figure, of in medians.items()},
                "plain_mean": {
                    figure: float(np.mean(by_figure[figure][use])) for figure in medians
                },
                "classes": {
                    "number": len(medians["sdr"]),
                    "medians": {
                        names[label]: {figure: medians[figure][label] for figure in medians}
                        for label in medians["sdr"]
                    },
                },
            }
        )
    return summaries


def format_summaries(summaries: list[dict[str, Any]]) -> str:
    """The summaries as a table, a paragraph for each group."""
    header = ("", "SDR", "SDRi", "SI-SDR", "SI-SDRi", "mean SDRi", "mean SI-SDRi")
    blocks = []
    for group in dict.fromkeys(summary["group"] for summary in summaries):
        of_group = [summary for summary in summaries if summary["group"] == group]
        rows = [
            (
                summary["query"],
                *(summary[figure] for figure in SEPARATION_FIGURES),
                summary["plain_mean"]["sdri"],
                summary["plain_mean"]["si_sdri"],
                summary["pairs"],
                summary["classes"]["number"],
            )
            for summary in of_group
        ]
        blocks.append(format_table((group, *header[1:], "pairs", "classes"), rows))
    explanation = "dB; median within a class, then mean over classes; mean: over all pairs"
    return "\n\n".join([*blocks, explanation])


def write_examples(
    model: Model,
    pairs: list[Pair],
    figures: dict[str, Figures],
    rows: dict[str, Row],
    number: int,
    folder: str | os.PathLike,
) -> list[pathlib.Path]:
    """Writes sounds and pictures of `number` pairs; returns the pictures.

    Chosen by rank, not by ear: with all pairs in order of their oracle SDRi, those at the quantiles
    1/2 of 1/number, 3/2 of 1/number and so on; one example is the median.
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); name a folder") from error
    ranked = np.argsort(figures[ORACLE]["sdri"], kind="stable")
    quantiles = (np.arange(min(number, len(pairs))) + 0.5) / min(number, len(pairs))
    pictures = []
    for example, at in enumerate(ranked[(quantiles * len(pairs)).astype(int)].tolist(), start=1):
        pair = pairs[at]
        ((_, mixture, source),) = _batches(model, [pair])
        condition = np.repeat(rows[ORACLE].conditions[at][None], BATCH_SIZE, axis=0)
        estimate = np.asarray(model.separate(mixture, condition))[0]
        name = load_ontology().class_names[pair.class_index]
        values = {figure: of[at] for figure, of in figures[ORACLE].items()}
        panels = {
            f"Mixture with {name}: SDR {values['sdr'] - values['sdri']:.1f} dB": mixture[0],
            f"Target: {name}": source[0],
            f"Estimate, oracle query: SDR {values['sdr']:.1f} dB (SDRi {values['sdri']:.1f}, "
            f"SI-SDRi {values['si_sdri']:.1f})": estimate,
        }
        stem = folder / f"example{example}_{safe_name(name)}"
        for what, waveform in zip(("mixture", "target", "estimate"), panels.values(), strict=True):
            write_wav(f"{stem}_{what}.wav", waveform[None], model.sample_rate)
        pictures.append(stem.with_name(stem.name + ".png"))
        write_picture(pictures[-1], panels, model.sample_rate)
    return pictures
