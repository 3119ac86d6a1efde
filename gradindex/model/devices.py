"""Devices and dtypes by the names that users give."""

from typing import Any

import torch

from gradindex.errors import InputError

DTYPES = {"float32": torch.float32, "float64": torch.float64,
          "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE = "device"  # the argument that an InputError is about


def device_called(device: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one. Raises InputError of DEVICE."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        called = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device}: expected auto, cpu, cuda or cuda:N.",
                         DEVICE) from None
    # Named, and not "auto": going on without the GPU that was asked for would take days in silence.
    if called.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {device}: this PyTorch ({torch.__version__}) sees no CUDA GPU. "
            "Use --device cpu, or install a CUDA build of torch.", DEVICE,
        )
    gpus = max(1, torch.cuda.device_count())
    if called.type not in ("cpu", "cuda") or (called.index or 0) >= gpus:
        raise InputError(
            f"--device {device}: expected auto, cpu, cuda or cuda:N; this machine has "
            f"{torch.cuda.device_count()} GPUs.", DEVICE,
        )
    return called


def wait_for(device: torch.device) -> None:
    """Wait for the GPU, which works on after a call came back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dtype_called(dtype: str) -> torch.dtype:
    """The dtype of a name in DTYPES. Raises InputError for another name."""
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected auto or one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def dtype_of(network: Any) -> torch.dtype:
    """The dtype that a network computes in."""
    # Not that of the first parameter: quantised weights are kept in integers.
    dtype: torch.dtype = next(
        parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    return dtype
