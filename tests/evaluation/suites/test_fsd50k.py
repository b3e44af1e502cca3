import numpy as np
import pytest

from tests.evaluation.suites import imitations
from tests.evaluation.suites.recomputed import (
    read_fitted,
    recomputed_averages,
    recomputed_gains,
    results_of,
    rows_of_all,
)
from uss_jax.bundles.model import Model
from uss_jax.errors import UserError
from uss_jax.evaluation.rows import AVERAGE, ORACLE
from uss_jax.evaluation.suites import fsd50k, mixing
from uss_jax.ontology import load_ontology

QUICK_COMPILATION = True


def test_fsd50k_asks_for_the_first_label_or_for_all(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(mixing, "PER_CLASS", 2)
    results = results_of(sets, "fsd50k", "embedding", tmp_path / "r.json")
    assert set(results["classes"]["medians"]) == set(imitations.SOUNDS)
    model = Model(sets / "embedding")
    made = {}
    for split in ("train", "test"):
        made[split] = []
        for item in fsd50k.items(sets / "fsd50k", split):
            a, b = read_fitted(item.source), read_fitted(item.other)
            made[split].append((item.label, a, a + b * np.sqrt(np.mean(a**2) / np.mean(b**2))))
    averages = recomputed_averages(model, [(label, source) for label, source, _ in made["train"]])
    expected = recomputed_gains(model, made["test"], averages)
    for row in (ORACLE, AVERAGE):
        assert rows_of_all(results)[row]["sdri"] == pytest.approx(expected[row], abs=2e-3)

    items = fsd50k.items(sets / "fsd50k", "test", all_labels=True)
    labels = {*imitations.SOUNDS, "Dog", "Animal", "Keyboard_(musical)"}
    assert {item.label for item in items} == labels
    for item in items:
        related = load_ontology().relatives(item.class_index)
        assert item.other_class_index not in related


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="FSD50K lacks 2 of its 2 files"):
        fsd50k.items(tmp_path, "test")
    copied = imitations.fsd50k(tmp_path / "fsd50k")
    (copied / "FSD50K.eval_audio" / "1002.wav").unlink()
    with pytest.raises(UserError, match=r"FSD50K lacks 1 of its 8 files: .*1002\.wav"):
        fsd50k.items(copied, "test")
