import errno
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uss_jax.bundles.checkpoints import Checkpoints, latest_step, load_tree, save_tree
from uss_jax.bundles.failures import DamagedCheckpoint
from uss_jax.devices.mesh import make_mesh, on_all_devices
from uss_jax.disk.checked_json import either, record, text, whole
from uss_jax.errors import UserError
from uss_jax.training.guard import no_norms
from uss_jax.training.optim import adamw_amsgrad, clipped
from uss_jax.training.resuming import restore_state
from uss_jax.training.state import TrainState, create_state

OPTIMIZER = adamw_amsgrad(1e-3)
POSITION = {"seed": 3, "global_batch": 8, "index_digest": "abc", "examples_seen": 40}
POSITION_RULE = record({name: either(text("abc"), whole(0, 99)) for name in POSITION})


def _state(seed=0, width=3, devices=8, extra=()):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    params = {"net": {"kernel": draw(2, width), **{name: draw(1) for name in extra}}, "query": {}}
    state = create_state(params, {"net": {"mean": draw(width)}, "query": {}}, OPTIMIZER)
    grads = jax.tree.map(jnp.ones_like, state.params)
    _, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    state = TrainState(jnp.int32(5), params, state.batch_stats, opt_state)
    return on_all_devices(state, make_mesh(jax.devices()[:devices]))


def _write(directory, *steps, **state):
    with Checkpoints(directory, keep=2) as checkpoints:
        for step in steps:
            checkpoints.save(step, _state(**state).parts(), POSITION)
    return directory


