import io
import pickle
import zipfile

import numpy as np
import pytest

from uss_jax.disk.checked_npz import INFLATION, Column, read_npz

COLUMNS = {
    "names": Column("U", "n"),
    "vectors": Column("f4", "n d"),
    "pair": Column("u4", "2"),
    "version": Column("i8"),
    "note": Column("S", optional=True),
}
RIGHT = {
    "names": np.array(["a", "bc"]),
    "vectors": np.zeros((2, 3), np.float32),
    "pair": np.array([1, 2], np.uint32),
    "version": np.int64(1),
}


def _archive(members, compression=zipfile.ZIP_STORED):
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    memory.seek(0)
    return memory


def _npy(shape, descr="<f4", data=b""):
    memory = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(memory, header)
    return memory.getvalue() + data


def _saved(**arrays):
    memory = io.BytesIO()
    np.savez(memory, **{**RIGHT, **arrays})
    memory.seek(0)
    return memory


def test_declared_arrays_come_back_and_others_stay_unread():
    memory = _saved(other=np.array([{}], dtype=object))
    read = read_npz(memory, COLUMNS)
    assert read.keys() == RIGHT.keys()
    for name, array in RIGHT.items():
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"names": np.array([1, 2])}, "'names' of type int64, expected U"),
        ({"names": np.array(["a", "b"], object)}, "'names' of type object"),
        ({"vectors": np.zeros((3, 3), np.float32)}, r"shape \(3, 3\), expected \[n d\] with n=2"),
        ({"vectors": np.zeros((2, 3), ">f4")}, "of type >f4"),
        ({"pair": np.zeros(3, np.uint32)}, r"shape \(3,\), expected \[2\]"),
        ({"version": np.array([1])}, r"shape \(1,\), expected \[\]"),
        ({"note": np.zeros(1, "S3")}, "'note' of shape"),
    ],
)
def test_arrays_of_another_kind_are_refused(arrays, said):
    with pytest.raises(ValueError, match=said):
        read_npz(_saved(**arrays), COLUMNS)


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (_npy((2**40, 3)), "bytes for the array"),
        (_npy((-2, -3), data=bytes(24)), "bytes for the array"),
        # What numpy would tokenise, and then warn of.
        (_npy((2,), data=bytes(8)).replace(b", }", b", }\n")[:-1], "numbers or texts"),
        (_npy((2,), "<f4", bytes(7)), "shape|bytes for"),
        (_npy((2, 10**12), "|S0"), "type|bytes for"),
        (b"not an array", "magic"),
        (_npy((2, 3), data=bytes(24)).replace(b"(2, 3)", b"((((((")[:90], "header|EOF|expected"),
    ],
)
def test_headers_are_believed_only_where_the_bytes_are_there(member, said):
    with pytest.raises(ValueError, match=said):
        read_npz(_archive({"vectors.npy": member}), {"vectors": Column("f4", "n d")})


def test_items_without_bytes_have_no_shape_of_any_size():
    with pytest.raises(ValueError, match="bytes for the array"):
        read_npz(_archive({"x.npy": _npy((10**12,), "|S0")}), {"x": Column("S", "n")})


def test_an_archive_that_grows_too_much_is_refused_before_it_is_unpacked():
    array = _npy((1000, 1000), data=bytes(4_000_000))
    memory = _archive({"vectors.npy": array}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=f"more than {INFLATION} times"):
        read_npz(memory, {"vectors": Column("f4", "n d")})
    with pytest.raises(ValueError, match="compressed in an unsupported way"):
        read_npz(
            _archive({"vectors.npy": array[:200]}, zipfile.ZIP_LZMA), {"vectors": Column("f4", "n")}
        )


def test_pickles_texts_and_cut_archives_are_refused():
    whole = _saved().getvalue()
    for data in (pickle.dumps([1]), b"PK", b"", b"text", whole[:-30], whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match=r"."):
            read_npz(io.BytesIO(data), COLUMNS)
    damaged = bytearray(whole)
    damaged[whole.index("bc".encode("utf-32-le"))] ^= 1
    with pytest.raises(ValueError, match=r"."):
        read_npz(io.BytesIO(bytes(damaged)), COLUMNS)
