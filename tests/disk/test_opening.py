"""Files that people name and that are no files: pipes and devices."""

import os
import pathlib
import threading

import pytest

from uss_jax.anchors.table import read_header
from uss_jax.bundles.bundle import read_bundle
from uss_jax.cli.inspection import inspect
from uss_jax.data.label_map import read_label_map
from uss_jax.data.labels import read_file_list, read_groups, read_labels
from uss_jax.data.schema import read_schema
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError
from uss_jax.separation.banks import load_bank
from uss_jax.separation.input_files import find_input_files

READERS = {
    "labels": lambda path: read_labels(path, path.parent, "train"),
    "label map": read_label_map,
    "file list": read_file_list,
    "schema": read_schema,
    "groups": read_groups,
    "list of recordings": lambda path: find_input_files([], [path]),
    "bank": load_bank,
    "anchor table": read_header,
    "bundle": lambda path: read_bundle(path.parent),
    "inspect": inspect,
}


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_for_a_pipe_that_nobody_writes_to(tmp_path, reader):
    path = tmp_path / ("config.json" if reader == "bundle" else "pipe")
    os.mkfifo(path)
    failed = []

    def read():
        try:
            READERS[reader](path)
        except UserError as error:
            failed.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    assert len(failed) == 1


def test_a_pipe_with_a_writer_is_read_to_its_end(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    holder = os.open(path, os.O_RDWR)  # as a shell holds the pipe of <(...) until its reader has it
    writer = threading.Thread(
        target=lambda: (os.write(holder, b"a.wav\nb.wav\n"), os.close(holder))
    )
    with open(path, encoding="utf-8", opener=at_once) as file:
        writer.start()
        assert file.read() == "a.wav\nb.wav\n"
    writer.join()


@pytest.mark.parametrize("reader", ["labels", "label map", "file list", "groups"])
def test_a_device_without_an_end_is_refused(reader):
    with pytest.raises(UserError, match="cannot be read"):
        READERS[reader](pathlib.Path("/dev/zero"))
