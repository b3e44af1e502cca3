import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.weights.test_htsat import FIELDS, htsat_variables, state_dict
from tests.weights.variables import assert_same_tree
from uss_jax.bundles.bundle import read_bundle
from uss_jax.cli.main import main
from uss_jax.models.htsat import HTSAT
from uss_jax.weights.htsat import HTSAT_PREFIX
from uss_jax.weights.torch import state_dict_of

torch = pytest.importorskip("torch")


def save(path, tensors):
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
    torch.save({"state_dict": tensors, "pytorch-lightning_version": "1.5.9"}, path)
    return str(path)


@pytest.mark.parametrize("kind", [[], ["--kind", "htsat"]])
def test_checkpoint_becomes_a_tagger_bundle_that_is_query_net_and_detector(tmp_path, kind):
    counter = f"{HTSAT_PREFIX}bn0.num_batches_tracked"
    tensors = {**state_dict(), counter: np.array(7)}
    source, out = save(tmp_path / "HTSAT_AudioSet_Saved_1.ckpt", tensors), tmp_path / "bundle"
    assert main(["convert", source, str(out), *kind]) == 0
    bundle = read_bundle(out)
    assert bundle.config["kind"] == "tagger"
    assert bundle.config["sample_rate"] == 32000
    assert "unknown: see the source of " in bundle.config["licence"]
    query, _ = bundle.query()
    sed, variables = bundle.sed()
    assert query.tagger == sed == HTSAT(**FIELDS)
    assert_same_tree(variables, htsat_variables())

    # And back: the bundle alone gives every tensor of the checkpoint.
    foreign = load_file(out / "foreign.safetensors")
    back = state_dict_of("sed", bundle.config["sed"]["model"], variables, HTSAT_PREFIX)
    back |= {name.removeprefix("sed/"): tensor for name, tensor in foreign.items()}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].tobytes() == tensor.tobytes(), name
