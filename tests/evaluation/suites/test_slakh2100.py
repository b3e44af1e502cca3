import numpy as np
import pytest
import soundfile

from tests.evaluation.suites.recomputed import (
    SAMPLES,
    recomputed_averages,
    recomputed_gains,
    results_of,
    rows_of_all,
)
from uss_jax.bundles.model import Model
from uss_jax.errors import UserError
from uss_jax.evaluation.rows import AVERAGE, ORACLE
from uss_jax.evaluation.suites import slakh2100
from uss_jax.ontology import load_ontology

QUICK_COMPILATION = True


def test_slakh2100(sets, tmp_path):
    results = results_of(sets, "slakh2100", "embedding", tmp_path / "r.json")
    # Of the flute four windows peak above 0.1, ten are too few; the lost stem has no file.
    assert set(results["classes"]["medians"]) == {"the_grand.nkm", "cello_ensemble.nkm"}
    model, made = Model(sets / "embedding"), {}
    for split in ("train", "test"):
        made[split] = []
        for track in sorted((sets / "slakh2100" / split).iterdir()):
            mixture, _ = soundfile.read(track / "mix.flac", dtype="float32")
            for stem, label in (("S00", "the_grand.nkm"), ("S01", "cello_ensemble.nkm")):
                source, _ = soundfile.read(track / "stems" / f"{stem}.flac", dtype="float32")
                for begin in range(0, len(source), SAMPLES):
                    window = source[begin : begin + SAMPLES]
                    if np.abs(window).max() > 0.1:
                        made[split].append((label, window, mixture[begin : begin + SAMPLES]))
    averages = recomputed_averages(model, [(label, source) for label, source, _ in made["train"]])
    expected = recomputed_gains(model, made["test"], averages)
    rows = rows_of_all(results)
    assert rows[ORACLE]["pairs"] == len(made["test"])
    for row in (ORACLE, AVERAGE):
        assert rows[row]["sdri"] == pytest.approx(expected[row], abs=2e-3)
    by_instrument = slakh2100.items(sets / "slakh2100", "test", by="instrument")
    classes = {item.label: item.class_index for item in by_instrument}
    assert classes == {"Acoustic Grand Piano": None, "Cello": load_ontology().resolve("Cello")}


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="Slakh2100 lacks"):
        slakh2100.items(tmp_path, "test")


@pytest.mark.parametrize(
    "stems",
    ["[S00, S01]", "null", "S00", "{S00: piano}", "{S00: null}", "{S00: {plugin_name: [1]}}"],
)
def test_metadata_of_another_form_is_one_sentence(tmp_path, stems):
    path = tmp_path / "metadata.yaml"
    path.write_text(f"stems: {stems}\n")
    with pytest.raises(UserError, match=r"metadata\.yaml has no readable list of stems; unpack"):
        slakh2100._stems(path)
    path.write_text("stems: {S00: {plugin_name: a, midi_program_name: null}, S01: {}}\n")
    assert list(slakh2100._stems(path)) == ["S00", "S01"]
