"""Deterministic weights for the parity tests, with numpy alone.

No pretrained checkpoint is needed: every reference number was made with weights that anybody can
rebuild from this file and `layouts/*.json`.

    state_dict = build_state_dict("cnn14")  # {torch name: array}

A layout lists name, shape, dtype and kind of every tensor in the order of PyTorch's
`state_dict()`. The values of a tensor depend on nothing but its seed string,
"<salt>:<model>:<name>", so a net inside a larger checkpoint has the same values as alone:

    seed = zlib.crc32(seed_string)
    raw = numpy.random.PCG64(seed).random_raw(n)   # stable across numpy versions and platforms
    u = (raw >> 40) * 2**-24                       # in [0, 1), exact in float32

All arithmetic is in float64 and rounded to float32 once. Kinds:

    uni:LOW:HIGH   LOW + (HIGH - LOW) * u
    fan:GAIN       uniform in +-GAIN * sqrt(3 / fan_in), fan_in = prod(shape[1:])
    fanc:GAIN      as fan, then every filter is centred over its input channels; the inputs of these
                   layers are positive, and centring keeps the output dependent on the input
    fant:GAIN      as fan with fan_in = shape[0], for transposed convolutions (in, out, kh, kw)
    zero           integer counters
    const:VALUE    a constant
    stft_real, stft_imag, istft_real, istft_imag, ola_window, mel:RATE:FMIN:FMAX
                   fixed buffers: DFT kernels with a periodic Hann window, the squared window, and
                   Slaney's mel filters
    rel_index:W    which row of the bias table belongs to two tokens of a W x W window, int64
    attn_mask:H:W:WIN:SHIFT
                   0 for two tokens of a WIN x WIN window of the H x W grid that were neighbours
                   before the grid was rolled by SHIFT, -100 for others
"""

import functools
import json
import pathlib
import zlib

import numpy as np

FIXED_KINDS = (
    *("stft_real", "stft_imag", "istft_real", "istft_imag", "ola_window", "mel"),
    *("rel_index", "attn_mask"),
)

SMOOTH_FILTER = {
    "name": "anchor_segment_detector.anchor_segment_scorer.smooth_filter",
    "shape": [1, 1, 201],
    "dtype": "float32",
    "kind": "const:0.0049751243781094526",
}

# The state dict of a whole USS Lightning checkpoint: (prefix, layout), in order.
LIGHTNING_PARTS = {
    f"lit_separation_cond{width}": (
        ("ss_model.", f"resunet30_cond{width}"),
        ("anchor_segment_detector.sed_model.", "cnn14_decision_level_max"),
        ("", None),  # the smoothing filter
        ("query_net.base.", "cnn14"),
    )
    for width in (527, 2048)
}


def uniform01(seed_string: str, n: int) -> np.ndarray:
    """n numbers in [0, 1), multiples of 2**-24, as float64."""
    seed = zlib.crc32(seed_string.encode("utf-8"))
    raw = np.random.PCG64(seed).random_raw(int(n))
    return (raw >> np.uint64(40)).astype(np.float64) * 2.0**-24


def hann(n: int) -> np.ndarray:
    """Periodic Hann window in float64."""
    return 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(n) / n)


def dft_angle(n: int, rows: int) -> np.ndarray:
    """2 pi (k t mod n) / n for k < rows and t < n, [rows, n]."""
    k = np.arange(rows, dtype=np.int64)[:, None]
    t = np.arange(n, dtype=np.int64)[None, :]
    return 2.0 * np.pi * ((k * t) % n).astype(np.float64) / n


def hz_to_mel(hz: float) -> float:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    if hz < 1000.0:
        return hz / (200.0 / 3.0)
    return 15.0 + np.log(np.float64(hz) / 1000.0) / (np.log(6.4) / 27.0)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """The inverse of `hz_to_mel`."""
    log_step = np.log(6.4) / 27.0
    return np.where(mel >= 15.0, 1000.0 * np.exp(log_step * (mel - 15.0)), mel * (200.0 / 3.0))


