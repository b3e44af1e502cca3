import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from uss_jax.errors import UserError
from uss_jax.weights.unpickle import read_checkpoint

torch = pytest.importorskip("torch")

STATE_DICT = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.steps": torch.tensor(7)}


class RunsACommand:
    """Unpickles to the result of a shell command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def assert_is_state_dict(arrays):
    assert arrays.keys() == STATE_DICT.keys()
    for name, array in arrays.items():
        assert isinstance(array, np.ndarray)
        np.testing.assert_array_equal(array, STATE_DICT[name])
        assert str(array.dtype) == str(STATE_DICT[name].dtype).removeprefix("torch.")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE_DICT},
        {"state_dict": STATE_DICT, "epoch": 3, "optimizer_states": [{"state": {0: {}}}]},
        STATE_DICT,
    ],
    ids=["panns", "lightning", "plain"],
)
def test_state_dicts_are_found_where_their_makers_put_them(tmp_path, content, zipped):
    path = tmp_path / "net.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_is_state_dict(read_checkpoint(path))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_views_parameters_and_half_precision_become_plain_arrays(tmp_path, zipped):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "transposed": whole.T,
        "slice": whole[1:, ::2],
        "parameter": torch.nn.Parameter(whole),
        "half": whole.to(torch.bfloat16),
    }
    path = tmp_path / "net.pth"
    torch.save({"model": tensors}, path, _use_new_zipfile_serialization=zipped)
    arrays = read_checkpoint(path)
    for name in ("parameter", "half"):
        np.testing.assert_array_equal(arrays[name], whole.numpy())
        assert arrays[name].dtype == np.float32
    np.testing.assert_array_equal(arrays["transposed"], whole.numpy().T)
    np.testing.assert_array_equal(arrays["slice"], whole.numpy()[1:, ::2])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_pickle_that_runs_a_command_runs_nothing(tmp_path, zipped, place):
    trace = tmp_path / "trace"
    evil = RunsACommand(f"touch '{trace}'")
    content = {"model": dict(STATE_DICT)}
    (content if place == "beside" else content["model"])["evil"] = evil
    path = tmp_path / "net.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_is_state_dict(read_checkpoint(path))
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap itself works
    assert trace.exists()


def test_a_bare_pickle_that_runs_a_command_runs_nothing(tmp_path):
    trace = tmp_path / "trace"
    path = tmp_path / "net.pth"
    path.write_bytes(pickle.dumps(RunsACommand(f"touch '{trace}'")))
    with pytest.raises(UserError, match=r"net\.pth is not a PyTorch checkpoint"):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_unknown_modules_are_passed_over(tmp_path, monkeypatch, protocol):
    module = tmp_path / "modules" / "elsewhere.py"
    module.parent.mkdir()
    module.write_text(
        "import pathlib\n"
        "pathlib.Path(__file__).with_name('imported').touch()\n"
        "class Config(dict):\n    pass\n"
        "class Rows(list):\n    pass\n"
        "class Names(set):\n    pass\n"
        "class Loop:\n    def __init__(self):\n        self.step = 3\n"
        "def schedule():\n    pass\n"
    )
    monkeypatch.syspath_prepend(module.parent)
    import elsewhere

    path = tmp_path / "net.ckpt"
    content = {
        "hyper_parameters": elsewhere.Config(rate=1),
        "rows": elsewhere.Rows([1, 2]),
        "names": elsewhere.Names("ab"),
        "loops": {elsewhere.Loop(): elsewhere.Loop()},
        "schedule": elsewhere.schedule,
        "dtype": torch.float32,
        "numpy": np.arange(3),
        "state_dict": STATE_DICT,
    }
    torch.save(content, path, pickle_protocol=protocol)
    del sys.modules["elsewhere"]
    (module.parent / "imported").unlink()
    assert_is_state_dict(read_checkpoint(path))
    assert not (module.parent / "imported").exists()


def _hostile_files(folder):
    """Small files of which a plain reader makes gigabytes."""
    folder.mkdir()
    (folder / "place.ckpt").write_bytes(b"\x80\x02Nr\xff\xff\xff\x0f.")
    (folder / "sets.ckpt").write_bytes(b"\x80\x04" + b"\x8f" * 20_000_000)
    (folder / "frame.ckpt").write_bytes(b"\x80\x04\x95" + (2**33).to_bytes(8, "little") + b"N.")
    (folder / "text.ckpt").write_bytes(b"\x80\x04\x8d" + (2**33).to_bytes(8, "little") + b"x.")
    # A list of 10,000 entries, made into a mapping again and again.
    pairs = b"(" + b"(K\x01K\x02t" * 10_000 + b"l"
    again = b"ccollections\nOrderedDict\n(h\x00tR" * 20_000
    (folder / "mappings.ckpt").write_bytes(b"\x80\x02" + pairs + b"q\x00(" + again + b"t.")
    for zipped in (True, False):
        view = {"a": torch.zeros(1).expand(2**28)}
        torch.save(
            {"model": view}, folder / f"view{zipped}.ckpt", _use_new_zipfile_serialization=zipped
        )
        shared = torch.zeros(2**18)
        many = {str(number): shared.view(-1) for number in range(2000)}
        torch.save(
            {"model": many}, folder / f"many{zipped}.ckpt", _use_new_zipfile_serialization=zipped
        )
    torch.save({"model": STATE_DICT}, folder / "claims.ckpt", _use_new_zipfile_serialization=False)
    content = (folder / "claims.ckpt").read_bytes()
    # The storage of six elements claims 2**30 - 1.
    assert content.count(b"K\x06Nt") == 1
    (folder / "claims.ckpt").write_bytes(content.replace(b"K\x06Nt", b"J\xff\xff\xff\x3fNt"))
    torch.save({"model": {"a": torch.zeros(2**27)}}, folder / "packed.ckpt")
    with zipfile.ZipFile(folder / "packed.ckpt") as plain:
        members = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(folder / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members.items():
            packed.writestr(name, data)


def test_small_files_do_not_take_much_memory(tmp_path):
    """At most half a gigabyte and six times the file, which has 20 MB at most."""
    _hostile_files(tmp_path / "files")
    script = (
        "import pathlib, resource, sys, torch\n"
        "from uss_jax.errors import UserError\n"
        "from uss_jax.weights.unpickle import read_checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try:\n"
        "        read_checkpoint(path)\n"
        "        print(path.name, 'was read')\n"
        "    except UserError as error:\n"
        "        print(error)\n"
        "print((peak() - before) // 1024)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "files")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    *said, grown = ran.stdout.splitlines()
    assert len(said) == 11
    for words in said:
        assert "is damaged" in words or "than 4 times its own size" in words, words
    assert int(grown) < 500 + 6 * 20


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_what_wrappers_put_before_all_names_is_dropped(tmp_path, wrapper):
    path = tmp_path / "net.pth"
    torch.save({"model": {wrapper + name: of for name, of in STATE_DICT.items()}}, path)
    assert_is_state_dict(read_checkpoint(path))
    torch.save({wrapper + "a": torch.ones(1), "b": torch.ones(1)}, path)
    assert set(read_checkpoint(path)) == {wrapper + "a", "b"}


def test_torchscript_programs_are_not_run(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"model": STATE_DICT}, path)
    with zipfile.ZipFile(path, "a") as archive:  # what makes torch.load call its interpreter
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/constants.pkl", pickle.dumps(()))
    with pytest.raises(UserError, match="is a TorchScript program"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files_are_refused(tmp_path, zipped, share):
    path = tmp_path / "net.pth"
    content = {"model": {"a": torch.zeros(5000)}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"net\.pth is not a PyTorch checkpoint or is damaged"):
        read_checkpoint(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a checkpoint\n")
    with pytest.raises(UserError, match=r"notes\.txt is not a PyTorch checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ({"epoch": 3, "net": {"w": torch.zeros(2)}}, "epoch, net"),
        ({"model": {}}, "model"),
        ([torch.zeros(2)], "not a dictionary"),
        (torch.nn.Linear(2, 2), "not a dictionary"),
    ],
    ids=["another key", "empty", "a list", "a pickled module"],
)
def test_files_without_a_state_dict_say_what_they_hold(tmp_path, content, held):
    path = tmp_path / "net.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=rf"net\.pth holds no state dict.* holds: {held}$"):
        read_checkpoint(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.pth"):
        with pytest.raises(UserError, match="is not a file"):
            read_checkpoint(path)


def test_without_torch_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'uss-jax\[torch\]'"):
        read_checkpoint(tmp_path / "net.pth")
