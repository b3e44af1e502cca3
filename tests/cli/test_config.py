import pytest

from tests.tiny import CONFIGS
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
    config.weights = ConfigDict()
    config.speed = None
    config.rates = (0.5, 2.0)
    config.words = ("a",)
    config.steps_traced = ()
    config.schedule = ConfigDict(dict(name="flat", rate=0.1))
    return config
"""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "config.py"

    def load(*overrides, argument="", text=CONFIG):
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
        weights={},
        speed=None,
        rates=(0.5, 2.0),
        words=("a",),
        steps_traced=(),
        schedule=dict(name="flat", rate=0.1),
    )
    assert isinstance(config.rate, float)
    assert load("steps=5", "steps=6").steps == 6


def test_sections_that_are_empty_or_none_take_new_keys(load):
    assert load("weights.Drum=3", "weights.Male speech, man speaking=2").weights.to_dict() == {
        "Drum": 3,
        "Male speech, man speaking": 2,
    }
    assert load("weights={'Drum': 3}", "weights.Bark=2").weights.to_dict() == {"Drum": 3, "Bark": 2}
    assert load("speed.least=0.5", "speed.most=2").speed.to_dict() == {"least": 0.5, "most": 2}
    assert load("speed={'least': 0.5}").speed.to_dict() == {"least": 0.5}


def test_a_section_can_be_set_as_a_whole(load):
    assert load("net={'width': 7}").net.to_dict() == dict(width=7, depth=4)
    # The keys of a schedule depend on its name.
    assert load("schedule={'name': 'cosine', 'total': 9}").schedule.to_dict() == {
        "name": "cosine",
        "total": 9,
    }
    assert load("net=None").net is None


def test_elements_of_a_sequence_keep_their_type_and_words_need_no_quotes(load):
    assert load("rates=(1, 2.5)").rates == (1.0, 2.5)
    assert load("words=b, c").words == ("b", "c")
    assert load("words=('b',)").words == ("b",)
    assert load("widths=5").widths == (5,)
    assert load("steps_traced=(3, 4)").steps_traced == (3, 4)


def test_a_flag_needs_no_value(load):
    text = CONFIG.replace("on=True", "on=False")
    assert load("on", text=text).on is True


def test_a_locked_config_takes_values_and_no_new_keys(load):
    text = CONFIG.replace("return config", "return config.lock()")
    assert load("weights.Drum=3", text=text).weights.Drum == 3
    with pytest.raises(UserError, match="there is no such key"):
        load("net.more=3", text=text)


def test_the_home_folder_is_found_in_values_and_in_the_file(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = CONFIG.replace('name="a"', 'name="~/default"')
    assert load(text=text).name == "/home/me/default"
    assert load("name=~/x", text=text).name == "/home/me/x"
    assert load("name=a~b", text=text).name == "a~b"


def test_an_argument_goes_to_get_config(load):
    assert load().size == "small"
    assert load(argument=":big").size == "big"
    with pytest.raises(UserError, match=r"config.py:poem: 'poem': expected small or"):
        load(argument=":poem")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("step=3", r"--config\.step: there is no such key; did you mean --config\.steps\?"),
        ("net.widht=3", r"did you mean --config\.net\.width\?"),
        ("nets.width=3", r"--config\.nets\.width: .* did you mean --config\.net\?"),
        ("zzz=3", "the keys are maybe, name, net, on, .*, words$"),
        ("steps.more=3", r"config\.steps is 10, which has no keys; write --config\.steps=VALUE"),
        ("weights.a.b=3", r"a key of config\.weights cannot contain a dot"),
        ("weights.=3", r"the key is missing; write --config\.weights\.KEY=VALUE"),
        ("weights=3", "expected a dict such as .*, not '3'"),
        ("net={'widht': 3}", r"--config\.net\.widht: .* did you mean --config\.net\.width\?"),
        ("net={'width': 'x'}", r"--config\.net\.width: expected a whole number, not 'x'"),
        ("schedule.total=3", r"to change the name, set the whole section: --config\.schedule="),
        ("schedule={'a.b': 3}", r"expected keys that are identifiers, not \['a\.b'\]"),
        ("schedule={1: 3}", r"expected keys that are identifiers, not \[1\]"),
        ("rate=nan", "expected a number, not 'nan'"),
        ("rate=1e999", "expected a number"),
        ("rate=True", "expected a number"),
        ("rates=a,b", r"expected values such as \(0\.5, 2\.0\)"),
        ("widths=(1.5,)", r"expected values such as \(1, 2\), not '\(1\.5,\)'"),
        ("widths=" + "(" * 500, r"expected values such as \(1, 2\), not '\(+\.\.\.'"),
        ("=3", "there is no such key"),
        ("steps=many", "steps"),
        ("steps=1.5", "steps"),
        ("on=perhaps", "expected true or false, not 'perhaps'"),
        ("net.width=(", "net.width"),
        ("steps", r"the value is missing; write --config\.steps=VALUE"),
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
            r"get_config\(\) returns a dict, not a ConfigDict",
        ),
        ("def get_config(): raise KeyError('a')", "KeyError: 'a'"),
    ],
)
def test_a_config_file_that_fails_is_said_in_one_sentence(load, text, said):
    with pytest.raises(UserError, match=rf"--config .*config\.py: .*{said}") as raised:
        load(text=text)
    assert "\n" not in str(raised.value)


def test_a_missing_config_is_said_with_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.py")))
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(
            UserError, match=rf"there is no such file\. Shipped configs: {shipped}$"
        ):
            load_config(str(path), [])
    for name in ("resnet30", "configs/resunet30.py", "resunet30.py"):
        with pytest.raises(UserError, match=r"did you mean --config resunet30\?"):
            load_config(name + ":condition=soft", [])


def test_shipped_configs_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resunet30").mkdir()  # a folder of that name is no config
    for file in CONFIGS.glob("*.py"):
        argument = ":width=half" if file.stem == "ablations" else ""
        config = load_config(f"{file.stem}{argument}", [])
        assert config.to_json_best_effort() == (
            load_config(f"{file}{argument}", []).to_json_best_effort()
        )
    assert load_config("resunet30:condition=embedding", []).query.kind == "embedding"
    (tmp_path / "mine").write_text(CONFIG)
    assert load_config("mine", []).steps == 10


@pytest.mark.parametrize("raised", ["sys.exit(0)", "exit()", "raise SystemExit"])
def test_a_config_that_exits_is_an_error(load, raised):
    with pytest.raises(UserError, match="SystemExit"):
        load(text=f"import sys\n{raised}\n{CONFIG}")


def test_a_name_that_no_file_can_have_is_no_config():
    with pytest.raises(UserError, match="there is no such file"):
        load_config("x" * 5000, [])
