import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.tiny import RATE, noise, write_records, write_separator
from uss_jax.anchors.table import COLUMNS, write_table
from uss_jax.bundles import bundle
from uss_jax.bundles.bundle import net_hash, read_bundle
from uss_jax.bundles.checkpoints import Checkpoints, load_tree, save_tree
from uss_jax.cli import inspection
from uss_jax.cli.inspection import inspect
from uss_jax.cli.main import main
from uss_jax.data.indexing import build_index
from uss_jax.data.schema import Schema
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.separation.banks import Bank, write_bank
from uss_jax.training.state import parameter_count


def test_a_bundle(tmp_path, capsys):
    path = write_separator(tmp_path / "soft", "soft")
    save_file({"separator/x": np.zeros(2, np.float32)}, path / "foreign.safetensors")
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"{RATE} Hz" in printed
    assert "condition: soft" in printed
    assert "1 tensor of the converted checkpoint" in printed
    config = read_bundle(path).config
    for part in ("separator", "query", "sed"):
        params = read_bundle(path).variables(part)["params"]
        assert f"{parameter_count(params):,} parameters, sha256 {config['hashes'][part]}" in printed
        for module in params:
            assert f"  {module} " in printed
    assert "damaged" not in printed


def test_a_changed_bundle_is_noticed(tmp_path):
    path = write_separator(tmp_path / "one_hot", "one_hot")
    changed = read_bundle(path).variables("separator")
    changed["params"]["after_conv"]["bias"] = changed["params"]["after_conv"]["bias"] + 1
    save_tree(path / "separator", changed)
    assert len([line for line in inspect(path) if "changed or is damaged" in line]) == 1


def test_each_part_is_read_and_hashed_once(tmp_path, monkeypatch):
    read, hashed = [], []

    def counted_read(folder):
        read.append(folder.name)
        return load_tree(folder)

    def counted_hash(variables):
        hashed.append(net_hash(variables))
        return hashed[-1]

    path = write_separator(tmp_path / "soft", "soft")
    monkeypatch.setattr(bundle, "load_tree", counted_read)
    for module in (bundle, inspection):
        monkeypatch.setattr(module, "net_hash", counted_hash)
    inspect(path)
    assert sorted(read) == ["query", "sed", "separator"]
    hashes = read_bundle(path).config["hashes"]
    # The fourth hash is that of the query net as a whole, which query banks state.
    assert hashed[:3] == [hashes[part] for part in ("separator", "query", "sed")]
    assert len(hashed) == 4


def test_a_net_that_cannot_be_opened_is_told(tmp_path):
    """Its config says another size than its arrays have."""
    path = write_separator(tmp_path / "soft", "soft")
    config = json.loads((path / "config.json").read_text())
    config["sed"]["model"]["classes"] = 50
    (path / "config.json").write_text(json.dumps(config))
    (words,) = [line for line in inspect(path) if line.startswith("cannot be used")]
    assert "sed" in words


def test_a_workdir_tells_its_history(tmp_path):
    path = write_separator(tmp_path / "run", "one_hot")
    config = json.loads((path / "config.json").read_text())
    data = {"records": "data/x", "split": "train"}
    config["training"] = {"total_steps": 5000, "global_batch": 16, "seed": 7, "data": data}
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n{"step": 20, "loss": 0.5}\n')
    text = "\n".join(inspect(path))
    assert "0 of 5,000 steps, global batch 16" in text
    assert "data: data/x (train), seed 7" in text
    assert "metrics of step 20: loss 0.5" in text


def test_any_checkpoint_of_a_run_stands_for_the_run_at_its_step(tmp_path):
    path = write_separator(tmp_path / "run", "one_hot")
    whole = load_tree(path / "separator")
    shutil.rmtree(path / "separator")
    config = json.loads((path / "config.json").read_text())
    del config["hashes"]["separator"]
    config["training"] = {}
    steps = "".join(f'{{"step": {step}, "sdri": {step / 100}}}\n' for step in (200, 300, 400, 500))
    (path / "metrics.jsonl").write_text(steps)
    (path / "config.json").write_text(json.dumps(config))
    hashes = {}
    with Checkpoints(path / "checkpoints", keep=2) as checkpoints:
        for step in (300, 500):
            parts = {
                item: {"separator": jax.tree.map(lambda x, by=step: x * np.float32(by), tree)}
                for item, tree in whole.items()
            }
            hashes[step] = net_hash({item: tree["separator"] for item, tree in parts.items()})
            checkpoints.save(step, parts, {"next": step})
    at = {step: path / "checkpoints" / str(step) for step in hashes}
    for step, digest in hashes.items():
        bundle = read_bundle(at[step])
        assert bundle.step == step
        assert net_hash(bundle.separator()[1]) == digest
        text = "\n".join(inspect(at[step]))
        assert f"{at[step]}: separator checkpoint, " in text
        assert f"sha256 {digest}" in text
        assert f"sha256 {hashes[800 - step]}" not in text
        assert f"metrics of step {step}: sdri {step / 100:g}" in text
    assert read_bundle(path).step == 500
    assert f"{path}: separator workdir, " in inspect(path)[0]
    with pytest.raises(UserError, match=r"run has no checkpoint of step 400; it has 300, 500"):
        read_bundle(path / "checkpoints" / "400")


