"""The shipped configs: what they expand to, and the published numbers in them.

After a change on purpose: `python -m tests.test_configs` writes the expanded configs anew.
"""

import dataclasses
import json
import pathlib
import runpy

import jax
import pytest
from ml_collections import ConfigDict

from tests.tiny import CONFIGS
from uss_jax.bundles.nets import build_sed, build_separator, layout
from uss_jax.cli.config import load_config
from uss_jax.errors import UserError
from uss_jax.models.cnn14 import Cnn14
from uss_jax.models.resunet import ResUNet
from uss_jax.training.optim import make_schedule
from uss_jax.training.state import parameter_count

_ABLATIONS = runpy.run_path(str(CONFIGS / "ablations.py"))
ABLATIONS = _ABLATIONS["ABLATIONS"] | _ABLATIONS["BAND_SPLIT"]
EXPANDED = pathlib.Path(__file__).parent / "golden_configs"
SHIPPED = [
    "resunet30.py",
    "resunet30.py:condition=soft,data=balanced",
    "resunet30.py:condition=soft,data=full",
    "resunet30.py:condition=embedding,data=balanced",
    "resunet30.py:condition=embedding,data=full",
    "resunet30.py:query=htsat,sed=htsat",
    "resunet30.py:query=yamnet,sed=yamnet",
    "tagger_cnn14.py",
    "tagger_htsat.py",
    "quickstart.py:part=tagger",
    "quickstart.py:part=separator",
    "demo.py",
    "demo.py:steps=20000,asked=varied",
    "bandsplit.py",
    "bandsplit.py:size=tiny",
    "bandsplit.py:size=small,condition=embedding,data=balanced",
    "bandsplit.py:size=large,query=yamnet,sed=yamnet",
    *(f"ablations.py:{name}" for name in ABLATIONS),
]


def _load(name, *overrides) -> ConfigDict:
    return load_config(str(CONFIGS / name), [f"--config.{word}" for word in overrides])


def _leaves(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {value!r}\n"


def _expanded(name) -> str:
    return "".join(sorted(_leaves(_load(name))))


def _file(name) -> pathlib.Path:
    return EXPANDED / f"{name.replace('.py', '').replace(':', '-')}.txt"


@pytest.mark.parametrize("name", SHIPPED)
def test_expanded_config_is_the_recorded_one(name):
    assert _expanded(name) == _file(name).read_text()


def test_every_config_and_no_other_is_recorded():
    assert {name.partition(":")[0] for name in SHIPPED} == {p.name for p in CONFIGS.glob("*.py")}
    assert {_file(name) for name in SHIPPED} == set(EXPANDED.iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_nets_and_schedules_build(name):
    config = _load(name)
    assert make_schedule(**config.schedule)(config.total_steps - 1) > 0
    if "tagger" in config:
        layout(build_sed({**config.tagger, "sample_rate": config.sample_rate}))
    else:
        layout(build_separator({**config.separator}))


@pytest.mark.parametrize(("condition", "width"), [("soft", 527), ("embedding", 2048)])
def test_the_published_separator(condition, width, golden):
    config = _load(f"resunet30.py:condition={condition},data=full")
    net = build_separator({**config.separator, "condition_width": width})
    assert net == ResUNet(condition_width=width)
    # The reference makes a second batch norm and FiLM in each decoder level that nothing reads.
    unread = (net.channels[-1] + sum(net.channels[1:])) * (width + 1 + 2)
    published = json.loads((golden / "layouts" / f"resunet30_cond{width}.json").read_text())
    count = parameter_count(layout(net)["params"])
    assert count + unread == published["trainable_parameters"]
    assert (config.sample_rate, config.segment_seconds, config.data.clip_seconds) == (32000, 2, 10)
    assert (net.n_fft, net.hop_samples) == (2048, 320)
    assert net.channels == (32, 64, 128, 256, 384, 384)
    assert (config.global_batch, config.mixing.group_size, config.mixing.sources) == (16, 16, 2)
    assert config.mixing.match_energy
    assert (config.loss, config.weight_decay, config.query.adaptor_width) == ("l1_wav", 0, 0)
    rate = make_schedule(**config.schedule)
    for step, wanted in ((0, 1e-6), (9999, 1e-6), (10000, 1e-5), (20000, 1e-4), (30000, 1e-3)):
        assert rate(step) == pytest.approx(wanted)


def test_the_published_tagger():
    config = _load("tagger_cnn14.py")
    net = build_sed({**config.tagger, "sample_rate": config.sample_rate})
    fields = {f.name: getattr(net, f.name) for f in dataclasses.fields(Cnn14)}
    wanted = {f.name: f.default for f in dataclasses.fields(Cnn14)}
    skipped = ("parent", "name")
    assert {k: v for k, v in fields.items() if k not in skipped} == {
        k: v for k, v in wanted.items() if k not in skipped
    }
    assert parameter_count(layout(net)["params"]) / 1e6 == pytest.approx(80.8, abs=0.1)  # PANNs
    assert (net.n_fft, net.hop_samples, net.mel_bins, net.f_max) == (1024, 320, 64, 14000)
    assert (config.global_batch, config.mixup_alpha, config.schedule.learning_rate) == (32, 1, 1e-3)
    assert config.spec_augment.to_dict() == dict(
        time_width=64, time_stripes=2, mel_width=8, mel_stripes=2
    )


@pytest.mark.parametrize(
    "name",
    [
        "resunet30.py:condition=poem",
        "resunet30.py:data=some",
        "resunet30.py:soft",
        "resunet30.py:size=big",
        "bandsplit.py:size=big",
        "bandsplit.py:size=tiny,condition=soft",
        "bandsplit.py:bands=40,bands=60",
        "bandsplit.py:bands=0",
        "bandsplit.py:size=tiny,bands=many",
        "demo.py:steps=0",
        "demo.py:20000",
        "demo.py:steps=5000,asked=other",
        "quickstart.py:part=all",
        "tagger_cnn14.py:part=all",
    ],
)
def test_arguments_a_config_does_not_know_are_refused(name):
    with pytest.raises(UserError, match=name.split(":")[0]):
        _load(name)


def test_bands_are_about_as_many_as_asked_for():
    for name, half in (("bandsplit.py:bands=30", 1024), ("bandsplit.py:size=tiny,bands=40", 256)):
        asked, bands = int(name.rpartition("=")[2]), _load(name).separator.bands
        assert (sum(bands), abs(len(bands) - asked) <= 3) == (half, True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    EXPANDED.mkdir(exist_ok=True)
    for shipped in SHIPPED:
        _file(shipped).write_text(_expanded(shipped))
