"""The forms of records for tasks beyond the next token: labelled texts, and pairs of answers."""

from collections.abc import Collection
from typing import Any

from gradindex.errors import InputError
from gradindex.model.messages import (
    BESIDE_MESSAGES,
    TOLD_BESIDE_PROMPTS,
    read_chat,
)
from gradindex.model.task_rows import REFERENCE
from gradindex.storage.build_plan import CorpusSettings
from gradindex.task import label_field, text_fields
from indexer.read.known_forms import ASKED, Content, Form

# task: the fields that may be named
FIELDS = {
    "causal": ("text", "prompt", "completion", "messages"),
    "classification": ("text", "text_b", "label"),
    "reward": ("prompt", "chosen", "rejected", "margin"),
    "preference": ("prompt", "chosen", "rejected"),
}


def task_form(task: str, names: Collection[Any], settings: CorpusSettings) -> Form | None:
    """The form of a record with fields of these names for a task, None where it has none.

    >>> form = task_form("classification", ["sentence", "label"], CorpusSettings(128))
    >>> form.needs, form.standard({"sentence": "Good.", "label": 1})
    (('sentence', 'label'), {'texts': ['Good.'], 'label': 1, 'called': ('sentence',)})
    """
    if task == "classification":
        return _labelled(names, settings)
    # a policy's preferences mean nothing without what its reference made of them
    if task == "preference" and settings.reference is None and not set(REFERENCE) <= set(names):
        return None
    return _pairs(names, settings, asked=task == "preference" and settings.reference is not None)


def _labelled(names: Collection[Any], settings: CorpusSettings) -> Form | None:
    texts = text_fields(names, settings.text_field, settings.text_b_field)
    label = label_field(names, settings.label_field)
    if texts is None or label is None:
        return None

    def standard(content: Content) -> Content:
        return {"texts": [content[name] for name in texts], "label": content[label],
                "called": texts}

    return Form("labelled", "labelled", (*texts, label), "read as text and label" if len(texts) == 1
                else "read as two texts and a label", standard)


def _pairs(
    names: Collection[Any], settings: CorpusSettings, asked: bool = False
) -> Form | None:
    """The form of pairs; `asked` says that a reference is asked for what it gives them."""
    chosen, rejected = (getattr(settings, f"{name}_field") or name
                        for name in ("chosen", "rejected"))
    # these rows may have, and have to where they are named; a prompt, where the first row has one
    prompt, margin = settings.prompt_field or "prompt", settings.margin_field or "margin"
    needs = (prompt,) * bool(settings.prompt_field or prompt in names) + (
        chosen, rejected) + (margin,) * bool(settings.margin_field)
    if not set(needs) <= set(names):
        return None
    numbers = {"margin": margin} if settings.task == "reward" else {
        name: name for name in REFERENCE}
    if asked and set(REFERENCE) & set(names):
        raise _said_twice(settings)

    def standard(content: Content) -> Content:
        said = {name: content.get(called) for name, called in numbers.items()}
        if asked:
            if any(value is not None for value in said.values()):
                raise _said_twice(settings)
            said = dict.fromkeys(REFERENCE, 0.0)  # until it is asked
        return {"prompt": content.get(prompt), "chosen": content[chosen],
                "rejected": content[rejected], **said,
                "called": {"prompt": prompt, "chosen": chosen, "rejected": rejected, **numbers}}

    return Form("pairs", "pairs", needs, "read as pairs of answers, the first preferred", standard,
                (prompt, *numbers.values(), *BESIDE_MESSAGES),
                tuple(name for name in TOLD_BESIDE_PROMPTS
                      if name not in (*needs, prompt, *numbers.values(), *settings.keep_fields)))


def check_prompt(
    name: str, form: Form, names: Collection[Any], settings: CorpusSettings
) -> None:
    """Raise InputError where answers of pairs have no prompt, and what looks like it isn't read."""
    likely = [field for field in ASKED if field in names
              and field not in (*form.needs, *settings.keep_fields)]
    if form.kind == "pairs" and likely and not {"prompt", settings.prompt_field} & set(form.needs):
        raise InputError(
            f"the pairs of {name} have no prompt, but a field {likely[0]!r}, which looks like one. "
            f"Name it with --prompt-field {likely[0]}, or, if the answers hold the whole dialogue, "
            f"keep it beside them with --keep-fields {likely[0]}.")


def holds_chats(content: Content, form: Form) -> bool:
    """Whether the answers of a pair are messages."""
    try:
        answers = form.read(content)
        return all(read_chat(answers[name]).messages for name in ("chosen", "rejected"))
    except InputError:  # which is said where all rows are read
        return False


def _said_twice(settings: CorpusSettings) -> InputError:
    """What to say where the data have what a reference is to be asked for."""
    assert settings.reference is not None
    return InputError(
        f"the data say what a reference gives the answers ({' and '.join(REFERENCE)}), and the "
        f"reference {settings.reference['name']} is to be asked for the same (--reference; of an "
        "append, that of its build). Leave one of them out.")


def unsuitable(name: str, names: Collection[Any], settings: CorpusSettings) -> InputError:
    """What to say of records that have no form for a task."""
    shown = ", ".join(str(one)[:60] for one in names) or "none"
    for role in FIELDS[settings.task]:
        called = getattr(settings, f"{role}_field")
        if called and called not in names:
            return InputError(f"--{role.replace('_', '-')}-field: the first record of {name} has "
                              f"no field {called!r}; it has {shown}.")
    if settings.task == "classification":
        looks = "" if not {"chosen", "rejected"} <= set(names) else (
            " These are pairs of answers, which a reward model learns (--task reward, with one "
            f"output; this model has {len(settings.labels)}), or a policy (--task preference).")
        return InputError(
            f"the first record of {name} has the fields {shown}; expected a text and its label."
            f"{looks} Name yours with --text-field (and --text-b-field) and --label-field.")
    # pairs are there, and only what a reference says of them is missing
    if settings.task == "preference" and _pairs(names, settings) is not None:
        return InputError(
            f"the first record of {name} has the fields {shown}; expected chosen and rejected with "
            f"{' and '.join(REFERENCE)}, the sums of log p that the reference gives each answer, "
            "as TRL's DPOTrainer adds them (precompute_ref_log_probs). Name the model to ask for "
            "them with --reference MODEL, at a build.")
    looks = ""
    if text_fields(names) and label_field(names):
        looks = " These are labelled texts, which a classifier learns (--task classification)" + (
            "; a model with one output, as this is, learns numbers from them, a regression, which "
            "is no task here." if settings.task == "reward" else ".")
    return InputError(
        f"the first record of {name} has the fields {shown}; expected a chosen and a rejected "
        f"answer, with the prompt that both follow or as whole dialogues.{looks} Name yours with "
        "--prompt-field, --chosen-field and --rejected-field (and --margin-field).")
