import numpy as np

from uss_jax.bundles.model import Model
from uss_jax.evaluation.rows import ORACLE
from uss_jax.evaluation.scoring import score
from uss_jax.evaluation.suites.pairs import find_pairs


def test_what_another_model_has_left_is_not_used(place, tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.write_text('{"run": "of another"}\n[0, {}]\n')
    pairs = find_pairs(place / "pairs")
    figures, _ = score(Model(place / "soft"), pairs, unfinished=unfinished)
    assert np.isfinite(figures[ORACLE]["sdr"]).all()
