"""Separating recordings: files in, files out, whatever their length, rate and channels.

Letters: `n` targets, `c` channels, `t` samples.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32
from tqdm import tqdm

from uss_jax.audio.files import (
    Format,
    audio_format,
    read_blocks,
    resample,
    resample_blocks,
    resampled_length,
    writing_audio,
)
from uss_jax.errors import UserError
from uss_jax.precision import HIGHEST
from uss_jax.separation.names import safe_name
from uss_jax.separation.queries import Query
from uss_jax.separation.separator import (
    Blocks,
    Layout,
    Target,
    separate_blocks,
    tag_segments,
)
from uss_jax.training.mesh import make_mesh
from uss_jax.training.model import Model

RESIDUAL = "residual"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How recordings are separated and written.

    Attributes:
      reference_blocks: cut as the reference does, for comparison with it.
      mono: mix the channels of a file down to one first, as the reference does. Otherwise one mask,
        of the channels' mean power, is for all of them. Waveforms are mixed by whoever gives them.
      residual: also write what is left of the mixture.
      sum_to_mixture: give each estimate an equal share of what is left, so that together they are
        the mixture (mixture consistency, arXiv:1811.08521).
      suffix: ".wav" or ".flac".
      subtype: libsndfile's name of the form of samples.
      overwrite: replace files that are there.
    """

    reference_blocks: bool = False
    mono: bool = False
    residual: bool = False
    sum_to_mixture: bool = False
    suffix: str = ".wav"
    subtype: str = "FLOAT"
    overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Separated:
    """What was made of a recording.

    Attributes:
      form: of the recording and of every file.
      files: target name -> file.
      targets: what was separated; the residual is none of them.
      rms: target name -> root mean square of the file's samples.
      probabilities: of each segment, [s, k]; None where the query needs none.
    """

    form: Format
    files: dict[str, pathlib.Path]
    targets: list[Target]
    rms: dict[str, float]
    probabilities: np.ndarray | None


