"""What separate, query, convert, compare and inspect read of others."""

import io
import json
import os
import pathlib
import re
import tempfile
import zipfile

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import tiny
from tests.fuzz.damage import check_words, damaged, fuzz, json_values
from uss_jax.bundles import nets
from uss_jax.bundles.bundle import read_bundle
from uss_jax.bundles.nets import fields_of
from uss_jax.bundles.tensors import read_tensors, write_tensors
from uss_jax.errors import UserError, one_line
from uss_jax.evaluation.comparison import compare
from uss_jax.models.resunet import ResUNet
from uss_jax.separation.banks import Bank, load_bank, write_bank
from uss_jax.separation.input_files import find_input_files
from uss_jax.separation.job import finished_facts
from uss_jax.separation.names import file_name
from uss_jax.separation.waveforms import as_waveform, require_rate

CONFIG = {
    "format_version": 1,
    "kind": "separator",
    "sample_rate": 8000,
    "segment_seconds": 0.5,
    "separator": fields_of(ResUNet(n_fft=128, hop_samples=64, channels=(4, 4))),
    "query": {"kind": "soft", "model": fields_of(tiny.TAGGER)},
    "sed": {"model": fields_of(tiny.TAGGER)},
    "hashes": {"sed": "00"},
    "licence": "none",
    "training": {"total_steps": 5},
}
RESULTS = {
    "suite": "pairs",
    "rows": [
        {"query": "oracle", "group": "all", "sdri": 1.5, "classes": {"number": 3, "medians": {}}},
        {"query": "class average", "group": "all", "sdri": None, "classes": {"number": 3}},
    ],
}
REPORT = {
    "made_of": "0",
    "threshold": 0.2,
    "sounds": [
        {"name": "x", "file": "x.wav", "clipped_share": 0.0, "active_share": 0, "peak": 0.1}
    ],
}


@st.composite
def changed(draw, content):
    """JSON of a value with one part of it replaced, or with damaged bytes."""
    if draw(st.booleans()):
        return draw(damaged(json.dumps(content).encode()))
    content = json.loads(json.dumps(content))
    node = content
    while True:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = draw(st.sampled_from(list(keys)))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and draw(st.booleans()):
            node = inner
            continue
        node[key] = draw(json_values())
        return json.dumps(content).encode()


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield pathlib.Path(path)


@fuzz
@given(
    data=changed(CONFIG)
    | st.binary(max_size=99)
    | json_values().map(lambda v: json.dumps(v).encode())
)
def test_a_bundle_s_config(folder, data):
    (folder / "config.json").write_bytes(data)
    try:
        config = read_bundle(folder).config
        if "separator" in config:
            separator = nets.build_separator(config["separator"])
            assert separator.n_fft <= 32768
        if "sed" in config:
            nets.build_sed(config["sed"]["model"])
        if "query" in config:
            nets.build_query({"kind": "soft", **config["query"]}, config["query"].get("model"))
    except UserError as error:
        check_words(one_line(str(error)))
    else:
        assert 1000 <= config["sample_rate"] <= 768_000


@fuzz
@given(data=changed(RESULTS))
def test_results(folder, data):
    (folder / "results.json").write_bytes(data)
    try:
        compare([folder])
    except UserError as error:
        check_words(one_line(str(error)))
    finally:
        (folder / "results.json").unlink()


@fuzz
@given(data=changed(REPORT))
def test_the_report_of_an_earlier_run(folder, data):
    (folder / "report.json").write_bytes(data)
    (folder / "x.wav").touch()
    facts = finished_facts(folder, "0")
    assert facts is None or facts["made_of"] == "0"


def _bank_bytes():
    with tempfile.TemporaryDirectory() as path:
        bank = Bank(("a", "狗"), np.ones((2, 3), np.float32), "soft", "00", "by hand")
        write_bank(f"{path}/b.npz", bank)
        return pathlib.Path(f"{path}/b.npz").read_bytes()


@fuzz
@given(data=damaged(_bank_bytes()) | st.binary(max_size=99))
def test_a_bank(folder, data):
    (folder / "b.npz").write_bytes(data)
    try:
        bank = load_bank(folder / "b.npz")
    except UserError as error:
        check_words(one_line(str(error)))
    else:
        assert bank.vectors.shape[0] == len(bank.name)
        assert len(set(bank.name)) == len(bank.name)


def _tensors_bytes():
    with tempfile.TemporaryDirectory() as path:
        where = pathlib.Path(path) / "t.safetensors"
        write_tensors(where, {"a/b": np.ones((2, 3), np.float32), "c": np.zeros((), np.int64)})
        return where.read_bytes()


