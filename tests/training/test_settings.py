"""Configs that are read, and what is said of those that are invalid."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.tiny import CONFIGS
from uss_jax.cli.config import load_config
from uss_jax.errors import UserError
from uss_jax.training.settings import separator_settings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.clear(), "config.seed is missing"),
        (lambda config: config.pop("global_batch"), "config.global_batch is missing"),
        (lambda config: config.update(data=3), "config.data is 3, expected a section of keys"),
        (lambda config: config.update(total_steps="9"), "config.total_steps is '9', expected"),
        (lambda config: config.update(total_steps=True), "config.total_steps is True, expected"),
        (lambda config: config.update(weight_decay=np.nan), "config.weight_decay is nan, expected"),
    ],
)
def test_a_config_file_of_other_keys_or_types_is_said(change, said):
    values = load_config(str(CONFIGS / "resunet30.py"), []).to_dict()
    change(values)
    with pytest.raises(UserError, match=said):
        separator_settings(ConfigDict(values))


@pytest.mark.parametrize("draws", [-1, 10**9, 1.5, True, "2"])
def test_class_weights_have_a_range(draws):
    values = load_config(str(CONFIGS / "resunet30.py"), []).to_dict()
    values["data"]["class_weights"] = {"Dog": draws}
    with pytest.raises(UserError, match=r"class_weights\['Dog'\] is .*, expected a whole number"):
        separator_settings(ConfigDict(values))
