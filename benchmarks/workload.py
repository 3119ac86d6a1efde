"""A trained model, its full windows of 128 tokens, held-out queries and a fitted curvature.

Everything is kept in a folder, so that several benchmarks share one training.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import GPTNeoXForCausalLM

from demo.documents import standard_library_documents
from demo.prepare import Settings, new_model, train, train_tokenizer
from gradindex.curvature import Ekfac
from gradindex.model import LanguageModel, ModelSource, Module, quiet_transformers, tracked_modules
from gradindex.progress import Progress
from gradindex.records import Part, Record
from indexer.fit import FitSettings, choose_sequences, fit

LENGTH = 128
PROMPT, COMPLETION = 64, 32


@dataclass
class Workload:
    """Training sequences and held-out queries; nothing of the queries was trained on."""

    model: LanguageModel
    modules: list[Module]
    ekfac: Ekfac
    train: list[Record]
    queries: list[Record]
    loss: str

    def summary(self) -> str:
        size = self.model.network.num_parameters() / 1e6
        tracked = sum(m.shape[0] * m.shape[1] for m in self.modules) / 1e6
        effective = sum(c.effective_dimension() for c in self.ekfac.values())
        return (f"GPT-NeoX of {size:.1f} M parameters ({tracked:.1f} M tracked, effective "
                f"dimension {effective:,.0f}), {self.loss}; {len(self.train):,} sequences of "
                f"{LENGTH} tokens")


def make_workload(
    cache: Path, sequences: int, queries: int, steps: int, progress: Progress
) -> Workload:
    """Train and fit, or reuse what `cache` holds for the same numbers."""
    quiet_transformers()
    texts = _files()
    tokenizer = train_tokenizer(texts, 4096)
    ids = np.concatenate([tokenizer(text, verbose=False).input_ids for text in texts])
    windows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int32)
    needed = sequences + queries
    if len(windows) < needed:
        raise SystemExit(f"the standard library gives {len(windows)} sequences; {needed} needed")
    order = np.random.default_rng(0).permutation(len(windows))[:needed]
    chosen = windows[order]
    settings = Settings(sequences=sequences, length=LENGTH, layers=4, hidden=192, steps=steps)
    folder = cache / f"{sequences}-{steps}"
    if not (folder / "model").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        network = new_model(settings)
        loss = train(network, [row.tolist() for row in chosen[:sequences]], settings, progress)
        (folder / "loss.txt").write_text(f"final loss {loss:.2f} nats a token")
        network.save_pretrained(folder / "model")
    source = ModelSource(GPTNeoXForCausalLM.from_pretrained(folder / "model"))
    model = source.load()
    modules = tracked_modules(model.network)
    training = [_record(n, row, 0) for n, row in enumerate(chosen[:sequences])]
    fitted = FitSettings(choose_sequences(sequences, 4096, 0), "model", 256, 2048, 0)
    ekfac = fit(model, modules, lambda wanted: [training[n] for n in wanted], fitted, folder,
                progress, sequences)
    held_out = [_record(n, row[: PROMPT + COMPLETION], PROMPT)
                for n, row in enumerate(chosen[sequences:])]
    return Workload(model, modules, ekfac, training, held_out, (folder / "loss.txt").read_text())


def _files() -> list[str]:
    """The documents of each source file, joined in order: text long enough for full windows."""
    files: dict[str, list[str]] = {}
    for document in standard_library_documents():
        files.setdefault(document["id"].partition(":")[0], []).append(document["text"])
    return ["\n\n".join(texts) + "\n" for texts in files.values()]


def _record(number: int, ids: np.ndarray, prompt: int) -> Record:
    scored = np.arange(len(ids)) >= prompt
    return Record(number, ids, scored, [Part(0, "standard library", 0, -1, -1, 0)])
