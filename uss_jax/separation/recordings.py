"""Separates audio files and waveforms of any length, sampling rate and number of channels.

Letters: `n` targets, `c` channels, `t` samples.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float32
from tqdm import tqdm

from uss_jax.audio.files import Format, audio_format, read_blocks, writing_audio
from uss_jax.audio.resampling import resample, resample_blocks, resampled_length
from uss_jax.bundles.model import Model
from uss_jax.devices.mesh import make_mesh
from uss_jax.devices.precision import HIGHEST
from uss_jax.disk.folder import make_folder
from uss_jax.errors import UserError, one_line
from uss_jax.separation.names import file_name
from uss_jax.separation.queries import Query
from uss_jax.separation.waveforms import as_waveform, consistent, require_rate
from uss_jax.separation.windows import Blocks, Layout, Target, separate_blocks, tag_segments

RESIDUAL = "residual"
_FLAC_CHANNELS = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """How recordings are separated and written.

    Attributes:
      reference_blocks: cut into adjacent blocks as bytedance/uss does, for comparison with it.
      mono: mix a file down to one channel first, as bytedance/uss does. Otherwise all channels
        share one mask, unless the net takes several at once. Not applied to waveforms.
      residual: also write the mixture minus the sum of the estimates.
      only_residual: write nothing else; its name is "without" and the names of the targets.
      sum_to_mixture: divide the residual equally among the estimates of sounds that are active in
        any segment, so that they add up to the mixture (mixture consistency, arXiv:1811.08521). If
        none is, all estimates are silent.
      suffix: ".wav" or ".flac".
      subtype: libsndfile's name of the sample format.
      overwrite: replace existing files.
    """

    reference_blocks: bool = False
    mono: bool = False
    residual: bool = False
    only_residual: bool = False
    sum_to_mixture: bool = False
    suffix: str = ".wav"
    subtype: str = "FLOAT"
    overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Separated:
    """The files separated from a recording.

    Attributes:
      form: format of the recording and of every file.
      files: target name -> file.
      targets: the separated targets, without the residual.
      rms: target name -> root mean square of the estimate's samples.
      clipped: target name -> share of the samples that were beyond full scale and clipped; 0 for
        floating-point files.
      probabilities: [s, k] tagging probabilities of segments; None if the query needs none.
    """

    form: Format
    files: dict[str, pathlib.Path]
    targets: list[Target]
    rms: dict[str, float]
    clipped: dict[str, float]
    probabilities: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The targets of a recording, and how to read it.

    Attributes:
      path: the recording.
      form: format of the mixture and of every file.
      recorded: starts a new iteration over the mixture's blocks, at the recording's rate.
      blocks: the same, at the model's rate.
      targets: targets to separate.
      probabilities: [s, k] tagging probabilities of segments; None if the query needs none.
    """

    path: pathlib.Path
    form: Format
    recorded: Callable[[], Blocks]
    blocks: Callable[[], Blocks]
    targets: list[Target]
    probabilities: np.ndarray | None


