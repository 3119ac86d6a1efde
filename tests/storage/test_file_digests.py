"""Digests of large files: remembered, and never believed of a file that changed."""

import json
import os
import time

import pytest

from gradindex.storage import files
from gradindex.storage.files import digest_of_files, sha256


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where digests are remembered, of files however young."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SETTLED", -1)
    return tmp_path / "cache" / "gradindex" / "digests.json"


def test_a_change_is_noticed_though_size_and_time_are_kept(tmp_path, cache):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(10_000))
    os.utime(file, (1, 1))
    before, first = file.stat(), digest_of_files([file])
    assert list(json.loads(cache.read_text()).values()) == [sha256(file)]
    time.sleep(0.05)  # longer than a tick of a disk's clock
    with file.open("r+b") as opened:
        opened.seek(4096)
        opened.write(b"other")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == \
        (before.st_size, before.st_mtime_ns, before.st_ino)
    assert digest_of_files([file]) != first
    assert sha256(file) in json.loads(cache.read_text()).values()


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, monkeypatch):
    """Two changes within a tick leave one time: what was read between them must not stay."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SETTLED", 60 * 10**9)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    digest_of_files([file])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [
    "[1,2]", "null", '"text"', "3", "", "{", "\x00\x01", '{"a": 1}', '{"a": {"b": []}}', "[" * 9999,
    '{"a": "short"}', "NaN"])
def test_a_cache_that_is_none_is_ignored_and_written_anew(tmp_path, cache, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    assert digest_of_files([file]) == digest_of_files([file])
    assert list(json.loads(cache.read_text()).values()) == [sha256(file)]


def test_a_remembered_digest_is_believed(tmp_path, cache):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    first = digest_of_files([file])
    known = json.loads(cache.read_text())
    cache.write_text(json.dumps(dict.fromkeys(known, "0" * 64)))
    assert digest_of_files([file]) != first


def test_names_that_are_not_utf_8(tmp_path, cache):
    path = tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"m\xe9.safetensors")
    path.parent.mkdir()
    path.write_bytes(b"weights")
    assert digest_of_files([path]) == digest_of_files([path])
    assert len(json.loads(cache.read_text())) == 1
