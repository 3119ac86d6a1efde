"""A saved model's files, looked at before its weights are read: are all there, and all used?

The names of tensors come from the heads of the safetensors files. transformers itself matches them
with a model without weights (on the device "meta"), by the same rules as when it loads them.
"""

import contextlib
import copy
import re
import sys
from collections.abc import Collection
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from gradindex.errors import InputError
from gradindex.model.config import is_quantised
from gradindex.model.load_adapter import check_adapter
from gradindex.model.load_errors import readable_errors
from gradindex.model.model_source import ModelSource, auto_class
from gradindex.model.saved_files import Shapes, tensor_shapes
from gradindex.progress import shares

# Tensors that older versions saved beside the weights: constants, which no score depends on.
_CONSTANTS = re.compile(
    r"(^|[._])(inv_freq|masked_bias|position_ids|(cos|sin)_cached|_extra_state|causal_mask)$"
    r"|(^|\.)(attn|attention|self_attn|self_attention|crossattention)\.bias$")
_NEXT_TOKENS = re.compile(r"(^|\.)mtp([._]|$)")  # layers that guess further tokens, for speed alone


def check_checkpoint(source: ModelSource) -> list[str]:
    """Check a saved model's class and files, and that it uses all of its weights; reads no weights.

    Returns what is to be said of it, a line each. Raises InputError for what can't be used.
    Quantised and pickled weights, and those of models with code of their own, are checked when they
    are loaded; an object has its class alone.
    """
    if source.adapter is not None:
        check_adapter(source)
        with source.adapter.explain_base():
            return check_checkpoint(source.base)
    config = source.load_config()
    check_class(source, config)
    if source.is_object:
        return []
    files = source.weight_files()
    if is_quantised(config) or _own_code(config) or not files or files[0].suffix != ".safetensors":
        return []
    shapes = tensor_shapes(files)
    matched = _match(source, config, shapes)
    if matched is None:
        return []
    network, loading = matched
    # asked again when the weights are loaded: here it costs nothing, and comes before the data
    check_loading(source, network, loading)
    return _left_out(network, shapes)


def check_loading(source: ModelSource, network: Any, loading: dict[str, Any]) -> None:
    """Raise InputError unless the weights of a model and its network are one to one.

    `loading` is what transformers says of loading them.
    """
    name, loaded = source.name, type(network).__name__
    owners = getattr(network.config, "architectures", None) or []
    dropped = [key for key in loading["unexpected_keys"] if not _is_left_out(key, network.config)]
    if source.head is not None:  # its base may have been saved with another head, as in training
        dropped = [key for key in dropped if _is_of_body(key, network)]
    users = [] if owners or not dropped else _users(network, dropped)
    tasks = " or ".join(sorted({task for user in users for task in tasks_of(user)}))
    brought: Collection[str] = () if source.head is None else source.head.tensors
    if lacking := set(loading["missing_keys"]) - set(brought):
        # transformers would fill them with random numbers
        saved = f" They were saved by {', '.join(owners)}." if set(owners) - {loaded} else \
            f" They are those of {' or '.join(users)}, and hold {_tensors(dropped)} instead" + (
                f", which --task {tasks} indexes." if tasks else ".") if users else ""
        raise InputError(
            f"the weights of {name} lack {_tensors(lacking)}.{saved} " + (
                f"Expected {source.task.model} as a whole ({loaded}), as save_pretrained writes it."
                if source.head is None else "Nor are they among the adapter's, so they were random "
                "numbers in its training. Expected a base that has them, or an adapter that was "
                "saved with them (modules_to_save).")
        )
    mismatched = [key for key in loading.get("mismatched_keys") or () if key[0] not in brought]
    if mismatched:
        tensor, found, expected = sorted(mismatched)[0]
        raise InputError(
            f"the weights of {name} don't fit its config.json: {tensor} is {list(found)}, expected "
            f"{list(expected)}. Put the config.json there that was saved with these weights."
        )
    if not dropped:
        return
    if source.head is not None:
        whose = "They are of the layers under the adapter and its head, which its training used " \
                "if they were there: put the config.json there that was saved with these weights."
    elif any("v_head" in key for key in dropped):
        whose = "They are a value head's, as TRL's AutoModelForCausalLMWithValueHead saves it: " \
                "save the model inside by itself (its pretrained_model.save_pretrained)."
    elif set(owners) - {loaded}:
        whose = f"They belong to {', '.join(owners)} (architectures in config.json). Give " \
                f"{source.task.model} alone, as save_pretrained writes it, if it was trained as " \
                "one."
    elif users:
        whose = f"They are used by {' or '.join(users)} (config.json names no architectures)" + (
            f", which --task {tasks} indexes." if tasks else
            f", which has another head. Expected {source.task.model}, such as the one that it was "
            "trained from.")
    else:
        whose = f"config.json names no other class (architectures: {', '.join(owners) or 'none'}" \
                "), so they were saved along with it, or config.json was changed. Put the right " \
                "config.json there, or save the model again without them."
    raise InputError(f"the weights of {name} hold {_tensors(dropped)}. {loaded}, as which they "
                     f"would be loaded, drops them. {whose}")


