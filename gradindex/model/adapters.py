"""Adapters, as `peft` makes them: what a saved one says, and which maps of a network are its own.

An adapter's layer wraps one of the base: LoRA keeps it as `base_layer` beside its own two linear
maps, `lora_A.<adapter>` and `lora_B.<adapter>`. peft is never imported here: transformers loads an
adapter with it, and its layers are known by their attributes.
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
    """A saved adapter: its folder, its base (`name` or `name@revision`), all else it says."""

    folder: Path
    base: str
    settings: dict[str, Any]

    @contextlib.contextmanager
    def explain_base(self) -> Iterator[None]:
        """Where the base can't be had, say whose base it is and what to do."""
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        base = None
    if not base or not isinstance(base, str):
        raise InputError(
            f"{file} names no base model; expected base_model_name_or_path to be a folder or hub "
            "id, as PeftModel.save_pretrained writes it. Add it."
        )
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

    It is the same network that loading the saved adapter gives, down to its modules' names.
    Raises InputError for a prompt-learning adapter, which has no layers in the network.
    """
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

    own: LoRA's maps that run; idle: modules that don't run as things stand (merged, disabled or
    inactive adapters, replaced originals); odd: maps under a running adapter that isn't plain LoRA.
    Such a one may use their weights in other ways, and their gradient isn't Σ d aᵀ then.
    """

    own: set[nn.Module] = field(default_factory=set)
    idle: set[nn.Module] = field(default_factory=set)
    odd: set[nn.Module] = field(default_factory=set)


def adapter_parts(network: nn.Module) -> Parts:
    """The parts of all adapters of a network; empty sets for a plain model."""
    parts = Parts()
    for _, layer in _adapter_layers(network):
        parts.idle.update(layer.modules())
        parts.idle -= {layer, *layer.base_layer.modules()}
        for adapter in _running(layer):
            lora = isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)
            sides = (layer.lora_A, layer.lora_B) if lora else ()
            maps = {side[adapter] for side in sides if adapter in side}
            parts.own |= maps
            if not lora or adapter in getattr(layer, "lora_variant", {}):
                parts.odd |= {*layer.base_layer.modules(), *maps}
            elif hasattr(layer, "parameter_name"):  # of a bare parameter, such as all experts' W
                parts.odd |= maps
    parts.idle -= parts.own
    for copies in network.modules():  # `modules_to_save`: a copy takes the original's place
        if isinstance(getattr(copies, "modules_to_save", None), nn.ModuleDict):
            parts.idle |= _idle_copies(copies)
    return parts


def _idle_copies(copies: Any) -> set[nn.Module]:
    active = [] if copies.disable_adapters else copies.active_adapters
    runs = copies.modules_to_save[active[0]] if active else copies.original_module
    return set(copies.modules()) - {copies, *runs.modules()}


def adapter_facts(network: nn.Module) -> list[str]:
    """What running adapters do that their tensors don't tell: a line each; none for a plain model.

    Equal tensors with another lora_alpha are another model.
    """
    return [
        f"{name} {adapter} {getattr(layer, 'scaling', {}).get(adapter)}"
        for name, layer in _adapter_layers(network) for adapter in _running(layer)
    ]


def no_adapter(network: nn.Module) -> str:
    """Why a network has no adapter's map to track."""
    if not any(True for _ in _adapter_layers(network)):
        return "the model has no adapter in its blocks"
    return "no LoRA map of the model's adapters runs (merged, disabled, inactive, or not LoRA)"


def _adapter_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in network.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "active_adapters"):
            yield name, layer


def _running(layer: Any) -> list[str]:
    return [] if layer.merged or layer.disable_adapters else list(layer.active_adapters)
