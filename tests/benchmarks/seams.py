"""How far windows differ from one pass, by the distance from their ends: run

    python -m tests.benchmarks.seams --model MODEL recording.wav ...

Each recording is separated as a whole, and again in the windows that `separate` would cut from its
middle, both asked with the class that the model's tagging net is surest of. Near its ends a window
does not hear what the whole hears, and there its estimate differs; `separate` leaves out the part
that the separator's `context_samples` name. The table shows the power of the difference at each
distance from an end, up to twice that part: the mean and the largest over all windows and
recordings, in dB of the mean power of the estimate of the whole recording.
"""

import argparse

import numpy as np
from jaxtyping import Float

from uss_jax.audio.files import read_mono
from uss_jax.bundles.model import Model
from uss_jax.errors import UserError
from uss_jax.evaluation.text_table import markdown_table
from uss_jax.separation.queries import indicators
from uss_jax.separation.windows import Layout

_FLOOR = 1e-20  # of a share of power: -200 dB


def condition_of_surest(model: Model, waveform: Float[np.ndarray, " t"]) -> np.ndarray:
    """The condition [1, d] of the class with the highest probability in the recording."""
    surest = int(np.argmax(model.tagger(waveform[None])["clipwise"][0]))
    return model.of_classes(indicators([[surest]]))


def differences(
    model: Model, waveform: Float[np.ndarray, " t"], layout: Layout, step: int
) -> Float[np.ndarray, "w d"]:
    """Power of the difference to one pass, for each window and distance, as a share of the whole.

    Distances are counted in `step` samples from the nearer end of a window.

    Raises:
      UserError: the recording is too short for a window away from its own ends.
    """
    condition = condition_of_surest(model, waveform)
    whole = np.asarray(model.separate(waveform[None], condition))[0]
    reach = min(2 * layout.context, layout.window // 2) // step * step
    rows = []
    for begin in range(layout.step, len(waveform) - layout.window - layout.step, layout.step):
        part = slice(begin, begin + layout.window)
        alone = np.asarray(model.separate(waveform[None, part], condition))[0]
        error = np.square(alone - whole[part])
        ends = np.stack([error[:reach], error[::-1][:reach]])
        rows.append(ends.reshape(2, -1, step).mean(axis=(0, 2)))
    if not rows:
        seconds = (2 * layout.step + layout.window) / model.sample_rate
        raise UserError(f"expected a recording of more than {seconds:.1f} s")
    return np.array(rows) / np.mean(np.square(whole))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.seams", description=__doc__)
    parser.add_argument("--model", required=True, help="bundle or workdir with a separator")
    parser.add_argument("--step", type=float, default=0.1, help="seconds between distances")
    parser.add_argument("recordings", nargs="+")
    args = parser.parse_args()
    model = Model(args.model)
    rate, rows = model.sample_rate, []
    step = round(args.step * rate)
    for path in args.recordings:
        waveform = read_mono(path, rate)
        layout = Layout.windows(model, len(waveform))
        rows.append(differences(model, waveform, layout, step))
    context = layout.context / rate
    print(f"window {layout.window / rate:.2f} s, left out at each end {context:.2f} s\n")
    shares = np.concatenate(rows)
    levels = 10 * np.log10(np.maximum([shares.mean(axis=0), shares.max(axis=0)], _FLOOR))
    lines = [
        [f"{at * args.step:.1f} to {(at + 1) * args.step:.1f}", f"{mean:.0f}", f"{largest:.0f}"]
        for at, (mean, largest) in enumerate(levels.T)
    ]
    print("\n".join(markdown_table(["distance / s", "mean / dB", "largest / dB"], lines)))


if __name__ == "__main__":
    main()
