import pytest

from tests.tiny import write_separator
from uss_jax.bundles.bundle import read_bundle
from uss_jax.bundles.card import CARD, read_card
from uss_jax.bundles.packaged import PACKAGED
from uss_jax.cli.inspection import inspect
from uss_jax.cli.main import main
from uss_jax.errors import UserError


def test_inspect_shows_the_card_and_export_copies_it(tmp_path, capsys):
    folder = write_separator(tmp_path / "model")
    assert "model card:" not in inspect(folder)
    (folder / CARD).write_text("# Mine\n\nTrained on dögs.\n", encoding="utf-8")
    assert inspect(folder)[-4:] == ["model card:", "  # Mine", "  ", "  Trained on dögs."]
    out = tmp_path / "out"
    assert main(["export", str(folder), "--format", "safetensors", "--out", str(out)]) == 0
    assert (out / CARD).read_text(encoding="utf-8") == "# Mine\n\nTrained on dögs.\n"
    assert "config.json describes it, card.md the model." in (out / "README.md").read_text()


@pytest.mark.parametrize("name", PACKAGED)
def test_a_bundle_of_the_package_has_a_card(name):
    card = read_card(PACKAGED[name])
    for heading in ("Trained on", "Figures", "What it cannot do", "Licence"):
        assert f"\n## {heading}\n" in card
    assert read_bundle(name).config["licence"] in card


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe", "is not UTF-8 text"), (b"x" * 262145, "longer than 256 kB")],
)
def test_a_card_that_cannot_be_read_is_told(tmp_path, content, words):
    (tmp_path / CARD).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_card(tmp_path)
