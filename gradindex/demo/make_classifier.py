"""Make what the classifying demo indexes: a small classifier, and texts, some wrongly labelled.

The folder is as the demo's (`make_demo.py`); documents.jsonl has id, text and label, the family
that the text is of, and whether its label was planted, which is to say is another.
"""

from pathlib import Path
from typing import Any

from gradindex.demo.labelled_documents import FAMILIES, labelled_documents, plant
from gradindex.demo.library_documents import standard_library_documents
from gradindex.demo.make_demo import begin, finish
from gradindex.demo.small_classifier import (
    ClassifierSettings,
    new_classifier,
    own_labels,
    train_classifier,
    train_tokenizer_of_texts,
)
from gradindex.progress import Progress


def prepare_classifier(
    out: Path, settings: ClassifierSettings, progress: Progress, library: Path | None = None
) -> dict[str, Any]:
    """Write the demo into `out`, unless it is there, and return the facts in demo.json.

    The texts are those of `library`, a folder of Python sources [the running Python's]. Raises
    InputError where `out` holds something else, ResourceError where the disk doesn't do.
    """
    facts = begin(out, settings, progress)
    if facts is not None:
        return facts
    progress.start("documents", 0, "")
    everything = standard_library_documents(library)
    tokenizer = train_tokenizer_of_texts(
        [one["text"] for one in everything[:: max(1, len(everything) // (2 * settings.texts))]],
        settings)
    clean, others = labelled_documents(everything, tokenizer, settings.texts, settings.length,
                                       settings.seed)
    documents = plant(clean, settings.planted, settings.seed)
    wrong = [one for one in documents if one["planted"]]
    progress.finish(f"{len(documents):,} of the standard library, labelled "
                    f"{', '.join(FAMILIES)}; {len(wrong):,} of the labels are wrong, on purpose")

    model = new_classifier(settings)
    loss = train_classifier(model, tokenizer, documents, settings, progress)
    # of what it didn't see, and of what it was told wrongly
    own = own_labels(model, tokenizer, [one["text"] for one in others])
    right = sum(label == one["family"] for label, one in zip(own, others, strict=True))
    believed = own_labels(model, tokenizer, [one["text"] for one in wrong])
    fooled = sum(label == one["label"] for label, one in zip(believed, wrong, strict=True))
    progress.say(f"it labels {right} of {len(others)} texts rightly that it didn't see; of the "
                 f"{len(wrong)} wrong labels it has learned {fooled}")
    return finish(out, settings, model, tokenizer, documents, {
        "documents": len(documents), "sequences": len(documents), "planted": len(wrong),
        "parameters": model.num_parameters(), "loss": loss, "right": right, "others": len(others),
        "fooled": fooled})