@pytest.mark.parametrize("devices", [1, 8])
def test_restored_bitwise_by_another_process_and_on_another_mesh(tmp_path, devices):
    _write(tmp_path / "c", 5)
    like = _state(seed=1, devices=devices)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest_step == 5
        assert checkpoints.position(5) == POSITION
        restored = restore_state(checkpoints, 5, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for found, saved, wanted in zip(*map(jax.tree.leaves, (restored, _state(), like)), strict=True):
        np.testing.assert_array_equal(found, saved)
        assert found.dtype == saved.dtype
        assert found.sharding == wanted.sharding


def test_a_run_from_before_norms_were_recorded_goes_on_with_an_empty_record(tmp_path):
    _write(tmp_path / "c", 5)
    like = _state(seed=1)
    like = like.replace(norms=on_all_devices(no_norms(), make_mesh()))
    like.norms["window"] = jnp.ones_like(like.norms["window"])
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        restored = restore_state(checkpoints, 5, like)
    assert np.isnan(restored.norms["window"]).all()
    assert restored.norms["spikes"] == 0
    assert restored.norms["window"].sharding == like.norms["window"].sharding
    jax.tree.map(np.testing.assert_array_equal, restored.params, _state().params)


@pytest.mark.parametrize("before", [OPTIMIZER, optax.chain(optax.clip(1.0), OPTIMIZER)])
@pytest.mark.parametrize("norm", [0.0, 0.5])
def test_a_run_goes_on_with_another_clipping(tmp_path, before, norm):
    # The state of a clipped optimiser once stood behind an empty one.
    saved = _state()
    after = jax.tree.map(jnp.ones_like, before.init(saved.params))
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(5, saved.replace(opt_state=after).parts(), POSITION)
    like = on_all_devices(
        _state(seed=1).replace(opt_state=clipped(OPTIMIZER, norm).init(saved.params)), make_mesh()
    )
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        restored = restore_state(checkpoints, 5, like)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for found in jax.tree.leaves(restored.opt_state):
        np.testing.assert_array_equal(found, np.ones_like(found))
    np.testing.assert_array_equal(restored.params["net"]["kernel"], saved.params["net"]["kernel"])


@pytest.mark.parametrize(
    ("best", "left"), [(0, [5, 6]), (1, [2, 5, 6]), (2, [2, 4, 5, 6]), (3, [1, 2, 4, 5, 6])]
)
@pytest.mark.parametrize(("by", "other"), [("sdri", "class_sdri"), ("class_sdri", "sdri")])
def test_the_best_stay_beside_the_newest(tmp_path, best, left, by, other):
    values = {1: 2.0, 2: 9.0, 3: 1.0, 4: 3.0, 6: float("nan")}
    with Checkpoints(tmp_path / "c", keep=2, keep_best=best, best_by=by) as checkpoints:
        for step in range(1, 7):
            figures = {other: 10.0 - values[step], by: values[step]} if step in values else None
            checkpoints.save(step, _state().parts(), POSITION, figures)
    assert sorted(int(path.name) for path in (tmp_path / "c").iterdir()) == left


def test_the_newest_are_kept(tmp_path):
    _write(tmp_path / "c", 1, 2, 3, 4)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["3", "4"]
    assert latest_step(tmp_path / "c") == 4


def test_reading_items_needs_no_model(tmp_path):
    _write(tmp_path / "c", 5)
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        params = checkpoints.read(5, "params")
    np.testing.assert_array_equal(params["net"]["kernel"], _state().params["net"]["kernel"])
    assert isinstance(params["net"]["kernel"], np.ndarray)


def test_parameters_alone_go_to_other_devices_in_another_dtype(tmp_path):
    _write(tmp_path / "c", 5, width=8)
    mesh = make_mesh(jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec(None, "data"))
    like = lambda width: {  # noqa: E731
        "net": {"kernel": jax.ShapeDtypeStruct((2, width), jnp.bfloat16, sharding=split)},
        "query": {},
    }
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        kernel = checkpoints.read(5, "params", like(8))["net"]["kernel"]
        with pytest.raises(UserError, match=r"params/net/kernel is \(2, 8\), the config's"):
            checkpoints.read(5, "params", like(4))
    wanted = np.asarray(_state(width=8).params["net"]["kernel"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(kernel, wanted)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 2)}


def test_a_folder_without_checkpoints_has_no_latest_step(tmp_path):
    assert latest_step(tmp_path / "nowhere") is None
    assert not (tmp_path / "nowhere").exists()
    assert latest_step(tmp_path) is None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"width": 4}, r"params/net/kernel is \(2, 3\), the config's model has \(2, 4\)"),
        ({"extra": ["gain"]}, "params/net/gain is missing, the config's model has"),
    ],
)
def test_another_model_names_the_first_differing_entry(tmp_path, other, said):
    _write(tmp_path / "c", 5)
    with (
        Checkpoints(tmp_path / "c", keep=2) as checkpoints,
        pytest.raises(UserError, match=f"step 5 is of another model: {said}"),
    ):
        restore_state(checkpoints, 5, _state(**other))


def test_what_a_kill_left_half_written_is_passed_over_and_cleared_by_the_next_run(tmp_path):
    _write(tmp_path / "c", 5)
    half = tmp_path / "c" / "6.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    assert latest_step(tmp_path / "c") == 5
    assert half.exists()  # a reader leaves the run's files alone
    _write(tmp_path / "c", 6)
    assert latest_step(tmp_path / "c") == 6
    assert not half.exists()


def test_an_old_checkpoint_that_a_kill_left_half_deleted_goes_with_the_next(tmp_path):
    _write(tmp_path / "c", 5, 6)
    shutil.rmtree(tmp_path / "c" / "5" / "params")
    (tmp_path / "c" / "5" / "_CHECKPOINT_METADATA").unlink()
    _write(tmp_path / "c", 7)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["6", "7"]


