"""The forms of records for tasks beyond the next token: labelled texts, and pairs of answers."""

from collections.abc import Collection
from typing import Any

from gradindex.errors import InputError
from gradindex.model.task_rows import REFERENCE
from gradindex.storage.build_plan import CorpusSettings
from indexer.read.known_forms import Content, Form

# what data sets call a text, or two; and its label
TEXTS = (("text", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
         ("question1", "question2"), ("question", "sentence"), ("text",), ("sentence",),
         ("content",), ("review",))
LABELS = ("label", "labels", "class", "target")


def task_form(task: str, names: Collection[Any], settings: CorpusSettings) -> Form | None:
    """The form of a record with fields of these names for a task, None where it has none.

    >>> form = task_form("classification", ["sentence", "label"], CorpusSettings(128))
    >>> form.needs, form.standard({"sentence": "Good.", "label": 1})
    (('sentence', 'label'), {'text': 'Good.', 'text_b': None, 'label': 1})
    """
    if task == "classification":
        return _labelled(names, settings)
    # a policy's preferences mean nothing without what its reference made of them
    if task == "preference" and not set(REFERENCE) <= set(names):
        return None
    return _pairs(names, settings)


def _labelled(names: Collection[Any], settings: CorpusSettings) -> Form | None:
    given = tuple(filter(None, (settings.text_field, settings.text_b_field)))
    texts = given if settings.text_field else next(
        (known + given for known in TEXTS if set(known) <= set(names)), None)
    label = settings.label_field or next((name for name in LABELS if name in names), None)
    if texts is None or label is None or not {*texts, label} <= set(names):
        return None
    first, second = texts[0], texts[1] if len(texts) > 1 else None

    def standard(content: Content) -> Content:
        return {"text": content[first], "label": content[label],
                "text_b": None if second is None else content[second]}

    return Form("labelled", "labelled", (*texts, label), "read as text and label" if second is None
                else "read as two texts and a label", standard)


def _pairs(names: Collection[Any], settings: CorpusSettings) -> Form | None:
    chosen, rejected = (getattr(settings, f"{name}_field") or name
                        for name in ("chosen", "rejected"))
    margin = settings.margin_field or "margin"
    prompt = settings.prompt_field or ("prompt" if "prompt" in names else None)
    if not {chosen, rejected, prompt or chosen} <= set(names):
        return None

    def standard(content: Content) -> Content:
        return {"prompt": None if prompt is None else content.get(prompt),
                "chosen": content[chosen], "rejected": content[rejected],
                "margin": content.get(margin),
                **{name: content.get(name) for name in REFERENCE}}

    return Form("pairs", "pairs", tuple(filter(None, (prompt, chosen, rejected))),
                "read as pairs of answers, the first preferred", standard,
                (margin, *REFERENCE, "tools", "chat_template_kwargs"))


def unsuitable(name: str, task: str, names: Collection[Any]) -> InputError:
    """What to say of records that have no form for a task."""
    shown = ", ".join(str(one)[:60] for one in names) or "none"
    if task == "classification":
        return InputError(
            f"the first record of {name} has the fields {shown}; expected a text and its label. "
            "Name yours with --text-field (and --text-b-field) and --label-field.")
    if task == "preference" and not set(REFERENCE) <= set(names):
        return InputError(
            f"the first record of {name} has the fields {shown}; expected chosen and rejected with "
            f"{' and '.join(REFERENCE)}, the sums of log p that the reference gives each answer, "
            "as TRL's DPOTrainer adds them (precompute_ref_log_probs).")
    return InputError(
        f"the first record of {name} has the fields {shown}; expected a chosen and a rejected "
        "answer, with the prompt that both follow or as whole dialogues. Name yours with "
        "--prompt-field, --chosen-field and --rejected-field.")
