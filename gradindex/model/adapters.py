"""Adapters, as `peft` makes them: what a saved one says, and which maps of a network belong to it.

An adapter's layer wraps a layer of the base model: LoRA keeps that as `base_layer` beside its two
linear maps, `lora_A.<adapter>` and `lora_B.<adapter>`. peft isn't imported here: its layers are
known by their attributes.
"""

import contextlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradindex.errors import InputError
from gradindex.model.saved_files import check_weights, tensor_shapes

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OWN = "the adapter's"  # what its untracked parameters are called, with their kind behind
OF_TEXTS = "SEQ_CLS"  # what peft calls the task of saying something of whole texts
IDLE = "adapters, and originals of trained copies, that don't run"
DORA = "DoraLinearVariant"  # what peft calls DoRA of a linear map

# What an adapter computes depends on its other settings, such as lora_alpha, but not on these.
_INCIDENTAL = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")


# what transformers calls the last map of a head that says something of whole texts
_HEADS = ("score", "classifier", "out_proj", "logits_proj")
_PREFIX = "base_model.model."  # what peft puts before the names of a network's tensors


@dataclass(frozen=True)
class BroughtHead:
    """A head that comes with an adapter, which its base lacks or has another of.

    `tensors` are the names of all tensors that the adapter has of the network itself, `outputs` how
    many the head gives; None where no tensor tells.
    """

    tensors: frozenset[str]
    outputs: int | None


def told_of_head(head: BroughtHead | None) -> dict[str, int]:
    """What transformers' loaders are told of a head that comes with an adapter.

    >>> told_of_head(BroughtHead(frozenset(), 3)), told_of_head(None)
    ({'num_labels': 3}, {})
    """
    return {} if head is None or head.outputs is None else {"num_labels": head.outputs}


@dataclass(frozen=True)
class Adapter:
    """A saved adapter: its folder, its base model (`name` or `name@revision`), other settings."""

    folder: Path
    base: str
    settings: dict[str, Any]

    @property
    def task_type(self) -> str | None:
        """What peft calls the task that it was trained for; None where it doesn't say."""
        return self.settings.get("task_type")

    @property
    def head(self) -> BroughtHead | None:
        """The head of whole texts that it brings, None for an adapter of another task."""
        file = self.folder / WEIGHTS
        if self.task_type not in (OF_TEXTS, None) or not file.exists():
            return None
        check_weights(file)
        shapes = {name.removeprefix(_PREFIX): shape
                  for name, shape in tensor_shapes([file]).items()}
        last = [shape[0] for name, shape in shapes.items()
                if name.endswith(".weight") and name.split(".")[-2] in _HEADS and len(shape) == 2]
        if self.task_type is None and not last:
            return None
        return BroughtHead(frozenset(shapes), last[0] if len(set(last)) == 1 else None)

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


def adapter_file(folder: Path, name: str | None) -> Path | None:
    """The adapter_config.json of a folder's adapter of this name [its own], None for no adapter.

    peft saves the adapter "default" in the folder itself, others in folders of their names. Raises
    InputError for a name that isn't there, and where one of several has to be named.
    """
    own, whole = folder / CONFIG, (folder / "config.json").exists()
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    shown = f"{', '.join(inner[:5])}{', …' * (len(inner) > 5)}"
    if name is None:
        if not own.exists() and inner and not whole:
            raise InputError(f"{folder} holds adapters in folders of its own: {shown}. Say which "
                             "with --adapter NAME.")
        return own if own.exists() else None
    if name in inner:
        return folder / name / CONFIG
    if own.exists() and name in ("default", folder.resolve().name):
        return own
    there = ["default"] * own.exists() + ([shown] if inner else [])
    raise InputError(f"--adapter {name}: {folder} has no adapter of this name. Expected one of: "
                     f"{', '.join(there) or 'none, it holds no adapter'}.")


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


