"""The scripts in launch/, as far as they can be checked where there is no cluster."""

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess

import pytest
import yaml

from uss_jax.cli.main import build_parser
from uss_jax.devices.hosts import ENVIRONMENT

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("script", "words"), [("local.sh", []), ("local.sh", ["0", "train"]), ("tpu_pod.sh", [])]
)
def test_wrong_words_are_answered_with_the_right_ones(script, words):
    environment = {**os.environ, "TPU": "a", "ZONE": "b"}
    ran = subprocess.run(
        ["bash", LAUNCH / script, *words], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 2
    assert "usage:" in ran.stderr


def _fake(folder, name, body):
    """A program that takes the place of a cluster's."""
    program = folder / name
    program.write_text(f"#!/usr/bin/env bash\n{body}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (143, True)])
def test_slurm_queues_again_what_was_stopped(tmp_path, status, requeued):
    _fake(tmp_path, "srun", f'echo "$SRUN_CPUS_PER_TASK srun $*"; exit {status}')
    _fake(tmp_path, "scontrol", 'echo "scontrol $*"')
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "64",
    }
    ran = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "train", "--workdir", "a b"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == status
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("64 srun ")
    assert lines[0].endswith(".venv/bin/uss-jax train --workdir a b")
    assert ("scontrol requeue 7" in lines) == requeued


def _run(script, *words, **environment):
    return subprocess.run(
        ["bash", script, *words],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **environment},
    )


