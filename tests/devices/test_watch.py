"""Two processes, of which one is lost or ends early, with limits of seconds and without nets."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.tiny import CONFIGS
from uss_jax.devices.watch import Watch

LOST = r"uss-jax: host {host} \(.+\) was lost: .+; the last checkpoint is step 40: the same command"
LOST += r" resumes from there\n"
ENDED = LOST.replace("was lost: .+", "ended: {why}")


def _spare():
    """A process that imports and waits to be told what it is."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.devices.host"],
        cwd=CONFIGS.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def spares():
    """Processes that import, for seconds, while tests wait for others."""
    spares = []
    yield spares
    for spare in spares:
        with spare:
            spare.kill()


@pytest.fixture
def start_one(tmp_path, spares):
    """Starts one of two processes."""
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    (tmp_path / "checkpoints" / "60.orbax-checkpoint-tmp").mkdir()
    with contextlib.ExitStack() as stack:
        # Stays bound: nobody else is given the port, and JAX's server can share it.
        held = stack.enter_context(socket.socket())
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{held.getsockname()[1]}",
            "JAX_NUM_PROCESSES": "2",
        }

        def start_one(process, *whats):
            host = stack.enter_context(spares.pop() if spares else _spare())
            stack.callback(host.kill)
            of_process = {**environment, "JAX_PROCESS_ID": str(process)}
            about = {"environment": of_process, "words": [str(tmp_path), *whats]}
            with host.stdin as told:
                print(json.dumps(about), file=told)
            host.stdin = None  # for communicate()
            return host

        yield start_one


@pytest.fixture
def start(start_one, spares):
    """Starts both and returns them once they have met."""

    def start(*whats):
        hosts = [start_one(process, *whats) for process in range(2)]
        for host in hosts:
            assert host.stdout.readline() == "joined\n", host.stderr.read()
        spares.extend(_spare() for _ in range(2 - len(spares)))
        return hosts

    return start


def _ended(host, timeout=180):
    return host.communicate(timeout=timeout)[1], host.returncode


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_is_killed_or_hangs_ends_the_other_though_it_hangs_too(start, lost, how):
    hosts = start("hang", "hang")
    hosts[lost].send_signal(how)
    err, status = _ended(hosts[1 - lost])
    assert re.fullmatch(LOST.format(host=lost), err), err
    assert status == 1


@pytest.mark.long
@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize(
    ("what", "why"),
    [("bad", "/data/shard-3 cannot be read"), ("bug", "TypeError: of our own making")],
)
def test_an_error_on_one_host_ends_the_other_which_names_it(start, bad, what, why):
    hosts = start(*(what if process == bad else "hang" for process in range(2)))
    err, status = _ended(hosts[1 - bad])
    assert re.fullmatch(ENDED.format(host=bad, why=why), err), err
    assert status == 1
    err, status = _ended(hosts[bad])
    assert status == 1
    if what == "bad":
        assert err == f"uss-jax: {why}\n"
    else:
        assert err.rstrip().endswith(why)


@pytest.mark.long
def test_an_error_on_all_hosts_is_each_ones_own_and_ends_them_at_once(start):
    hosts = start("bad", "bad", "patient")
    begun = time.monotonic()
    for host in hosts:
        assert _ended(host) == ("uss-jax: /data/shard-3 cannot be read\n", 1)
    assert time.monotonic() - begun < 120


@pytest.mark.long
@pytest.mark.parametrize("other", ["broken", "hang"])
def test_a_collective_that_fails_while_all_hosts_live_is_an_error_with_its_traceback(start, other):
    hosts = start("broken", other)
    err, status = _ended(hosts[0])
    assert re.search(r"Traceback.*INTERNAL: no partner\n$", err, re.S), err
    assert status == 1
    assert _ended(hosts[1])[1] == 1


@pytest.mark.long
@pytest.mark.parametrize("lost", [0, 1])
def test_a_collective_that_fails_because_a_host_is_lost_gives_no_traceback(start, tmp_path, lost):
    hosts = start(*("hang" if process == lost else "breaks" for process in range(2)))
    hosts[lost].kill()
    (tmp_path / "lost").touch()
    err, status = _ended(hosts[1 - lost])
    assert re.fullmatch(LOST.format(host=lost), err), err
    assert status == 1


@pytest.mark.long
@pytest.mark.parametrize("whats", [("busy", "late"), ("late", "busy")])
def test_a_host_that_is_busy_for_long_is_not_lost(start, whats):
    assert [_ended(host) for host in start(*whats)] == [("", 0)] * 2


@pytest.mark.long
@pytest.mark.parametrize("interrupted", [0, 1])
def test_ctrl_c_on_one_host_ends_both(start, interrupted):
    hosts = start("hang", "hang")
    # By then it waits: what comes just before a wait is heard by the second thread alone, which
    # ends the process after its patience, and tells no other host.
    time.sleep(2)
    hosts[interrupted].send_signal(signal.SIGINT)
    assert _ended(hosts[interrupted]) == ("uss-jax: interrupted\n", 130)
    err, status = _ended(hosts[1 - interrupted])
    assert re.fullmatch(ENDED.format(host=interrupted, why="interrupted"), err), err
    assert status == 1


@pytest.mark.long
@pytest.mark.parametrize("process", [0, 1])
def test_a_host_whose_other_never_starts_says_so(start_one, process):
    err, status = _ended(start_one(process, "alone", "alone"))
    assert err.startswith("uss-jax: the 2 hosts did not all connect within 8 seconds: ")
    assert err.count("\n") == 1
    assert status == 1


def test_a_host_that_never_sends_a_heartbeat_is_lost_too():
    written = {}

    class Store:
        def key_value_set(self, key, value, allow_overwrite):
            written[key] = value

    watch = Watch(Store(), 0, 3, "localhost:1")
    for now in (0.0, 30.0, 61.0, 90.0):
        watch._read_beats = {0: f"{now} a", 2: f"{now} c"}
        watch._note_lost(now)
        assert ("uss_jax/end/1" in written) == (now > 60)
    assert list(written) == ["uss_jax/end/1"]
    assert written["uss_jax/end/1"].startswith("host 1 (unknown) was lost: nothing was heard from")
