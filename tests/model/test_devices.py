"""Devices that aren't there, or can't do what is asked of them: one line each, before the data."""

from typing import Any

import pytest
import torch

import gradindex
from gradindex.errors import InputError
from gradindex.model import devices
from gradindex.model.devices import check_dtype, device_called, has_fast_float64
from gradindex.model.model_source import ModelSource
from support.indexes import SMALL

CARD = torch.device("cuda", 0)


def refused(message: str, call: Any) -> None:
    with pytest.raises(InputError, match=message) as told:
        call()
    assert "\n" not in str(told.value)


def test_without_a_gpu(monkeypatch):
    refused(r"^--device cuda: this PyTorch .* sees no CUDA GPU\. Use --device cpu, or install a "
            "CUDA build", lambda: device_called("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). "
                           "Please update your GPU driver by downloading and installing a new one")

    monkeypatch.setattr(torch.cuda, "init", init)
    refused(r"sees no CUDA GPU: The NVIDIA driver on your system is too old \(found version "
            r"11040\)\. Use --device cpu, or see to the driver", lambda: device_called("cuda"))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    refused("see which GPUs there are", lambda: device_called("cuda:1"))


@pytest.mark.parametrize("capability, can, fast", [
    ((6, 1), False, False), ((7, 0), False, True), ((7, 5), False, False), ((8, 0), True, True),
    ((8, 9), True, False), ((9, 0), True, True), ((12, 0), True, False),
])
def test_what_a_card_computes_in(monkeypatch, capability, can, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    assert has_fast_float64(CARD) == fast
    check_dtype(CARD, torch.float16)
    if can:
        check_dtype(CARD, torch.bfloat16)
    else:
        refused(r"--dtype bfloat16: a card \(compute capability .*Use --dtype float16 or float32",
                lambda: check_dtype(CARD, torch.bfloat16))


def test_what_only_a_gpu_takes(model_folder, data_file, tmp_path):
    for wrong, message in (
            ({"eigen_dtype": "float32"}, "--eigen-dtype float32 is for a GPU"),
            ({"eigen_dtype": "half"}, "expected auto or float64 or float32"),
            ({"device_map": "auto"}, "sees no CUDA GPU"),
            ({"device_map": "auto", "device": "cpu"}, "--device cpu names another place"),
            ({"device_map": "auto", "ray": "local"}, "--device-map and --ray can't go together")):
        refused(message, lambda wrong=wrong: gradindex.build(
            str(model_folder), data_file, tmp_path / "index", **wrong, **SMALL))
        assert not (tmp_path / "index").exists()


def test_a_device_map_needs_accelerate(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("pip install accelerate", lambda: ModelSource("model", device_map="auto"))


def test_a_card_that_has_too_little_room(monkeypatch):
    for name, value in (("mem_get_info", (10**9, 4 * 10**9)), ("memory_reserved", 3 * 10**8),
                        ("memory_allocated", 10**8), ("get_device_name", "a card")):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    devices.check_room(CARD, 1_200_000_000)
    with pytest.raises(gradindex.ResourceError, match=r"takes 1.3 GB, and a card \(cuda:0\) has "
                                                      r"1.2 GB of 4 GB free"):
        devices.check_room(CARD, 1_300_000_000)
