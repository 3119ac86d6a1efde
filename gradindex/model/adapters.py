"""Adapters, as `peft` makes them: what a saved one says, and which maps of a network belong to it.

An adapter's layer wraps a layer of the base model: LoRA keeps that as `base_layer` beside its two
linear maps, `lora_A.<adapter>` and `lora_B.<adapter>`. peft is never imported here: transformers
loads an adapter with it, and its layers are known by their attributes.
"""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gradindex.errors import InputError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# What an adapter computes depends on its other settings, such as lora_alpha, but not on these.
_INCIDENTAL = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: its folder, its base model (`name` or `name@revision`), other settings."""

    folder: Path
    base: str
    settings: dict[str, Any]

    @contextlib.contextmanager
    def explain_base(self) -> Iterator[None]:
        """Say of an InputError about the base whose base it is, and what to do."""
        try:
            yield
        except InputError as error:
            raise InputError(
                f"{error} It is the base of the adapter in {self.folder}: put it there, or name "
                f"the right one in {CONFIG} (base_model_name_or_path)."
            ) from None


def read_adapter(file: Path) -> Adapter:
    """The adapter described by an adapter_config.json.

    Raises InputError when peft is missing or the file names no base.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            f"{file.parent} holds an adapter, and peft, which loads adapters, isn't installed. Run "
            "pip install peft."
        )
    try:
        settings = json.loads(file.read_text())
        base, revision = settings["base_model_name_or_path"], settings.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # JSON of any form at all
        base = None
    if not base or not isinstance(base, str):
        raise InputError(
            f"{file} names no base model; expected base_model_name_or_path to be a folder or hub "
            "id, as PeftModel.save_pretrained writes it. Add it."
        )
    # The adapter would be taken, and whoever put both there may mean the other.
    if any(file.parent.glob("model*.safetensors")) or any(file.parent.glob("pytorch_model*.bin")):
        raise InputError(
            f"{file.parent} holds an adapter and the weights of a whole model; expected one of "
            f"them. Move {CONFIG} and the adapter's weights to a folder of their own."
        )
    return Adapter(
        file.parent, f"{base}@{revision}" if revision else base,
        {name: value for name, value in settings.items() if name not in _INCIDENTAL},
    )


def unwrapped(network: Any) -> Any:
    """The transformers model inside a PeftModel, with its adapters in place; any other as it is.

    Raises InputError for a prompt-learning adapter, which has no layers in the network.
    """
    # It is the network that loading the saved adapter gives, down to its modules' names: an index
    # built from the object is read with the folder.
    if not hasattr(network, "get_base_model"):
        return network
    if getattr(getattr(network, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError(
            "the PeftModel's adapter is learned tokens (prompt learning), which the network inside "
            "runs without. Expected an adapter of layers, such as LoRA."
        )
    return network.get_base_model()


@dataclass
class Parts:
    """What adapters make of a network's modules.

    `lora` are LoRA's linear maps that run. `idle` modules don't run as things stand: those of
    merged, disabled or inactive adapters, and replaced originals. `unusual` are the maps of and
    under a running adapter that isn't plain LoRA, which may use their weights in other ways: their
    gradient isn't Σ d aᵀ then.
    """

    lora: set[nn.Module] = field(default_factory=set)
    idle: set[nn.Module] = field(default_factory=set)
    unusual: set[nn.Module] = field(default_factory=set)


def adapter_parts(network: nn.Module) -> Parts:
    """The parts of all adapters of a network; empty sets for a plain model."""
    parts = Parts()
    for _, layer in _adapter_layers(network):
        # Everything in the layer but its base is idle until an adapter that runs claims it.
        parts.idle.update(layer.modules())
        parts.idle -= {layer, *layer.base_layer.modules()}
        for adapter in _running(layer):
            is_lora = isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
            sides = (layer.lora_A, layer.lora_B) if is_lora else ()
            maps = {side[adapter] for side in sides if adapter in side}
            parts.lora |= maps
            if not is_lora or adapter in getattr(layer, "lora_variant", {}):  # DoRA and the like
                parts.unusual |= {*layer.base_layer.modules(), *maps}
            elif hasattr(layer, "parameter_name"):  # of a bare parameter, such as all experts' W
                parts.unusual |= maps
    parts.idle -= parts.lora
    for copies in network.modules():  # `modules_to_save`: a copy takes the original's place
        if isinstance(getattr(copies, "modules_to_save", None), nn.ModuleDict):
            parts.idle |= _idle_copies(copies)
    return parts


def _idle_copies(copies: Any) -> set[nn.Module]:
    """Of the original and its copies in a `modules_to_save` wrapper, those that don't run."""
    active = [] if copies.disable_adapters else copies.active_adapters
    runs = copies.modules_to_save[active[0]] if active else copies.original_module
    return set(copies.modules()) - {copies, *runs.modules()}


def adapter_facts(network: nn.Module) -> list[str]:
    """A line for each running adapter with its scale, which its tensors don't tell.

    None for a plain model.
    """
    # Part of the model's identity: equal tensors with another lora_alpha are another model.
    return [
        f"{name} {adapter} {getattr(layer, 'scaling', {}).get(adapter)}"
        for name, layer in _adapter_layers(network) for adapter in _running(layer)
    ]


def no_adapter(network: nn.Module) -> str:
    """Why a network has no adapter's map to track, in words for a message."""
    if not any(True for _ in _adapter_layers(network)):
        return "the model has no adapter in its blocks"
    return "no LoRA map of the model's adapters runs (merged, disabled, inactive, or not LoRA)"


def _adapter_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in network.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "active_adapters"):
            yield name, layer


def _running(layer: Any) -> list[str]:
    """The names of the adapters of a layer that run."""
    return [] if layer.merged or layer.disable_adapters else list(layer.active_adapters)
