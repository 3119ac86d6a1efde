"""Files of ours, on machines that lack something."""

import hashlib
import os
import pwd

import pytest

from gradindex.errors import ResourceError
from gradindex.storage.files import atomic_write, digest_of_files
from support.needed import file_system


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def expected(path):
    one = hashlib.sha256(b"weights").hexdigest()
    return hashlib.sha256(os.fsencode(path.name) + f" {one}\n".encode()).hexdigest()


def test_a_user_without_a_home_has_no_cache(weights, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def unknown(_):
        raise KeyError("uid not found")  # as for a number that containers make up

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert digest_of_files([weights]) == expected(weights)


@pytest.mark.parametrize("home", ["/dev/null", "/proc/none"])
def test_a_home_that_can_t_be_written_to_costs_only_time(weights, monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    assert digest_of_files([weights]) == expected(weights)


def test_a_home_on_a_full_disk_costs_only_time(weights, monkeypatch, tmp_path):
    place = tmp_path / "home"
    with file_system(place, "-o", "size=4k"):
        (place / "full").write_bytes(b"x" * 4096)
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        assert digest_of_files([weights]) == expected(weights)
        with pytest.raises(ResourceError, match=r"^the disk is full: .*more could not be written, "
                                                r"which needs 9,000 bytes \(0 bytes free; "):
            atomic_write(place / "more", b"y" * 9000)
        assert not (place / "more.tmp").exists()


def test_a_model_s_file_may_be_called_anything(weights):
    other = weights.with_name(os.fsdecode(b"caf\xe9.safetensors"))
    weights.rename(other)
    assert digest_of_files([other]) == expected(other)
