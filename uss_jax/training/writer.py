"""Reports of a run: metrics.jsonl, TensorBoard events, and a progress bar or lines of text."""

import contextlib
import json
import os
import pathlib
import sys
import time

from tqdm import tqdm

from uss_jax.disk.atomic import full, is_full, replacing
from uss_jax.disk.checked_json import parse_json, record, whole
from uss_jax.errors import UserError

# tensorboardX imports PyTorch where it is installed, which takes seconds; scalars need none of it.
_torch = sys.modules.setdefault("torch", None)
from tensorboardX import SummaryWriter  # noqa: E402

if _torch is None:
    del sys.modules["torch"]

_LINE = record({"step": whole(0, 2**63)}, others=True)


class MetricsWriter:
    """Writes the metrics of a run after `start_step`; to be used on the first process only."""

    def __init__(self, workdir: str | os.PathLike, start_step: int, total_steps: int, name: str):
        """Opens the files; drops lines of steps after `start_step`, left by a run that died.

        Args:
          workdir: folder of the run.
          start_step: number of steps already done.
          total_steps: number of steps of the whole run.
          name: label of the progress.
        """
        self._name, self._total = name, total_steps
        path = pathlib.Path(workdir) / "metrics.jsonl"
        _keep_until(path, start_step)
        self._file = path.open("a")
        self._events = SummaryWriter(
            str(workdir), purge_step=start_step + 1, filename_suffix=f".{start_step}"
        )
        # A progress bar on a terminal, lines in a log.
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, desc=name, unit="step")
        self._began = time.monotonic()
        self._start = start_step

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the metrics of a step."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            if is_full(error):
                raise UserError(full(self._file.name)) from error
            raise
        for key, value in values.items():
            self._events.add_scalar(key, value, step)
        text = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
        else:
            seconds = (time.monotonic() - self._began) / max(step - self._start, 1)
            left = seconds * (self._total - step)
            print(f"{self._name} {step}/{self._total}: {text}, {left:.0f} s left", flush=True)

    def close(self) -> None:
        """Closes the files and the progress bar."""
        self._file.close()
        self._events.close()
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _keep_until(path: pathlib.Path, step: int) -> None:
    """Drops lines after `step`, and invalid lines left by a kill or a power cut."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            if parse_json(line, _LINE)["step"] <= step:
                kept.append(line + b"\n")
    with replacing(path) as temporary:
        temporary.write_bytes(b"".join(kept))
