"""Everything that a tagging net serves works with each of them."""

import functools
import json
import runpy

import jax
import numpy as np
import pytest

from tests.tiny import (
    CONFIGS,
    ONE_BLOCK,
    RATE,
    SEGMENT,
    SEGMENT_SECONDS,
    TAGGER,
    TINY_HTSAT,
    TINY_YAMNET,
    noise,
    quick_jit,
    random_variables,
    tagger_variables,
    tone,
    write_records,
    write_tagger,
)
from uss_jax.anchors.find import find_anchors
from uss_jax.audio.files import write_wav
from uss_jax.bundles.bundle import read_bundle, write_bundle
from uss_jax.bundles.model import Model
from uss_jax.bundles.nets import TAGGERS, build_query, build_sed, fields_of
from uss_jax.data.chosen import Chosen
from uss_jax.data.index import load_index
from uss_jax.data.reader import ClipReader
from uss_jax.devices.mesh import make_mesh
from uss_jax.errors import UserError
from uss_jax.evaluation.clips import anchors_of_clips
from uss_jax.evaluation.suites.planted import (
    BACKGROUNDS,
    evaluate_planted,
    format_planted,
    plant,
)
from uss_jax.evaluation.suites.tagging import evaluate_tagging
from uss_jax.models.resunet import ResUNet
from uss_jax.separation.example_vectors import vector_of_recordings
from uss_jax.training.condition_nets import ConditionNets
from uss_jax.training.examples import Mixing
from uss_jax.training.losses import LOSSES
from uss_jax.training.optim import adamw
from uss_jax.training.separation_step import Anchoring, Nets, make_separation_step
from uss_jax.training.settings import separator_settings
from uss_jax.training.state import create_state
from uss_jax.training.tagging_step import make_tagging_step
from uss_jax.training.train_separator import fresh_state, make_step, train_separator
from uss_jax.training.train_tagger import train_tagger

QUICK_COMPILATION = True

NETS = {"cnn14": TAGGER, "htsat": TINY_HTSAT, "yamnet": TINY_YAMNET}
LOW, HIGH = 10, 400  # two classes
CLIPS, CLIP_SECONDS = 16, 2.0


def sounds():
    """Clips of a low or a high tone in noise, of other loudness and pitch each."""
    rng, seconds = np.random.default_rng(0), CLIP_SECONDS
    for i in range(CLIPS):
        label = (LOW, HIGH)[i % 2]
        hertz = rng.uniform(300, 500) if label == LOW else rng.uniform(2000, 3000)
        amplitude = rng.uniform(0.1, 0.5)
        yield f"clip{i}", tone(hertz, seconds, amplitude) + noise(i, seconds, 0.01), [label]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    write_records(directory, "train", list(sounds()))
    return directory


