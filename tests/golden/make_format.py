"""Make `format-N/`: a small index of the newest format N with its model, which every later version
must open.

    PYTHONPATH=.:tests python tests/golden/make_format.py

It is made once for each format: making it again would hide a change of the format. The model is
given as an object and the data as rows, so that no path is in it.
"""

import json
import sys
from pathlib import Path

import torch

import gradindex
from gradindex.demo.small_model import train_tokenizer
from gradindex.storage import manifest
from support.documents import small_documents
from support.indexes import SMALL
from support.models import random_network

OUT = Path(__file__).parent / f"format-{manifest.FORMAT}"
QUESTION = {"prompt": "The apple number", "completion": " 8 grows"}


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
    network.save_pretrained(OUT / "model")
    tokenizer.save_pretrained(OUT / "model")
    found = gradindex.open(OUT / "index", **model).search(**QUESTION, shortlist="all", k=10)
    (OUT / "answer.json").write_text(json.dumps([
        {"id": hit.id, "influence": hit.influence, "code_score": hit.code_score, "text": hit.text,
         "user_id": hit.user_id, "fields": hit.fields, "duplicates": hit.duplicates,
         "generic_rate": hit.generic_rate}
        for hit in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