class Separator:
    """A model that separates waveforms.

    Example::

        separator = Separator.load("runs/soft")
        estimates = separator.separate(waveform, 44100, Classes({"Speech": [0]}))
    """

    def __init__(self, model: Model, settings: Settings | None = None, mesh: Mesh | None = None):
        """Wraps an opened model.

        Args:
          model: model with a separator.
          settings: settings; those of files have no effect on waveforms.
          mesh: devices over which a recording's windows are split; if None, all local
            accelerators, or one CPU device.
        """
        self.model = model
        self.settings = settings or Settings()
        on_cpu = jax.default_backend() == "cpu"
        if mesh is None and not on_cpu:
            mesh = make_mesh(jax.local_devices())
        self._mesh = mesh
        # One window keeps a CPU busy; an accelerator needs many.
        self._batch_size = (1 if on_cpu else 16) * (mesh.size if mesh else 1)

    @classmethod
    def load(cls, path: str | os.PathLike, precision: str = HIGHEST) -> "Separator":
        """Opens a bundle or workdir at a precision of uss_jax/devices/precision.py."""
        return cls(Model(path, precision))

    def separate(
        self, waveform: Any, sample_rate: int, query: Query
    ) -> dict[str, Float32[np.ndarray, "*c t"]]:
        """Returns target name -> estimate, in the waveform's shape and aligned with it.

        Args:
          waveform: [samples] or [channels, samples], at least one sample: floats in [-1, 1], or
            integers, scaled by the full scale of their type.
          sample_rate: sampling rate, in Hz.
          query: sounds to separate.

        Raises:
          UserError: invalid samples or rate, or a query that does not fit the model.
        """
        given = as_waveform(waveform)
        rows = np.atleast_2d(given)
        sample_rate = require_rate(sample_rate)
        query.require_fit(self.model)
        self._require_channels(len(rows), "the waveform", "give its channels one by one")
        at_rate = resample(rows, sample_rate, self.model.sample_rate)
        targets, _ = self.find_targets(lambda: iter([at_rate]), query)
        if not targets:
            return {}
        pieces = list(self.estimates(iter([at_rate]), at_rate.shape[1], targets))
        whole = np.concatenate(pieces, axis=2)
        back = resample(whole.astype(np.float32), self.model.sample_rate, sample_rate)
        missing = max(rows.shape[1] - back.shape[2], 0)
        back = np.pad(back[:, :, : rows.shape[1]], ((0, 0), (0, 0), (0, missing)))
        if self.settings.sum_to_mixture:
            back = consistent(back, rows, _heard(targets))
        return {t.name: b.reshape(given.shape) for t, b in zip(targets, back, strict=True)}

    def find_targets(
        self, blocks: Callable[[], Blocks], query: Query
    ) -> tuple[list[Target], Float32[np.ndarray, "s k"] | None]:
        """Returns a query's targets in a recording, and the probabilities they are based on."""
        probabilities = None
        if query.needs_tags:
            padded = self.settings.reference_blocks
            probabilities = tag_segments(self.model, blocks(), padded)
        return query.targets(self.model, probabilities), probabilities

    def estimates(
        self, blocks: Blocks, samples: int, targets: Sequence[Target]
    ) -> Iterator[Float32[np.ndarray, "n c _"]]:
        """Yields all estimates of a recording, piece by piece.

        Args:
          blocks: the recording at the model's rate.
          samples: approximate length of the recording, in samples.
          targets: targets to separate.

        Raises:
          UserError: an estimate is not finite.
        """
        if self.settings.reference_blocks:
            layout = Layout.blocks(self.model)
        else:
            layout = Layout.windows(self.model, samples)
        size, mesh = self._batch_size, self._mesh
        smaller = functools.partial(setattr, self, "_batch_size")
        for piece in separate_blocks(self.model, layout, blocks, targets, size, mesh, smaller):
            finite = np.isfinite(piece).all(axis=(1, 2))
            if not finite.all():
                raise UserError(
                    f'{self.model.path} gives NaN or infinite samples for "'
                    f'{targets[int(np.argmin(finite))].name}"; its training has diverged, or the '
                    "condition is unlike those it was trained with"
                )
            yield piece

    def separate_file(
        self, path: str | os.PathLike, folder: str | os.PathLike, query: Query
    ) -> Separated:
        """Separates a recording into files, in constant memory.

        Args:
          path: the recording.
          folder: output folder; each target's file is named after it.
          query: sounds to separate.
        """
        plan = self.plan(path, query)
        return self.write(plan, self.make_room(plan, folder, replace=self.settings.overwrite))

    def plan(self, path: str | os.PathLike, query: Query) -> Plan:
        """Finds the targets in a recording; reads it once if the query needs tags."""
        form = audio_format(path)
        if self.settings.mono:
            form = dataclasses.replace(form, channels=1)
        self._require_channels(form.channels, str(path), "give --mono")
        if self.settings.suffix == ".flac" and form.channels > _FLAC_CHANNELS:
            raise UserError(
                f"{path} has {form.channels} channels, a FLAC file holds {_FLAC_CHANNELS}; give "
                "--format wav"
            )

        def recorded() -> Blocks:
            pieces = read_blocks(path)
            return (p.mean(axis=0, keepdims=True) for p in pieces) if self.settings.mono else pieces

        def blocks() -> Blocks:
            return resample_blocks(recorded(), form.sample_rate, self.model.sample_rate)

        targets, probabilities = self.find_targets(blocks, query)
        return Plan(pathlib.Path(path), form, recorded, blocks, targets, probabilities)

    def _require_channels(self, channels: int, name: str, remedy: str) -> None:
        """Raises a UserError unless the net takes so many channels; any number with one mask."""
        takes = self.model.separator.module.audio_channels
        if takes > 1 and channels not in (1, takes):
            raise UserError(
                f"{name} has {channels} channels, {self.model.path} separates {takes} at once; "
                f"{remedy}, or a model with audio_channels=1"
            )

    def make_room(
        self, plan: Plan, folder: str | os.PathLike, *, replace: bool
    ) -> dict[str, pathlib.Path]:
        """Maps target names to output files, and makes the files' folders.

        Args:
          plan: plan of the recording.
          folder: output folder.
          replace: allow existing files.

        Raises:
          UserError: a file exists, would be that of two targets or is the recording itself, or a
            folder cannot be made.
        """
        folder = pathlib.Path(folder)
        files: dict[str, pathlib.Path] = {}
        for name in self._names(plan):
            parts = [file_name(part) for part in name.split("/")]
            file = folder.joinpath(*parts[:-1], parts[-1] + self.settings.suffix)
            if file in files.values():
                raise UserError(
                    f'"{name}" and another requested sound would both be written to {file}'
                )
            if file.exists() and not replace:
                raise UserError(f"{file} exists; give --overwrite to replace it")
            if file.exists() and file.samefile(plan.path):
                raise UserError(f"{file} is the recording itself; give another --out")
            files[name] = file
        for file in files.values():
            make_folder(file.parent, "give another --out", name=folder)
        return files

    def _names(self, plan: Plan) -> list[str]:
        """Returns the names of what is written."""
        names = [target.name for target in plan.targets]
        if self.settings.only_residual:
            return [without_name(names)]
        return names + [RESIDUAL] * self.settings.residual

    def write(self, plan: Plan, files: dict[str, pathlib.Path]) -> Separated:
        """Separates the planned targets into their files; each file appears only when complete."""
        form, subtype = plan.form, self.settings.subtype
        energy = np.zeros(len(files))
        done = 0
        with contextlib.ExitStack() as stack:
            writers = [stack.enter_context(writing_audio(f, form, subtype)) for f in files.values()]
            progress = tqdm(
                total=form.samples / form.sample_rate,
                desc=one_line(plan.path.name),
                unit="s",
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of sound, "
                "{remaining} left",
                disable=None,
            )
            stack.enter_context(progress)
            for mixture, estimates in self._pieces(plan):
                for write, estimate in zip(writers, estimates, strict=True):
                    write(estimate)
                energy += np.square(estimates, dtype=np.float64).sum(axis=(1, 2))
                done += mixture.shape[1]
                progress.update(mixture.shape[1] / form.sample_rate)
        count = done * form.channels
        rms = dict(zip(files, np.sqrt(energy / count).tolist(), strict=True))
        shares = {f: writer.clipped / count for f, writer in zip(files, writers, strict=True)}
        return Separated(form, files, plan.targets, rms, shares, plan.probabilities)

    def _pieces(
        self, plan: Plan
    ) -> Iterator[tuple[Float32[np.ndarray, "c t"], Float32[np.ndarray, "n c t"]]]:
        """Yields pieces of the mixture and of all output files, at the recording's rate."""
        rate, targets = self.model.sample_rate, plan.targets
        samples = resampled_length(plan.form.samples, plan.form.sample_rate, rate)
        pieces: Iterator[np.ndarray] = iter(())
        if targets:
            estimates = self.estimates(plan.blocks(), samples, targets)
            pieces = (p.reshape(p.shape[0] * p.shape[1], p.shape[2]) for p in estimates)
            pieces = resample_blocks(pieces, rate, plan.form.sample_rate)
        for mixture, estimates in _beside(plan.recorded(), pieces, len(targets)):
            if self.settings.sum_to_mixture:
                estimates = consistent(estimates, mixture, _heard(targets))
            if self.settings.residual or self.settings.only_residual:
                left = (mixture - estimates.sum(axis=0))[None]
                kept = estimates[: 0 if self.settings.only_residual else None]
                estimates = np.concatenate([kept, left])
            yield mixture, estimates


def _heard(targets: Sequence[Target]) -> Bool[np.ndarray, " n"]:
    return np.array([target.active.any() for target in targets], bool)


def without_name(names: Sequence[str]) -> str:
    """Returns the name of a recording without the sounds of these names."""
    return f"without {', '.join(names)}"


def _beside(
    mixture: Blocks, estimates: Iterator[Float32[np.ndarray, "m _"]], targets: int
) -> Iterator[tuple[Float32[np.ndarray, "c t"], Float32[np.ndarray, "n c t"]]]:
    """Yields pieces of the mixture and of all estimates, of equal length, to the mixture's end."""
    held = None
    for block in mixture:
        channels, length = block.shape
        if held is None:
            held = np.zeros((targets * channels, 0), np.float32)
        while held.shape[1] < length:
            piece = next(estimates, None)
            if piece is None:  # resampling back and forth may lose a sample or two
                piece = np.zeros((len(held), length - held.shape[1]), np.float32)
            held = np.concatenate([held, piece], axis=1)
        yield block, held[:, :length].reshape(targets, channels, length)
        held = held[:, length:]
