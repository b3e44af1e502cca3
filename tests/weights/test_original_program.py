"""What `convert` writes loads in bytedance/uss with strict=True, under several Lightnings.

`bash launch/original.sh` installs the original program with some versions of Lightning and runs
this; the environment variable names the Pythons that have it.
"""

import csv
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

from tests.golden.weights import build_state_dict
from uss_jax.cli.main import main
from uss_jax.ontology import load_ontology

torch = pytest.importorskip("torch")

PYTHONS = [path for path in os.environ.get("USS_ORIGINAL_PYTHONS", "").split(os.pathsep) if path]
PROGRAM = pathlib.Path(__file__).with_name("original_program.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """source.ckpt, back.ckpt by way of a bundle, and labels.csv."""
    place = tmp_path_factory.mktemp("original")
    tensors = build_state_dict("lit_separation_cond527")
    state_dict = {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}
    torch.save({"state_dict": state_dict}, place / "source.ckpt")
    for words in (("source.ckpt", "bundle"), ("bundle", "back.ckpt")):
        assert main(["convert", *(str(place / word) for word in words)]) == 0
    ontology = load_ontology()
    rows = zip(ontology.class_mids, ontology.class_names, strict=True)
    with open(place / "labels.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("index", "mid", "display_name"), *((i, *row) for i, row in enumerate(rows))]
        )
    return place


@pytest.mark.long
@pytest.mark.skipif(not PYTHONS, reason="USS_ORIGINAL_PYTHONS names no Python with bytedance/uss")
@pytest.mark.parametrize("python", PYTHONS or [""])
def test_the_original_program_loads_what_we_write(place, python):
    files = [place / name for name in ("back.ckpt", "source.ckpt", "labels.csv")]
    run = subprocess.run(
        [python, str(PROGRAM), *map(str, files)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    print(said)  # with pytest -s
    assert said["tensors"] == said["equal"] == 501
