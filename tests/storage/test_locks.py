"""Who is refused at an index is told which process is there, as far as anyone can know."""

import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from gradindex.errors import GradindexError
from gradindex.storage import locks

HOST = socket.gethostname()


@pytest.fixture
def index(tmp_path):
    (tmp_path / "segments").mkdir()
    return tmp_path


@pytest.fixture
def silent(index):
    """A process that holds the lock and wrote no name, as on a full disk."""
    script = "import fcntl, os, sys; d = os.open(sys.argv[1], os.O_RDONLY); " \
             "fcntl.flock(d, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", script, str(index)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    yield holder.pid
    holder.communicate()


def refused(index):
    with pytest.raises(GradindexError) as caught, locks.only_writer(index, "gradindex build"):
        pass
    text = str(caught.value)
    start, end = f"another process is writing to {index}: ", ". Wait for it, or stop it first."
    assert text.startswith(start) and text.endswith(end)
    return text.removeprefix(start).removesuffix(end)


def test_a_writer_says_what_it_does(index):
    with locks.only_writer(index, "gradindex append"):
        said = refused(index)
    assert said.startswith(f"gradindex append in process {os.getpid()} on {HOST}, since 20")


def test_a_writer_that_left_no_name_is_known_to_the_kernel(index, silent):
    assert refused(index) == f"process {silent} of this machine"


def test_the_name_that_a_killed_writer_left_is_not_believed(index, silent):
    (index / "writer.json").write_text(json.dumps(
        {"pid": 1, "host": HOST, "doing": "gradindex build", "since": "2001-01-01"}))
    assert refused(index) == f"process {silent} of this machine"
    (index / "writer.json").write_text(json.dumps(
        {"pid": silent, "host": HOST, "doing": "gradindex build", "since": "2001-01-01"}))
    assert refused(index) == f"gradindex build in process {silent} on {HOST}, since 2001-01-01"


def test_shards_say_which_they_are(index):
    with locks.one_of_writers(index, 1, "one of 3 shards"), \
            locks.one_of_writers(index, 2, "one of 3 shards"):
        (index / "shard.0").write_text("process 1 on nowhere, one of 3 shards")  # of a killed one
        said = refused(index)
        with pytest.raises(GradindexError, match=rf"another process is shard 2 of the build in "
                                                 rf".*: process {os.getpid()} on {HOST}, one of 3 "
                                                 r"shards\. Every shard runs once"), \
                locks.one_of_writers(index, 2, "one of 3 shards"):
            pass
    me = f"process {os.getpid()} on {HOST}, one of 3 shards"
    assert said == f"shard 1 of a build ({me}); shard 2 of a build ({me})"


def test_a_shard_that_has_not_written_its_name_yet(index):
    descriptor = os.open(index / "shard.1", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(GradindexError, match="shard 1 of the build in .*: one that began just "
                                                 r"now\. Every shard runs once"), \
                locks.one_of_writers(index, 1, "one of 3 shards"):
            pass
    finally:
        os.close(descriptor)
