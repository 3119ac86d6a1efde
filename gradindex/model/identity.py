"""What a model, its tokenizer and data are, whatever their path: digests, and how they compare."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from gradindex.errors import IndexMismatchError
from gradindex.model.adapters import WEIGHTS, adapter_facts
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.storage.files import digest_of_files


def tensors_digest(network: nn.Module) -> str:
    """SHA-256 in hex over every tensor's name, dtype, shape and bytes, and adapters' scales."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    for line in adapter_facts(network):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def identify(model: LanguageModel) -> dict[str, Any]:
    """What an index knows a model by.

    `files` and `tensors` are digests of its weight files and of its tensors, `config` is what its
    configuration says (`config_facts`); `also` the same of its other members, by name.
    """
    return {"files": files_digest(model.source), "tensors": tensors_digest(model.network),
            "config": config_facts(model.network.config),
            "also": {name: identify(other) for name, other in model.others.items()}}


# Of a configuration, what says where it came from or how fast it runs, not what it computes.
_INCIDENTAL = {"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures",
               "auto_map", "name_or_path"}


def config_facts(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types, without the entries that no gradient depends on."""
    facts = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in facts.items()
            if name not in _INCIDENTAL and not name.startswith("_")}


def _different(before: Any, now: Any, name: str) -> str | None:
    """The first entry in which two configurations differ, in words; None where they agree."""
    if isinstance(before, dict) and isinstance(now, dict):
        # Entries that only one has are another version's of transformers, which adds and drops
        # some: an index would have to be built again for each of them.
        differences = (_different(before[key], now[key], f"{name}.{key}" if name else key)
                       for key in sorted({*before} & {*now}))
        return next((difference for difference in differences if difference), None)
    return None if before == now else f"{name} is {now!r}, was {before!r}"


def check_identity(
    model: LanguageModel, expected: dict[str, Any], flag: str = "--model"
) -> None:
    """Raise IndexMismatchError unless a model is the one with the identity `expected`.

    So of its other members, those that are there. `flag` is by what the right one is named.
    """
    for name, other in model.others.items():
        check_identity(other, expected["also"][name], f"--model {name}=…")
    # The configuration first: equal weights with another activation or scale are another model.
    if changed := _different(expected["config"], config_facts(model.network.config), ""):
        raise IndexMismatchError(
            f"the model {model.source.name} is not as it was when the index was built: in its "
            f"configuration {changed}. Pass {flag} with the right folder or id@revision, or build "
            "a new index for this model."
        )
    # Equal files are enough, and their digest is cached. Others may hold the same tensors, saved
    # again or cut into other shards: only then are all tensors read.
    files = files_digest(model.source)
    if files is not None and files == expected["files"]:
        return
    tensors = tensors_digest(model.network)
    if tensors == expected["tensors"]:
        return
    raise IndexMismatchError(
        f"the model {model.source.name} is not the one the index was built with: its weights have "
        f"digest {tensors[:12]}, the index expects {str(expected['tensors'])[:12]}. Pass {flag} "
        "with the right folder or id@revision, or build a new index for this model."
    )


def files_digest(source: ModelSource) -> str | None:
    """SHA-256 over the SHA-256s of the weight files, or None for a model given as an object.

    An adapter's covers its weights, its settings and the weights of its base.
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
    """SHA-256 of all that decides which tokens a text becomes; None without a tokenizer.

    That is vocabulary, merges, special tokens, chat template and what comes before and behind.
    """
    if tokenizer is None:
        return None
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left there by whoever called the tokenizer last; every call of ours sets its own.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:  # can't read text for us, but may stand beside a model that is used with token files
        content = {"vocabulary": tokenizer.get_vocab()}
    content["chat_template"] = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
