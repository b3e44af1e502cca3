"""Banks of vectors: found by their exact names, whatever file names would make of these."""

import numpy as np
import pytest
import soundfile

from tests import tiny
from uss_jax.cli.main import main
from uss_jax.errors import UserError
from uss_jax.separation.banks import Bank, load_bank, write_bank

QUICK_COMPILATION = True


def bank(*names):
    return Bank(names, np.ones((len(names), 3), np.float32), "embedding", "hash")


@pytest.mark.parametrize(
    ("names", "asked", "row"),
    [
        (("狗", "猫"), "狗", 0),
        (("a b", "a_b"), "a b", 0),
        (("a b", "a_b"), "a_b", 1),
        (("Dog", "dog"), "dog", 1),
        (("Vacuum cleaner", "x"), "vacuum_cleaner", 0),
        (("Türklopfer", "x"), "tu\u0308rklopfer", 0),
    ],
)
def test_the_exact_name_comes_first(names, asked, row):
    assert bank(*names).select([asked], "b.npz") == [row]


@pytest.mark.parametrize(
    ("names", "asked", "said"),
    [
        (("狗", "猫"), ["☃"], 'no vector called "☃"; it has 狗, 猫'),
        (
            ("a b", "A_B"),
            ["a_B"],
            '"a_B" is ambiguous: it could be "a b" or "A_B" of b.npz; give the exact name',
        ),
        (("Dog", "Cat"), ["Dog", "dog"], '"Dog" is given twice'),
    ],
)
def test_a_name_that_means_no_single_vector_is_refused(names, asked, said):
    with pytest.raises(UserError) as error:
        bank(*names).select(asked, "b.npz")
    assert said in str(error.value)


def test_every_sound_of_a_bank_gets_a_file(tmp_path):
    """Names that an ASCII file name would merge."""
    model = str(tiny.write_separator(tmp_path / "model"))
    names = ["狗", "猫", "Türklopfer", "a b", "a_b", "v1.2 barks", "site.A", "site.B"]
    for seed, name in enumerate(names):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "x.wav", tiny.noise(seed, 0.5), tiny.RATE)
    folders = [str(tmp_path / name) for name in names]
    stored = str(tmp_path / "b.npz")
    assert main(["query", "make", stored, *folders, "--model", model]) == 0
    assert list(load_bank(stored).name) == names
    soundfile.write(tmp_path / "street.wav", tiny.noise(20, 0.5), tiny.RATE)
    words = ["separate", str(tmp_path / "street.wav"), "--model", model, "--query", stored]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert {p.stem for p in (tmp_path / "out/street").glob("*.wav")} == set(names)
    assert main([*words, "--out", str(tmp_path / "one"), "--classes", "狗"]) == 0
    assert [p.stem for p in (tmp_path / "one/street").glob("*.wav")] == ["狗"]


def test_a_bank_with_a_name_twice_is_refused(tmp_path):
    write_bank(tmp_path / "b.npz", bank("a", "a"))
    with pytest.raises(UserError, match='two vectors called "a"'):
        load_bank(tmp_path / "b.npz")
