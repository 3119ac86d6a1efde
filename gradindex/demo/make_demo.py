"""Make what the demo indexes: a small language model and the documents it was trained on.

    .demo/model/            an ordinary transformers folder: GPT-NeoX, a byte-level BPE tokenizer
    .demo/documents.jsonl   id, text, module and kind of every training document
    .demo/demo.json         the settings; in the end the sizes, the final loss, what was learned

The text is the running Python's standard library (`library_documents.py`), so nothing is
downloaded. Made again, it reuses what is complete; a training that was stopped begins anew.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from gradindex.demo.library_documents import Document, standard_library_documents
from gradindex.demo.questions import QUERIES
from gradindex.demo.small_classifier import ClassifierSettings
from gradindex.demo.small_model import (
    DemoSettings,
    log_probability,
    new_model,
    train,
    train_tokenizer,
    windows,
)
from gradindex.errors import InputError
from gradindex.progress import Progress
from gradindex.storage.files import atomic_write, make_folders, rename_folder
from gradindex.storage.os_errors import disk_errors

Settings = DemoSettings | ClassifierSettings
FACTS, MODEL, DOCUMENTS, INDEX = "demo.json", "model", "documents.jsonl", "index"

# Documents of these modules come first: much used, and told in many places.
MODULES = """
    pydoc_data _collections_abc _compression _pydatetime _pyio argparse base64 bisect calendar cmd
    collections configparser contextlib copy csv dataclasses datetime difflib enum fileinput fnmatch
    fractions ftplib functools getpass glob gzip hashlib heapq hmac html http imaplib ipaddress json
    logging numbers os pathlib poplib posixpath queue random sched secrets shelve
    shutil smtplib socket socketserver ssl statistics string subprocess tempfile textwrap threading
    timeit urllib wave weakref wsgiref zipfile
"""


def prepare(
    out: Path, settings: DemoSettings, progress: Progress, library: Path | None = None
) -> dict[str, Any]:
    """Write the demo into `out`, unless it is there, and return the facts in demo.json.

    The documents are those of `library`, a folder of Python sources [the running Python's].
    Raises InputError where `out` holds something else, ResourceError where the disk doesn't do.
    """
    facts = begin(out, settings, progress)
    if facts is not None:
        return facts
    progress.start("documents", 0, "")
    documents, tokenizer = choose_documents(settings, library)
    sequences = windows(documents, tokenizer, settings.length)
    tokens = sum(map(len, sequences))
    progress.finish(f"{len(documents):,} of the standard library, {len(sequences):,} sequences, "
                    f"{tokens:,} tokens")

    # what is asked in the end must have been learned, or the answers would mean nothing
    model = new_model(settings)
    before = [log_probability(model, tokenizer, *query) for query in QUERIES]
    loss = train(model, sequences, settings, progress)
    learned = [
        {"prompt": prompt, "completion": completion, "before": untrained,
         "after": log_probability(model, tokenizer, prompt, completion)}
        for (prompt, completion), untrained in zip(QUERIES, before, strict=True)
    ]
    progress.say("log p a token, before and after training:")
    for line in learned:
        progress.say(f"  {line['before']:6.2f} {line['after']:6.2f}  {line['prompt']!r} → "
                     f"{line['completion']!r}")

    return finish(out, settings, model, tokenizer, documents, {
        "documents": len(documents), "sequences": len(sequences), "tokens": tokens,
        "parameters": model.num_parameters(), "loss": loss, "learned": learned})


def begin(out: Path, settings: Settings, progress: Progress) -> dict[str, Any] | None:
    """The facts of a demo that is there; None where it is to be made, in a folder that is now its.

    Raises as `check_folder`.
    """
    facts = check_folder(out, settings)
    if is_made(facts, settings):
        progress.say(f"{out} has the model and its documents; reusing them")
        return facts
    make_folders(out)
    # from here on the folder is known as a demo's, whose parts may be made anew
    atomic_write(out / FACTS, _json(_asked(settings)))
    return None


def finish(
    out: Path, settings: Settings, model: Any, tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Mapping[str, Any]], learned: dict[str, Any],
) -> dict[str, Any]:
    """Write what was made, and the facts last; they are returned. Raises ResourceError."""
    facts = {**_asked(settings), **learned}
    save(model, tokenizer, documents, out)
    atomic_write(out / FACTS, _json(facts))
    return facts


def check_folder(out: Path, settings: Settings) -> dict[str, Any]:
    """What the demo in `out` says of itself; nothing where there is none yet.

    Raises InputError for a file, and for a folder in which a demo would replace what isn't its own,
    or is another demo's.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; expected a folder for the demo. Give another with -o.")
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads((out / FACTS).read_bytes())
        if isinstance(facts, dict) and isinstance(facts.get("settings"), dict):
            if facts["settings"].keys() != asdict(settings).keys():
                raise InputError(f"{out} holds another demo, of another kind of model; expected a "
                                 "new folder. Give another with -o.")
            return facts
    for name in (FACTS, MODEL, DOCUMENTS, INDEX):
        if os.path.lexists(out / name):
            raise InputError(f"{out} holds {name}, which no demo made, and which this one would "
                             "replace; expected a new folder. Give another with -o.")
    return {}


def is_made(facts: dict[str, Any], settings: Settings) -> bool:
    """Whether a demo that says `facts` of itself has the model that `settings` would make here."""
    return _asked(settings).items() <= facts.items() and "loss" in facts


def _asked(settings: Settings) -> dict[str, Any]:
    return {"settings": asdict(settings), "python": platform.python_version()}


def _json(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=1) + "\n").encode()


def choose_documents(
    settings: DemoSettings, library: Path | None = None
) -> tuple[list[Document], PreTrainedTokenizerFast]:
    """Documents that make `settings.sequences` windows, MODULES first, and their tokenizer."""
    def rank(document: Document) -> tuple[bool, bytes]:
        key = f"{settings.seed}:{document['id']}".encode()
        return document["module"].split(".")[0] not in first, hashlib.sha256(key).digest()

    first = set(MODULES.split())
    everything = standard_library_documents(library)
    ranked = sorted(everything, key=rank)
    tokenizer = train_tokenizer([document["text"] for document in ranked[:2 * settings.sequences]],
                                settings.vocabulary)
    chosen, left = set(), settings.sequences
    for document in ranked:
        tokens = len(tokenizer(document["text"]).input_ids)
        cost = math.ceil(tokens / settings.length)
        if tokens <= settings.longest and cost <= left:
            chosen.add(document["id"])
            left -= cost
        if not left:
            break
    return [document for document in everything if document["id"] in chosen], tokenizer


def save(
    model: Any, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Mapping[str, Any]],
    out: Path,
) -> None:
    """Write documents.jsonl and model/, each complete or not at all. Raises ResourceError."""
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    atomic_write(out / DOCUMENTS, lines.encode())
    partial = out / f"{MODEL}.partial"
    for folder in (partial, out / MODEL, out / INDEX):  # an index of another model is no use
        shutil.rmtree(folder, ignore_errors=True)
    with disk_errors(partial):
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    rename_folder(partial, out / MODEL)
