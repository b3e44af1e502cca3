"""Pairs, `class_id=K/*source.wav` and `*mixture.wav`: finds them, scores them, writes examples."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from uss_jax.audio.files import audio_format, read_alike, read_mono, write_wav
from uss_jax.audio.picture import write_picture
from uss_jax.audio.resampling import resampled_length
from uss_jax.bundles.model import Model
from uss_jax.data.csv_rows import read_columns
from uss_jax.disk.folder import make_folder
from uss_jax.errors import UserError, counted
from uss_jax.evaluation.averages import (
    Vectors,
    averaged,
    bank_of_averages,
    by_name,
    class_vectors,
    file_vectors,
)
from uss_jax.evaluation.clips import open_clips
from uss_jax.evaluation.finished import unfinished_beside
from uss_jax.evaluation.items import ALL, Item
from uss_jax.evaluation.make_pairs import MANIFEST
from uss_jax.evaluation.rows import ORACLE, Drawn, Row, left_out, row_of
from uss_jax.evaluation.scoring import Figures, score
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.summary import report
from uss_jax.evaluation.wording import how_asked, read_wording
from uss_jax.ontology import load_ontology, whole_number
from uss_jax.separation.banks import load_bank, require_npz, write_bank
from uss_jax.separation.names import file_name

# Cutting and resampling may differ by a frame between programs; a larger difference is an error.
_TOLERATED_SECONDS = 0.05


def run(
    model: Model,
    data: str,
    out: str,
    *,
    train_records: str | None,
    split: str | None,
    train_pairs: str | None,
    oracle_only: bool,
    recordings: tuple[int, ...],
    text_encoder: str | None,
    texts: str | None,
    bank: str | None,
    examples: int,
    out_dir: str | None,
) -> tuple[Results, str]:
    """Evaluates separation on a folder of pairs; the options are described in `SUITES`."""
    if train_records and train_pairs:
        raise UserError("--train-records and --train-pairs both give class averages; give one")
    if oracle_only and (train_records or train_pairs):
        raise UserError(
            "--oracle-only uses no class averages; leave out --train-records and --train-pairs"
        )
    if oracle_only and text_encoder:
        raise UserError("--oracle-only asks with no texts; leave out --text-encoder")
    if oracle_only and recordings:
        raise UserError("--oracle-only draws no recordings; leave out --recordings")
    if recordings and not (train_records or train_pairs):
        raise UserError(
            "--recordings draws training recordings; give --train-records or --train-pairs too"
        )
    if bank and not (train_records or train_pairs):
        raise UserError(
            "--bank stores averages over training clips; give --train-records or --train-pairs too"
        )
    if train_pairs and not model.query.module.takes.recordings:
        raise UserError(
            f"--train-pairs averages conditions of recordings, and those of {model.path} "
            f"({model.query.module.kind}) are not made of any; leave it out"
        )
    how_made = f"averaged over {train_records or train_pairs}"
    if bank:
        _require_replaceable(bank, how_made)
    if examples and not out_dir:
        raise UserError("--examples needs --out-dir, the folder to write them to")
    wording = read_wording(model, text_encoder, texts)
    pairs = find_pairs(data)
    remark = wording.remark(pairs) if wording else ""
    vectors: Vectors = {}
    how = {"train_records": train_records, "split": (split or "train") if train_records else None}
    if train_records:
        reader, _ = open_clips(train_records, how["split"], model)
        classes = sorted({pair.class_index for pair in pairs})
        vectors = by_name(class_vectors(model, reader, classes))
    if train_pairs:
        how = {"train_pairs": train_pairs}
        vectors = file_vectors(model, sources_by_class(train_pairs), without_silence=False)
    averages = averaged(vectors)
    if bank and not averages:
        raise UserError(
            f"--bank {bank} would be empty: {train_records or train_pairs} has no sound of a class "
            "of these pairs; give other training clips, or leave --bank out"
        )
    figures, rows = score(
        model,
        pairs,
        averages,
        drawn=Drawn(vectors, recordings) if recordings else None,
        wording=wording,
        oracle_only=oracle_only,
        unfinished=unfinished_beside(out),
    )
    results, table = report(model, pairs, figures, out)
    text = [table, *filter(None, [remark, left_out(rows, len(pairs))])]
    if absent := [row_of(count) for count in recordings if row_of(count) not in rows]:
        text.append(f"no row of {', '.join(absent)}: no class of these pairs has so many vectors")
    if recordings and not model.query.module.takes.recordings:
        kind = model.query.module.kind
        text.append(f"conditions of the kind {kind} are those of classes, whatever the recordings")
    if bank:
        write_bank(bank, bank_of_averages(model, averages, how_made))
        text.append(f"{bank}: vectors of {counted(len(averages), 'class', 'classes')}")
    if examples and out_dir:
        pictures = write_examples(model, pairs, figures, rows, examples, out_dir)
        text += [f"{picture}: its audio files are next to it" for picture in pictures]
    if recordings:
        how["recordings"] = list(recordings)
    how |= how_asked(text_encoder, texts)
    return {**results, "how": how}, "\n\n".join(text)


def _require_replaceable(bank: str, how: str) -> None:
    """Raises a UserError unless a bank's file is new, or a bank that was made in the same way.

    The same command again, as after a stop, replaces what it wrote.
    """
    require_npz(bank)
    if not os.path.lexists(bank):
        return
    try:
        made_alike = load_bank(bank).how == how
    except UserError:
        made_alike = False
    if not made_alike:
        raise UserError(f"{bank} exists and is not a bank {how}; give --bank another name")


@dataclasses.dataclass(frozen=True)
class Pair:
    """The files of a mixture and of its target source; implements `Item`.

    Attributes:
      mixture, source: audio files.
      class_index: class of the source.
      group: group in the manifest; empty if there is none.
      other_class_index: class of the mixture's other source in the manifest; None if not given.
    """

    mixture: pathlib.Path
    source: pathlib.Path
    class_index: int
    group: str
    other_class_index: int | None = None

    @property
    def name(self) -> str:
        """Path of the mixture."""
        return str(self.mixture)

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """Mixture and source."""
        return self.mixture, self.source

    @property
    def label(self) -> str:
        """Name of the class."""
        return load_ontology().class_names[self.class_index]

    def samples(self, sample_rate: int) -> int:
        """Returns the length of the shorter file at this sampling rate.

        Raises:
          UserError: the lengths differ by more than 0.05 s.
        """
        lengths = []
        for path in (self.mixture, self.source):
            form = audio_format(path)
            lengths.append(resampled_length(form.samples, form.sample_rate, sample_rate))
        if abs(lengths[0] - lengths[1]) > _TOLERATED_SECONDS * sample_rate:
            raise UserError(
                f"{self.mixture} lasts {lengths[0] / sample_rate:.4g} s, {self.source.name} "
                f"{lengths[1] / sample_rate:.4g} s; a source must be as long as its mixture"
            )
        return min(lengths)

    def read(self, side: str, sample_rate: int) -> Float[np.ndarray, " _"]:
        """Reads the "mixture" or the "source", in mono: the same channels of both."""
        if audio_format(getattr(self, side)).channels == 1:
            return read_mono(getattr(self, side), sample_rate)
        source, mixture = read_alike((self.source, self.mixture), sample_rate)
        return source if side == "source" else mixture


def find_pairs(directory: str | os.PathLike) -> list[Pair]:
    """Returns the pairs of a folder, sorted by class index and file name.

    Raises:
      UserError: there are no pairs, a source is missing, or a class index is invalid.
    """
    directory = pathlib.Path(directory)
    manifest = _read_manifest(directory / MANIFEST)
    pairs = []
    for folder in sorted(directory.glob("class_id=*")):
        class_index = _class_index(folder.name.removeprefix("class_id="))
        if class_index is None:
            raise UserError(f"{folder} is not named class_id=K with a class index K from 0 to 526")
        for mixture in sorted(folder.glob("*mixture.wav")):
            stem = mixture.name.removesuffix("mixture.wav")
            source = mixture.with_name(stem + "source.wav")
            if not source.is_file():
                raise UserError(f"{mixture} has no source beside it; expected {source.name}")
            said = manifest.get(f"{folder.name}/{stem.rstrip('._')}", {})
            other = said.get("partner_class_index") or None
            if other is not None and (other := _class_index(other)) is None:
                raise UserError(
                    f"{directory / MANIFEST}: the partner_class_index of {said['file']} is not a "
                    "class index from 0 to 526; make the pairs again"
                )
            group = said.get("group") or ""
            if group == ALL:
                raise UserError(
                    f'{directory / MANIFEST}: the group of {said["file"]} is "{ALL}", which stands '
                    "for all pairs in tables; name it otherwise"
                )
            pairs.append(Pair(mixture, source, class_index, group, other))
    if not pairs:
        raise UserError(
            f"{directory} holds no pairs; expected class_id=K/*mixture.wav and *source.wav, as "
            "`uss-jax make-pairs` writes them"
        )
    return sorted(pairs, key=lambda pair: (pair.class_index, pair.mixture.name))


def _class_index(text: str) -> int | None:
    number = whole_number(text)
    return number if number is not None and number < len(load_ontology().class_mids) else None


def _read_manifest(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns name of a pair -> its manifest row; empty without a manifest."""
    if not path.is_file():
        return {}
    remedy = "make the pairs again, or remove the file if you need no groups"
    return {row["file"]: row for row in read_columns(path, ["file"], remedy, "surrogateescape")}


