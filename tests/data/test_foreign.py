import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from tests.data.test_encodings import SAMPLES, STORED
from uss_jax.cli.main import main
from uss_jax.data.index import load_index
from uss_jax.data.indexing import build_index
from uss_jax.data.metadata import check_format, read_sample_rate
from uss_jax.data.reader import ClipReader
from uss_jax.data.schema import Schema
from uss_jax.data.tf_example import guess_schema, parse
from uss_jax.data.tfrecord import RecordWriter
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

SPEECH, DOG = (load_ontology().resolve(name) for name in ("Speech", "Dog"))
NAMES = {"index": [DOG, SPEECH], "mid": ["/m/0bt9lr", "/m/09x0r"], "name": ["Dog", "Speech"]}
SHARDS = ("part-1.tfrecord", "part-2.tfrecord")


def _record(id, encoding, form, labels=None, audio_name="waveform"):
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["video_id"].bytes_list.value.append(id)
    audio = STORED[encoding]
    if isinstance(audio, bytes):
        feature[audio_name].bytes_list.value.append(audio)
    elif encoding == "float":
        feature[audio_name].float_list.value.extend(audio.tolist())
    else:
        feature[audio_name].int64_list.value.extend(audio.tolist())
    for label in NAMES[form] if labels is None else labels:
        if isinstance(label, int):
            feature["classes"].int64_list.value.append(label)
        else:
            feature["classes"].bytes_list.value.append(label.encode())
    return example.SerializeToString(deterministic=True)


def _write(directory, encoding="float", form="mid", names=SHARDS, **record):
    directory.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        with RecordWriter(directory / name) as writer:
            for at in range(2):
                writer.write(_record(f"{number}é{at}".encode(), encoding, form, **record))
    return directory


def _schema(path, **fields):
    path.write_text(json.dumps({"shards": "*.tfrecord", "sample_rate": 8000, **fields}))
    return path


def _index(directory, *words):
    return main(["index", str(directory), "--workers", "1", *map(str, words)])


@pytest.mark.parametrize("encoding", STORED)
@pytest.mark.parametrize("form", NAMES)
def test_records_of_any_encoding_and_labels_are_read_where_they_are(tmp_path, encoding, form):
    directory = _write(tmp_path / "lab", encoding, form)
    fields = {"id": "video_id", "audio": "waveform", "labels": "classes"}
    schema = _schema(tmp_path / "s.json", **fields, encoding=encoding, label_form=form)
    assert _index(directory, "--schema", schema) == 0
    index = load_index(directory, "train", verify=True)
    assert [id.decode() for id in index.ids] == ["0é0", "0é1", "1é0", "1é1"]
    assert index.labels(2).tolist() == sorted([DOG, SPEECH])
    assert read_sample_rate(directory) == 8000
    reader = ClipReader(directory, index)
    np.testing.assert_array_equal(reader.read(3), SAMPLES)
    np.testing.assert_array_equal(reader.read(3, 100, 50), SAMPLES[100:150])
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("encoding", STORED)
def test_usual_names_are_found_without_a_schema(tmp_path, encoding, capsys):
    names = ("lab-eval.tfrecord-00000-of-00001",)
    directory = _write(tmp_path / "lab", encoding, "name", names=names)
    assert _index(directory) == 1
    assert "the sample rate of the records" in capsys.readouterr().err
    (directory / "features.json").write_text(json.dumps({"a": {"audio": {"sampleRate": "8000"}}}))
    assert _index(directory) == 0
    said = f"eval: id in 'video_id', audio in 'waveform' ({encoding}), labels in 'classes' (name)"
    assert said in capsys.readouterr().out
    reader = ClipReader(directory, load_index(directory, "eval"))
    np.testing.assert_array_equal(reader.read(1), SAMPLES)
    assert _index(directory) == 0  # and again


@pytest.mark.parametrize("encoding", STORED)
def test_what_a_schema_leaves_open_is_recognised(tmp_path, encoding):
    names = ("lab-eval.tfrecord-00000-of-00001",)
    directory = _write(tmp_path / "lab", encoding, "mid", names=names)
    (tmp_path / "s.json").write_text('{"sample_rate": 8000}')
    assert _index(directory, "--schema", tmp_path / "s.json") == 0
    index = load_index(directory, "eval")
    assert index.encoding == encoding
    np.testing.assert_array_equal(ClipReader(directory, index).read(1), SAMPLES)
    assert index.labels(0).tolist() == sorted([DOG, SPEECH])


def test_a_whole_audio_file_is_never_taken_for_samples(tmp_path, capsys):
    names = ("lab-eval.tfrecord-00000-of-00001",)
    for encoding in ("wav", "flac"):
        directory = _write(tmp_path / encoding, encoding, "mid", names=names)
        schema = tmp_path / "s.json"
        schema.write_text('{"sample_rate": 8000, "encoding": "pcm_s16le"}')
        assert _index(directory, "--schema", schema) == 1
        assert "an audio file (encoding wav or flac), not PCM samples" in capsys.readouterr().err


