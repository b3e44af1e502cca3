"""The scripts in launch/, as far as they can be checked where there is no cluster."""

import importlib.metadata
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
    _fake(tmp_path, "srun", f'echo "srun $*"; exit {status}')
    _fake(tmp_path, "scontrol", 'echo "scontrol $*"')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    ran = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", "train", "--workdir", "a b"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == status
    lines = ran.stdout.splitlines()
    assert lines[0].endswith(".venv/bin/uss-jax train --workdir a b")
    assert ("scontrol requeue 7" in lines) == requeued


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
