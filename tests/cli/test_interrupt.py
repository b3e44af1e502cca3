import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.tiny import CONFIGS

# Of each the way in which the main thread cannot hear of Ctrl-C at once.
DEAF = {
    "a compiler": "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    "a destructor": """
        class Noisy:
            def __del__(self):
                print("here", flush=True)
                time.sleep(60)
        Noisy()
        time.sleep(60)
    """,
    "nothing": "time.sleep(60)",
}
PROGRAM = """
import hashlib, multiprocessing, sys, time
from uss_jax.disk.atomic import replacing, replacing_folder
from uss_jax.cli import main
from uss_jax.cli.interrupt import end_on_interrupt

def work(args):
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    with replacing(sys.argv[1] + "/a.txt") as file, replacing_folder(sys.argv[1] + "/b") as folder:
        file.write_text("half")
        folder.mkdir()
        (folder / "c").write_text("half")
        print(child.pid, flush=True)
{deaf}

if __name__ == "__main__":
    main.build_parser = lambda command: type("Parser", (), dict(
        parse_args=staticmethod(lambda words: type("Args", (), dict(run=staticmethod(work))))
    ))
    sys.argv[1:] = [sys.argv[1]]
    main.main.__globals__["COMMANDS"] = dict.fromkeys(sys.argv[1:])
    main.command()
"""


def _ended(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("deaf", "number", "word"),
    [(deaf, signal.SIGINT, "interrupted") for deaf in DEAF]
    + [("a compiler", signal.SIGTERM, "terminated")],
)
def test_a_signal_ends_the_process_with_a_word_and_nothing_half_written(
    tmp_path, start, deaf, number, word
):
    body = textwrap.indent(textwrap.dedent(DEAF[deaf]), " " * 8)
    (tmp_path / "program.py").write_text(PROGRAM.format(deaf=body))
    out = tmp_path / "out"
    out.mkdir()
    process = start(
        [sys.executable, tmp_path / "program.py", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent)},
    )
    child = int(process.stdout.readline())
    time.sleep(0.3)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert error == f"uss-jax: {word}\n"
    assert process.returncode == 128 + number
    assert list(out.iterdir()) == []
    for _ in range(100):
        if _ended(child):
            break
        time.sleep(0.1)
    assert _ended(child)


def test_a_second_ctrl_c_does_not_wait(start):
    program = """
import time
from uss_jax.cli.interrupt import end_on_interrupt

end_on_interrupt()
said = "ready"
while True:
    try:
        print(said, flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        said = "heard"
"""
    process = start(
        [sys.executable, "-c", program],
        cwd=CONFIGS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "heard\n"
    time.sleep(4)  # so that it counts as pressed again, however late the first was noted
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
