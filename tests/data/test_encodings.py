import io

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from uss_jax.audio.in_memory import flac_bytes
from uss_jax.data.encodings import count_samples, decode, decode_into, to_int16, varints
from uss_jax.data.schema import Schema
from uss_jax.data.tf_example import parse

SAMPLES = np.random.default_rng(0).integers(-(2**15), 2**15, 1000).astype(np.int16)


def _example(audio):
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["id"].bytes_list.value.append(b"a")
    feature["labels"].int64_list.value.append(3)
    if isinstance(audio, bytes):
        feature["audio"].bytes_list.value.append(audio)
    elif audio.dtype.kind == "f":
        feature["audio"].float_list.value.extend(audio.tolist())
    else:
        feature["audio"].int64_list.value.extend(audio.tolist())
    return example.SerializeToString(deterministic=True)


def _wav_bytes(samples, channels=1):
    memory = io.BytesIO()
    soundfile.write(memory, np.stack([samples] * channels, axis=1), 8000, format="WAV")
    return memory.getvalue()


STORED = {
    "pcm_s16le": SAMPLES.tobytes(),
    "flac": flac_bytes(SAMPLES, 8000),
    "wav": _wav_bytes(SAMPLES),
    "float": SAMPLES / np.float32(32768),
    "int64": SAMPLES,
}


@pytest.mark.parametrize("encoding", STORED)
def test_every_encoding_gives_back_the_samples(encoding):
    clip = parse(_example(STORED[encoding]), Schema(encoding=encoding))
    np.testing.assert_array_equal(decode(clip.audio, encoding), SAMPLES)
    assert count_samples(clip.audio, encoding, 8000) == len(SAMPLES)


@pytest.mark.parametrize("encoding", STORED)
def test_a_part_is_the_part_of_the_whole(encoding):
    audio = parse(_example(STORED[encoding]), Schema(encoding=encoding)).audio
    for begin, length in ((0, 1000), (0, 10), (990, 10), (333, 444), (1000, 0)):
        part = np.full(length, 7, np.int16)
        decode_into(part, audio, encoding, begin)
        np.testing.assert_array_equal(part, SAMPLES[begin : begin + length])
    with pytest.raises(ValueError, match="ends at sample 1000"):
        decode_into(np.zeros(11, np.int16), audio, encoding, 990)


@pytest.mark.parametrize(("form", "subtype"), [("WAV", "PCM_24"), ("FLAC", "PCM_S8")])
@pytest.mark.parametrize("channels", [1, 2])
def test_parts_of_other_files_are_parts_of_what_they_decode_to(form, subtype, channels):
    memory = io.BytesIO()
    sound = np.random.default_rng(1).uniform(-0.9, 0.9, (500, channels))
    soundfile.write(memory, sound, 8000, format=form, subtype=subtype)
    part = np.zeros(100, np.int16)
    decode_into(part, memory.getvalue(), form.lower(), 250)
    np.testing.assert_array_equal(part, decode(memory.getvalue(), form.lower())[250:350])


def test_channels_are_averaged():
    np.testing.assert_array_equal(decode(_wav_bytes(SAMPLES, 2), "wav"), SAMPLES)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_varints_are_read_as_protocol_buffers_write_them(values):
    example = tf_example_pb2.Example()
    example.features.feature["audio"].int64_list.value.extend(values)
    example.features.feature["id"].bytes_list.value.append(b"a")
    example.features.feature["labels"].int64_list.value.append(0)
    payload = example.SerializeToString(deterministic=True)
    packed = parse(payload, Schema(encoding="int64")).audio if values else b""
    assert varints(packed).tolist() == values


# As AU, CAF, W64, MP4 and WebM files begin.
FILES = (b".snd", b"caff", b"riff\x2e\x91\xcf\x11", b"\0\0\0\x20ftypM4A ", b"\x1aE\xdf\xa3")


@pytest.mark.parametrize(
    ("data", "encoding", "said"),
    [
        (b"", "pcm_s16le", "0 bytes of audio"),
        (b"abc", "pcm_s16le", "3 bytes of audio, not one or more whole pcm_s16le"),
        (b"abcdef", "float", "6 bytes of audio"),
        (b"", "int64", "no samples"),
        (b"RIFF rubbish", "wav", "no readable audio file"),
        (STORED["flac"], "flac", "audio of 8000 Hz, the schema says 16000"),
        (STORED["flac"][: len(STORED["flac"]) // 2], "flac", "cut off"),
        *((begin + b"...." * 9, "pcm_s16le", "an audio file") for begin in FILES),
    ],
)
def test_what_is_no_audio_is_said(data, encoding, said):
    with pytest.raises(ValueError, match=said):
        count_samples(data, encoding, 16000)


def test_a_file_without_samples_is_said():
    with pytest.raises(ValueError, match="no samples"):
        count_samples(_wav_bytes(SAMPLES[:0]), "wav", 8000)


def test_full_scale_is_cut_to_16_bits():
    waveform = np.array([-2, -1, -0.5, 0, 0.5, 1, 2], np.float32)
    assert to_int16(waveform).tolist() == [-32768, -32768, -16384, 0, 16384, 32767, 32767]


def test_a_wav_that_was_written_to_a_pipe_is_read_as_it_is_counted():
    memory = io.BytesIO()
    soundfile.write(memory, SAMPLES, 8000, format="WAV", subtype="PCM_16")
    data = bytearray(memory.getvalue())
    at = data.index(b"data") + 4
    data[at : at + 4] = bytes(4)
    count = count_samples(bytes(data), "wav", 8000)
    assert count == len(SAMPLES)
    out = np.zeros(count - 7, np.int16)
    decode_into(out, bytes(data), "wav", 7)
    np.testing.assert_array_equal(out, SAMPLES[7:])
