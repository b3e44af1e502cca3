"""Separates recordings of any length in constant memory, and any number of sounds at once.

A recording is cut into overlapping windows of one shape; the context at each end of a window is
discarded, since its neighbour keeps those samples. Pooling makes a net's output depend on where a
window starts, so windows start on multiples of the net's grid, where they agree with one pass over
the whole recording as far as the context covers what the net reaches (tests/benchmarks/seams.py
shows the rest). `Layout.blocks` gives the adjacent blocks of bytedance/uss instead.

A `Target` is defined on the tagging grid of segments (2 s as published). A window is separated with
the mean condition of the active segments that overlap its kept part; its estimate is gated to
silence, with a fade of 50 ms, where no segment is active. Windows without an active segment are not
computed.

Letters: `b` batch, `c` channels, `t` samples, `s` segments, `g` steps of a grid, `k` classes, `d`
condition width, `n` targets.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32

from uss_jax.audio.resampling import mono
from uss_jax.bundles.model import Model, Net
from uss_jax.devices.batching import in_batches
from uss_jax.devices.memory import exhausted, is_exhausted
from uss_jax.devices.mesh import batch_sharded
from uss_jax.errors import UserError

_FADE_SECONDS = 0.05
_TAGGING_BATCH = 8
# Length of the detector's windows, and of the context at each end that is not kept. A window is no
# longer than HTS-AT's image. Windows begin 7.68 s apart: a multiple of Cnn14's segments (0.32 s),
# and of YAMNet's usual hops (0.12, 0.24, 0.48 s).
_DETECTED_SECONDS = (10.08, 1.2)
_DETECTION_BATCH = 4
_GRID_SECONDS = 0.1

Blocks = Iterable[Float32[np.ndarray, "c _"]]


@dataclasses.dataclass(frozen=True)
class Target:
    """A sound to separate.

    Attributes:
      name: display name, from which the file name is made.
      conditions: one for each active segment [a, d], or one for all [1, d].
      active: [s] or [1], whether the target sounds in a segment.
    """

    name: str
    conditions: Float[np.ndarray, "_ d"]
    active: Bool[np.ndarray, "_"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a recording is cut; all lengths in samples.

    Attributes:
      window: input length of the net.
      context: length at each end of a window that is separated but not kept.
      segment: step of the tagging grid.
      fade: length of a gate's transition between active and silent segments.
    """

    window: int
    context: int
    segment: int
    fade: int

    @property
    def step(self) -> int:
        """Distance between the starts of adjacent windows, in samples."""
        return self.window - 2 * self.context

    @classmethod
    def windows(cls, model: Model, samples: int) -> "Layout":
        """Returns the net's window and context, rounded up to its grid.

        Short recordings get half, a quarter or an eighth of the window, so that a folder of files
        compiles only a few programs.

        Args:
          model: model with the separator.
          samples: approximate length of the recording, in samples.
        """
        net = model.separator.module
        grid = net.grid_samples
        context = -(-net.context_samples // grid) * grid
        for part in (8, 4, 2, 1):
            # At least one step of the grid is kept, in case the recording is longer after all.
            window = max(-(-net.window_samples // part // grid), 2 * context // grid + 1) * grid
            if samples <= window:
                break
        fade = round(_FADE_SECONDS * model.sample_rate)
        return cls(window, context, model.segment_samples, fade)

    @classmethod
    def blocks(cls, model: Model) -> "Layout":
        """Returns the layout of bytedance/uss: one block per segment, no context, no fade."""
        return cls(model.segment_samples, 0, model.segment_samples, 0)


def tag_segments(model: Model, blocks: Blocks, padded: bool = False) -> Float32[np.ndarray, "s k"]:
    """Returns the tagging probabilities of each segment.

    Args:
      model: model with a tagging net.
      blocks: the recording at the model's rate, in pieces; `mono` mixes its channels.
      padded: tag the rest of a recording, less than a segment, with silence after it, as the
        reference does; otherwise with as much of the segment before it, since a tagging net hears
        little in a short sound, and `separate` would mute a sound that goes on to the end. A
        recording shorter than a segment is padded in either case.
    """
    probabilities, pieces = [], _segments(blocks, Layout.blocks(model), padded)
    for segments, rows in in_batches(pieces, _TAGGING_BATCH):
        probabilities.append(np.asarray(model.tagger(np.stack(segments))["clipwise"])[:rows])
    return np.concatenate(probabilities)


def _segments(blocks: Blocks, cut: Layout, padded: bool) -> Iterator[Float32[np.ndarray, " t"]]:
    """Yields what is tagged for each segment, in mono."""
    before = None
    for true, samples in _windows(blocks, cut):
        if not padded and before is not None and true < cut.window:
            samples = np.concatenate([before[:, true:], samples[:, :true]], axis=1)
        before = samples
        yield mono(samples)


def classes_heard(probabilities: Float32[np.ndarray, "_ k"], threshold: float) -> list[int]:
    """Returns the classes whose peak reaches the threshold, the most probable first."""
    peaks = probabilities.max(axis=0)
    order = np.argsort(-peaks, kind="stable")
    return [k for k in order.tolist() if peaks[k] >= threshold]


def detect_sounds(model: Model, blocks: Blocks) -> tuple[Float32[np.ndarray, "g k"], float]:
    """Returns the detector's probabilities on a grid of about 0.1 s, and its exact step in seconds.

    The value of a step is the maximum over its frames. Arguments are as for `tag_segments`.

    Raises:
      UserError: a probability is NaN.
    """
    hop = model.sed.module.frame_hop_samples
    step = max(round(_GRID_SECONDS * model.sample_rate / hop), 1)
    grid, held = [], None
    for frames in _detected(model, blocks, hop):
        if not np.isfinite(frames).all():
            raise UserError(f"the detector of {model.path} gives probabilities that are NaN")
        held = frames if held is None else np.concatenate([held, frames])
        whole = len(held) // step * step
        grid.append(held[:whole].reshape(-1, step, held.shape[1]).max(axis=1))
        held = held[whole:]
    if len(held):
        grid.append(held.max(axis=0, keepdims=True))
    return np.concatenate(grid), step * hop / model.sample_rate


def _detected(model: Model, blocks: Blocks, hop: int) -> Iterator[Float32[np.ndarray, "_ k"]]:
    """Yields the detector's probabilities of the frames that each window keeps."""
    window, context = (round(s * model.sample_rate / hop) * hop for s in _DETECTED_SECONDS)
    cut, index = Layout(window, context, model.segment_samples, 0), 0
    windows = ((true, mono(samples)) for true, samples in _windows(blocks, cut))
    for some, rows in in_batches(windows, _DETECTION_BATCH):
        if rows == 1 and index == 0:  # a short recording: a quarter of the work
            some = some[:1]
        framewise = model.sed(np.stack([samples for _, samples in some]))["framewise"]
        for (true, _), of_window in zip(some[:rows], np.asarray(framewise), strict=False):
            first, last = _kept(cut, index, true)
            end = last // hop + (true <= last)  # the recording's end has a frame of its own
            yield of_window[first // hop : end]
            index += 1


def separate_blocks(
    model: Model,
    layout: Layout,
    blocks: Blocks,
    targets: Sequence[Target],
    batch_size: int,
    mesh: Mesh | None = None,
    smaller: Callable[[int], None] = lambda size: None,
) -> Iterator[Float32[np.ndarray, "n c _"]]:
    """Yields the estimates of all targets in pieces that together have the recording's length.

    Args:
      model: model with the separator.
      layout: how to cut the recording.
      blocks: the recording at the model's rate, in pieces.
      targets: targets to separate.
      batch_size: number of (window, target) pairs in one run of the net; halved when they do not
        fit into the memory of a device.
      mesh: devices over which a batch is split; their number divides `batch_size`. None for one
        device.
      smaller: is told of a batch size that is halved, for the recordings that follow.

    Raises:
      UserError: a device has too little memory for one window.
    """
    net = model.separator if mesh is None else model.separator_on(mesh)
    pending: list[tuple[int, np.ndarray, int]] = []  # index, samples, true length
    jobs: list[tuple[int, int, np.ndarray]] = []  # place in pending, target number, condition

    size, devices = batch_size, 1 if mesh is None else mesh.size

    def separate_jobs() -> dict[tuple[int, int], np.ndarray]:
        estimates = {}
        for some, count in in_batches(jobs, size):
            windows = np.stack([pending[place][1] for place, _, _ in some])
            conditions = np.stack([condition for _, _, condition in some])
            if mesh is not None:
                windows, conditions = jax.device_put((windows, conditions), batch_sharded(mesh))
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                separated = _separate(net, windows, conditions)
            keys = [(place, number) for place, number, _ in some[:count]]
            estimates |= zip(keys, np.asarray(separated), strict=False)
        return estimates

    def flush() -> Iterator[np.ndarray]:
        nonlocal size
        while True:
            try:
                estimates = separate_jobs()
                break
            except RuntimeError as error:
                if not is_exhausted(error):
                    raise
                if size == devices:
                    seconds = layout.window / model.sample_rate
                    remedy = f"a window of {seconds:.3g} s needs more; take another device"
                    raise UserError(exhausted(remedy)) from error
                size = max(size // devices // 2, 1) * devices
                smaller(size)
        for place, (index, window, true) in enumerate(pending):
            first, last = _kept(layout, index, true)
            out = np.zeros((len(targets), len(window), last - first), np.float32)
            for number, target in enumerate(targets):
                if (place, number) in estimates:
                    gate = _gate(layout, target, index * layout.step + first, last - first)
                    out[number] = estimates[place, number][:, first:last] * gate
            yield out
        pending.clear()
        jobs.clear()

    for index, (true, window) in enumerate(_windows(blocks, layout)):
        for number, target in enumerate(targets):
            rows = _active_rows(layout, target, index, true)
            if rows.size:
                jobs.append((len(pending), number, _condition(target, rows)))
        pending.append((index, window, true))
        if len(jobs) >= batch_size or len(pending) >= batch_size:
            yield from flush()
    yield from flush()


def _separate(
    net: Net,
    windows: Float[Array | np.ndarray, "b c t"],
    conditions: Float[Array | np.ndarray, "b d"],
) -> Float[Array, "b c t"]:
    """Separates any channels with one mask; a net of several channels takes as many, or one."""
    taken = net.module.audio_channels
    if taken == 1:
        return net(windows, conditions, method="separate_with_shared_mask")
    if windows.shape[1] == 1:
        return net(jnp.repeat(windows, taken, axis=1), conditions).mean(axis=1, keepdims=True)
    return net(windows, conditions)


def _windows(blocks: Blocks, layout: Layout) -> Iterator[tuple[int, Float32[np.ndarray, "c t"]]]:
    """Yields (true length, samples) of every window; the last one is zero-padded.

    The true length is more than a window if the recording goes on after it.
    """
    held = None
    for block in blocks:
        held = block if held is None else np.concatenate([held, block], axis=1)
        # Waits for a sample beyond the window: the last window keeps its end, others do not.
        while held.shape[1] > layout.window:
            yield layout.window + 1, held[:, : layout.window]
            held = held[:, layout.step :]
    if held is not None:
        true = held.shape[1]
        yield true, np.pad(held, ((0, 0), (0, layout.window - true)))


def _kept(layout: Layout, index: int, true: int) -> tuple[int, int]:
    """Returns (first, last) of a window's kept samples; no context is cut at a recording's ends."""
    last = true if true <= layout.window else layout.window - layout.context
    return (layout.context if index else 0), last


def _active_rows(layout: Layout, target: Target, index: int, true: int) -> np.ndarray:
    """Returns the active segments in a window's kept part or, if none, within a fade of it."""
    start = index * layout.step
    first, last = _kept(layout, index, true)
    for margin in (0, layout.fade):
        begin, end = max(start + first - margin, 0), start + last + margin
        rows = np.arange(begin // layout.segment, -(-end // layout.segment))
        rows = np.unique(np.minimum(rows, len(target.active) - 1))
        if target.active[rows].any():
            break
    return rows[target.active[rows]]


def _condition(target: Target, rows: np.ndarray) -> Float[np.ndarray, " d"]:
    if len(target.conditions) == 1:
        return target.conditions[0]
    return target.conditions[np.searchsorted(np.flatnonzero(target.active), rows)].mean(axis=0)


def _gate(layout: Layout, target: Target, begin: int, samples: int) -> Float32[np.ndarray, " t"]:
    """Returns the gain from sample `begin` on: 1 in active segments, 0 elsewhere.

    The fade lies inside the silent segment, so that active segments are not attenuated.
    """
    if target.active.all():
        return np.ones(samples, np.float32)
    at = begin + np.arange(-layout.fade, samples + layout.fade)
    segment = np.clip(at // layout.segment, 0, len(target.active) - 1)
    active = target.active[segment].astype(np.float64)
    if not layout.fade:
        return active.astype(np.float32)
    # Distance to the nearest active sample.
    ones = np.flatnonzero(active)
    if not ones.size:
        return np.zeros(samples, np.float32)
    place = np.arange(layout.fade, layout.fade + samples)
    right = np.minimum(np.searchsorted(ones, place), len(ones) - 1)
    left = np.maximum(right - 1, 0)
    distance = np.minimum(np.abs(ones[right] - place), np.abs(ones[left] - place))
    return np.clip(1 - distance / layout.fade, 0, 1).astype(np.float32)