@fuzz
@given(data=damaged(_tensors_bytes()) | st.binary(max_size=99))
def test_tensors_of_a_foreign_checkpoint(folder, data):
    (folder / "t.safetensors").write_bytes(data)
    try:
        tensors = read_tensors(folder / "t.safetensors")
    except UserError as error:
        check_words(one_line(str(error)))
    else:
        assert sum(array.nbytes for array in tensors.values()) <= len(data)


def _checkpoint_bytes(zipped):
    torch = pytest.importorskip("torch")
    memory = io.BytesIO()
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4).half()}
    torch.save({"model": tensors, "epoch": 3}, memory, _use_new_zipfile_serialization=zipped)
    return memory.getvalue()


@st.composite
def checkpoints(draw):
    """Damaged checkpoints, zipped ones with right checksums, and odd pickles."""
    kind = draw(st.sampled_from(("zip", "legacy", "member", "pickle")))
    if kind == "pickle":
        opcodes = st.sampled_from(
            [b"}", b"]", b"(", b"N", b"K\x01", b"q\x00", b"h\x00", b"R", b"t"]
        )
        parts = draw(st.lists(opcodes | st.binary(max_size=3), max_size=20))
        return b"\x80\x02" + b"".join(parts) + b"."
    if kind != "member":
        return draw(damaged(_checkpoint_bytes(kind == "zip")))
    memory = io.BytesIO()
    good = zipfile.ZipFile(io.BytesIO(_checkpoint_bytes(True)))
    with good, zipfile.ZipFile(memory, "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            bad.writestr(name, draw(damaged(content)) if name.endswith(".pkl") else content)
    return memory.getvalue()


@fuzz
@given(data=checkpoints())
@pytest.mark.filterwarnings("ignore")
def test_a_foreign_checkpoint(folder, data):
    from uss_jax.weights.unpickle import read_checkpoint

    (folder / "net.pth").write_bytes(data)
    try:
        arrays = read_checkpoint(folder / "net.pth")
    except UserError as error:
        check_words(one_line(str(error)))
    else:
        assert sum(array.nbytes for array in arrays.values()) <= 4 * len(data)


@fuzz
@given(
    tensors=st.dictionaries(
        st.sampled_from(
            (
                "bn0.weight",
                "fc_audioset.bias",
                "conv_block1.bn2.weight",
                "conv_block99999.bn2.weight",
                "base.bn0.weight",
                "base.encoder_block1.conv_block1.bn2.weight",
                "base.pre_conv.weight",
                "base.encoder_block1.conv_block9999.bn1.weight",
                "tscam_conv.bias",
                "patch_embed.proj.bias",
                "film.encoder_block1->conv_block1->beta1.weight",
                "layers.0.blocks.0.norm1.weight",
                "layers.0.blocks.0.attn.relative_position_bias_table",
                "spectrogram_extractor.stft.conv_real.weight",
            )
        ),
        st.lists(st.integers(0, 4), max_size=4),
    )
)
def test_tensors_that_make_no_net(tensors):
    from uss_jax.weights.cnn14 import convert_cnn14
    from uss_jax.weights.htsat import convert_htsat
    from uss_jax.weights.resunet import convert_resunet

    arrays = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    for convert in (convert_cnn14, convert_htsat, convert_resunet):
        with pytest.raises(UserError):
            convert(arrays)


@fuzz
@given(given=json_values(), rate=json_values())
def test_samples_of_any_kind(given, rate):
    try:
        waveform = as_waveform(given)
        require_rate(rate)
    except UserError as error:
        check_words(one_line(str(error)))
    else:
        assert waveform.dtype == np.float32
        assert np.abs(waveform).max() <= 10


@fuzz
@given(name=st.text(max_size=40) | st.binary(max_size=40).map(os.fsdecode))
def test_names_of_files(name):
    made = file_name(name)
    assert made.encode()
    assert not set(made) & set("/\0\n")
    assert one_line(name).encode() or not name
    assert "\n" not in one_line(name)


@pytest.fixture(scope="module")
def one_recording(tmp_path_factory):
    """Makes the working directory, which a list may name, a folder with one recording."""
    path = tmp_path_factory.mktemp("recordings")
    (path / "a.wav").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield


@pytest.mark.usefixtures("one_recording")
@fuzz
@given(data=st.binary(max_size=60) | st.sampled_from((b".", b"a.wav", b"./\na.wav\n")))
def test_lists_of_recordings(folder, data):
    # Else the whole disk would be walked; test_input_files.py has absolute paths.
    assume(b".." not in data and not re.search(rb"(^|[\r\n])/", data))
    (folder / "list.txt").write_bytes(data)
    try:
        found = find_input_files([], [folder / "list.txt"])
    except UserError as error:
        check_words(one_line(str(error)))
    else:
        assert all(".." not in one.place.parts and not one.place.is_absolute() for one in found)
