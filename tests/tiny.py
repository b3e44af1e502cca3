"""Bundles with tiny random nets, and records of tones and noises, at 8 kHz.

Files are written with packages that a machine with a GPU may lack. They are imported when needed,
so that tests of nets alone run there.
"""

import atexit
import functools
import hashlib
import json
import math
import pathlib
import shutil
import tempfile

import jax
import numpy as np

from uss_jax.bundles.nets import build_query, fields_of, init_adaptors
from uss_jax.bundles.node_vectors import load_node_vectors
from uss_jax.models.cnn14 import Cnn14
from uss_jax.models.htsat import HTSAT
from uss_jax.models.query import KINDS
from uss_jax.models.resunet import ResUNet
from uss_jax.models.yamnet import YAMNet

RATE = 8000
SEGMENT_SECONDS = 0.5
SEGMENT = int(RATE * SEGMENT_SECONDS)
TAGGER = Cnn14(
    sample_rate=RATE, n_fft=256, hop_samples=80, mel_bins=16, f_max=4000.0, channels=(4, 4, 6)
)
TINY_HTSAT = HTSAT(
    sample_rate=RATE,
    n_fft=256,
    hop_samples=80,
    mel_bins=16,
    f_max=4000.0,
    image_size=64,
    token_width=8,
    depths=(2, 1),
    heads=(2, 4),
)
TINY_YAMNET = YAMNet(sample_rate=RATE, channels=14 * (8,), unknown_classes=())
ONE_BLOCK = TINY_HTSAT.clone(depths=(1,), heads=(2,))  # for what compiles long
# Tiny nets take longer to compile than to run.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
WIDTHS = {"one_hot": 527, "soft": 527, "class_vectors": 6, "embedding": 6}
WIDTHS |= {"text": 384, "text_or_audio": 7}


def random_variables(net, *shapes, seed=0):
    """Random variables of a net; drawn by numpy, since compiling the nets' own takes long."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 100
        return (rng.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(net, shapes))


@functools.cache
def shapes_of(net, shapes):
    """Shapes of a net's variables, for float32 inputs of the shapes; traced once in a process."""
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    return jax.eval_shape(net.init, jax.random.key(0), *inputs)


def tagger_variables(seed=0, net=TAGGER):
    """Random variables whose probabilities differ between sounds and stay off 0 and 1."""
    variables = random_variables(net, (1, RATE), seed=seed)
    if "batch_stats" not in variables:
        return {"batch_stats": {}, **variables}
    variables["batch_stats"]["bn0"]["mean"][:] = -40.0  # dB, as log-mel is
    variables["batch_stats"]["bn0"]["var"][:] = 400.0
    return variables


def write_tagger(path, seed=0, net=TAGGER) -> pathlib.Path:
    """A tagger bundle with query net and detector of the same variables."""
    model = {"model": fields_of(net)}

    def write(path):
        parts = dict.fromkeys(("query", "sed"), tagger_variables(seed, net))
        _write(path, "tagger", {"query": model, "sed": model}, parts)

    return _copy(path, write, "tagger", type(net).__name__, model, seed)


def write_separator(path, kind="soft", seed=0, means=None) -> pathlib.Path:
    """A separator bundle with query net and detector; `means` [k, k] are those of its classes."""
    made_of = "separator", kind, seed, None if means is None else means.tobytes()
    return _copy(path, lambda path: _write_separator(path, kind, seed, means), *made_of)


def _write_separator(path, kind, seed, means):
    separator = ResUNet(n_fft=128, hop_samples=64, channels=(4, 4), condition_width=WIDTHS[kind])
    model = fields_of(TAGGER)
    asked = KINDS[kind]
    query = {"kind": kind, "model": model if asked.recordings else None}
    if kind == "text_or_audio":
        query |= {"adaptor_width": WIDTHS[kind], "adaptor_hidden": 8}
    sections = {"separator": fields_of(separator), "query": query, "sed": {"model": model}}
    variables = tagger_variables(seed)
    parts = {
        "separator": random_variables(
            separator, (1, 1, 640), (1, separator.condition_width), seed=seed + 1
        ),
        "sed": variables,
    }
    if asked.recordings:
        parts["query"] = variables
    parts |= {name: {"params": tree} for name, tree in parts_of_query(query, seed).items()}
    if means is not None:
        sections["means"] = {"classes": int(means.any(axis=1).sum())}
        parts["means"] = {"params": {"means": means}}
    _write(path, "separator", sections, parts)


def class_means(*classes, seed=0):
    """Mean probabilities [k, k] of some classes; rows of zeros for the others."""
    means = np.zeros((527, 527), np.float32)
    means[list(classes)] = np.random.default_rng(seed).random((len(classes), 527)) ** 4
    return means


def _copy(path, write, *made_of) -> pathlib.Path:
    """Copies the bundle that `write` makes; it is written once in a process, which flushes files.

    Args:
      path: folder to create; `write` refuses one that exists.
      write: takes the folder.
      made_of: what tells the bundle from others.
    """
    path = pathlib.Path(path)
    if path.exists():
        write(path)
    original = _originals() / hashlib.sha256(repr(made_of).encode()).hexdigest()
    if not original.exists():
        write(original)
    return shutil.copytree(original, path)