@dataclass
class Parts:
    """What adapters make of a network's modules.

    `lora` are LoRA's linear maps that run, whose gradient is Σ d aᵀ. `idle` modules don't run as
    things stand: those of merged, disabled or inactive adapters, and replaced originals. `own` are
    all other modules of running adapters, with a word for what they are. `unclear` are the maps
    under adapters that may use their weights in other ways, `no_bias` those whose bias they do.
    """

    lora: set[nn.Module] = field(default_factory=set)
    idle: set[nn.Module] = field(default_factory=set)
    own: dict[nn.Module, str] = field(default_factory=dict)
    unclear: dict[nn.Module, str] = field(default_factory=dict)
    no_bias: set[nn.Module] = field(default_factory=set)


def adapter_parts(network: nn.Module) -> Parts:
    """The parts of all adapters of a network; empty ones for a plain model."""
    parts = Parts()
    for _, layer in _adapter_layers(network):
        # one that runs elsewhere may have nothing in this layer
        base, running = list(layer.base_layer.modules()), _running(layer) & _held(layer)
        # Everything in the layer but its base is idle until an adapter that runs claims it.
        beside = {*layer.modules()} - {layer, *base}
        if not running:
            parts.idle |= beside
            continue
        word = f"{OWN} {kind_of(layer, running)}"
        maps = {side[adapter] for side in _sides(layer) for adapter in running if adapter in side}
        parts.idle |= {map_ for side in _sides(layer) for map_ in side.values()} - maps
        variants = {type(variant).__name__ for adapter, variant
                    in getattr(layer, "lora_variant", {}).items() if adapter in running}
        parts.own |= {module: word for module in (layer, *beside)}
        if hasattr(layer, "parameter_name"):  # of a bare parameter: its maps aren't run as such
            continue
        if _sides(layer) and variants <= {DORA}:
            parts.lora |= maps
            # DoRA subtracts the base's bias from its output again before it scales that
            parts.no_bias |= set(base) if variants else set()
        else:
            parts.unclear |= dict.fromkeys((*base, *maps), f"linear maps under {word}")
    parts.own = {module: word for module, word in parts.own.items() if module not in parts.lora}
    for copies in network.modules():  # `modules_to_save`: a copy takes the original's place
        if isinstance(getattr(copies, "modules_to_save", None), nn.ModuleDict):
            parts.idle |= _idle_copies(copies)
    return parts


def _sides(layer: Any) -> tuple[nn.ModuleDict, ...]:
    """LoRA's maps by adapter, lora_A and lora_B; none of another kind of adapter."""
    sides = [side for name in ("lora_A", "lora_B")
             if isinstance(side := getattr(layer, name, None), nn.ModuleDict) and len(side)]
    return tuple(sides)


def kind_of(layer: Any, running: Iterable[str]) -> str:
    """What kind of adapter a layer belongs to, in words."""
    if hasattr(layer, "parameter_name"):
        return "LoRA on bare parameters (target_parameters)"
    variants = {type(variant).__name__.removesuffix("LinearVariant") for adapter, variant
                in getattr(layer, "lora_variant", {}).items() if adapter in running}
    if variants:
        return " and ".join(sorted(variants)).replace("Dora", "DoRA")
    # peft keeps each kind in a package of its own
    parts = type(layer).__module__.split(".")
    return parts[2].upper() if parts[:2] == ["peft", "tuners"] else type(layer).__name__


def _idle_copies(copies: Any) -> set[nn.Module]:
    """Of the original and its copies in a `modules_to_save` wrapper, those that don't run."""
    active = [] if copies.disable_adapters else copies.active_adapters
    runs = copies.modules_to_save[active[0]] if active else copies.original_module
    return set(copies.modules()) - {copies, *runs.modules()}


def run_alone(network: nn.Module, name: str) -> None:
    """Let the adapter of this name run, and no other. Raises InputError where there is none."""
    layers = [layer for _, layer in _adapter_layers(network)]
    copies: list[Any] = [module for module in network.modules()
                         if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)]
    names = set[str]().union(*(_held(layer) for layer in layers),
                             *(copy.modules_to_save.keys() for copy in copies))
    if name not in names:
        raise InputError(f"--adapter {name}: the model has no adapter of this name. Expected one "
                         f"of: {', '.join(sorted(names)) or 'none, it has no adapter'}.")
    for layer in layers:
        layer.set_adapter([name])
    for copy in copies:
        copy.enable_adapters(name in copy.modules_to_save)
        if name in copy.modules_to_save:
            copy.set_adapter(name)