class Separator:
    """A model that separates waveforms.

    Example::

        separator = Separator.load("runs/soft")
        estimates = separator.separate(waveform, 44100, Classes({"Speech": [0]}))
    """

    def __init__(self, model: Model, settings: Settings | None = None, mesh: Mesh | None = None):
        """Takes an opened model.

        Args:
          model: with the nets.
          settings: those of files do not matter for waveforms.
          mesh: the devices that share the windows of a recording; all accelerators, or one CPU,
            when None.
        """
        self.model = model
        self.settings = settings or Settings()
        on_cpu = jax.default_backend() == "cpu"
        if mesh is None and not on_cpu:
            mesh = make_mesh(jax.local_devices())
        self._mesh = mesh
        # A CPU is busy with one window; an accelerator wants many.
        self._batch_size = (1 if on_cpu else 16) * (mesh.size if mesh else 1)

    @classmethod
    def load(cls, path: str | os.PathLike, precision: str = HIGHEST) -> "Separator":
        """Opens a bundle or workdir, to compute at a precision: see uss_jax/precision.py."""
        return cls(Model(path, precision))

    def separate(
        self, waveform: Float32[np.ndarray, "*c t"], sample_rate: int, query: Query
    ) -> dict[str, Float32[np.ndarray, "*c t"]]:
        """The estimates of what is asked for, as long as the waveform and in its place.

        Args:
          waveform: [samples] or [channels, samples] in [-1, 1], one sample or more.
          sample_rate: Hz.
          query: what to separate.
        """
        rows = np.atleast_2d(waveform)
        if rows.ndim != 2 or not rows.size:
            raise UserError(f"a waveform of shape {waveform.shape} is not [channels, samples]")
        if not np.isfinite(rows).all():
            raise UserError("the waveform has a sample that is not a number")
        at_rate = resample(rows, sample_rate, self.model.sample_rate)
        targets, _ = self.find_targets(lambda: iter([at_rate]), query)
        pieces = list(self.estimates(iter([at_rate]), at_rate.shape[1], targets))
        whole = np.concatenate(pieces, axis=2) if targets else np.zeros((0, *at_rate.shape))
        back = resample(whole.astype(np.float32), self.model.sample_rate, sample_rate)
        missing = max(rows.shape[1] - back.shape[2], 0)
        back = np.pad(back[:, :, : rows.shape[1]], ((0, 0), (0, 0), (0, missing)))
        if self.settings.sum_to_mixture:
            back = consistent(back, rows)
        return {t.name: b.reshape(waveform.shape) for t, b in zip(targets, back, strict=True)}

    def find_targets(
        self, blocks: Callable[[], Blocks], query: Query
    ) -> tuple[list[Target], Float32[np.ndarray, "s k"] | None]:
        """The targets of a query in a recording, and the probabilities that they follow from."""
        probabilities = tag_segments(self.model, blocks()) if query.needs_tags else None
        return query.targets(self.model, probabilities), probabilities

    def estimates(
        self, blocks: Blocks, samples: int, targets: Sequence[Target]
    ) -> Iterator[Float32[np.ndarray, "n c _"]]:
        """Pieces of all estimates of a recording of about so many samples at the model's rate."""
        if self.settings.reference_blocks:
            layout = Layout.blocks(self.model)
        else:
            layout = Layout.windows(self.model, samples)
        return separate_blocks(self.model, layout, blocks, targets, self._batch_size, self._mesh)

    def separate_file(
        self, path: str | os.PathLike, folder: str | os.PathLike, query: Query
    ) -> Separated:
        """Separates a recording into files, in constant memory.

        Args:
          path: the recording.
          folder: where to write a file for each target, named after it.
          query: what to separate.
        """
        form, rate = audio_format(path), self.model.sample_rate
        if self.settings.mono:
            form = dataclasses.replace(form, channels=1)

        def recorded() -> Iterator[np.ndarray]:
            pieces = read_blocks(path)
            return (p.mean(axis=0, keepdims=True) for p in pieces) if self.settings.mono else pieces

        def blocks() -> Iterator[np.ndarray]:
            return resample_blocks(recorded(), form.sample_rate, rate)

        targets, probabilities = self.find_targets(blocks, query)
        names = [target.name for target in targets]
        if self.settings.residual:
            names.append(RESIDUAL)
        files = self._files(pathlib.Path(folder), names)

        samples = resampled_length(form.samples, form.sample_rate, rate)
        pieces: Iterator[np.ndarray] = iter(())
        if targets:
            estimates = self.estimates(blocks(), samples, targets)
            pieces = (p.reshape(p.shape[0] * p.shape[1], p.shape[2]) for p in estimates)
            pieces = resample_blocks(pieces, rate, form.sample_rate)
        energy, done = np.zeros(len(names)), 0
        with contextlib.ExitStack() as stack:
            subtype = self.settings.subtype
            writers = [stack.enter_context(writing_audio(f, form, subtype)) for f in files.values()]
            progress = tqdm(
                total=form.samples / form.sample_rate,
                desc=os.path.basename(path),
                unit="s",
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of sound, "
                "{remaining} left",
                disable=None,
            )
            stack.enter_context(progress)
            for mixture, estimates in _beside(recorded(), pieces, len(targets)):
                if self.settings.sum_to_mixture:
                    estimates = consistent(estimates, mixture)
                if self.settings.residual:
                    left = mixture - estimates.sum(axis=0)
                    estimates = np.concatenate([estimates, left[None]])
                for write, estimate in zip(writers, estimates, strict=True):
                    write(estimate)
                energy += np.square(estimates, dtype=np.float64).sum(axis=(1, 2))
                done += mixture.shape[1]
                progress.update(mixture.shape[1] / form.sample_rate)
        rms = np.sqrt(energy / (done * form.channels))
        rms = dict(zip(names, rms.tolist(), strict=True))
        return Separated(form, files, targets, rms, probabilities)

    def _files(self, folder: pathlib.Path, names: list[str]) -> dict[str, pathlib.Path]:
        """A file for each name, in folders that exist; none that is there already."""
        files: dict[str, pathlib.Path] = {}
        for name in names:
            parts = [safe_name(part) for part in name.split("/")]
            file = folder.joinpath(*parts[:-1], parts[-1] + self.settings.suffix)
            if file in files.values():
                raise UserError(f'"{name}" and another sound asked for would both be {file}')
            if file.exists() and not self.settings.overwrite:
                raise UserError(f"{file} exists; give --overwrite to replace it")
            files[name] = file
        try:
            for file in files.values():
                file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be made ({error.strerror}); name another --out"
            ) from error
        return files


def consistent(
    estimates: Float32[np.ndarray, "n c t"], mixture: Float32[np.ndarray, "c t"]
) -> Float32[np.ndarray, "n c t"]:
    """Estimates that add up to the mixture: each with an equal share of what was left."""
    if not len(estimates):
        return estimates
    return estimates + (mixture - estimates.sum(axis=0)) / np.float32(len(estimates))


def _beside(
    mixture: Blocks, estimates: Iterator[Float32[np.ndarray, "m _"]], targets: int
) -> Iterator[tuple[Float32[np.ndarray, "c t"], Float32[np.ndarray, "n c t"]]]:
    """Yields equally long pieces of the mixture and of all estimates, to the mixture's end."""
    held = None
    for block in mixture:
        channels, length = block.shape
        if held is None:
            held = np.zeros((targets * channels, 0), np.float32)
        while held.shape[1] < length:
            piece = next(estimates, None)
            if piece is None:  # resampled there and back, a sample or two may be missing
                piece = np.zeros((len(held), length - held.shape[1]), np.float32)
            held = np.concatenate([held, piece], axis=1)
        yield block, held[:, :length].reshape(targets, channels, length)
        held = held[:, length:]
