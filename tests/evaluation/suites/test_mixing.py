import numpy as np
import pytest

from tests.evaluation.suites import imitations
from tests.evaluation.suites.recomputed import fsd50k_pairs, kaggle_pairs
from uss_jax.errors import UserError
from uss_jax.evaluation.suites import fsd50k, fsdkaggle2018, mixing
from uss_jax.evaluation.suites.mixing import Recording, class_index_of, mixed_neighbours
from uss_jax.ontology import load_ontology


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("suite", "transcribed"), [(fsdkaggle2018, kaggle_pairs), (fsd50k, fsd50k_pairs)]
)
def test_pairs_are_the_published_ones_sample_by_sample(
    sets, monkeypatch, suite, transcribed, split
):
    monkeypatch.setattr(mixing, "PER_CLASS", 5)
    folder = sets / suite.__name__.split(".")[-1]
    expected = transcribed(folder, split, 5)
    items = suite.items(folder, split)
    assert [item.label for item in items] == [label for label, _, _ in expected]
    for item, (_, source, mixture) in zip(items, expected, strict=True):
        np.testing.assert_array_equal(item.read("source", imitations.RATE), source)
        np.testing.assert_allclose(item.read("mixture", imitations.RATE), mixture, atol=1e-6)


def test_a_data_set_of_one_class_makes_no_mixture(tmp_path):
    same = [Recording(tmp_path / str(n), ("Dog",), (74,)) for n in range(3)]
    with pytest.raises(UserError, match="all recordings are of one class"):
        mixed_neighbours(same)


def test_labels_of_freesound_s_sets_are_audioset_s_classes():
    for label, name in {
        "Gunshot_or_gunfire": "Gunshot, gunfire",
        "Violin_or_fiddle": "Violin, fiddle",
        "Burping_or_eructation": "Burping, eructation",
        "Hi-hat": "Hi-hat",
        "Drawer_open_or_close": "Drawer open or close",
    }.items():
        assert class_index_of(label) == load_ontology().resolve(name)
    assert class_index_of("the_grand.nkm") is None