def _tensors(names: Collection[str]) -> str:
    """Some tensors' number and first names, as people say them.

    >>> _tensors({"b", "a"}), _tensors(["c"])
    ('2 tensors (a, b)', '1 tensor (c)')
    """
    shown = ", ".join(sorted(names)[:5]) + ", …" * (len(names) > 5)
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({shown})"


def _is_of_body(key: str, network: Any) -> bool:
    """Whether a tensor belongs to a part that a network has under its head."""
    name = key.removeprefix(f"{network.base_model_prefix}.")
    return name.partition(".")[0] in dict(network.base_model.named_children())


def _is_left_out(key: str, config: Any) -> bool:
    """Whether a tensor may be left out: a constant, or of layers that guess further tokens."""
    text = config.get_text_config()
    first = getattr(text, "num_hidden_layers", 0) or 0
    # DeepSeek's and GLM's lie behind the model's own layers, under the same name
    further = range(first, first + (getattr(text, "num_nextn_predict_layers", 0) or 0))
    layer = re.search(r"(^|\.)layers\.(\d+)\.", key)
    return bool(_CONSTANTS.search(key) or _NEXT_TOKENS.search(key)
                or (layer and int(layer[2]) in further))


def _left_out(network: Any, shapes: Shapes) -> list[str]:
    """What a class leaves out of its own checkpoints, in words, where it is worth a line."""
    prefix, used = f"{network.base_model_prefix}.", set(network.state_dict())
    listed = [re.compile(pattern)
              for pattern in network._keys_to_ignore_on_load_unexpected or ()]
    names = [name for name in shapes
             if not {name, prefix + name, name.removeprefix(prefix)} & used
             and not _CONSTANTS.search(name)
             and (any(pattern.search(name) for pattern in listed)
                  or _is_left_out(name, network.config))]
    total = sum(map(_entries, shapes.values()))
    # only what is worth a line; `shares` says nothing of less
    amount = shares({"": sum(_entries(shapes[name]) for name in names) / total}).strip()
    if not amount:
        return []
    return [f"model: left out, having no part in {type(network).__name__}: {_tensors(names)}, "
            f"{amount} of what its files hold"]


def _entries(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


# ---- its class


def architectures_of(source: ModelSource, config: Any) -> list[str]:
    """The names of a model's classes: an object's own, or those that its config.json names."""
    # an object's own class, whatever it was loaded from
    model = getattr(source.model, "_orig_mod", source.model)
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [type(inside).__name__] if source.is_object else \
        getattr(config, "architectures", None) or []


def tasks_of(class_name: str) -> list[str]:
    """The tasks that a class of transformers may have been trained for."""
    if class_name in _OF_TEXTS:
        return ["classification", "reward"]
    causal: Collection[str] = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return ["causal", "preference"] if class_name in causal else []


def check_class(source: ModelSource, config: Any) -> None:
    """Raise InputError for a model that isn't, or wasn't saved as, one of the source's task."""
    owners, task = architectures_of(source, config), source.task
    where = "" if source.is_object else " (architectures in its config.json)"
    if not task.is_causal:
        _check_of_texts(source, config, owners, where)
        return
    for found in owners:
        if found in _OTHER_TASKS:
            tasks = " or ".join(tasks_of(found))
            raise InputError(
                f"the model {source.name} is a {found}{where}, which says something else of a text "
                f"than its next token: a class, a value or a place.{_at_odds(source, config)} " + (
                    f"Index it with --task {tasks}." if tasks else "Expected a causal language "
                    "model, such as the one that it was trained from."))
        if found in _HEADLESS:  # tied embeddings would be its head, though nothing was trained so
            raise InputError(
                f"the model {source.name} is a {found}{where}, which has no head that says a next "
                "token. Expected a causal language model as save_pretrained writes it"
                + (f"; if it was trained as one whose head is its embeddings, name {causal} there."
                   if (causal := _causal_class(config)) and not source.is_object else ".")
            )
    if not source.is_object and not _own_code(config) and \
            type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"the model {source.name} is {' '.join(owners) or 'a model'} of type "
            f"{config.model_type!r}, which transformers has no causal language model for "
            "(AutoModelForCausalLM). Expected one that says a next token from those before it; an "
            "encoder-decoder such as T5 is none."
        )


