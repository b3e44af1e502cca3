import pytest

from tests.evaluation.suites.recomputed import (
    kaggle_pairs,
    recomputed_averages,
    recomputed_gains,
    results_of,
    rows_of_all,
)
from uss_jax.bundles.model import Model
from uss_jax.errors import UserError
from uss_jax.evaluation.rows import AVERAGE, CLASS, ORACLE
from uss_jax.evaluation.suites import fsdkaggle2018, mixing

QUICK_COMPILATION = True


def test_fsdkaggle2018(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(mixing, "PER_CLASS", 4)
    results = results_of(sets, "fsdkaggle2018", "soft", tmp_path / "r.json")
    model, folder = Model(sets / "soft"), sets / "fsdkaggle2018"
    train, test = (kaggle_pairs(folder, split, 4) for split in ("train", "test"))
    averages = recomputed_averages(model, [(label, source) for label, source, _ in train])
    expected = recomputed_gains(model, test, averages)
    rows = rows_of_all(results)
    for row in (ORACLE, AVERAGE):
        assert rows[row]["pairs"] == 16
        assert rows[row]["sdri"] == pytest.approx(expected[row], abs=2e-3)
    assert rows[CLASS]["classes"]["number"] == 4
    assert results["baseline_sdri"] == pytest.approx(
        3.01, abs=0.5
    )  # real sounds, nearly orthogonal
    assert not list(tmp_path.glob(".*"))


def test_a_hundred_mixtures_of_each_class_are_drawn(sets):
    items = fsdkaggle2018.items(sets / "fsdkaggle2018", "test")
    assert len(items) == 400
    assert len({item.name for item in items}) == 400


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"FSDKaggle2018 lacks 2 of its 2 files: .*post_comp"):
        fsdkaggle2018.items(tmp_path, "train")
