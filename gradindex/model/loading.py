"""What a model is loaded as, and transformers' loading errors in one line."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from gradindex.errors import InputError
from gradindex.model.adapters import CONFIG, WEIGHTS, Adapter

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


@contextlib.contextmanager
def readable_errors(name: str, adapter: Adapter | None = None) -> Iterator[None]:
    """Turn transformers' page-long errors into InputErrors of one line that say what to do.

    `name` is the model, or the adapter, that is being loaded.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file fails in any library below
        # transformers has few classes of errors: which it is can be told only by what it says.
        text = " ".join(str(error).split())
        if "trust_remote_code" in text or "custom code" in text:
            fix = "It needs its own code: pass --trust-remote-code if you trust it."
        elif "gated" in text or "401" in text or "403" in text:
            fix = "It is gated or private: accept its licence and set HF_TOKEN."
        elif "safetensors" in text and \
                not Path(name, WEIGHTS if adapter else "model.safetensors").exists():
            fix = "It has no safetensors weights: convert them, or pass --allow-pickle if you " \
                  "trust the file (unpickling can run code)."
        elif Path(name).is_dir():
            files = f"{CONFIG} and {WEIGHTS}" if adapter else "config.json and model.safetensors"
            fix = f"Expected a folder with {files}, as save_pretrained writes it."
        else:
            fix = "Expected an existing folder or a hub id that can be reached from here (with " \
                  "HF_HUB_OFFLINE=1 only cached models are found)."
        raise InputError(f"the model {name} can't be loaded: {text[:200]} {fix}") from None


def quiet_transformers() -> None:
    """Silence other libraries' log lines and bars; the command line shows its own."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
