"""Make `format-N/`: a small index of the newest format N with its model, which every later version
must open.

    PYTHONPATH=.:tests python tests/golden/make_format.py

It is made once for each format: making it again would hide a change of the format. The model is
given as an object and the data as rows, so that no path is in it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import gradindex
from gradindex.demo.small_model import train_tokenizer
from gradindex.storage import manifest
from support import task_models
from support.documents import small_documents
from support.indexes import SMALL
from support.models import other_model, random_network

OUT = Path(__file__).parent / f"format-{manifest.FORMAT}"
QUESTION = {"prompt": "The apple number", "completion": " 8 grows"}
LABELLED = {"text": "a great plot", "label": "positive"}
APPLES = {"prompt": "The apple number", "completion": " 9 grows"}
PREFERRED = {"prompt": "why was it", "chosen": " great", "rejected": " so bad"}


def main() -> None:
    """Build, append, delete: everything that a manifest can say."""
    if OUT.exists():
        sys.exit(f"{OUT} exists; a format is frozen once")
    documents = small_documents()
    tokenizer = train_tokenizer([document["text"] for document in documents], 300)
    network = random_network("gpt_neox", torch.float32, vocab_size=len(tokenizer))
    model = {"model": network, "tokenizer": tokenizer}
    torch.set_num_threads(1)
    gradindex.build(network, documents[:24], OUT / "index", tokenizer=tokenizer, **SMALL,
                    covariance_blocks=2)
    gradindex.append(OUT / "index", documents[24:36], **model)
    gradindex.delete(OUT / "index", [3, 17])
    finish(OUT, network, tokenizer, QUESTION)
    # records of other tasks: a label, the border of a pair, what a reference makes of it
    words = task_models.tokenizer_of_texts()
    words.eos_token = "[SEP]"
    classifier = task_models.network_of_texts("bert", 2, torch.float32, **task_models.NAMES)
    gradindex.build(classifier, task_models.sentences(24), OUT / "classification" / "index",
                    tokenizer=words, **task_models.SMALL, keep_fields=["number"])
    finish(OUT / "classification", classifier, words, LABELLED)
    policy = task_models.policy(torch.float32)
    gradindex.build(policy, task_models.answers(24), OUT / "preference" / "index", tokenizer=words,
                    task="preference", **task_models.SMALL, derive=["longer-chosen"])
    finish(OUT / "preference", policy, words, PREFERRED)
    # two models with one score
    gradindex.build(network, documents[:12], OUT / "members" / "index", tokenizer=tokenizer,
                    also={"base": other_model(network)}, **SMALL)
    finish(OUT / "members", {"last": network, "base": other_model(network)}, tokenizer, APPLES)


def finish(out: Path, model: Any, tokenizer: Any, question: dict[str, str]) -> None:
    """Write an index's model, and what the index answers, beside it."""
    network = model["last"] if isinstance(model, dict) else model
    network.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    index = gradindex.open(out / "index", model=model, tokenizer=tokenizer)
    (out / "answer.json").write_text(json.dumps([
        {"id": hit.id, "influence": hit.influence, "code_score": hit.code_score, "text": hit.text,
         "user_id": hit.user_id, "fields": hit.fields, "duplicates": hit.duplicates,
         "generic_rate": hit.generic_rate}
        for hit in index.search(**question, shortlist="all", k=10)], indent=1) + "\n")


if __name__ == "__main__":
    main()
