"""Short-time Fourier transform and its inverse, by FFT, for any backend and sharding.

As in the reference (torchlibrosa): periodic Hann window, centred frames, reflect padding.

Letters: `t` samples, `n` frames, `f` bins = n_fft / 2 + 1, `h` hop.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Complex, Float

from uss_jax.devices.mesh import BATCH_AXIS


def hann_window(n_fft: int) -> np.ndarray:
    """Returns the periodic Hann window, float64 [n_fft]."""
    return 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(n_fft) / n_fft)


def frame_count(samples: int, hop_samples: int) -> int:
    """Returns the number of frames of a centred transform of `samples` samples."""
    return samples // hop_samples + 1


def stft(
    waveform: Float[Array, "*batch t"], n_fft: int, hop_samples: int
) -> Complex[Array, "*batch n f"]:
    """Computes the spectrum of every frame; frame `i` is centred on sample `i * hop_samples`.

    Args:
      waveform: at least one sample, any leading axes, of which the first is the batch and may be
        sharded. Computed in float32 (float64 for float64 input) whatever the dtype.
      n_fft: window and transform length in samples, even.
      hop_samples: samples between frames.

    Returns:
      complex [..., t // hop_samples + 1, n_fft // 2 + 1].
    """
    waveform = _at_least_float32(waveform)
    frames = frame_count(waveform.shape[-1], hop_samples)
    lead = [(0, 0)] * (waveform.ndim - 1)
    padded = jnp.pad(waveform, [*lead, (n_fft // 2, n_fft // 2)], mode="reflect")

    framed = cut_frames(padded, frames, n_fft, hop_samples)
    windowed = framed * hann_window(n_fft).astype(framed.dtype)
    return _without_gathering(jnp.fft.rfft, windowed)


def change_spectrum(
    waveform: Float[Array, "*batch t"],
    n_fft: int,
    hop_samples: int,
    change: Callable[[Complex[Array, "*batch n f"]], Complex[Array, "*batch n f"]],
) -> Float[Array, "*batch t"]:
    """Transforms a waveform, changes its spectrum, and transforms it back to the same length.

    Where frames overlap little, the samples after the last frame's centre are in that frame alone.
    If they reach where its window is below 1/2, the inverse would divide by almost nothing, and
    what a changed spectrum puts there would become a burst; zeros up to the next centre add a
    frame.

    Raises:
      ValueError: frames overlap by less than half, so that some samples are in no window's middle.
    """
    if 2 * hop_samples > n_fft:
        raise ValueError(f"hop_samples={hop_samples} is more than half of n_fft={n_fft}")
    length = waveform.shape[-1]
    if length % hop_samples > n_fft // 4:
        lead = [(0, 0)] * (waveform.ndim - 1)
        waveform = jnp.pad(waveform, [*lead, (0, -length % hop_samples)])
    changed = change(stft(waveform, n_fft, hop_samples))
    return istft(changed, n_fft, hop_samples, waveform.shape[-1])[..., :length]


def cut_frames(
    waveform: Float[Array, "*batch t"], frames: int, frame_samples: int, hop_samples: int
) -> Float[Array, "*batch n _"]:
    """Cuts frames, the first from sample 0 on; samples beyond the waveform's end are zero."""
    # A frame is `pieces` consecutive blocks of one hop. Slices avoid a gather, whose gradient would
    # be a scatter.
    pieces = -(-frame_samples // hop_samples)
    block_samples = (frames - 1 + pieces) * hop_samples
    lead = [(0, 0)] * (waveform.ndim - 1)
    excess = block_samples - waveform.shape[-1]
    padded = (
        jnp.pad(waveform, [*lead, (0, excess)]) if excess > 0 else waveform[..., :block_samples]
    )
    blocks = padded.reshape(*padded.shape[:-1], frames - 1 + pieces, hop_samples)
    framed = jnp.concatenate([blocks[..., i : i + frames, :] for i in range(pieces)], axis=-1)
    return framed[..., :frame_samples]


def istft(
    spectrum: Complex[Array, "*batch n f"],
    n_fft: int,
    hop_samples: int,
    length: int | None = None,
) -> Float[Array, "*batch t"]:
    """Inverts `stft`: windowed overlap-add, divided by the sum of squared windows.

    Args:
      spectrum: complex [..., frames, n_fft // 2 + 1].
      n_fft: as given to `stft`.
      hop_samples: as given to `stft`.
      length: output length in samples; None for (frames - 1) * hop_samples.
    """
    frames = spectrum.shape[-2]
    pieces = -(-n_fft // hop_samples)
    framed = _without_gathering(lambda x: jnp.fft.irfft(x, n=n_fft), spectrum)
    window = hann_window(n_fft)

    tail = pieces * hop_samples - n_fft
    lead = [(0, 0)] * (framed.ndim - 1)
    framed = jnp.pad(framed * window.astype(framed.dtype), [*lead, (0, tail)])
    framed = framed.reshape(*framed.shape[:-1], pieces, hop_samples)
    lead = lead[:-1]
    summed = sum(
        jnp.pad(framed[..., i, :], [*lead, (i, pieces - 1 - i), (0, 0)]) for i in range(pieces)
    )

    # The overlapping frames depend on the block alone: an iota replaces a table of all samples.
    squares = np.pad(window**2, (0, tail)).reshape(pieces, hop_samples).astype(framed.dtype)
    block = jnp.arange(frames + pieces - 1)[:, None]
    overlap = sum(
        jnp.where((block >= i) & (block < frames + i), squares[i], 0) for i in range(pieces)
    )

    summed = summed / jnp.maximum(overlap, 1e-11)
    flat = summed.reshape(*summed.shape[:-2], -1)
    length = (frames - 1) * hop_samples if length is None else length
    flat = flat[..., n_fft // 2 :][..., :length]
    missing = length - flat.shape[-1]
    return jnp.pad(flat, [*lead, (0, missing)]) if missing > 0 else flat


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _without_gathering(transform: Callable[[Array], Array], x: Array) -> Array:
    """Applies a transform of the last axis on each device's own rows of the batch.

    For an FFT, XLA's partitioner gathers the whole batch on every device; inside `shard_map` it
    cannot. The transform is called directly without a mesh (`jax.set_mesh`), inside the caller's
    own `shard_map`, or if the batch is not divisible by the number of devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or BATCH_AXIS not in mesh.axis_names or x.ndim < 2:
        return transform(x)
    if dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[BATCH_AXIS] == AxisType.Manual:
        return transform(x)
    if x.shape[0] % mesh.shape[BATCH_AXIS]:
        return transform(x)
    spec = PartitionSpec(BATCH_AXIS)
    return jax.shard_map(transform, in_specs=spec, out_specs=spec)(x)
