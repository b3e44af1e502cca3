import google_crc32c
import pytest
import tensorboardX.record_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from uss_jax.data.tfrecord import RecordWriter, scan_records
from uss_jax.errors import UserError


def test_checksum_of_another_writer_is_ours(tmp_path):
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the check value of crc32c
    writer = tensorboardX.record_writer.RecordWriter(str(tmp_path / "shard"))
    writer.write(b"abc")
    writer.close()
    assert [payload for _, _, payload in scan_records(tmp_path / "shard")] == [b"abc"]


@settings(max_examples=20)
@given(st.lists(st.binary(max_size=100), min_size=1, max_size=5))
def test_scan_gives_back_what_was_written(tmp_path_factory, payloads):
    path = tmp_path_factory.mktemp("shard") / "shard"
    with RecordWriter(path) as writer:
        for payload in payloads:
            writer.write(payload)
    data = path.read_bytes()
    scanned = list(scan_records(path))
    assert [payload for _, _, payload in scanned] == payloads
    for offset, length, payload in scanned:
        assert data[offset : offset + length] == payload


@settings(max_examples=60)
@given(st.data())
def test_any_flipped_bit_and_any_cut_is_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("shard") / "shard"
    with RecordWriter(path) as writer:
        writer.write(b"first payload")
        writer.write(b"second payload")
    good = path.read_bytes()
    second = 13 + 16
    at = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(good[:at])
        if at in (0, second):  # nothing, and a whole record: the index knows the size
            return
    else:
        bad = bytearray(good)
        bad[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(bad)
    with pytest.raises(
        UserError, match=f"record at byte {second if at >= second else 0} "
    ) as error:
        list(scan_records(path))
    assert str(path) in str(error.value)