def mel_matrix(sample_rate: float, n_fft: int, bands: int, f_min: float, f_max: float):
    """Triangular mel filters of equal area, [n_fft // 2 + 1, bands] in float64."""
    bins = np.arange(n_fft // 2 + 1) * (float(sample_rate) / n_fft)
    edges = mel_to_hz(np.linspace(hz_to_mel(f_min), hz_to_mel(f_max), bands + 2))
    width = np.diff(edges)
    ramps = edges[:, None] - bins[None, :]
    lower = -ramps[:-2] / width[:-1, None]
    upper = ramps[2:] / width[1:, None]
    filters = np.maximum(0.0, np.minimum(lower, upper))
    filters *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return filters.T


def relative_index(window: int) -> np.ndarray:
    """Row of the bias table for each pair of a window's tokens, [window**2, window**2].

    The row numbers the vertical and horizontal distance, each shifted to begin at 0.
    """
    place = np.indices((window, window)).reshape(2, -1)
    down, right = place[:, :, None] - place[:, None, :] + window - 1
    return down * (2 * window - 1) + right


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """The mask of a shifted grid's windows, [windows, window**2, window**2].

    Along each axis the roll brings the first `shift` rows to the end, so that the last window holds
    rows of both ends of the grid, which may not see each other.
    """

    def side(n: int) -> np.ndarray:
        return np.searchsorted([n - window, n - shift], np.arange(n), side="right")

    side_of_token = side(height)[:, None] * 3 + side(width)
    rows = side_of_token.reshape(height // window, window, width // window, window)
    rows = rows.swapaxes(1, 2).reshape(-1, window * window)
    return np.where(rows[:, :, None] == rows[:, None, :], 0.0, -100.0)


def fixed_buffer(shape: tuple[int, ...], kind: str, *arguments: str) -> np.ndarray:
    """A buffer that is a formula, float32 (an index: int64)."""
    if kind == "rel_index":
        return relative_index(int(arguments[0])).astype(np.int64)
    if kind == "attn_mask":
        return shift_mask(*map(int, arguments)).astype(np.float32)
    if kind in ("stft_real", "stft_imag"):
        rows, _, n_fft = shape
        angle = dft_angle(n_fft, rows)
        wave = np.cos(angle) if kind == "stft_real" else -np.sin(angle)
        values = (wave * hann(n_fft)[None, :])[:, None, :]
    elif kind in ("istft_real", "istft_imag"):
        n_fft = shape[0]
        angle = dft_angle(n_fft, n_fft)
        wave = (np.cos(angle) if kind == "istft_real" else np.sin(angle)) / n_fft
        values = (wave * hann(n_fft)[:, None])[:, :, None]  # the window runs over time, axis 0
    elif kind == "ola_window":
        values = hann(shape[0]) ** 2
    else:
        sample_rate, f_min, f_max = (float(a) for a in arguments)
        values = mel_matrix(sample_rate, 2 * (shape[0] - 1), shape[1], f_min, f_max)
    return values.astype(np.float32)


def make_tensor(name: str, shape, kind: str, salt: str = "dev", model: str = "") -> np.ndarray:
    """One tensor of the recipe."""
    shape = tuple(int(s) for s in shape)
    op, *arguments = kind.split(":")
    if op in FIXED_KINDS:
        return fixed_buffer(shape, op, *arguments)
    if op == "zero":
        return np.zeros(shape, np.int64)
    if op == "const":
        return np.full(shape, float(arguments[0]), np.float32)
    if op == "uni":
        low, high = float(arguments[0]), float(arguments[1])
    elif op in ("fan", "fanc", "fant"):
        fan_in = shape[0] if op == "fant" else int(np.prod(shape[1:]))
        high = float(arguments[0]) * np.sqrt(3.0 / fan_in)
        low = -high
    else:
        raise ValueError(f"unknown kind: {kind!r}")
    u = uniform01(f"{salt}:{model}:{name}", int(np.prod(shape)))
    values = (low + (high - low) * u).reshape(shape)
    if op == "fanc":
        values -= values.mean(axis=1, keepdims=True)
    return values.astype(np.float32)


@functools.cache
def layout_tensors(layout: str) -> tuple[dict, ...]:
    """The rows of a layout, each with "name", "shape", "dtype", "kind", "model", "source_name"."""
    if layout not in LIGHTNING_PARTS:
        spec = json.loads((pathlib.Path(__file__).parent / f"layouts/{layout}.json").read_text())
        return tuple(
            {"model": spec["model"], "source_name": t["name"], **t} for t in spec["tensors"]
        )
    rows = []
    for prefix, part in LIGHTNING_PARTS[layout]:
        if part is None:
            name = SMOOTH_FILTER["name"]
            rows.append({**SMOOTH_FILTER, "model": "lit_separation", "source_name": name})
        else:
            rows += [{**t, "name": prefix + t["name"]} for t in layout_tensors(part)]
    return tuple(rows)


def build_state_dict(layout: str, salt: str = "dev", fixed: bool = True) -> dict[str, np.ndarray]:
    """The tensors of a layout in state dict order.

    Args:
      layout: "cnn14", "cnn14_decision_level_max", "resunet30_cond527", "resunet30_cond2048",
        "resunet30_cond527_stereo", "lit_separation_cond527", "lit_separation_cond2048", "htsat" or
        "htsat_2048d".
      salt: the first part of every seed string; the reference numbers were made with "dev".
      fixed: False leaves out the formula buffers (DFT kernels, windows, mel filters, masks).
    """
    return {
        t["name"]: make_tensor(t["source_name"], t["shape"], t["kind"], salt, t["model"])
        for t in layout_tensors(layout)
        if fixed or t["kind"].split(":")[0] not in FIXED_KINDS
    }
