"""Small documents, and rows of tokens where a text would say no more."""

from pathlib import Path
from typing import Any

import numpy as np

FRUIT = ("apple", "pear", "plum", "fig", "lime", "cherry", "mango", "quince")
PLACES = ("hill", "river", "market", "garden", "harbour")


def small_documents() -> list[dict[str, Any]]:
    """Forty short documents, one of them twice, some longer than a sequence of 24 tokens."""
    documents = []
    for n in range(40):
        fruit, place = FRUIT[n % 8], PLACES[n % 5]
        body = f"The {fruit} number {n} grows by the {place}. " * (1 + n % 3)
        documents.append({"text": body.strip(), "url": f"doc/{n}", "place": place})
    documents[17]["text"] = documents[9]["text"]
    return documents


NEW: list[dict[str, Any]] = [  # documents to be appended
    {"text": "The quince number 77 grows by the gate. The quince number 78 grows by the gate.",
     "url": "new/0", "place": "gate"},
    {"text": small_documents()[9]["text"], "url": "new/1", "place": "river"},
    {"text": "A late plum falls by the river.", "url": "new/2", "place": "river"},
]


def tiny_tokens(seed: int, rows: int = 8) -> np.ndarray:
    """Token ids [rows, 6], none of them 36."""
    return np.random.default_rng(seed).integers(0, 36, (rows, 6))


def save(path: Path, tokens: np.ndarray) -> Path:
    """Write a file of tokens, and return its path."""
    path.parent.mkdir(exist_ok=True)
    np.save(path, tokens)
    return path
