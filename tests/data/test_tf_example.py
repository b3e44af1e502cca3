import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from uss_jax.data.tf_example import parse, serialise


@given(
    st.binary(max_size=30),
    st.lists(st.integers(-(2**15), 2**15 - 1), max_size=50),
    st.lists(st.integers(0, 526), max_size=5),
)
def test_parse_gives_back_what_was_serialised(id, samples, labels):
    samples = np.array(samples, np.int16)
    clip = parse(serialise(id, samples, labels))
    assert clip.id == id
    np.testing.assert_array_equal(np.frombuffer(clip.audio, "<i2"), samples)
    assert clip.labels == tuple(sorted(set(labels)))


def test_equal_clips_give_equal_bytes():
    samples = np.arange(100, dtype=np.int16)
    assert serialise(b"a", samples, [3, 1, 3]) == serialise(b"a", samples.copy(), [1, 3])


def test_a_hand_written_example_is_read():
    # Wire format by hand: features { feature { key "id" value { bytes_list { value "x" } } } ... }
    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    def entry(key, feature):
        return field(1, field(1, key) + field(2, feature))

    payload = field(
        1,
        entry(b"id", field(1, field(1, b"x")))
        + entry(b"audio", field(1, field(1, b"\x01\x00\xff\xff")))
        + entry(b"labels", field(3, field(1, bytes([5, 130, 2])))),
    )
    assert parse(payload) == (b"x", b"\x01\x00\xff\xff", (5, 258))


def _foreign(**features):
    example = tf_example_pb2.Example()
    for name, value in features.items():
        feature = example.features.feature[name]
        if isinstance(value, float):
            feature.float_list.value.append(value)
        else:
            feature.bytes_list.value.append(value)
    return example.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"\xff\xff\xff", "not a tf.train.Example"),
        (b"", "no feature 'id' and no 'audio' and no 'labels'"),
        (_foreign(id=b"a", waveform=b"ab"), r"no feature 'audio'.*\['id', 'waveform'\]"),
        (_foreign(id=b"a", audio=0.5, labels=b""), "one bytes value in feature 'audio'"),
        (_foreign(id=b"a", audio=b"ab", labels=b"/m/09x0r"), "class indexes"),
    ],
    ids=["not-protobuf", "empty", "no-audio", "float-audio", "text-labels"],
)
def test_other_schemas_are_told_apart(payload, said):
    with pytest.raises(ValueError, match=said):
        parse(payload)