@pytest.fixture(scope="module", params=list(TAGGERS))
def bundle(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles") / request.param
    return write_tagger(path, net=NETS[request.param])


@pytest.fixture(params=list(TAGGERS))
def name(request):
    return request.param


def test_a_bundle_says_which_net_it_holds(tmp_path, name):
    opened = read_bundle(write_tagger(tmp_path / "bundle", net=NETS[name]))
    assert opened.config["query"]["model"]["net"] == name
    assert type(opened.query()[0].tagger) is TAGGERS[name]["query"]
    assert type(opened.sed()[0]) is TAGGERS[name]["sed"]


def test_records_are_tagged_and_mined(bundle, records):
    model = Model(bundle)
    reader = ClipReader(records, load_index(records, "train"))
    figures = evaluate_tagging(model, reader)
    assert [0 < row["map"] <= 1 for row in figures] == [True, True]

    chosen = Chosen(np.arange(CLIPS), np.tile([LOW, HIGH], CLIPS // 2))
    anchors = anchors_of_clips(reader, chosen, model.sed, SEGMENT)
    assert (anchors.samples == SEGMENT).all()
    assert (anchors.begin_sample % model.sed.module.frame_hop_samples == 0).all()
    assert anchors.begin_sample.max() <= CLIP_SECONDS * RATE - SEGMENT


def test_planted_events_are_looked_for(bundle, tmp_path):
    """They are shorter than a segment, so that an anchor can contain them."""
    clips = [(f"clip{i}", tone(300 + 400 * i, 0.3), [i]) for i in range(4)]
    reader = ClipReader(tmp_path, write_records(tmp_path, "train", clips))
    rows = evaluate_planted(Model(bundle), reader, clips=8, seed=0)
    assert len(rows) == 9
    assert all(0 <= row["contain"] <= 1 for row in rows)
    contain = {(row["background"], row["anchors"]): row["contain"] for row in rows}
    # In silence, a clip's energy is the event's.
    planted = plant(reader, "silence", sample_rate=RATE, clips=8, seed=0)
    energy = np.square(planted.audio, dtype=np.float64)
    places = range(0, energy.shape[1] - SEGMENT + 1, RATE // 100)
    inside = np.array([energy[:, at : at + SEGMENT].sum(axis=1) for at in places])
    share = np.mean(inside >= 0.9 * energy.sum(axis=1))
    assert contain["silence", "all places"] == pytest.approx(share)
    found = any(contain[name, "mined"] > contain[name, "all places"] for name in BACKGROUNDS)
    assert found or bundle.name == "yamnet"  # one of its frames is longer than a segment


def test_silent_recordings_are_not_planted(bundle, records, tmp_path):
    """Two thirds of the events are silent; what is said of the others does not change."""
    reader = ClipReader(records, load_index(records, "train"))
    planted = [plant(reader, "silence", sample_rate=RATE, clips=6, seed=0)]
    clips = [("a", tone(300, 1.0), [0]), ("b", 0 * tone(300, 1.0), [0, 1])]
    index = write_records(tmp_path, "train", clips)
    planted.append(plant(ClipReader(tmp_path, index), "silence", sample_rate=RATE, clips=6, seed=0))
    assert [int(events.heard.sum()) for events in planted] == [6, 2]
    rows = evaluate_planted(Model(bundle), ClipReader(tmp_path, index), clips=6, seed=0)
    everywhere = [row for row in rows if row["anchors"] == "all places"]
    assert all((row["clips"], row["silent"]) == (2, 4) for row in rows)
    assert all(row["mean_energy_inside"] > 0.01 for row in everywhere)
    assert "left out: 4 with a silent target" in format_planted(rows)


def test_recordings_are_made_into_queries(name, tmp_path):
    net = NETS[name]
    separator = ResUNet(condition_width=net.embedding_width)
    config = {
        "kind": "separator",
        "sample_rate": RATE,
        "segment_seconds": SEGMENT_SECONDS,
        "separator": fields_of(separator),
        "query": {"kind": "embedding", "model": fields_of(net)},
    }
    write_bundle(tmp_path / "bundle", config, {"query": tagger_variables(net=net)})
    write_wav(tmp_path / "query.wav", tone(400, 1.2)[None], RATE)
    vector = vector_of_recordings(Model(tmp_path / "bundle"), tmp_path / "query.wav")
    assert vector.shape == (net.embedding_width,)
    assert np.isfinite(vector).all()


@pytest.mark.long
def test_a_separator_steps_with_it_as_query_net_and_detector(name):
    net = NETS[name]
    model = fields_of(net)
    query = build_query({"kind": "embedding"}, model)
    separator = ResUNet(n_fft=128, hop_samples=64, channels=(4, 4), condition_width=query.width)
    optimizer = adamw(1e-2)
    step = make_separation_step(
        Nets(separator, query, build_sed(model)),
        optimizer,
        LOSSES["l1_wav"],
        Anchoring(SEGMENT, min_dbfs=-60.0),
        Mixing(sources=2, group_size=4, match_energy=True),
    )
    fresh = random_variables(separator, (1, 1, 640), (1, net.embedding_width))
    state = create_state(
        {"separator": fresh["params"], "query": {}},
        {"separator": fresh["batch_stats"], "query": {}},
        optimizer,
    )
    tagger = tagger_variables(net=net)
    frozen = {"sed": tagger, "query": {item: {"tagger": tagger[item]} for item in tagger}}
    batch = {
        "audio": np.stack([waveform for _, waveform, _ in sounds()][:4]),
        "samples": np.full(4, CLIP_SECONDS * RATE, np.int32),
        "class_index": np.array([LOW, HIGH, LOW, HIGH]),
    }
    step = quick_jit(step)
    losses = []
    for _ in range(5):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 5
    assert losses[-1] < losses[0]


@pytest.mark.long
def test_a_separator_trains_by_the_shipped_config_with_htsat(records, tmp_path):
    bundle = str(write_tagger(tmp_path / "htsat", net=ONE_BLOCK))
    config = shipped("resunet30.py", "condition=embedding,query=htsat,sed=htsat")
    config.total_steps = 1
    config.global_batch = 8
    config.mixing.group_size = 8
    config.segment_seconds = SEGMENT_SECONDS
    config.separator.n_fft = 128
    config.separator.hop_samples = 64
    config.separator.channels = (4, 4)
    config.sed_bundle = config.query_bundle = bundle
    config.data.records = str(records)
    config.data.split = "train"
    train_separator(config, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["separator"]["condition_width"] == ONE_BLOCK.embedding_width
    assert written["sed"]["model"] == written["query"]["model"] == fields_of(ONE_BLOCK)
    assert np.isfinite(losses(tmp_path / "run")).all()


@pytest.mark.long
def test_the_rule_of_anchors_reaches_the_step():
    config = shipped("resunet30.py", "condition=soft,sed=htsat")
    config.global_batch = config.mixing.group_size = CLIPS
    config.segment_seconds = SEGMENT_SECONDS
    variables = tagger_variables(net=ONE_BLOCK)
    batch = {
        "audio": np.stack([waveform for _, waveform, _ in sounds()]),
        "samples": np.full(CLIPS, CLIP_SECONDS * RATE, np.int32),
        "class_index": np.tile(np.array([LOW, HIGH], np.int32), CLIPS // 2),
    }
    find = functools.partial(
        find_anchors, ONE_BLOCK, segment_samples=SEGMENT, min_dbfs=config.anchors.min_dbfs
    )
    key, images = jax.random.key(0), {"uss": None, "htsat": ONE_BLOCK.frames_of_image(201)}
    wanted = {
        rule: quick_jit(functools.partial(find, image=image))(variables, batch, key)
        for rule, image in images.items()
    }
    assert (wanted["uss"].begin_sample != wanted["htsat"].begin_sample).any()

    separator = ResUNet(n_fft=128, hop_samples=64, channels=(4, 4), condition_width=527)
    config.anchors.rule = "htsat"
    query = build_query({"kind": "one_hot"}, None)
    around = ConditionNets(ONE_BLOCK, True, query, {}, {})
    settings = separator_settings(config)
    step = make_step(settings, separator, around, make_mesh())
    untrained = {"params": {}, "batch_stats": {}}
    state = fresh_state(settings, separator, jax.random.key(0), untrained)
    score = quick_jit(lambda *args: step(*args)[1]["anchor_score"])
    means = {rule: float(anchors.score.mean()) for rule, anchors in wanted.items()}
    found = float(score(state, {"sed": variables}, batch, key))
    assert found == pytest.approx(means["htsat"], rel=1e-5)
    assert means["htsat"] != pytest.approx(means["uss"], rel=1e-4)


def test_a_bundle_of_another_net_than_the_config_s_is_refused(bundle, records, tmp_path):
    other = next(name for name in TAGGERS if name != bundle.name)
    config = shipped("resunet30.py", f"sed={other}")
    config.sed_bundle = str(bundle)
    config.data.records = str(records)
    config.data.split = "train"
    with pytest.raises(UserError, match=f"holds the net {bundle.name}, config.sed_net is {other}"):
        train_separator(config, tmp_path)


@pytest.mark.long
def test_htsat_trains_by_the_shipped_config(records, tmp_path):
    config = shipped("tagger_htsat.py")
    config.total_steps = 20
    config.global_batch = 8
    config.segment_seconds = SEGMENT_SECONDS
    for field, value in fields_of(ONE_BLOCK).items():
        if field in config.tagger:
            config.tagger[field] = tuple(value) if isinstance(value, list) else value
    config.schedule.learning_rate = 0.2  # of which the first epoch takes a twentieth
    config.data.records = str(records)
    config.data.split = "train"
    train_tagger(config, tmp_path)
    loss = losses(tmp_path)
    assert loss[-1] < 0.1 * loss[0]
    assert json.loads((tmp_path / "config.json").read_text())["sed"]["model"]["net"] == "htsat"


@pytest.mark.long
def test_htsat_learns_to_tell_two_sounds_from_noise():
    net = TINY_HTSAT.clone(classes=2)
    optimizer = adamw(1e-2)
    step = make_tagging_step(
        net, optimizer, outputs=("clipwise",), mixup_alpha=None, spec_augment_stripes=None
    )
    step = quick_jit(step)
    fresh = tagger_variables(net=net)
    state = create_state({"tagger": fresh["params"]}, {"tagger": fresh["batch_stats"]}, optimizer)
    _, waveforms, labels = zip(*sounds(), strict=True)
    empty = [noise(CLIPS + i, CLIP_SECONDS, 0.01 * 2**i) for i in range(CLIPS // 2)]
    batch = {
        "audio": np.stack([*waveforms, *empty]),
        "labels": np.array(
            [[c in of for c in (LOW, HIGH)] for of in (*labels, *[[]] * len(empty))]
        ),
    }
    losses = []
    for _ in range(40):
        state, metrics = step(state, {}, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.02 * losses[0]


def test_probabilities_that_a_net_does_not_give_are_refused(records, tmp_path):
    config = shipped("tagger_htsat.py")
    config.global_batch = 8
    config.outputs = ("clipwise", "tagging")
    config.tagger.f_max = RATE / 2
    config.tagger.depths = (1,)
    config.tagger.heads = (2,)
    config.data.records = str(records)
    config.data.split = "train"
    with pytest.raises(UserError, match=r"of this net.s clip probabilities: clipwise$"):
        train_tagger(config, tmp_path)


def shipped(file, *argument):
    config = runpy.run_path(str(CONFIGS / file))["get_config"](*argument)
    config.sample_rate = RATE
    config.data.clip_seconds = CLIP_SECONDS
    config.data.threads = 1
    config.log_every_steps = 1
    return config


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])
