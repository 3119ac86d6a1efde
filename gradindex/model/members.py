"""Several models that share one score: the model itself, "last", and other members.

Checkpoints of one training run, models trained from other seeds, or the base that a model was tuned
from. Each has gradients and a curvature of its own, and the influence is the weighted sum over
them, Σ_k w_k I_k(q, m); with equal weights 1/M it is their mean, which predicts retraining better
than one of them alone. To everything but the pass through a network another member's maps are
just more modules (`Module.member`), so a sequence has one code for all of them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradindex.errors import InputError, about
from gradindex.model.checkpoint import check_checkpoint
from gradindex.model.config import context_length, vocabulary_size
from gradindex.model.load_tokenizer import load_tokenizer
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import Anatomy, examine, tracked_modules
from gradindex.modules import AT, LAST, MEMBER_FORM, Module, split_name
from gradindex.storage.manifest import MOST_MEMBERS


def named_members(also: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    """Members by name, from a mapping or from texts such as "early=FOLDER".

    Without a name it is the revision of a hub id, or the folder's own name. Raises InputError for
    names that can't be, or are there twice.

    >>> named_members(["early=runs/step-64", "org/model@step2000", "runs/seed-1"])
    {'early': 'runs/step-64', 'step2000': 'org/model@step2000', 'seed-1': 'runs/seed-1'}
    """
    if isinstance(also, (str, Path)):
        also = [also]
    if not isinstance(also, Iterable):
        raise InputError(f"also={also!r}: expected a mapping of names to models, or a list of "
                         "\"NAME=MODEL\".")
    pairs = list(also.items()) if isinstance(also, Mapping) else [split_name(one) for one in also]
    members: dict[str, Any] = {}
    for name, model in pairs:
        if name is None:
            name = _own_name(model)
        if not isinstance(name, str) or not re.match(MEMBER_FORM, name):
            raise InputError(f"--also {name}=…: expected a name of letters, digits and . _ -, as "
                             "in --also early=FOLDER.")
        # names become those of files, which some disks take as equal
        if name.lower() in (LAST, *(other.lower() for other in members)):
            raise InputError(
                f"--also {name}=…: there is a model of this name, as {LAST} is the first one's; "
                "expected another for each, as in --also early=FOLDER.")
        if model is None or str(model) == "":
            raise InputError(f"--also {name}: no model is given; expected a folder, a hub id or a "
                             "model object, as in --also early=FOLDER.")
        with about(f"--also {name}"):
            ModelSource(model)  # which refuses what is no model
        members[name] = model
    if len(members) > MOST_MEMBERS:
        raise InputError(
            f"{len(members)} models beside the first: expected at most {MOST_MEMBERS}.")
    return members


def _own_name(model: Any) -> str:
    """The name of a member that was given none. Raises InputError where nothing gives one."""
    if model == "":
        raise InputError("--also: no model is given; expected a folder or a hub id, as in --also "
                         "early=FOLDER.")
    if not isinstance(model, (str, Path)):
        raise InputError(f"also=[{type(model).__name__}]: expected a name for each model object, "
                         "as in also={\"early\": model}.")
    source = ModelSource(model)
    return source.revision or Path(source.name).resolve().name


def member_source(source: ModelSource, name: str) -> ModelSource:
    """Where another member comes from; it has the tokenizer of the first."""
    return replace(source, model=source.also[name], also={})


def check_members(source: ModelSource) -> list[str]:
    """Look at the members before any weights are read; returns what to know of them.

    Raises InputError for one that isn't there or has other tokens.
    """
    if not source.also:
        return []
    said, tokens, tokenizer = [], vocabulary_size(source.load_config()), load_tokenizer(source)
    for name in source.also:
        member = member_source(source, name)
        with about(f"--also {name}"):
            said += [f"{name}: {line}" for line in check_checkpoint(member)]
            if (theirs := vocabulary_size(member.load_config())) != tokens:
                raise InputError(f"it has {theirs} tokens and the model {tokens}; expected another "
                                 "checkpoint of the model, or one trained like it.")
            _check_tokens(source, name, tokenizer)
            _check_classes(source, name)
    return said


def check_lengths(source: ModelSource, length: int) -> None:
    """Raise InputError where a member doesn't read sequences of so many tokens."""
    for name in source.also:
        with about(f"--also {name}"):
            context = context_length(member_source(source, name).load_config())
            if context is not None and context < length:
                raise InputError(f"it reads {context} tokens at most, and sequences have up to "
                                 f"{length}. Set --seq-len {context}.")


