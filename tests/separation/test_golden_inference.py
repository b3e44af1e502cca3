"""Separation in the reference's blocks gives the reference's numbers, by class, level and query."""

import json
import pathlib

import numpy as np
import pytest

from tests.golden.compare import relative_error, stored
from tests.golden.inputs import make_signal, query_signal
from tests.golden.nets import golden_separator, golden_tagger
from uss_jax.audio.files import write_wav
from uss_jax.bundles import model as model_module
from uss_jax.bundles.bundle import Bundle
from uss_jax.bundles.model import Model
from uss_jax.bundles.nets import fields_of
from uss_jax.separation.example_vectors import remove_silence, vector_of_recordings
from uss_jax.separation.queries import Classes, Vectors, level_sets
from uss_jax.separation.recordings import Separator, Settings
from uss_jax.separation.windows import tag_segments

pytestmark = pytest.mark.golden

RATE = 32000
# Not every node of levels 2 and 3 was separated by the reference, and four show it.
NODES = 4


class MemoryBundle(Bundle):
    """A converted checkpoint that was not written to disk."""

    def variables(self, part):
        return self.config["parts"][part]


def separator_of(layout, kind, monkeypatch):
    (separator, separator_variables), (tagger, tagger_variables) = (
        golden_separator(layout),
        golden_tagger("cnn14"),
    )
    config = {
        "kind": "separator",
        "sample_rate": RATE,
        "segment_seconds": 2.0,
        # Float32 in every way of computing, as the reference's numbers are compared.
        "separator": fields_of(separator.clone(dtype="float32")),
        "query": {"kind": kind, "model": fields_of(tagger.clone(dtype="float32"))},
        "parts": {"separator": separator_variables, "query": tagger_variables},
    }
    bundle = MemoryBundle(pathlib.Path("golden"), config)
    monkeypatch.setattr(model_module, "read_bundle", lambda path: bundle)
    return Separator(Model("golden"), Settings(reference_blocks=True))


@pytest.fixture
def reference(golden):
    with np.load(golden / "inference.npz") as arrays:
        return dict(arrays), json.loads((golden / "inference.json").read_text())


def write_queries(folder, facts):
    """The query recordings, as the WAV files that the reference read."""
    for query in facts["queries"]:
        seed, samples = query["seed"], query["samples"]
        soft = query.get("soft") and tuple(query["soft"])
        silence = np.zeros(samples, np.float32)
        waveform = query_signal(seed, samples, soft) if seed else silence
        write_wav(folder / query["name"], waveform[None], RATE)


def test_silence_is_removed_as_by_the_reference(golden, reference):
    arrays, facts = reference
    for query in facts["queries"][:-1]:
        soft = query.get("soft") and tuple(query["soft"])
        heard = remove_silence(query_signal(query["seed"], query["samples"], soft), RATE)
        assert len(heard) == facts["remove_silence_samples"][query["name"]]
        np.testing.assert_array_equal(
            stored(arrays, f"remove_silence/{query['name']}", heard),
            arrays[f"remove_silence/{query['name']}"],
        )
    assert remove_silence(np.zeros(40000, np.float32), RATE).size == 0


@pytest.mark.long
def test_soft_conditions(reference, tmp_path, monkeypatch):
    arrays, facts = reference
    separator = separator_of("resunet30_cond527", "soft", monkeypatch)
    mixture = make_signal("dev/inference", facts["samples"])

    probabilities = tag_segments(separator.model, [mixture[None]], padded=True)
    np.testing.assert_allclose(probabilities, arrays["segment_at_probs"], atol=1e-4)

    # By classes.
    sets = {str(at): asked["class_ids"] for at, asked in enumerate(facts["class_ids"])}
    targets = Classes(sets).targets(separator.model, probabilities)
    estimates = separator.separate(mixture, RATE, Classes(sets))
    for at, asked in enumerate(facts["class_ids"]):
        assert targets[at].active.tolist() == asked["active_segments"]
        if not any(asked["active_segments"]):
            assert not estimates[str(at)].any()
        else:
            assert relative_error(arrays, f"class_ids_{at}/audio", estimates[str(at)]) < 1e-4

    # By levels: all decisions, and some of the sounds.
    for level, nodes in facts["levels"].items():
        sets = level_sets([int(level)], first_parent_only=True)
        assert [list(indexes) for indexes in sets.values()] == [n["indexes"] for n in nodes]
        found = Classes(sets).targets(separator.model, probabilities)
        for target, node in zip(found, nodes, strict=True):
            assert target.name == f"level={level}/{node['name']}"
            assert np.flatnonzero(target.active).tolist() == node["active"]
    rows = {
        f"level={level}/{node['name']}": arrays[f"level{level}/audio"][node["audio_row"]]
        for level, nodes in facts["levels"].items()
        for node in [n for n in nodes if n["audio_row"] is not None and n["active"]][:NODES]
    }
    sets = {
        name: indexes
        for name, indexes in level_sets([1, 2, 3], first_parent_only=True).items()
        if name in rows
    }
    estimates = separator.separate(mixture, RATE, Classes(sets, only_active=True))
    assert estimates.keys() == rows.keys()
    for name, row in rows.items():
        thinned = estimates[name][:: facts["level_audio_stride"]]
        assert np.linalg.norm(thinned - row) < 1e-4 * np.linalg.norm(row), name

    # By example recordings.
    write_queries(tmp_path, facts)
    vector = vector_of_recordings(separator.model, tmp_path)
    np.testing.assert_allclose(vector, arrays["query_emb_remove_sil_1"], rtol=1e-4, atol=1e-6)
    estimate = separator.separate(mixture, RATE, Vectors({"query": vector}))["query"]
    assert relative_error(arrays, "query_condition/audio", estimate) < 1e-4


@pytest.mark.long
def test_embedding_conditions(reference, tmp_path, monkeypatch):
    arrays, facts = reference
    separator = separator_of("resunet30_cond2048", "embedding", monkeypatch)
    write_queries(tmp_path, facts)
    vector = vector_of_recordings(separator.model, tmp_path)
    assert relative_error(arrays, "query_emb2048_remove_sil_1", vector) < 1e-4
    samples = facts["query_condition2048"]["audio_samples"]
    mixture = make_signal("dev/inference", facts["samples"])[:samples]
    estimate = separator.separate(mixture, RATE, Vectors({"query": vector}))["query"]
    assert relative_error(arrays, "query_condition2048/audio", estimate) < 1e-4
