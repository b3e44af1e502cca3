"""A small separator learns real sounds, through the commands that users run."""

import importlib.resources
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.tiny import CONFIGS
from uss_jax.anchors.find import find_anchors
from uss_jax.anchors.mix import energy, mix
from uss_jax.bundles.model import Model
from uss_jax.data.conversion import ClipSettings
from uss_jax.data.labels import read_labels
from uss_jax.data.orders import BalancedOrder
from uss_jax.data.pipeline import batches
from uss_jax.data.prepare import prepare
from uss_jax.data.reader import ClipReader

RATE, STEPS, BATCH = 8000, 400, 8
CONFIG = {
    "sample_rate": RATE,
    "segment_seconds": 0.5,
    "total_steps": STEPS,
    "global_batch": BATCH,
    "mixing.group_size": BATCH,
    "data.split": "train",
    "data.clip_seconds": 2.0,
    "data.threads": 1,
    "anchors.source": "random",
    "query.kind": "one_hot",
    "separator.n_fft": 256,
    "separator.hop_samples": 128,
    "separator.channels": (8, 16),
    "schedule.learning_rate": 4e-3,
    "schedule.warm_up_steps": 10,
}


def _without_common_labels(labelled, count):
    """The first clips that have no label in common."""
    chosen, labels = [], set()
    for item in labelled:
        if not labels & set(item.labels) and len(chosen) < count:
            chosen.append(item)
            labels |= set(item.labels)
    return chosen


@pytest.mark.long
def test_a_separator_beats_every_constant_mask(tmp_path):
    demo = importlib.resources.files("uss_jax") / "assets" / "demo"
    labelled = read_labels(demo / "manifest.csv", demo, "train").clips
    prepared = prepare(
        _without_common_labels(labelled, 8),
        demo,
        tmp_path,
        name="demo",
        version="1.0.0",
        split="train",
        settings=ClipSettings(RATE, CONFIG["data.clip_seconds"]),
    )
    words = [f"--config.{k}={v}" for k, v in {**CONFIG, "data.records": prepared.directory}.items()]
    config = str(CONFIGS / "resunet30.py")
    command = ["train", "--config", config, "--workdir", str(tmp_path / "run"), *words]
    # A process of its own, where there is one device.
    subprocess.run(
        [sys.executable, "-m", "uss_jax.cli.main", *command], cwd=CONFIGS.parent, check=True
    )

    # New mixtures of other segments of the same clips.
    (batch,) = batches(
        ClipReader(prepared.directory, prepared.index),
        BalancedOrder(prepared.index.label_row, prepared.index.label_class, seed=1),
        start_step=0,
        stop_step=1,
        batch_size=64,
        clip_samples=int(RATE * CONFIG["data.clip_seconds"]),
    )
    batch = jax.tree.map(jax.numpy.asarray, batch)
    segment = int(RATE * CONFIG["segment_seconds"])
    anchors = find_anchors(
        None, None, batch, jax.random.key(1), segment_samples=segment, min_dbfs=None
    )
    target = anchors.segment
    mixture = mix(
        target, energy(target, anchors.samples), sources=2, group_size=BATCH, match_energy=True
    )
    model = Model(tmp_path / "run")
    condition = model.condition(np.asarray(target), np.asarray(batch["class_index"]))
    loss = np.abs(model.separate(np.asarray(mixture), condition) - target).mean()
    constant = min(np.abs(gain * mixture - target).mean() for gain in np.linspace(0, 1, 101))
    print(f"\nloss {loss:.4f}, {loss / constant:.3f} of the best constant mask's {constant:.4f}")
    assert loss <= 0.8 * constant
