import jax
import numpy as np

from tests.anchors.toy import SED, SETTINGS, padded
from tests.tiny import SEGMENT
from uss_jax.anchors.find import find_anchors


def test_the_anchors_are_those_the_training_step_finds(reader, table):
    index = reader.index
    counts = np.diff(index.label_row.astype(int))
    records = np.repeat(np.arange(len(index)), counts)
    batch = {
        "audio": np.stack([padded(reader, record) for record in records.tolist()]),
        "samples": index.samples[records].astype(np.int32),
        "class_index": index.label_class.astype(np.int32),
    }
    anchors = jax.jit(
        lambda variables, batch: find_anchors(
            SED.module,
            variables,
            batch,
            jax.random.key(0),
            segment_samples=SEGMENT,
            min_dbfs=SETTINGS.min_dbfs,
        )
    )(SED.variables, batch)
    np.testing.assert_array_equal(table.begin_sample[:, 0], anchors.begin_sample)
    np.testing.assert_allclose(table.score[:, 0], anchors.score, atol=1e-5)
    assert len(set(table.begin_sample[:, 0].tolist())) >= 3  # not all at the same place
