"""A saved adapter put into its base, by peft, which enters here alone."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from gradindex.errors import InputError
from gradindex.model.adapters import CONFIG, OF_TEXTS, WEIGHTS, Adapter
from gradindex.model.load_errors import readable_errors
from gradindex.model.model_source import ModelSource
from gradindex.model.probe import in_evaluation, some_tokens
from gradindex.model.saved_files import check_weights

# Tasks of adapters over a base with another head; the others leave the head of the base.
_OTHER_TASKS = ("TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
_OF_TOKENS = "CAUSAL_LM"
# What these do is done around the network for each text, by peft's wrapper, and not in its layers.
_AROUND = {"XLORA": "X-LoRA mixes adapters anew for each text",
           "POLY": "Poly mixes adapters by a task's number"}


def check_adapter(source: ModelSource) -> None:
    """Raise InputError for an adapter whose kind can't be used, or whose weights aren't there."""
    adapter = source.adapter
    assert adapter is not None
    kind, task = adapter.task_type, source.task
    if kind in (*_OTHER_TASKS, OF_TEXTS if task.is_causal else _OF_TOKENS):
        others = {OF_TEXTS: "classification or reward", _OF_TOKENS: "causal or preference"}
        raise InputError(
            f"the adapter {adapter.folder} was trained for another task (task_type {kind}) than "
            + ("saying the next token" if task.is_causal else "saying something of whole texts")
            + f". Expected one of {task.model} ({_OF_TOKENS if task.is_causal else OF_TEXTS})"
            + (f"; to index this one: --task {others[kind]}." if kind in others else "."))
    if why := _around_network(_config(source, adapter)):
        raise InputError(f"the adapter {adapter.folder} can't be used: {why}, which the network "
                         "inside runs without. Expected an adapter of layers, such as LoRA.")
    _weights(source, adapter)


def load_adapter(network: Any, source: ModelSource) -> Any:
    """A PeftModel of a network with the adapter that `source` names in its layers.

    Raises InputError for one that can't be used, and where its weights and its settings differ.
    """
    import peft

    check_adapter(source)
    adapter = source.adapter
    assert adapter is not None
    name, place = source.adapter_name or "default", _place(source, adapter)
    with readable_errors(source.name, adapter), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own calls of transformers
        config = peft.PeftConfig.from_pretrained(**place)
        # earlier ones don't list their heads among what they bring; this class does
        of_texts = adapter.task_type == OF_TEXTS
        wrapped = (peft.PeftModelForSequenceClassification if of_texts else peft.PeftModel)(
            network, config, name, autocast_adapter_dtype=False)
        loaded = wrapped.load_adapter(
            place.pop("pretrained_model_name_or_path"), name, **place,
            torch_device=str(network.device), autocast_adapter_dtype=False)
    for names, wrong in ((loaded.missing_keys, "lack"), (loaded.unexpected_keys, "also hold")):
        if names:  # peft would leave random numbers there, or drop them
            modules = dict(wrapped.named_modules())
            homeless = [name for name in names if not _has_home(modules, name)]
            raise InputError(
                f"the weights of the adapter {adapter.folder} {wrong} {len(names)} "
                f"tensor{'s' * (len(names) > 1)}: {', '.join(sorted(names)[:5])}. " + (
                    f"Its base {adapter.base}, as a {type(network).__name__}, has no such modules: "
                    "the adapter was trained on another base, or with another head. Name the base "
                    f"of {source.task.model} in {CONFIG} (base_model_name_or_path), and give an "
                    "adapter that was trained as one."
                    if homeless else
                    f"Expected a complete adapter, the one that its {CONFIG} describes, on the "
                    f"base that it was trained on; found {adapter.base}.")
            )
    return wrapped


def _has_home(modules: dict[str, Any], name: str) -> bool:
    """Whether a network of these modules has the one that a tensor of an adapter belongs to."""
    parts = name.split(".")
    known = next(end for end in range(len(parts), -1, -1) if ".".join(parts[:end]) in modules)
    last = modules[".".join(parts[:known])]
    # what isn't there is an adapter's part of a map, and no module of the base's
    return len(parts) - known <= 1 or type(last).__module__.startswith("peft.tuners.") or \
        not any(last.children())


def _place(source: ModelSource, adapter: Adapter) -> dict[str, Any]:
    """Where peft finds an adapter, as the arguments of its loaders."""
    if Path(source.name).is_dir():
        return {"pretrained_model_name_or_path": str(adapter.folder)}
    return {"pretrained_model_name_or_path": source.name, "revision": source.revision,
            "subfolder": source.adapter_name}


def _weights(source: ModelSource, adapter: Adapter) -> None:
    """Raise InputError unless an adapter's weights are there, whole and not pickled."""
    place = _place(source, adapter)
    place["path_or_repo_id"] = place.pop("pretrained_model_name_or_path")
    if place.get("subfolder", "") is None:
        del place["subfolder"]
    with readable_errors(source.name, adapter):
        # by itself peft may go on to a pickled file
        weights = transformers.utils.cached_file(
            filename=WEIGHTS, **place, _raise_exceptions_for_missing_entries=False)
        if weights is None and not source.allow_pickle:
            raise FileNotFoundError(f"there is no {WEIGHTS} as safetensors.")
    if weights is not None:
        check_weights(Path(weights))


def _config(source: ModelSource, adapter: Adapter) -> Any:
    """What peft reads of an adapter's settings."""
    import peft

    with readable_errors(source.name, adapter):
        return peft.PeftConfig.from_pretrained(**_place(source, adapter))


def _kind(config: Any) -> str:
    return str(getattr(config, "peft_type", "")).rpartition(".")[2]


def _around_network(config: Any) -> str | None:
    """What an adapter of these settings does around the network for each text; None for nothing."""
    kind = _kind(config)
    if getattr(config, "is_prompt_learning", False):
        return f"{kind} is learned tokens (prompt learning), put before the text"
    if getattr(config, "alora_invocation_tokens", None):
        return "aLoRA works from certain tokens of a text on"
    if getattr(config, "arrow_config", None):
        return "Arrow chooses among adapters anew for each token"
    return _AROUND.get(kind)


def unwrapped(network: Any, name: str | None = None) -> Any:
    """The transformers model inside a PeftModel, with its adapters in place; any other as it is.

    `name` is the adapter that is meant [those that run]. Raises InputError for one that does
    something around the network, not in its layers.
    """
    # It is the network that an index built from the object is read with, whatever holds it.
    network = getattr(network, "_orig_mod", network)  # of torch.compile
    if not hasattr(network, "get_base_model"):
        return network
    config = network.peft_config.get(name) if name else getattr(network, "active_peft_config", None)
    why = _around_network(config)
    if why is None and not _same_without(network):
        why = f"{_kind(config)} does something around the network"
    if why:
        raise InputError(f"the PeftModel's adapter can't be used: {why}, which the network inside "
                         "runs without. Expected an adapter of layers, such as LoRA.")
    return network.get_base_model()


def _same_without(wrapped: Any) -> bool:
    """Whether a PeftModel says what the network inside says, on a few tokens.

    LoRA isn't asked: it is known to, and a pass changes some quantised layers.
    """
    inside = wrapped.get_base_model()
    kinds = {_kind(config) for config in wrapped.peft_config.values()}
    if next(inside.parameters()).device.type == "meta" or kinds == {"LORA"}:
        return True
    tokens = some_tokens(inside, 1, 4)
    with torch.no_grad(), in_evaluation(wrapped):
        one, other = (network(input_ids=tokens, use_cache=False).logits
                      for network in (wrapped, inside))
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5)