@pytest.mark.parametrize(
    ("given", "shared"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2,5,GPU-1a,7"}, ["2,5", "GPU-1a,7"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["", ""]),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ["-1", "-1"]),
        ({"CUDA_VISIBLE_DEVICES": "2,5,7", "JAX_PLATFORMS": "cpu"}, ["2,5,7", "2,5,7"]),
        ({}, ["0,1,2", "3,4,5"]),
    ],
)
def test_processes_share_the_gpus_that_are_given(tmp_path, given, shared):
    _fake(tmp_path, "nvidia-smi", "seq 6")
    _fake(
        tmp_path,
        "python",
        f'[ "$1" != -c ] || exec echo 1; echo "$CUDA_VISIBLE_DEVICES" >{tmp_path}/$JAX_PROCESS_ID',
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    given = {"PATH": path, "PYTHON": str(tmp_path / "python"), **given}
    ran = _run(LAUNCH / "local.sh", "2", "train", **given)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert [(tmp_path / name).read_text().strip() for name in "01"] == shared


def test_gpus_that_cannot_be_shared_evenly_are_refused(tmp_path):
    _fake(tmp_path, "python", "echo 1")
    given = {"PYTHON": str(tmp_path / "python"), "CUDA_VISIBLE_DEVICES": "2,5,7"}
    ran = _run(LAUNCH / "local.sh", "2", "train", **given)
    assert ran.returncode == 2
    assert "3 GPUs cannot be shared evenly by 2 processes" in ran.stderr


@pytest.mark.parametrize(("version", "refused"), [("4 4", True), ("5 0", True), ("5 1", False)])
def test_an_old_bash_is_refused(tmp_path, version, refused):
    text = (LAUNCH / "local.sh").read_text().replace("BASH_VERSINFO", "VERSION")
    (tmp_path / "local.sh").write_text(f"VERSION=({version})\n{text}")
    ran = _run(tmp_path / "local.sh")
    assert ran.returncode == 2
    assert ("bash 5.1 or newer is needed" in ran.stderr) == refused


@pytest.fixture
def checkout(tmp_path):
    """A folder whose .venv has a Python that writes down how it is called."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "programs").mkdir()
    for name in ("setup.cfg", "pyproject.toml"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9, 1e9))
    _python(tmp_path)
    return tmp_path


def _python(checkout, without="none"):
    """Makes the Python of .venv, which has no module `without`."""
    body = f'echo "$2" >>{checkout}/calls; [ "$2" != "{without}" ]'
    _fake(checkout / ".venv" / "bin", "python", body)


def _make_environment(checkout, extra=""):
    """Returns the run of make_environment, and the modules that it called."""
    (checkout / "calls").write_text("")
    (checkout / "script").write_text(
        f'cd "{checkout}"; source "{LAUNCH}/environment.sh"; make_environment {extra}'
    )
    path = f"{checkout}/programs:{os.environ['PATH']}"
    ran = _run(checkout / "script", PATH=path)
    return ran, (checkout / "calls").read_text().split()


def test_an_installation_is_repeated_only_if_what_it_needs_has_changed(checkout):
    _fake(checkout / "programs", "df", "exit 1")
    _fake(checkout / "programs", "python3", "exit 1")
    for extra, calls in (("", ["pip", "pip"]), ("", []), ("test", ["pip", "pip"]), ("test", [])):
        ran, called = _make_environment(checkout, extra)
        assert (ran.returncode, ran.stderr, called) == (0, "", calls)
    os.utime(checkout / "setup.cfg", (4e9, 4e9))
    assert _make_environment(checkout)[1] == ["pip", "pip"]


def test_an_environment_of_the_user_is_kept(checkout):
    kept = checkout / ".venv" / "kept"
    kept.touch()
    _python(checkout, without="pip")
    ran, called = _make_environment(checkout)
    assert (ran.returncode, called) == (1, ["pip", "ensurepip", "pip"])
    assert "Installation failed" in ran.stderr
    (checkout / ".venv" / "bin" / "python").write_text(
        '#!/usr/bin/env bash\n[ $# -gt 0 ] && [ -z "$2" ]'
    )
    ran, _ = _make_environment(checkout)
    assert ran.returncode == 1
    assert ".venv has no pip and cannot get it: install pip there" in ran.stderr
    (checkout / ".venv" / "bin" / "python").unlink()
    ran, _ = _make_environment(checkout)
    assert ran.returncode == 1
    assert ".venv has no working Python: remove it" in ran.stderr
    assert kept.exists()


@pytest.mark.parametrize(
    ("version", "megabytes", "said"),
    [("1", "9999", "Python 3.11 or newer is needed"), ("0", "2999", "3000 MB of free disk space")],
)
def test_a_new_environment_needs_python_and_space(tmp_path, version, megabytes, said):
    (tmp_path / "programs").mkdir()
    _fake(tmp_path / "programs", "python3", f"exit {version}")
    _fake(tmp_path / "programs", "df", f"echo; echo a b c {megabytes}")
    ran, _ = _make_environment(tmp_path)
    assert ran.returncode == 1
    assert said in ran.stderr
    assert not (tmp_path / ".venv").exists()


def test_scripts_and_studies_of_a_batch_of_six_run_on_cpus():
    for name in ("quickstart.sh", "demo.sh"):
        assert 'JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"' in (LAUNCH / name).read_text(), name
    for study in ("asked", "words", "separators", "scaling_study"):
        content = json.loads((LAUNCH / f"{study}.json").read_text())
        assert content["set"]["JAX_PLATFORMS"] == "cpu", study


def test_the_quickstart_leaves_what_the_scaling_study_reads():
    script = (LAUNCH / "quickstart.sh").read_text()
    study = json.loads((LAUNCH / "scaling_study.json").read_text())["set"]
    for key in ("anchors.table", "query.table"):
        place = study[key].replace("out/seed0", "$runs")
        assert f'--config.{key}="{place}"' in script
    assert f'--out "{study["eval.pairs"].replace("out/seed0", "$runs")}"' in script


def test_a_pod_gets_the_same_words_on_every_worker(tmp_path):
    _fake(tmp_path, "gcloud", 'printf "%s\\n" "$@"')
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TPU": "a",
        "ZONE": "b",
    }
    ran = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh", "train", "--workdir", "/mnt/a b"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 0
    lines = ran.stdout.splitlines()
    assert "--worker=all" in lines
    assert "/mnt/a\\ b" in lines[-1]  # quoted for the shell over there


def test_the_job_set_is_one_whose_processes_find_each_other():
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry for entry in container["env"]}
    assert set(ENVIRONMENT.values()) <= set(environment)
    host, port = environment["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    name = manifest["metadata"]["name"]
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert container["ports"] == [{"containerPort": int(port)}]
    assert int(environment["JAX_NUM_PROCESSES"]["value"]) == job["completions"]
    assert "completion-index" in environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    # The chips of all hosts make up the slice.
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(container["resources"]["limits"]["google.com/tpu"]) * job["completions"]
    assert chips == int(rows) * int(columns)
    command, *words = container["args"]
    words = [word for word in words if not word.startswith("--config.")]
    assert build_parser(command).parse_args(words).workdir.startswith("/shared/")


def test_the_image_is_made_of_what_is_here():
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.M):
        for source in line.split():
            assert (LAUNCH.parent / source).exists(), source
    extras = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    assert {"cuda12", "cuda13", "tpu"} <= set(extras)
    assert re.search(r"^ARG DEVICE=(\S+)$", text, re.M)[1] in extras


def test_scripts_say_first_how_they_are_used():
    for script in SCRIPTS:
        if script.name != "environment.sh":
            head = script.read_text().splitlines()[:6]
            assert any(f"launch/{script.name}" in line for line in head), script.name