def _truncate_all(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _remove_all(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


@pytest.mark.parametrize("damage", [_truncate_all, _remove_all])
@pytest.mark.parametrize("item", ["params", "opt_state", "position"])
def test_damage_is_said_with_what_to_do(tmp_path, damage, item):
    damage(_write(tmp_path / "c", 5) / "5" / item)
    with (
        Checkpoints(tmp_path / "c", keep=2) as checkpoints,
        pytest.raises(UserError, match=r"c/5 is damaged \(.*read\); move it away"),
    ):
        _ = checkpoints.position(5), restore_state(checkpoints, 5, _state())


def test_trees_come_back_and_replace_each_other(tmp_path):
    for seed in (0, 1):
        tree = {
            "params": {"a": np.random.default_rng(seed).random(3, np.float32)},
            "batch_stats": {},
        }
        save_tree(tmp_path / "tree", tree)
        loaded = load_tree(tmp_path / "tree")
        jax.tree.map(np.testing.assert_array_equal, loaded, tree)
        assert loaded.keys() == tree.keys()


@pytest.mark.parametrize("damage", [_truncate_all, _remove_all])
def test_a_damaged_tree_is_one_sentence(tmp_path, damage):
    save_tree(tmp_path / "tree", {"params": {"a": np.zeros(3)}})
    damage(tmp_path / "tree")
    with pytest.raises(UserError, match="tree is not a readable set of parameters"):
        load_tree(tmp_path / "tree")


# Ways in which a file may come back from a disk.
_DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "byte": lambda data: _with_other_byte(data, len(data) // 2),
    "first byte": lambda data: _with_other_byte(data, 0),
    "other JSON": lambda data: b"[]",
    "deep JSON": lambda data: b"[" * 100_000,
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
}


def _with_other_byte(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def test_a_damaged_file_is_told_or_does_not_matter(tmp_path):
    # Arrays of a few numbers and of many are in files of different kinds.
    _write(tmp_path / "c", 4, 5, width=3000)
    saved, like = _state(width=3000), _state(seed=1, width=3000)
    step = tmp_path / "c" / "5"
    files = [path for path in sorted(step.rglob("*")) if path.is_file()]
    # The other parts of the state are in files of the same kinds as `params`.
    others = {"batch_stats", "opt_state", "skipped", "norms"}
    files = [path for path in files if path.relative_to(step).parts[0] not in others]
    told = whole = 0
    for number, path in enumerate(files):
        original = path.read_bytes()
        damage = list(_DAMAGES)[number % len(_DAMAGES)] if path.parent.name != "d" else "byte"
        path.write_bytes(_DAMAGES[damage](original))
        try:
            with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
                checkpoints.position(5, POSITION_RULE)
                restored = restore_state(checkpoints, 5, like)
        except DamagedCheckpoint:
            told += 1
        else:
            whole += 1
            for found, wanted in zip(*map(jax.tree.leaves, (restored, saved)), strict=True):
                np.testing.assert_array_equal(found, wanted, err_msg=f"{path} {damage}")
        path.write_bytes(original)
    assert told > 5
    assert whole > 0


def test_the_latest_step_is_known_whatever_its_notes_hold(tmp_path):
    _write(tmp_path / "c", 4, 5)
    (tmp_path / "c" / "5" / "_CHECKPOINT_METADATA").write_text("[]")
    assert latest_step(tmp_path / "c") == 5


@pytest.mark.parametrize("malformed", [False, True])
def test_a_note_that_another_host_removes_first_does_no_harm(tmp_path, monkeypatch, malformed):
    note = _write(tmp_path / "c", 5) / "5" / "_CHECKPOINT_METADATA"
    read = pathlib.Path.read_bytes

    def removed_meanwhile(path):
        if path != note:
            return read(path)
        if malformed:
            note.unlink()
            return b"[]"
        note.unlink(missing_ok=True)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(note))

    monkeypatch.setattr(pathlib.Path, "read_bytes", removed_meanwhile)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        restored = restore_state(checkpoints, 5, _state(seed=1))
    assert not note.exists()
    jax.tree.map(np.testing.assert_array_equal, restored.params, _state().params)


@pytest.mark.parametrize("keep", [2, None])
def test_a_note_that_cannot_be_read_is_a_sentence(tmp_path, keep):
    note = _write(tmp_path / "c", 5) / "5" / "_CHECKPOINT_METADATA"
    note.unlink()
    note.mkdir()
    with pytest.raises(DamagedCheckpoint, match=r"c/5 is damaged \(_CHECKPOINT_METADATA cannot be"):
        Checkpoints(tmp_path / "c", keep=keep)


def test_what_was_copied_wrongly_from_the_devices_is_found(tmp_path):
    # Another number than the fingerprint was taken of, as from a host's faulty memory.
    _write(tmp_path / "c", 5)
    saved = (tmp_path / "c" / "5" / "fingerprints" / "metadata").read_text()
    shutil.rmtree(tmp_path / "c")
    _write(tmp_path / "c", 5, seed=2)
    (tmp_path / "c" / "5" / "fingerprints" / "metadata").write_text(saved)
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match="params does not match its saved fingerprint"):
            checkpoints.read(5, "params")
        with pytest.raises(DamagedCheckpoint, match="params does not match its saved fingerprint"):
            checkpoints.read(5, "params", _state().params)


def test_a_checkpoint_without_fingerprints_is_believed(tmp_path):
    _write(tmp_path / "c", 5)
    shutil.rmtree(tmp_path / "c" / "5" / "fingerprints")
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        restored = restore_state(checkpoints, 5, _state(seed=1))
    jax.tree.map(np.testing.assert_array_equal, restored.params, _state().params)


def test_a_checkpoint_set_aside_leaves_the_one_before(tmp_path):
    _write(tmp_path / "c", 4, 5)
    (tmp_path / "c-damaged" / "5").mkdir(parents=True)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.set_aside(5) == tmp_path / "c-damaged" / "5-1"
        assert checkpoints.latest_step == 4
        checkpoints.save(5, _state(seed=7).parts(), POSITION)
    assert latest_step(tmp_path / "c") == 5
    assert (tmp_path / "c-damaged" / "5-1" / "params").is_dir()


def test_a_checkpoint_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    made, fsync, rename = [], os.fsync, os.rename

    def noted_fsync(descriptor):
        made.append(pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_rename(source, target, **options):
        made.append((pathlib.Path(source), pathlib.Path(target)))
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    _write(tmp_path / "c", 5)
    (at,) = [i for i, x in enumerate(made) if isinstance(x, tuple) and x[1] == tmp_path / "c" / "5"]
    unfinished = made[at][0]
    before = {path.relative_to(unfinished) for path in made[:at] if isinstance(path, pathlib.Path)}
    final = {path.relative_to(tmp_path / "c" / "5") for path in (tmp_path / "c" / "5").rglob("*")}
    assert final - before <= {pathlib.Path("commit_success.txt")}  # which nobody reads
    assert tmp_path / "c" in made[at:]


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    _write(tmp_path / "c", 4)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_500_000))
    with (
        Checkpoints(tmp_path / "c", keep=2) as checkpoints,
        pytest.raises(UserError, match=r"c has 1.5 MB free, but 2.0 MB are needed; free"),
    ):
        checkpoints.save(5, _state().parts(), POSITION)
    with pytest.raises(UserError, match=r"has 1.5 MB free"):
        save_tree(tmp_path / "parts" / "sed", {"a": np.ones(3)})
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["4"]
    assert list((tmp_path / "parts").iterdir()) == []
    assert latest_step(tmp_path / "c") == 4


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Error writing a: [OS error 28: No space left on device]"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    ],
)
def test_a_disk_that_is_full_nonetheless_is_told(tmp_path, monkeypatch, error):
    def save(*args, **kwargs):
        raise error

    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", save)
        with pytest.raises(UserError, match=r"no space is left to write .*c; free some and run"):
            checkpoints.save(5, _state().parts(), POSITION)
