"""A trained model, its full windows, held-out queries and a fitted curvature.

Everything is kept in a folder, so that several benchmarks share one training.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from gradindex.demo.library_documents import standard_library_documents
from gradindex.demo.small_model import DemoSettings, new_model, train, train_tokenizer
from gradindex.draws import Stream, choose
from gradindex.influence.curvature import Ekfac
from gradindex.influence.gradients import backward, gradient
from gradindex.influence.preconditioned import Gradients
from gradindex.model.load_errors import quiet_transformers
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import tracked_modules
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.storage.records import Part, Record
from indexer.defaults import DAMPING
from indexer.fit.notes import FitSettings
from indexer.fit.schedule import fit

PROMPT, COMPLETION = 64, 32


@dataclass(frozen=True)
class Size:
    """What is trained and indexed: `sequences` of `length` tokens, and the model.

    `text` is "library" (the standard library's documents) or "packages" (all Python sources of the
    installed packages, much more). `modules` and `dtype` are those of the index.
    """

    sequences: int = 8192
    length: int = 128
    layers: int = 4
    hidden: int = 192
    steps: int = 1000
    batch: int = 16
    learning_rate: float = 4e-3
    modules: str = "mlp"
    dtype: str = "float32"
    fit_sequences: int = 4096
    text: str = "library"


@dataclass
class Workload:
    """Training sequences and held-out queries; nothing of the queries was trained on."""

    size: Size
    model: LanguageModel
    modules: list[Module]
    ekfac: Ekfac
    train: list[Record]
    queries: list[Record]
    loss: str
    folder: Path

    def summary(self) -> str:
        count = self.model.network.num_parameters() / 1e6
        tracked = sum(m.size for m in self.modules) / 1e6
        effective = sum(c.effective_dimension(DAMPING) for c in self.ekfac.values())
        return (f"GPT-NeoX of {count:.1f} M parameters ({self.size.modules}: {tracked:.1f} M "
                f"tracked, effective dimension {effective:,.0f}), {self.size.dtype}, {self.loss}; "
                f"{len(self.train):,} sequences of {self.size.length} tokens; {len(self.queries)} "
                f"queries of {PROMPT} + {COMPLETION} tokens")


def make_workload(cache: Path, size: Size, queries: int, progress: Progress) -> Workload:
    """Train and fit, or reuse what `cache` holds for the same numbers."""
    quiet_transformers()
    folder = cache / "-".join(str(value) for value in (
        size.sequences, size.length, size.layers, size.hidden, size.steps, size.text))
    folder.mkdir(parents=True, exist_ok=True)
    chosen = _windows(folder, size, queries)
    settings = DemoSettings(sequences=size.sequences, length=size.length, layers=size.layers,
                        hidden=size.hidden, steps=size.steps, batch=size.batch,
                        learning_rate=size.learning_rate)
    if not (folder / "model").is_dir():
        network = new_model(settings)
        loss = train(network, [row.tolist() for row in chosen[: size.sequences]], settings,
                     progress)
        (folder / "loss.txt").write_text(f"final loss {loss:.2f} nats a token")
        network.save_pretrained(folder / "model")
    source = ModelSource(GPTNeoXForCausalLM.from_pretrained(folder / "model"))
    model = LanguageModel.load(source, size.dtype)
    modules = tracked_modules(model.network, size.modules)
    training = [record(n, row, 0) for n, row in enumerate(chosen[: size.sequences])]
    ekfac = fit_on(folder, model, modules, training, size.fit_sequences, progress)
    held_out = [record(n, row[: PROMPT + COMPLETION], PROMPT)
                for n, row in enumerate(chosen[size.sequences:][:queries])]
    return Workload(size, model, modules, ekfac, training, held_out,
                    (folder / "loss.txt").read_text(), folder)


def fit_on(
    folder: Path, model: LanguageModel, modules: list[Module], training: list[Record], count: int,
    progress: Progress,
) -> Ekfac:
    """EK-FAC of these modules on `count` of the sequences, kept in the folder."""
    kinds = "-".join(sorted({module.kind for module in modules}))
    home = folder / f"fit-{kinds}-{str(model.dtype).removeprefix('torch.')}-{count}"
    home.mkdir(exist_ok=True)
    chosen = choose(Stream.FIT_SEQUENCES, 0, len(training), count)
    settings = FitSettings(chosen, "model", 256, 2048, 0)
    return fit(model, modules, lambda wanted: [training[n] for n in wanted], settings, home,
               progress)[0]


def query_gradients(work: Workload, queries: list[Record]) -> Gradients:
    """∇ log p(completion | prompt) of every query: [q, o, i] by module."""
    found: dict[str, list[torch.Tensor]] = {m.name: [] for m in work.modules}

    def each(module: Module, a: torch.Tensor, d: torch.Tensor) -> None:
        wide = work.model.accumulate
        found[module.name].append(gradient(module, a.to(wide), d.to(wide)))

    for query in queries:
        with torch.no_grad():
            backward(work.model, work.modules,
                     work.model.batch([query]), each)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _windows(folder: Path, size: Size, queries: int) -> np.ndarray:
    """Token ids int32 [sequences + at least `queries`, length] in random order, kept on disk."""
    path = folder / "windows.npy"
    needed = size.sequences + max(queries, 64)
    if path.is_file():
        kept = np.load(path, allow_pickle=False)
        if len(kept) >= needed:
            return kept
    shutil.rmtree(folder / "model", ignore_errors=True)  # trained on other windows
    texts = list(library() if size.text == "library" else _packages())
    tokenizer = train_tokenizer(texts if size.text == "library" else texts[::10], 4096)
    windows = _cut(tokenizer, texts, size.length)
    if len(windows) < needed:
        raise SystemExit(f"the text gives {len(windows)} sequences; {needed} needed")
    chosen = windows[np.random.default_rng(0).permutation(len(windows))[:needed]]
    np.save(path, chosen, allow_pickle=False)
    return chosen


def _cut(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> np.ndarray:
    """All texts' tokens joined and cut into full windows."""
    fast: Tokenizer = tokenizer.backend_tokenizer
    ids: list[np.ndarray] = []
    for first in range(0, len(texts), 256):
        ids += [np.array(one.ids, np.int32) for one in fast.encode_batch(texts[first:first + 256])]
    joined = np.concatenate(ids)
    return joined[: len(joined) // length * length].reshape(-1, length)


def library() -> Iterator[str]:
    """The documents of each source file, joined in order: text long enough for full windows."""
    files: dict[str, list[str]] = {}
    for document in standard_library_documents():
        files.setdefault(document["id"].partition(":")[0], []).append(document["text"])
    return ("\n\n".join(texts) + "\n" for texts in files.values())


def _packages() -> Iterator[str]:
    """Python sources of the installed packages, in an order that mixes them."""
    root = Path(torch.__file__).parent.parent
    paths = sorted(root.rglob("*.py"))
    order = np.random.default_rng(1).permutation(len(paths))
    texts = (paths[place].read_text(encoding="utf-8", errors="ignore") for place in order)
    return islice((text for text in texts if len(text) > 1000), 4000)


def record(number: int, ids: np.ndarray, prompt: int) -> Record:
    """A sequence whose first `prompt` tokens aren't scored."""
    scored = np.arange(len(ids)) >= prompt
    return Record(number, ids, scored, [Part(0, "python sources", 0, -1, -1, 0)])
