"""Transformers' page-long loading errors made one line, and its chatter silenced."""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import transformers

from gradindex.errors import InputError
from gradindex.memory import gpu_failed, ran_out
from gradindex.model.adapters import CONFIG, WEIGHTS, Adapter

_OTHER_SHAPE = re.compile(r"size mismatch for (\S+): .*?Size\((.*?)\) from checkpoint.*?"
                          r"Size\((.*?)\)")
_NO_MODULE = re.compile(r"(Target modules|No modules were targeted|target_parameters) .*?\.(?= |$)")


@contextlib.contextmanager
def readable_errors(name: str, adapter: Adapter | None = None) -> Iterator[None]:
    """Turn transformers' page-long errors into InputErrors of one line that say what to do.

    `name` is the model, or the adapter, that is being loaded.
    """
    try:
        yield
    except Exception as error:  # a damaged file fails in any library below
        if ran_out(error) or gpu_failed(error):
            raise
        # transformers has few classes of errors: which it is can be told only by what it says.
        text = " ".join(str(error).split())
        if adapter and (unfit := _unfit(text)):
            raise InputError(
                f"the adapter {adapter.folder} doesn't fit its base {adapter.base}: {unfit}. It "
                f"was trained on another base, or {CONFIG} isn't the one that was saved with it: "
                "name the right base there (base_model_name_or_path), or put the right file there."
            ) from None
        if "trust_remote_code" in text or "custom code" in text:
            fix = "It needs its own code: pass --trust-remote-code if you trust it."
        elif "gated" in text or "401" in text or "403" in text:
            fix = "It is gated or private: accept its licence and set HF_TOKEN."
        elif "safetensors" in text and not any(Path(name).glob("*.safetensors")):
            fix = "It has no safetensors weights: convert them, or pass --allow-pickle if you " \
                  "trust the file (unpickling can run code)."
        elif Path(name).is_dir():
            files = f"{CONFIG} and {WEIGHTS}" if adapter else "config.json and model.safetensors"
            fix = f"Expected a folder with {files}, as save_pretrained writes it."
        else:
            fix = "Expected an existing folder or a hub id that can be reached from here (with " \
                  "HF_HUB_OFFLINE=1 only cached models are found)."
        raise InputError(f"the model {name} can't be loaded: {text[:200]} {fix}") from None


def _unfit(text: str) -> str | None:
    """What of an adapter has no place in a base of another shape, as peft's error tells it."""
    if found := _OTHER_SHAPE.search(text):
        tensor, adapters, bases = found.groups()
        return f"{tensor} is {adapters}, the base has room for {bases}"
    found = _NO_MODULE.search(text)
    return found and found[0].rstrip(".").replace("Target", "target")


def quiet_transformers() -> None:
    """Silence other libraries' log lines and bars; the command line shows its own."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