def _check_of_texts(source: ModelSource, config: Any, owners: list[str], where: str) -> None:
    """Raise InputError for what is no classifier of texts, or no reward model."""
    task = source.task
    for found in owners:
        # a base under an adapter that brings the head may have been saved with any, or none
        if found not in _OF_TEXTS and not _own_code(config) and source.head is None:
            tasks = " or ".join(tasks_of(found))
            raise InputError(
                f"the model {source.name} is a {found}{where}, which has no head that gives whole "
                f"texts a class or a value.{_at_odds(source, config)} Expected {task.model} "
                "(AutoModelForSequenceClassification), as save_pretrained writes it"
                + (f"; to index this one: --task {tasks}." if tasks else "."))
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"the model {source.name} is an encoder-decoder ({config.model_type}), which reads a "
            f"text twice. Expected {task.model} that reads it once, such as BERT or Llama with a "
            "head.")
    if not source.is_object and not _own_code(config) and \
            type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            f"the model {source.name} is {' '.join(owners) or 'a model'} of type "
            f"{config.model_type!r}, which transformers has no classifier of texts for "
            f"(AutoModelForSequenceClassification). Expected {task.model}.")
    kind, count = getattr(config, "problem_type", None), config.num_labels
    if kind == "multi_label_classification" or (kind == "regression" and \
            task.name == "classification"):
        said = {"regression": "a number"}.get(kind, "several labels")
        raise InputError(
            f"the model {source.name} gives a text {said} (problem_type {kind} in its "
            "config.json); expected one label of several classes, of which one is right.")
    if task.name == "reward" and count != 1:
        raise InputError(
            f"the model {source.name} has {count} outputs (num_labels in its config.json); a "
            "reward model has one. A classifier is indexed with --task classification.")
    if task.name == "classification" and count < 2:
        raise InputError(
            f"the model {source.name} has one output (num_labels in its config.json), which is a "
            "value and no class; expected two classes or more. A reward model is indexed with "
            "--task reward; regression can't be.")


def _own_code(config: Any) -> bool:
    """Whether a model's class isn't one of transformers', but comes with it."""
    own = getattr(config, "auto_map", None) or {}
    return "AutoModelForCausalLM" in own or "AutoModelForSequenceClassification" in own


def _causal_class(config: Any) -> str | None:
    """The name of transformers' causal language model for a configuration, if it has one."""
    names: dict[str, str] = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return names.get(getattr(config, "model_type", ""))


def _classes(*tables: str) -> set[str]:
    """The names of classes in some of transformers' tables, without causal language models."""
    found = (getattr(modeling_auto, f"{table}_MAPPING_NAMES", {}) for table in tables)
    classes = {name for table in found for names in table.values()
               for name in ([names] if isinstance(names, str) else names)}
    # some answer questions with a language model of their own
    return classes - set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


# the classes that give whole texts or their tokens a class or value
_OTHER_TASKS = _classes(*(f"MODEL_FOR_{task}" for task in (
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")))
_HEADLESS = _classes("MODEL")
_OF_TEXTS = _classes("MODEL_FOR_SEQUENCE_CLASSIFICATION")


def _users(network: Any, tensors: Collection[str]) -> list[str]:
    """The classes beside a network's own that have tensors of all of these names."""
    own_file = vars(sys.modules[type(network).__module__]).values()
    kinds: list[Any] = [kind for kind in own_file
                        if isinstance(kind, type)
                        and issubclass(kind, transformers.PreTrainedModel)]
    found = []
    for kind in kinds:
        # some of a file's classes have another kind of configuration
        with contextlib.suppress(Exception), torch.device("meta"):
            other = kind._from_config(copy.deepcopy(network.config))
            if set(tensors) <= set(other.state_dict()):
                found.append(kind.__name__)
    return found


# ---- its tensors


def _at_odds(source: ModelSource, config: Any) -> str:
    """Which tensors of another class's model its task lacks and drops, as a sentence to go on with.
    """
    if source.is_object or is_quantised(config) or _own_code(config):
        return ""
    with contextlib.suppress(InputError):  # of files that can't be read, too: the class says enough
        files = source.weight_files()
        if files and files[0].suffix == ".safetensors" and (
                matched := _match(source, config, tensor_shapes(files))):
            network, loading = matched
            wrong = {"lack": loading["missing_keys"], "drop": [
                key for key in loading["unexpected_keys"] if not _is_left_out(key, network.config)]}
            said = " and ".join(f"{what} {_tensors(names)}"
                                for what, names in wrong.items() if names)
            return f" As a {type(network).__name__} it would {said}." if said else ""
    return ""


def _match(
    source: ModelSource, config: Any, shapes: Shapes
) -> tuple[Any, dict[str, Any]] | None:
    """The network without weights, and what transformers says of tensors of these shapes for it.

    None where its class can't be made without weights.
    """
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        with readable_errors(source.name), torch.device("meta"):
            config = copy.deepcopy(config)  # in which a model notes what it chose
            kind = type(auto_class(source.task).from_config(config))
            network, loading = kind.from_pretrained(
                None, config=config, state_dict=empty, device_map={"": "meta"},
                output_loading_info=True, ignore_mismatched_sizes=True)
    except InputError:  # some classes read their own weights: loading them tells all the same
        return None
    return network, loading