def _check_classes(source: ModelSource, name: str) -> None:
    """Raise InputError where a member of a classifier has other classes, or another order."""
    if source.task.name != "classification":
        return
    ours, theirs = (dict(one.load_config().id2label) for one in (
        source, member_source(source, name)))
    if ours != theirs:
        raise InputError(
            f"its classes are {', '.join(map(str, theirs.values()))}, the model's "
            f"{', '.join(map(str, ours.values()))}: their scores would be of different labels. "
            "Expected the same names in the same order (id2label in config.json).")


def _check_tokens(source: ModelSource, name: str, ours: Any) -> None:
    """Raise InputError where a member's own tokenizer, if it has one, has other tokens."""
    # the template of chats may differ: a base has none
    theirs = load_tokenizer(replace(source, model=source.also[name], tokenizer=None, also={}))
    if ours is None or theirs is None:
        return
    before = {number: token for token, number in ours.get_vocab().items()}
    for token, number in sorted(theirs.get_vocab().items(), key=lambda known: known[1]):
        # what was added to one alone is read by neither wrongly
        if before.get(number, token) != token:
            raise InputError(
                f"its tokenizer has {token!r:.40} for the number {number}, the model's "
                f"{before[number]!r:.40}: it would read other texts. Expected a model with the "
                "same tokenizer.")


def load_members(source: ModelSource, dtype: str = "auto") -> LanguageModel:
    """Load a model with all of its other members. Raises InputError."""
    model = LanguageModel.load(source, dtype)
    for name in source.also:
        model.others[name] = load_member(model, name, dtype)
    return model


def load_member(model: LanguageModel, name: str, dtype: str) -> LanguageModel:
    """Load another member, which runs beside a model. Raises InputError for one that can't."""
    source = replace(member_source(model.source, name), tokenizer=model.tokenizer)
    with about(f"--also {name}"):
        other = LanguageModel.load(source, dtype)
        if other.dtype != model.dtype:
            raise InputError(
                f"it computes in {str(other.dtype).removeprefix('torch.')}, the model in "
                f"{str(model.dtype).removeprefix('torch.')}; expected one dtype. Say which with "
                "--dtype.")
    return other


def tracked_of_all(
    model: LanguageModel, choice: str, anatomy: Anatomy | None = None
) -> list[Module]:
    """The tracked modules of a model and of its other members, of equal weights.

    As `tracked_modules`; also raises InputError for a member of another shape.
    """
    modules = tracked_modules(model.network, choice, anatomy)
    equal = 1 / (1 + len(model.others))
    every = [replace(module, weight=equal) for module in modules]
    for name, other in model.others.items():
        with about(f"--also {name}"):
            own = tracked_modules(
                other.network, choice, examine(other.network, other.source.task))
            _check_alike(modules, own)
            for module in modules:
                uses = [len(one.sharing(module.name)) for one in (model, other)]
                if uses[0] != uses[1]:
                    raise InputError(
                        f"{module.name} is tied to the embedding in one of the two models and not "
                        "in the other; expected both alike, or leave it out with --modules mlp.")
        every += [replace(module, name=f"{name}{AT}{module.name}", member=name, weight=equal)
                  for module in own]
    return every


def _check_alike(modules: list[Module], own: list[Module]) -> None:
    """Raise InputError where a member's modules aren't those of the model."""
    for ours, theirs in zip(modules, own, strict=False):
        if ours != theirs:
            raise InputError(
                f"its map {theirs.name} [{theirs.d_out}, {theirs.d_in}] is not the model's "
                f"{ours.name} [{ours.d_out}, {ours.d_in}]; expected another checkpoint of the "
                "model, or one trained like it.")
    if len(modules) != len(own):
        raise InputError(f"it has {len(own)} maps to track and the model {len(modules)}; expected "
                         "another checkpoint of the model, or one trained like it.")
