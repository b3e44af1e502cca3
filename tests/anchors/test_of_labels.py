import numpy as np
import pytest

from tests.anchors.toy import SED, padded
from tests.tiny import SEGMENT
from uss_jax.ontology import load_ontology


def test_runners_up_overlap_none_before_and_score_no_higher(reader, table):
    rows = np.repeat(np.arange(len(reader.index)), np.diff(reader.index.label_row.astype(int)))
    found = 0
    for row, record in enumerate(rows):
        begin, score = table.begin_sample[row].astype(int), table.score[row]
        there = score >= 0
        found += there.sum()
        apart = np.abs(np.subtract.outer(begin[there], begin[there]))
        assert (apart[~np.eye(there.sum(), dtype=bool)] >= SEGMENT).all()
        assert (np.diff(score) <= 1e-6).all()
        assert (begin[~there] == begin[0]).all()
        assert (begin + SEGMENT <= max(reader.index.samples[record], SEGMENT)).all()
    assert found > len(rows)  # some have one


def test_level_and_purity_are_of_the_best_anchor(reader, table):
    index, ontology = reader.index, load_ontology()
    row = 0
    for record in range(len(index)):
        clip = padded(reader, record) / np.float32(32768)
        framewise = np.asarray(SED(clip[None])["framewise"][0])
        labels = index.labels(record).tolist()
        related = sorted(set().union(*(ontology.relatives(label) for label in labels)))
        for _ in labels:
            begin = int(table.begin_sample[row, 0])
            end = min(begin + SEGMENT, int(index.samples[record]))
            level = 10 * np.log10(np.mean(np.square(clip[begin:end], dtype=np.float64)))
            # Levels are of segments that begin on the hop, which a short clip's end need not.
            assert table.rms_db[row] == pytest.approx(level, abs=0.5)
            hop = SED.module.hop_samples
            mean = framewise[-(-begin // hop) : end // hop + 1].mean(axis=0)
            mean[related] = 0
            assert table.purity[row] == pytest.approx(mean.max(), rel=2e-3)
            row += 1
