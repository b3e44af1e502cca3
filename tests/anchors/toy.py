"""Clips of three shards, and the detector and settings that mine them."""

import numpy as np

from tests.tiny import RATE, SEGMENT, TAGGER, noise, tagger_variables, tone
from uss_jax.anchors.mine import MiningSettings
from uss_jax.bundles.model import Net
from uss_jax.bundles.nets import build_sed, fields_of
from uss_jax.ontology import load_ontology

LENGTH = int(1.6 * RATE)
SETTINGS = MiningSettings(RATE, SEGMENT, LENGTH, candidates=3, min_dbfs=-60.0)
SED = Net(build_sed(fields_of(TAGGER)), tagger_variables(seed=1))
SPEECH, DOG, BARK, MUSIC = (
    load_ontology().resolve(name) for name in ("Speech", "Dog", "Bark", "Music")
)
LABELS = [[SPEECH], [DOG, SPEECH], [BARK], [MUSIC, DOG, SPEECH], []]


def clips_of_many_lengths():
    """Sounds that change, of many lengths, one of them mostly silent."""
    clips = []
    for i in range(10):
        quiet = np.zeros(int(0.1 * i * RATE), np.float32)
        sound = np.concatenate([tone(300 + 200 * i, 0.35), quiet, noise(i, 0.3)])
        clips.append((f"clip{i}", sound, LABELS[i % 5]))
    clips[3] = ("short", tone(500, 0.2), [DOG])
    return clips


def padded(reader, record):
    samples = reader.read(record)
    return np.pad(samples, (0, LENGTH - len(samples)))
