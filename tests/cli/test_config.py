import pytest

from uss_jax.cli.config import load_config
from uss_jax.errors import UserError

CONFIG = """
from ml_collections import ConfigDict

def get_config(argument="small"):
    if argument not in ("small", "big"):
        raise ValueError(f"{argument!r}: expected small or big")
    config = ConfigDict(dict(steps=10, rate=0.5, name="a", on=True, widths=(1, 2), size=argument))
    config.maybe = 1.0
    config.net = ConfigDict(dict(width=3, depth=4))
    return config
"""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)

    def load(*overrides, argument="", text=None):
        if text is not None:
            path.write_text(text)
        return load_config(f"{path}{argument}", [f"--config.{word}" for word in overrides])

    return load


def test_leaves_are_overridden_with_their_type(load):
    config = load("steps=20", "rate=2", "name=b c", "on=false", "widths=(3,)", "net.width=7")
    assert config.to_dict() == dict(
        steps=20,
        rate=2.0,
        name="b c",
        on=False,
        widths=(3,),
        size="small",
        maybe=1.0,
        net=dict(width=7, depth=4),
    )
    assert isinstance(config.rate, float)
    assert load("steps=5", "steps=6").steps == 6


def test_an_argument_goes_to_get_config(load):
    assert load().size == "small"
    assert load(argument=":big").size == "big"
    with pytest.raises(UserError, match=r"config.py:poem: ValueError: 'poem': expected small or"):
        load(argument=":poem")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("step=3", r"--config\.step: there is no such key; did you mean --config\.steps\?"),
        ("net.widht=3", r"did you mean --config\.net\.width\?"),
        ("nets.width=3", r"--config\.nets\.width: .* did you mean --config\.net\?"),
        ("zzz=3", "there are maybe, name, net, on"),
        ("steps.more=3", "that is a leaf already"),
        ("=3", "there is no such key"),
        ("steps=many", "steps"),
        ("steps=1.5", "steps"),
        ("on=perhaps", "on"),
        ("net.width=(", "net.width"),
        ("steps", "steps"),
    ],
)
def test_what_cannot_be_set_is_said_in_one_sentence(load, word, said):
    with pytest.raises(UserError, match=said) as raised:
        load(word)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config(:", "SyntaxError"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("x = 1", r"has no get_config\(\)"),
        (
            "def get_config(): return {'a': 1}",
            r"get_config\(\) gives a dict, expected a ConfigDict",
        ),
        ("def get_config(): raise KeyError('a')", "KeyError: 'a'"),
    ],
)
def test_a_config_file_that_fails_is_said_in_one_sentence(load, text, said):
    with pytest.raises(UserError, match=rf"--config .*config\.py: .*{said}") as raised:
        load(text=text)
    assert "\n" not in str(raised.value)


def test_a_missing_config_file_is_said(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(UserError, match="there is no such file"):
            load_config(str(path), [])