def test_metrics_of_an_old_step_are_found_far_from_the_end(tmp_path):
    """Those of one step, also if its evaluation was made up for later."""
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": {step}.5, "{"x" * 500}": 0}}' for step in range(1, 1001)]
    lines.insert(4, '{"step": 4, "eval/sdri": 3}')
    path.write_text("\n".join(lines))
    for step in (4, 5, None):
        found = inspection._last_metrics(path, step)
        assert found["step"] == (step or 1000)
        assert found["loss"] == found["step"] + 0.5
        assert found.get("eval/sdri") == (3 if step == 4 else None)
    assert inspection._last_metrics(path, 0) is None


def test_a_metric_that_no_float_can_hold_is_left_out(tmp_path):
    path = write_separator(tmp_path / "run", "one_hot")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "training": {}}))
    (path / "metrics.jsonl").write_text(f'{{"step": 20, "loss": 1{"0" * 400}, "sdri": 2.5}}\n')
    assert "metrics of step 20: sdri 2.5" in inspect(path)


def test_the_classes_and_lengths_of_records_are_shown(tmp_path):
    clips = [("a", noise(1, 0.5), [0, 72]), ("b", noise(2, 1.5), [0]), ("c", noise(3, 0.75), [0])]
    write_records(tmp_path, "test", clips)
    text = "\n".join(inspect(tmp_path))
    assert "lengths: 0.50 to 1.50 s, median 0.75 s" in text
    dog = load_ontology().class_names[72]
    assert f"clips of each class: Speech (3); {dog} (1)\n" in f"{text}\n"
    clips = [(f"{k}.{at}", noise(1, 0.1), [k]) for k in range(20) for at in range(1 + (k == 19))]
    clips += [(f"more{at}", noise(1, 0.1), [0]) for at in range(2)]
    write_records(tmp_path, "test", clips)
    lines = inspect(tmp_path)
    names = load_ontology().class_names
    shown = [f"{names[0]} (3)", f"{names[19]} (2)", *(f"{names[k]} (1)" for k in range(1, 7))]
    assert lines[-3] == f"    classes with the most clips: {'; '.join(shown)}"
    shown = "; ".join(f"{names[k]} (1)" for k in range(11, 19))
    assert lines[-2] == f"    with the fewest: {shown}"
    assert lines[-1] == "    20 classes with clips, 507 of 527 without"


def test_a_split_whose_shards_have_names_of_their_own_is_shown(tmp_path):
    write_records(tmp_path, "test", [("a", noise(1, 0.5), [0])])
    write_records(tmp_path / "other", "dev", [("b", noise(2, 0.5), [3]), ("c", noise(3, 1), [3])])
    (tmp_path / "other" / "toy-dev.tfrecord-00000-of-00001").rename(tmp_path / "lab.tfrecord")
    build_index(tmp_path, "train", Schema(sample_rate=RATE, shards="*.tfrecord", split="train"))
    text = "\n".join(inspect(tmp_path))
    assert "  test: 1 clip, 0.5 s, 1 label" in text
    assert "  train: 2 clips, 1.5 s, 2 labels of 1 class, 1 shard, index" in text


def test_records_tables_and_banks(tmp_path):
    index = write_records(tmp_path / "records", "test", [("a", noise(1, 0.9), [72, 3])])
    text = "\n".join(inspect(tmp_path / "records"))
    assert "8000 Hz" in text
    assert "test: 1 clip, 0.9 s, 2 labels of 2 classes, 1 shard," in text
    assert index.digest in text

    columns = {name: np.zeros((3, 1) if "k" in of.shape else 3) for name, of in COLUMNS.items()}
    header = {"sed_hash": "a", "index_digest": "b", "sample_rate": RATE}
    header |= {"segment_samples": 12, "clip_samples": 12}
    write_table(tmp_path / "anchors.npz", header, columns)
    assert inspect(tmp_path / "anchors.npz")[0].endswith("anchor table, 3 rows")

    write_bank(tmp_path / "b.npz", Bank(("Dog",), np.zeros((1, 6)), "embedding", "abc", "by hand"))
    text = "\n".join(inspect(tmp_path / "b.npz"))
    assert "1 vector of width 6" in text
    assert "by hand" in text


def test_anything_else_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be inspected; give"):
        inspect(tmp_path)
    (tmp_path / "x.npz").write_text("no")
    with pytest.raises(UserError, match="cannot be read"):
        inspect(tmp_path / "x.npz")


def test_texts_of_a_file_are_shown_without_control_characters(tmp_path, capsys):
    path = write_separator(tmp_path / "one_hot", "one_hot")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "licence": "mine\x1b[31m\nother: x"}))
    bank = Bank(("a\nb\x1b[0m",), np.zeros((1, 6), np.float32), "embedding", "0" * 64)
    write_bank(tmp_path / "bank.npz", bank)
    for words, shown in (
        (["inspect", path], r"licence: mine\x1b[31m\nother: x"),
        (["query", "list", tmp_path / "bank.npz"], r"  a\nb\x1b[0m"),
    ):
        assert main([str(word) for word in words]) == 0
        printed = capsys.readouterr().out
        assert shown in printed.split("\n")
        assert "\x1b" not in printed
