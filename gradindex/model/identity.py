"""What a model, its tokenizer and data are, whatever their path: digests, and how they compare."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from gradindex.errors import IndexMismatchError
from gradindex.model.adapters import WEIGHTS, adapter_facts
from gradindex.model.network import LanguageModel
from gradindex.model.source import ModelSource
from gradindex.storage.files import digest_of_files


def tensors_digest(network: nn.Module) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, in order of name, and over what
    running adapters do with theirs."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    for line in adapter_facts(network):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def identify(model: LanguageModel) -> dict[str, Any]:
    """What the index remembers a model by: digests of its weight files and of its tensors, and its
    configuration."""
    return {"files": files_digest(model.source), "tensors": tensors_digest(model.network),
            "config": config_facts(model.network.config)}


# Of a configuration, what says where it came from or how fast it runs, not what it computes.
_INCIDENTAL = {"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures",
               "auto_map", "name_or_path"}


def config_facts(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types, without what doesn't matter to the gradient."""
    facts = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in facts.items()
            if name not in _INCIDENTAL and not name.startswith("_")}


def _different(before: Any, now: Any, name: str) -> str | None:
    """Where two configurations differ; entries that only one has are another library version's."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = (_different(before[key], now[key], f"{name}.{key}" if name else key)
                 for key in sorted({*before} & {*now}))
        return next((one for one in found if one), None)
    return None if before == now else f"{name} is {now!r}, was {before!r}"


def check_identity(model: LanguageModel, expected: dict[str, Any]) -> None:
    """Raise IndexMismatchError unless this is the model the index was built with.

    Equal weight files are enough; files that differ (saved again, sharded otherwise) are forgiven
    when every tensor is the same. The configuration must say the same.
    """
    if changed := _different(expected["config"], config_facts(model.network.config), ""):
        raise IndexMismatchError(
            f"the model {model.source.name} is not as it was when the index was built: in its "
            f"configuration {changed}. Pass --model with the right folder or id@revision, or build "
            "a new index for this model."
        )
    files = files_digest(model.source)
    if files is not None and files == expected["files"]:
        return
    tensors = tensors_digest(model.network)
    if tensors == expected["tensors"]:
        return
    raise IndexMismatchError(
        f"the model {model.source.name} is not the one the index was built with: its weights have "
        f"digest {tensors[:12]}, the index expects {str(expected['tensors'])[:12]}. Pass --model "
        "with the right folder or id@revision, or build a new index for this model."
    )


def files_digest(source: ModelSource) -> str | None:
    """SHA-256 over the weight files' own SHA-256s, or None for a model given as an object.

    An adapter's covers its own weights and settings and its base's weights.
    """
    if source.is_object:
        return None
    if source.adapter is not None:
        folder = source.adapter.folder
        weights = sorted(folder.glob(WEIGHTS)) or sorted(folder.glob("adapter_model.bin"))
        settings = json.dumps(source.adapter.settings, sort_keys=True)
        return digest_of_files(weights, (settings, f"base {files_digest(source.base)}"))
    folder = source.folder
    return digest_of_files(
        sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    )


def tokenizer_digest(tokenizer: Any | None) -> str | None:
    """SHA-256 of what decides text → tokens: vocabulary, merges, special tokens, chat template."""
    if tokenizer is None:
        return None
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Leftovers of whoever last called the tokenizer; every call of ours sets its own.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:  # can't read text for us, but may stand beside a model that is used with token files
        content = {"vocabulary": tokenizer.get_vocab()}
    content["chat_template"] = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