def test_zeros_and_ones_for_all_classes_are_recognised_and_no_indexes(tmp_path, capsys):
    hot = [int(index in (DOG, SPEECH)) for index in range(527)]
    names = ("lab-eval.tfrecord-00000-of-00001",)
    directory = _write(tmp_path / "lab", "float", "index", names=names, labels=hot)
    schema = tmp_path / "s.json"
    schema.write_text('{"sample_rate": 8000}')
    assert _index(directory, "--schema", schema) == 0
    assert "labels in 'classes' (multi_hot)" in capsys.readouterr().out
    assert load_index(directory, "eval").labels(0).tolist() == sorted([DOG, SPEECH])
    schema.write_text('{"sample_rate": 8000, "label_form": "index"}')
    assert _index(directory, "--schema", schema) == 1
    assert "has the label 1 more than once" in capsys.readouterr().err
    schema.write_text('{"sample_rate": 8000, "label_form": "multi_hot"}')
    other = _write(tmp_path / "other", "float", "index", names=names, labels=[0, 1])
    assert _index(other, "--schema", schema) == 1
    assert "needs 527 zeros and ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "audio", "said"),
    [
        (
            dict(names=["dog", "pig"]),
            {},
            "classes.labels.txt: the numbers in classes are of 2",
        ),
        (dict(num_classes=4), {}, "features.json: the numbers in classes are of 4 classes, not"),
        (dict(names=list(reversed(load_ontology().class_names))), {}, "of 527 classes such as Fi"),
        (dict(names=load_ontology().class_names), dict(shape=(None, 2)), "has the shape (-1, 2)"),
        (dict(names=load_ontology().class_names), dict(shape=(None, 1)), ""),
        (dict(names=load_ontology().class_mids), {}, ""),
        (dict(num_classes=527), {}, ""),
    ],
)
def test_numbers_of_other_classes_and_several_channels_are_refused(
    tmp_path, classes, audio, said, capsys
):
    directory = _write(tmp_path / "lab", "int64", "index", ("lab-a.tfrecord-00000-of-00001",))
    features = {
        "video_id": tfds.features.Text(),
        "waveform": tfds.features.Tensor(**{"shape": (None,), "dtype": np.int64, **audio}),
        "classes": tfds.features.Sequence(tfds.features.ClassLabel(**classes)),
    }
    tfds.features.FeaturesDict(features).save_config(directory)
    schema = _schema(tmp_path / "s.json", shards="*.tfrecord-*")
    assert _index(directory, "--schema", schema) == bool(said)
    assert said in capsys.readouterr().err
    # Whoever knows better says so; of channels nobody can.
    schema = _schema(tmp_path / "s.json", shards="*.tfrecord-*", label_form="index")
    assert _index(directory, "--schema", schema) == ("shape" in said)


def test_whole_files_in_records_state_their_channels_themselves(tmp_path):
    """As TFDS keeps encoded files of stereo, with the shape of what they decode to."""
    directory = _write(tmp_path / "lab", "wav", "mid", ("lab-eval.tfrecord-00000-of-00001",))
    shape = {"dimensions": ["-1", "2"]}
    features = {"waveform": {"audio": {"sampleRate": "8000", "shape": shape}}}
    (directory / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    assert _index(directory) == 0
    np.testing.assert_array_equal(
        ClipReader(directory, load_index(directory, "eval")).read(1), SAMPLES
    )


def test_a_label_list_with_repeats_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="has the label 5 more than once"):
        parse(
            _record(b"a", "float", "index", [5, 7, 5]),
            Schema("video_id", "waveform", "classes", "float"),
        )


def test_an_empty_list_of_names_is_no_crash():
    example = tf_example_pb2.Example()
    feature = example.features.feature
    for name in ("id", "audio", "labels"):
        feature[name].bytes_list.SetInParent()
    schema = guess_schema(example.SerializeToString(), {"sample_rate": 8000})
    assert (schema.encoding, schema.label_form) == ("pcm_s16le", "name")


@pytest.mark.parametrize("encoding", ["float", "int64"])
def test_records_of_another_scale_are_refused_and_clipped_ones_told(
    tmp_path, monkeypatch, encoding, capsys
):
    full_scale = 1.0 if encoding == "float" else 32768
    names = ("lab-eval.tfrecord-00000-of-00001",)
    schema = tmp_path / "s.json"
    schema.write_text('{"sample_rate": 8000}')
    for number, (scale, status) in enumerate(((20, 1), (2, 0), (0.9, 0))):
        loud = np.asarray(scale * full_scale * np.sin(np.arange(SAMPLES.size)))
        monkeypatch.setitem(STORED, encoding, loud.astype(np.float32 if full_scale == 1 else int))
        directory = _write(tmp_path / f"lab{number}", encoding, "mid", names=names)
        assert _index(directory, "--schema", schema) == status
        told = capsys.readouterr().err
        assert ("divide" in told) == (scale == 20)
        assert ("in 2 of 2 records, more than 0.1%" in told) == (scale == 2)


