"""The reference of preference pairs: which model it is, and whether it can be asked at all.

A policy that learned preferences directly is compared with a reference, mostly the model that it
began as. What the reference gives each answer is in the data, as trainers write it down, or a build
asks for it (`ask_reference.py`). Here no weights are read, but to be digested.
"""

from dataclasses import dataclass, replace
from typing import Any

from gradindex.errors import IndexMismatchError, InputError, about
from gradindex.model.adapters import adapter_facts
from gradindex.model.checkpoint import check_checkpoint
from gradindex.model.config import context_length, vocabulary_size
from gradindex.model.identity import files_digest, tensors_digest
from gradindex.model.load_tokenizer import load_tokenizer
from gradindex.model.model_source import ModelSource, anywhere, fetch_weights
from gradindex.model.network import LanguageModel
from gradindex.progress import Progress
from gradindex.storage.build_plan import CorpusSettings, ReferenceFacts
from indexer.read.choose_form import say_references
from indexer.read.discover import discover


@dataclass(frozen=True)
class Reference:
    """Where a reference comes from (None: it is the policy without its adapter), and its facts."""

    source: ModelSource | None
    facts: ReferenceFacts


def choose_reference(
    asked: Any, policy: ModelSource, data: list[Any], settings: CorpusSettings, progress: Progress
) -> Reference | None:
    """The reference to be asked, not yet identified; None where none is needed.

    That is the one that was `asked` for, or where the data say nothing of one, the base of the
    policy's own adapter. Raises InputError for one that can't be used, or has no use.
    """
    if asked is not None:
        if settings.task != "preference":
            raise InputError(
                "--reference is the model that a policy of preferences is compared with, and the "
                f"task is {settings.task}. Leave it out, or say --task preference.")
        return _named(asked, policy, progress)
    if settings.task != "preference" or not _has_adapter(policy) or \
            say_references(discover(data).sources, settings):
        return None
    base = policy.adapter.base if policy.adapter else policy.name
    return Reference(None, _facts(base, own_base=True))


def _named(asked: Any, policy: ModelSource, progress: Progress) -> Reference:
    with about("--reference"):
        source = replace(policy, model=asked, tokenizer=None, adapter_name=None, also={})
        for line in check_checkpoint(source):
            progress.say(f"reference: {line}")
    name = source.name if source.is_object else anywhere(source.name)
    return Reference(source, _facts(name, source.revision))


def _facts(name: str, revision: str | None = None, own_base: bool = False) -> ReferenceFacts:
    return {"name": name, "revision": revision, "own_base": own_base, "files": None,
            "tensors": None}


def _has_adapter(policy: ModelSource) -> bool:
    """Whether a policy is a base with an adapter that runs."""
    if policy.is_object:
        return policy.adapter_name is not None or bool(adapter_facts(policy.model))
    return policy.adapter is not None


def vocabulary_of(reference: Reference | None, policy: ModelSource, length: int) -> int:
    """How many token ids the policy has that its reference has, too.

    Raises InputError where the reference means other tokens by them, or doesn't read `length` of
    them.
    """
    own = vocabulary_size(policy.load_config())
    if reference is None or reference.source is None:
        return own
    source, name = reference.source, reference.facts["name"]
    config = source.load_config()
    context, size = context_length(config), vocabulary_size(config)
    if context and length > context:
        raise InputError(f"the reference {name} reads {context} tokens at most, and sequences have "
                         f"up to {length}. Set --seq-len {context}.")
    with about("--reference"):
        tokenizers = [load_tokenizer(one) for one in (policy, source)]
    if None in tokenizers:
        # nothing else tells whether they have the same tokens
        if size != own:
            raise InputError(
                f"the reference {name} has {size} tokens, the policy {own}, and a tokenizer that "
                "would tell which they share isn't there. Give a reference with the policy's "
                "tokenizer beside it.")
        return own
    _check_tokens(name, *(tokenizer.get_vocab() for tokenizer in tokenizers if tokenizer))
    return min(own, size)


def _check_tokens(name: str, policy: dict[str, int], reference: dict[str, int]) -> None:
    """Raise InputError where a token id stands for another token in a reference's vocabulary.

    Tokens that were added to one of them may be missing in the other.
    """
    theirs = {number: token for token, number in reference.items()}
    for token, number in sorted(policy.items(), key=lambda known: known[1]):
        if theirs.get(number, token) != token:
            raise InputError(
                f"the reference {name} has another tokenizer than the policy: token {number} is "
                f"{theirs[number]!r:.40} there and {token!r:.40} here, so it would read other "
                "texts. Expected a model of the same vocabulary, such as the one that the policy "
                "was trained from.")


def identified(
    reference: Reference, policy: ModelSource, dtype: str, progress: Progress
) -> Reference:
    """A reference with the digest of its weights, by which a plan knows it. Raises InputError."""
    source, facts = reference.source, reference.facts
    if source is None:
        progress.say(f"reference: the adapter's own base, {facts['name']}: the policy with its "
                     "adapter disabled")
        return reference
    progress.say(f"reference: {facts['name']}")
    with about("--reference"):
        files, tensors = _digests(source, dtype, of_tensors=source.is_object)
    if files is not None and not policy.is_object and files == files_digest(policy):
        progress.say("warning: the reference has the policy's own weights, as before any training: "
                     "every pair is then as likely as its opposite")
    return Reference(source, {**facts, "files": files, "tensors": tensors})


def _digests(
    source: ModelSource, dtype: str, of_tensors: bool
) -> tuple[str | None, str | None]:
    """The digests of a source's files and, if it is asked for, of its tensors in a dtype."""
    tensors = tensors_digest(LanguageModel.load(source, dtype).network) if of_tensors else None
    fetch_weights(source)
    return files_digest(source), tensors


def reference_at_build(
    facts: ReferenceFacts | None, asked: Any, policy: ModelSource, dtype: str
) -> Reference | None:
    """The reference of an index's build, which is now where `asked` says [where it was then].

    Raises InputError where there was none, or it isn't there; IndexMismatchError for another.
    """
    if facts is None or facts["own_base"]:
        if asked is not None:
            raise InputError(
                "--reference says where the reference of the index's build is now, and the build "
                f"asked {'none' if facts is None else 'the policy itself, without its adapter'}. "
                "Leave it out.")
        return None if facts is None else Reference(None, facts)
    if asked is None and facts["files"] is None:
        raise InputError("the reference of the index's build was a model object; pass it "
                         "(reference=…, or --reference PATH).")
    revision = facts["revision"]
    there = facts["name"] if revision is None else f"{facts['name']}@{revision}"
    try:
        source = replace(policy, model=there if asked is None else asked, tokenizer=None,
                         adapter_name=None, also={})
        check_checkpoint(source)
        files, tensors = _digests(source, dtype, of_tensors=facts["files"] is None)
    except InputError as error:
        raise InputError(f"--reference: {error} At the build it was {there}; if it was moved, say "
                         "where it is with --reference PATH.") from None
    # of an object the files aren't known, of a folder the tensors
    found, expected = (tensors, facts["tensors"]) if facts["files"] is None else (
        files, facts["files"])
    if found != expected:
        raise IndexMismatchError(
            f"the reference {source.name} is not the one that the index was built with: its "
            f"weights have digest {str(found)[:12]}, the index expects {str(expected)[:12]}. Pass "
            "--reference with the right folder or id@revision, or build a new index.")
    return Reference(source, facts)