@functools.cache
def _originals() -> pathlib.Path:
    """The folder of the bundles that this process has written; it goes with the process."""
    folder = tempfile.mkdtemp(prefix="uss-jax-bundles-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)


def parts_of_query(section, seed=0):
    """Random adaptors, and the names in the package, of a query net's section."""
    net = build_query({k: v for k, v in section.items() if k != "model"}, section["model"])
    draw = quick_jit(functools.partial(init_adaptors, net))
    parts = jax.tree.map(np.asarray, draw(jax.random.key(seed)))
    if net.takes.texts:
        parts["names"] = {"names": load_node_vectors().of_classes()}
    return parts


def _write(path, kind, sections, parts) -> None:
    from uss_jax.bundles.bundle import write_bundle

    config = {"kind": kind, "sample_rate": RATE, "segment_seconds": SEGMENT_SECONDS, **sections}
    write_bundle(path, config, parts)


def tone(hertz, seconds, amplitude=0.3) -> np.ndarray:
    t = np.arange(int(seconds * RATE)) / RATE
    return (amplitude * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


def noise(seed, seconds, amplitude=0.1) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return (amplitude * samples).astype(np.float32)


def write_records(directory, split, clips):
    """Writes records of (id, float waveform, labels); their index."""
    from uss_jax.data.indexing import build_index
    from uss_jax.data.metadata import write_metadata
    from uss_jax.data.tf_example import serialise
    from uss_jax.data.tfrecord import RecordWriter

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shard = directory / f"toy-{split}.tfrecord-00000-of-00001"
    with RecordWriter(shard) as writer:
        for id, waveform, labels in clips:
            samples = np.rint(waveform * 32767).astype(np.int16)
            writer.write(serialise(id.encode(), samples, labels))
    write_metadata(
        directory,
        name="toy",
        version="1.0.0",
        split=split,
        shard_records=[len(clips)],
        shard_bytes=shard.stat().st_size,
        sample_rate=RATE,
    )
    return build_index(directory, split)


def write_place(path) -> pathlib.Path:
    """A folder with `records` (split train) and a `tagger` bundle, to train on."""
    path = pathlib.Path(path)
    clips = [(f"tone{i}", tone(300 + 150 * i, 0.6 + 0.1 * i), [i, 72]) for i in range(5)]
    clips += [(f"noise{i}", noise(i, 1.2), [300 + i]) for i in range(3)]
    write_records(path / "records", "train", clips)
    write_tagger(path / "tagger")
    return path


def write_pairs(directory, classes) -> None:
    """Evaluation pairs of half a second, one for each class index given."""
    from uss_jax.audio.files import write_wav

    for number, label in enumerate(classes):
        folder = pathlib.Path(directory) / f"class_id={label}"
        folder.mkdir(parents=True, exist_ok=True)
        source = tone(300 + 90 * number, 0.5)
        mixture = source + noise(number, 0.5, amplitude=0.05 * (1 + number))
        for side, waveform in (("source", source), ("mixture", mixture)):
            write_wav(folder / f"{number}_{side}.wav", waveform[None], RATE)


def train_words(config, place, workdir, changed=None) -> list[str]:
    """`uss-jax` words that train a shipped config shrunk to a few steps of tiny nets.

    Args:
      config: file name in configs/, with its argument.
      place: as `write_place` makes it.
      workdir: of the run.
      changed: leaves of the config and their values, over those that shrink it.
    """
    leaves = {
        "sample_rate": RATE,
        "segment_seconds": SEGMENT_SECONDS,
        "data.records": place / "records",
        "data.split": "train",
        "data.clip_seconds": 1.0,
        "data.threads": 1,
        "total_steps": 4,
        "global_batch": 8,
        "log_every_steps": 1,
        "checkpoint_every_steps": 2,
    }
    tagger = "tagger" in config
    if tagger:
        fields = {k: v for k, v in fields_of(TAGGER).items() if k not in ("sample_rate", "dtype")}
        leaves |= {f"tagger.{k}": tuple(v) if k == "channels" else v for k, v in fields.items()}
    else:
        leaves |= {
            "sed_bundle": place / "tagger",
            "query_bundle": place / "tagger",
            "mixing.group_size": 8,
            "separator.n_fft": 128,
            "separator.hop_samples": 64,
            "separator.channels": (4, 4),
        }
    leaves |= changed or {}
    command = ["train-tagger" if tagger else "train", "--config", str(CONFIGS / config)]
    words = [f"--config.{key}={value}" for key, value in leaves.items()]
    return [*command, "--workdir", str(workdir), *words]


def finish_run(config, place, workdir, changed):
    """Trains for two steps, checks that each is reported, and returns the workdir's Model."""
    from uss_jax.bundles.model import Model
    from uss_jax.cli.main import main

    assert main(train_words(config, place, workdir, {"total_steps": 2, **changed})) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["grad_norm"] > 0
    return Model(workdir)