@contextlib.contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Let a network run as its base alone for a while.

    Raises InputError where an adapter is merged into the base's weights.
    """
    if merged := [name for name, layer in _adapter_layers(network) if layer.merged]:
        raise InputError(f"an adapter is merged into {merged[0]}, so the base can't be run alone. "
                         "Unmerge it (unmerge_adapter), or give the base itself.")
    # transformers' own networks have a method of the second name, and so are none of them
    parts: list[Any] = [part for part in network.modules()
                        if hasattr(part, "enable_adapters") and not part.disable_adapters]
    try:
        for part in parts:
            part.enable_adapters(False)
        yield
    finally:
        for part in parts:
            part.enable_adapters(True)
        network.requires_grad_(False)  # which peft turns on again


def quiet_dora(network: nn.Module) -> None:
    """Let DoRA's layers form lora_B·lora_A from the weights, in every pass.

    By themselves they run both maps on an identity matrix, which a hook would take for inputs.
    """
    for module in network.modules():
        if hasattr(module, "get_lora_weight"):
            module.get_lora_weight = _product  # type: ignore[assignment]


def _product(*, lora_A: nn.Module, lora_B: nn.Module, **_: Any) -> Tensor:
    """lora_B·lora_A [o, i] of linear maps."""
    product: Tensor = lora_B.weight @ lora_A.weight  # type: ignore[operator]
    return product


def adapter_facts(network: nn.Module) -> list[str]:
    """A line for each running adapter with its scale, which its tensors don't tell.

    None for a plain model.
    """
    # Part of the model's identity: equal tensors with another lora_alpha are another model.
    return [
        f"{name} {adapter} {getattr(layer, 'scaling', {}).get(adapter)}"
        for name, layer in _adapter_layers(network) for adapter in layer.active_adapters
        if adapter in _running(layer)
    ]


def untrained(network: nn.Module) -> dict[str, int]:
    """Of the running adapters those whose LoRA adds nothing, and in how many layers: B is 0 in all.

    So each begins, and so does what training never reached.
    """
    layers: dict[str, list[bool]] = {}
    for _, layer in _adapter_layers(network):
        for name in sorted(_running(layer)):
            for parts in (getattr(layer, "lora_B", {}), getattr(layer, "lora_embedding_B", {})):
                if name in parts:
                    part = parts[name]
                    tensors = part.parameters() if isinstance(part, nn.Module) else [part]
                    layers.setdefault(name, []).append(not any(map(Tensor.any, tensors)))
    return {name: len(zero) for name, zero in layers.items() if all(zero)}


def no_adapter(network: nn.Module) -> str:
    """Why a network has no adapter's map to track, in words for a message."""
    layers = [layer for _, layer in _adapter_layers(network)]
    # adaption prompts and others take the place of a module that isn't linear
    others = [module for module in network.modules()
              if type(module).__module__.startswith("peft.tuners.")]
    if not layers and not others:
        return "the model has no adapter in its blocks"
    kinds = sorted({kind_of(layer, running) for layer in layers
                    if (running := _running(layer) & _held(layer))}
                   or {kind_of(module, ()) for module in others if not layers})
    if not kinds:
        return "no LoRA map of the model's adapters runs (merged, disabled or inactive)"
    return f"the model's adapter is {', '.join(kinds)}, which has no linear map of its own that " \
           "a pass runs, so its gradient can't be read. Track the base's maps alone"


def _adapter_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in network.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "active_adapters"):
            yield name, layer


def _running(layer: Any) -> set[str]:
    """The names of the adapters of a layer that run."""
    return set() if layer.merged or layer.disable_adapters else set(layer.active_adapters)


def _held(layer: Any) -> set[str]:
    """The names of the adapters that have something in a layer."""
    parts = (getattr(layer, name, None) for name in getattr(layer, "adapter_layer_names", ()))
    return {name for part in parts if part is not None and hasattr(part, "keys")
            for name in part.keys()}  # noqa: SIM118, a ModuleDict