def test_names_that_cannot_be_guessed_are_asked_for(tmp_path, capsys):
    names = ("lab-eval.tfrecord-00000-of-00001",)
    directory = _write(tmp_path / "lab", names=names, audio_name="loudspeaker")
    assert _index(directory) == 1
    error = capsys.readouterr().err
    assert "record at byte 0 has no feature that looks like its audio" in error
    assert "loudspeaker" in error
    assert "--schema" in error


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"labels": ["/m/0dgw9r"]}, 'unknown label: "/m/0dgw9r" is in the ontology but not one'),
        ({"labels": ["/m/nothing"]}, "unknown label: no sound class"),
        ({"labels": [3]}, r"needs mids \(bytes\) in feature 'classes'"),
        ({"audio_name": "sound"}, "no feature 'waveform'"),
        ({"encoding": "int64"}, "needs a float_list in feature 'waveform'"),
    ],
)
def test_what_is_not_as_the_schema_says_is_said_with_its_place(tmp_path, record, said):
    directory = _write(tmp_path / "lab", **record)
    schema = Schema(
        "video_id", "waveform", "classes", "float", "mid", sample_rate=8000, shards="*.tfrecord"
    )
    with pytest.raises(UserError, match=said) as error:
        build_index(directory, "train", schema)
    assert "part-1.tfrecord: the record at byte 0 " in str(error.value)


def test_a_pattern_without_files_and_a_missing_schema_are_said(tmp_path, capsys):
    directory = _write(tmp_path / "lab")
    assert _index(directory, "--schema", tmp_path / "nothing.json") == 1
    assert "nothing.json cannot be read" in capsys.readouterr().err
    assert _index(directory) == 1
    assert 'give a --schema with "shards"' in capsys.readouterr().err
    assert _index(directory, "--schema", _schema(tmp_path / "s.json", shards="*.rec")) == 1
    assert "has no files that match the schema's pattern '*.rec'" in capsys.readouterr().err


def test_a_split_of_another_rate_or_encoding_beside_others_is_refused(tmp_path, capsys):
    directory = _write(tmp_path / "lab")
    assert _index(directory, "--schema", _schema(tmp_path / "s.json")) == 0
    _write(directory, names=("extra-1.rec",))
    extra = {"shards": "extra*", "split": "extra"}
    other = _schema(tmp_path / "extra.json", **extra, sample_rate=16000)
    assert _index(directory, "--schema", other) == 1
    said = capsys.readouterr().err
    assert "lab already has train at 8000 Hz; put records that differ in a folder of" in said
    assert read_sample_rate(directory) == 8000
    assert not (directory / "index-extra.npz").exists()
    _write(directory, "flac", names=("extra-1.rec",))
    assert _index(directory, "--schema", _schema(tmp_path / "extra.json", **extra)) == 1
    assert "already has train encoded as float; put records" in capsys.readouterr().err
    _write(directory, names=("extra-1.rec",))
    assert _index(directory, "--schema", _schema(tmp_path / "extra.json", **extra)) == 0
    # Alone, or all at once, splits may get another rate.
    assert _index(_write(tmp_path / "alone"), "--schema", _schema(tmp_path / "s.json")) == 0
    corrected = _schema(tmp_path / "s.json", sample_rate=16000)
    assert _index(tmp_path / "alone", "--schema", corrected) == 0
    assert read_sample_rate(tmp_path / "alone") == 16000


def test_all_splits_of_a_folder_may_get_another_rate_at_once(tmp_path):
    names = [f"lab-{split}.tfrecord-00000-of-00001" for split in ("eval", "train")]
    directory = _write(tmp_path / "lab", names=names)
    schema = tmp_path / "s.json"
    for rate in (8000, 16000):
        schema.write_text(json.dumps({"sample_rate": rate}))
        assert _index(directory, "--schema", schema) == 0
        assert read_sample_rate(directory) == rate


def test_prepared_records_beside_indexed_ones_of_another_rate_are_refused(tmp_path):
    directory = _write(tmp_path / "lab")
    assert _index(directory, "--schema", _schema(tmp_path / "s.json", encoding="float")) == 0
    said = "already has train at 8000 Hz; give test a different --version, or --sample-rate 8000"
    with pytest.raises(UserError, match=said):
        check_format(directory, "test", 16000, "float")
    check_format(directory, "test", 8000, "float")
