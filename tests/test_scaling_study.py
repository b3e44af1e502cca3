"""The scaling study with a trainer that is quick: its loss is a power law of compute."""

import importlib.util
import json
import pathlib
import signal
import sys
import threading

import numpy as np
import pytest

from tests.tiny import CONFIGS
from uss_jax.errors import UserError

PATH = CONFIGS.parent / "launch" / "scaling_study.py"
SPEC = importlib.util.spec_from_file_location("scaling_study", PATH)
scaling_study = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scaling_study)

# Takes the words of `uss-jax train`.
TRAINER = """
import json, os, pathlib, sys
leaves = dict(w.removeprefix("--config.").split("=") for w in sys.argv[1:] if "--config." in w)
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
workdir.mkdir(parents=True, exist_ok=True)
steps, batch = int(leaves["total_steps"]), int(leaves["global_batch"])
flops = 1e9 * batch * eval(leaves["separator.channels"])[0]
with open(workdir / "starts", "a") as starts:
    print(file=starts)
if os.environ.get("FAIL") == workdir.name:
    sys.exit(3)
lines = [{"step": n, "eval/l1": 50 * (flops * n) ** -0.25} for n in (steps // 2, steps)]
for line in lines:
    line |= {"loss": -3.0, "eval/sdri": 4.0, "eval/si_sdri": 2.5, "eval/half_sdri": 3.01}
lines.insert(1, {"step": steps // 2 + 1, "skipped_grad_norm": 3.0})
if leaves["eval.pairs"] == "none":
    lines = [{k: of for k, of in line.items() if "eval" not in k} for line in lines]
(workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
entry = {"parameters": 5, "devices": int(os.environ["JAX_NUM_CPU_DEVICES"])}
entry |= {"flops_per_step": flops, "items_per_second": 2.0}
(workdir / "throughput.json").write_text(json.dumps([entry]))
(workdir / "config.json").write_text(json.dumps({"training": {"global_batch": batch}}))
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    content = {
        "config": "configs/quickstart.py",
        "launch": [sys.executable, str(tmp_path / "trainer.py")],
        "set": {
            "total_steps": 10,
            "eval.pairs": "pairs",
            "eval.every_steps": 5,
            "JAX_NUM_CPU_DEVICES": 2,
        },
        "grid": {
            "width": {
                "4": {"separator.channels": [4, 4]},
                "8": {"separator.channels": [8, 8], "total_steps": 20},
            },
            "batch": {"8": {"global_batch": 8}, "16": {"global_batch": 16}},
        },
    }
    path = tmp_path / "study.json"
    path.write_text(json.dumps(content))
    return path


def test_a_grid_becomes_one_table_and_one_plot_and_goes_on(study, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("FAIL", "width-8_batch-8")
    with pytest.raises(UserError, match="width-8_batch-8: training ended with status 3"):
        scaling_study.run(study, out)
    assert not (out / "table.md").exists()
    monkeypatch.delenv("FAIL")
    said = scaling_study.run(study, out)
    assert "mean absolute error (l1) ~ compute ^ -0.250 (standard error 0.000)" in said

    results = json.loads((out / "results.json").read_text())
    assert [(row["width"], row["batch"]) for row in results["runs"]] == [
        ("4", "8"),
        ("4", "16"),
        ("8", "8"),
        ("8", "16"),
    ]
    assert [row["flops"] for row in results["runs"]] == [3.2e11, 6.4e11, 1.28e12, 2.56e12]
    assert {row["devices"] for row in results["runs"]} == {2}
    rows = (out / "table.md").read_text().splitlines()
    assert len(rows) == 2 + 4
    assert rows[2].startswith("| 4 | 8 | 5 | 10 | 2 | 3.2e+11 |")
    assert rows[0].endswith("| l1 | sdri | si_sdri | half_sdri |")
    assert rows[2].endswith("| 0.06648 | 4 | 2.5 | 3.01 |")
    assert (out / "scaling.png").stat().st_size > 5000

    content = json.loads(study.read_text())
    content["set"]["schedule.learning_rate"] = 0.1
    study.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"made by another study .* give another --out"):
        scaling_study.run(study, out)


@pytest.mark.parametrize("changed", [{"eval.pairs": ""}, {"eval.every_steps": 4}])
def test_runs_that_do_not_evaluate_themselves_at_the_end_are_refused(study, tmp_path, changed):
    content = json.loads(study.read_text())
    content["set"] |= changed
    study.write_text(json.dumps(content))
    with pytest.raises(UserError, match="width-4_batch-8 is not evaluated after its last step"):
        scaling_study.run(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_last_evaluation_is_said(study, tmp_path):
    content = json.loads(study.read_text())
    content["set"]["eval.pairs"] = "none"
    study.write_text(json.dumps(content))
    with pytest.raises(UserError, match="width-4_batch-8 has no evaluation after its last step"):
        scaling_study.run(study, tmp_path / "out")


def test_sigterm_is_passed_on_to_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_study, "_ending", threading.Event())
    before = signal.getsignal(signal.SIGTERM)
    try:
        scaling_study.heed_sigterm()
        with pytest.raises(SystemExit, match="143"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    script = (
        "import os, pathlib, signal, sys, time\n"
        f"place = pathlib.Path({str(tmp_path)!r})\n"
        "def save(*_): (place / 'saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(place / 'ready').touch()\n"
        "time.sleep(60)\n"
    )

    def stop():
        while not (tmp_path / "ready").exists():
            pass
        scaling_study.end_children()

    threading.Thread(target=stop).start()
    with pytest.raises(UserError, match="a run ended with status 143"):
        scaling_study.call([sys.executable, "-c", script], "a run", None)
    assert (tmp_path / "saved").exists()
    with pytest.raises(UserError, match="a run ended with status"):  # nor does a later one go on
        scaling_study.call(["sleep", "60"], "a run", None)


def test_the_exponent_comes_with_how_sure_it_is():
    rng = np.random.default_rng(0)
    compute = np.logspace(10, 14, 200)
    noisy = 3 * compute**-0.1 * np.exp(0.05 * rng.standard_normal(200))
    fit = scaling_study.power_law(compute, noisy)
    wanted, covariance = np.polyfit(np.log(compute), np.log(noisy), 1, cov=True)
    assert fit["exponent"] == pytest.approx(wanted[0])
    assert fit["exponent_error"] == pytest.approx(covariance[0, 0] ** 0.5)
    assert np.log(fit["scale"]) == pytest.approx(wanted[1])
    assert abs(fit["exponent"] + 0.1) < 3 * fit["exponent_error"]


def test_too_few_points_make_no_law():
    assert scaling_study.power_law(np.array([1e9, 1e10, 1e11]), np.array([3.0, 2.0, 1.0])) is None
    assert scaling_study.power_law(np.full(5, 1e9), np.arange(1.0, 6.0)) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be an object with config and grid"),
        ('{"config": "a", "grid": {}, "steps": 3}', "must be an object with config and grid"),
        ('{"config": "a", "grid": {"width": {"4": 4}}}', "grid.width must be an object"),
        ('{"config": "a", "grid": {"width": {}}}', "grid.width must be an object"),
    ],
)
def test_what_is_no_study_is_said(tmp_path, content, said):
    path = tmp_path / "study.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        scaling_study.read_study(path)


def test_the_study_that_comes_along_is_one():
    study = scaling_study.read_study(pathlib.Path(PATH).with_suffix(".json"))
    runs = list(scaling_study.runs_of(study))
    assert len(runs) >= scaling_study.LEAST_POINTS
