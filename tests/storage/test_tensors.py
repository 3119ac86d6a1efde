"""Files of tensors: read as the safetensors library reads them, and nothing is believed."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gradindex.errors import DamagedIndexError
from gradindex.storage.tensors import DTYPES, read_metadata, read_tensors, write_tensors

TENSORS = {
    "a": torch.arange(6, dtype=torch.float64).reshape(2, 3), "b": torch.tensor(3.5).bfloat16(),
    "none": torch.zeros(0, 4), "d": torch.tensor([[1, -2]], dtype=torch.int16),
    "é": torch.tensor([1.5, float("inf")], dtype=torch.float16), "f": torch.tensor([7, 255]).byte(),
    "g": torch.tensor([-1], dtype=torch.int64), "h": torch.tensor([5], dtype=torch.int32),
    "i": torch.tensor([0.1, -0.0]),
}


def equal(one, other):
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        and tensor.shape == other[name].shape for name, tensor in one.items())


def test_what_is_written_is_what_the_library_reads(tmp_path):
    assert {tensor.dtype for tensor in TENSORS.values()} == set(DTYPES)
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {"blocks": "3"})
    assert equal(safetensors.torch.load_file(path), TENSORS)
    tensors, metadata = read_tensors(path)
    assert equal(tensors, TENSORS) and metadata == {"blocks": "3"}
    assert read_metadata(path)["blocks"] == "3"


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"other": "words"})
    tensors, metadata = read_tensors(path, check=False)
    assert equal(tensors, TENSORS) and metadata == {"other": "words"}
    with pytest.raises(DamagedIndexError, match="its own digest differs"):
        read_tensors(path)


def test_nothing_of_the_file_is_mapped_and_each_tensor_can_be_written_to(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    tensors, _ = read_tensors(path)
    assert str(path) not in Path("/proc/self/maps").read_text()
    path.write_bytes(b"")  # which would end a process that maps it
    tensors["a"] += 1
    assert torch.equal(tensors["a"], TENSORS["a"] + 1)


def changed(**about):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **about}
    return json.dumps({"x": entry}).encode()


@pytest.mark.parametrize("header, behind", [
    (changed(), b"\0" * 7), (changed(), b"\0" * 9), (changed(shape=[3]), b"\0" * 8),
    (changed(shape=[-2]), b"\0" * 8), (changed(shape=[2.0]), b"\0" * 8),
    (changed(shape=[True, 2]), b"\0" * 8), (changed(shape=5), b"\0" * 8),
    (changed(shape=[1 << 62], data_offsets=[0, 1 << 64]), b"\0" * 8),
    (changed(data_offsets=[4, 12]), b"\0" * 12), (changed(data_offsets=None), b"\0" * 8),
    (changed(dtype="F8"), b"\0" * 8), (changed(dtype=[]), b"\0" * 8), (b"[]", b""),
    (b'{"x": 3}', b""), (b'{"__metadata__": {"a": 1}}', b""), (b'{"__metadata__": 1}', b""),
    (b"\xff", b""), (b"[" * 100_000, b""), (b"", b"")])
def test_a_file_that_lies_is_refused(header, behind, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + behind)
    with pytest.raises(DamagedIndexError, match="can't be read"):
        read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, b"\xff" * 7 + b"\x7f{}"])
def test_a_file_that_ends_too_soon_is_refused(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedIndexError, match="can't be read"):
        read_tensors(path)
