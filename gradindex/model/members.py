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

from gradindex.errors import InputError
from gradindex.model.checkpoint import check_checkpoint
from gradindex.model.config import vocabulary_size
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
    pairs = list(also.items()) if isinstance(also, Mapping) else [split_name(one) for one in also]
    members: dict[str, Any] = {}
    for name, model in pairs:
        if name is None:
            name = _own_name(model)
        if not re.match(MEMBER_FORM, str(name)):
            raise InputError(f"--also {name}=…: expected a name of letters, digits and . _ -, as "
                             "in --also early=FOLDER.")
        # names become those of files, which some disks take as equal
        if name.lower() in (LAST, *(other.lower() for other in members)):
            raise InputError(
                f"--also {name}=…: there is a model of this name, as {LAST} is the first one's; "
                "expected another for each, as in --also early=FOLDER.")
        members[name] = model
    if len(members) > MOST_MEMBERS:
        raise InputError(
            f"{len(members)} models beside the first: expected at most {MOST_MEMBERS}.")
    return members


def _own_name(model: Any) -> str:
    """The name of a member that was given none."""
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
    said, tokens = [], vocabulary_size(source.load_config())
    for name in source.also:
        member = member_source(source, name)
        with of_member(name):
            said += [f"{name}: {line}" for line in check_checkpoint(member)]
            if (theirs := vocabulary_size(member.load_config())) != tokens:
                raise InputError(f"it has {theirs} tokens and the model {tokens}; expected another "
                                 "checkpoint of the model, or one trained like it.")
            _check_tokens(source, name)
    return said


def _check_tokens(source: ModelSource, name: str) -> None:
    """Raise InputError where a member's own tokenizer, if it has one, has other tokens."""
    # the template of chats may differ: a base has none
    ours = load_tokenizer(source)
    theirs = load_tokenizer(replace(source, model=source.also[name], tokenizer=None, also={}))
    if ours is None or theirs is None:
        return
    before, now = ours.get_vocab(), theirs.get_vocab()
    for token, number in sorted(now.items(), key=lambda known: known[1]):
        if before.get(token, number) != number:
            raise InputError(
                f"its tokenizer has another number for {token!r:.40}, {number} and not "
                f"{before[token]}: it would read other texts. Expected a model with the same "
                "tokenizer.")


class of_member:
    """A context in which an InputError is said to be about a member."""

    def __init__(self, name: str):
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, InputError):
            raise InputError(f"--also {self._name}: {error}") from None


def load_members(source: ModelSource, dtype: str = "auto") -> LanguageModel:
    """Load a model with all of its other members. Raises InputError."""
    model = LanguageModel.load(source, dtype)
    for name in source.also:
        model.others[name] = load_member(model, name, dtype)
    return model


def load_member(model: LanguageModel, name: str, dtype: str) -> LanguageModel:
    """Load another member, which runs beside a model. Raises InputError for one that can't."""
    source = replace(member_source(model.source, name), tokenizer=model.tokenizer)
    with of_member(name):
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
        with of_member(name):
            own = tracked_modules(
                other.network, choice, examine(other.network, other.source.task))
            _check_alike(modules, own)
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
