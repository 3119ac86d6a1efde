"""Devices and dtypes by the names that users give."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch

from gradindex.errors import InputError, ResourceError
from gradindex.progress import size

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
        raise InputError(f"--device {device}: this PyTorch ({torch.__version__}) sees no CUDA GPU"
                         f"{_why_none()}", DEVICE)
    gpus = max(1, torch.cuda.device_count())
    if called.type not in ("cpu", "cuda") or (called.index or 0) >= gpus:
        raise InputError(
            f"--device {device}: expected auto, cpu, cuda or cuda:N; this machine has "
            f"{torch.cuda.device_count()} GPUs.", DEVICE,
        )
    return called


def _why_none() -> str:
    """Why PyTorch sees no GPU, and what to do."""
    if torch.version.cuda is None:
        return ". Use --device cpu, or install a CUDA build of torch."
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the driver is missing or too old, it says
        reason = " ".join(str(error).split()).partition(". ")[0]
        return f": {reason}. Use --device cpu, or see to the driver (`nvidia-smi`)."
    return ". Use --device cpu, or see which GPUs there are (`nvidia-smi`)."


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError where a device doesn't compute in a dtype."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise InputError(
                f"--dtype bfloat16: {torch.cuda.get_device_name(device)} (compute capability "
                f"{major}.{minor}) doesn't compute in it, which takes 8.0. Use --dtype float16 or "
                "float32.")


# compute capabilities of the cards that compute in float64 at half the speed of float32; on all
# others it is a sixty-fourth or so
_FAST_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


def has_fast_float64(device: torch.device) -> bool:
    """Whether a GPU computes in float64 at a good part of its speed in float32."""
    return torch.cuda.get_device_capability(device) in _FAST_FLOAT64


def check_room(device: torch.device, needed: int) -> None:
    """Raise ResourceError where a GPU hasn't `needed` bytes free for a model's weights."""
    if device.type == "cuda" and needed > (room := free_on(device)):
        raise ResourceError(
            f"the model takes {size(needed)}, and {torch.cuda.get_device_name(device)} ({device}) "
            f"has {size(room)} of {size(torch.cuda.mem_get_info(device)[1])} free. Use another GPU "
            "(--device cuda:N), fewer bytes a weight (--dtype bfloat16), or --device cpu.")


@contextlib.contextmanager
def float32_products(device: torch.device, rounded: bool = False) -> Iterator[None]:
    """Let a GPU multiply float32 in all its digits for a while, whatever the process has set.

    `rounded` lets its tensor cores do it in TF32, which keeps 11 bits of each factor.
    """
    if device.type == "cpu":
        yield
        return
    # PyTorch's newer setting: the older one raises where a program has set this one
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if rounded else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def free_on(device: torch.device) -> int:
    """Bytes that can be had on a GPU, what PyTorch keeps for later among them."""
    return int(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device) \
        - torch.cuda.memory_allocated(device)


def on_host(devices: Collection[torch.device]) -> bool:
    """Whether there is no GPU among devices."""
    return all(device.type == "cpu" for device in devices)


def wait_for(devices: Collection[torch.device]) -> None:
    """Wait for GPUs, which work on after a call came back."""
    for device in devices:
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