def sources_by_class(directory: str | os.PathLike) -> dict[str, list[pathlib.Path]]:
    """Returns class name -> the source files of a folder of pairs."""
    files: dict[str, list[pathlib.Path]] = {}
    for pair in find_pairs(directory):
        files.setdefault(pair.label, []).append(pair.source)
    return files


def write_examples(
    model: Model,
    items: Sequence[Item],
    figures: dict[str, Figures],
    rows: dict[str, Row],
    number: int,
    folder: str | os.PathLike,
) -> list[pathlib.Path]:
    """Writes the audio and spectrograms of `number` items; returns the paths of the pictures.

    Items are chosen at the quantiles (i + 1/2) / number of their oracle SDRi; a single example is
    the median.
    """
    folder = pathlib.Path(folder)
    make_folder(folder, "give another folder")
    sdri = figures[ORACLE]["sdri"]
    ranked = np.argsort(sdri, kind="stable")[: np.isfinite(sdri).sum()]  # NaN is last
    quantiles = (np.arange(min(number, len(ranked))) + 0.5) / min(number, len(ranked))
    pictures = []
    for example, at in enumerate(ranked[(quantiles * len(ranked)).astype(int)].tolist(), start=1):
        item = items[at]
        samples = item.samples(model.sample_rate)
        sides = (item.read(side, model.sample_rate) for side in ("mixture", "source"))
        mixture, source = (side[:samples] for side in sides)
        estimate = np.asarray(model.separate(mixture[None], rows[ORACLE].conditions[at][None]))[0]
        values = {figure: of[at] for figure, of in figures[ORACLE].items()}
        panels = {
            f"Mixture with {item.label}: SDR {values['sdr'] - values['sdri']:.1f} dB": mixture,
            f"Target: {item.label}": source,
            f"Estimate, oracle query: SDR {values['sdr']:.1f} dB (SDRi {values['sdri']:.1f}, "
            f"SI-SDRi {values['si_sdri']:.1f})": estimate,
        }
        stem = folder / f"example{example}_{file_name(item.label)}"
        for what, waveform in zip(("mixture", "target", "estimate"), panels.values(), strict=True):
            write_wav(f"{stem}_{what}.wav", waveform[None], model.sample_rate)
        pictures.append(stem.with_name(stem.name + ".png"))
        write_picture(pictures[-1], panels, model.sample_rate)
    return pictures
