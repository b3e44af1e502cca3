"""The reference's nets with the weights of the recipe, as modules and variables of ours.

They compute in the dtype of the way that was chosen, see ways.py.
"""

import functools
from typing import Any

from tests.golden import ways
from tests.golden.weights import build_state_dict
from uss_jax.models.cnn14 import Cnn14, Cnn14DecisionLevelMax
from uss_jax.models.resunet import ResUNet
from uss_jax.weights.cnn14 import convert_cnn14
from uss_jax.weights.resunet import convert_resunet


@functools.lru_cache(maxsize=2)
def golden_tagger(layout: str) -> tuple[Cnn14, Any]:
    """(module, variables) of the layout "cnn14" or "cnn14_decision_level_max"."""
    converted = convert_cnn14(build_state_dict(layout, fixed=False))
    module = Cnn14 if layout == "cnn14" else Cnn14DecisionLevelMax
    return module(**converted.fields, dtype=ways.chosen.dtype), converted.variables


@functools.lru_cache(maxsize=2)
def golden_separator(layout: str) -> tuple[ResUNet, Any]:
    """(module, variables) of a layout "resunet30_..."."""
    converted = convert_resunet(build_state_dict(layout, fixed=False))
    return ResUNet(**converted.fields, dtype=ways.chosen.dtype), converted.variables
