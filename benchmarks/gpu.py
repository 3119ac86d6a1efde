"""What the GPU path costs and whether it is right: every part within nine minutes of an H200.

    python -m benchmarks.gpu [--part agree,model,rescore,scan,eigen] [--small]

Models have random weights. Each part prints as it ends, failures included, with its target beside.
`--small` runs every part on a CPU, small, in two minutes: whether it runs is all that this says.
"""

import contextlib
import gc
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import gradindex
from gradindex.draws import Stream
from gradindex.influence.blockwise import covariance_shapes, identity
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.curvature import Curvature
from gradindex.influence.device_codes import (
    DeviceCodes,
    RoundedQueries,
    bits_times_limbs,
    has_kernel,
    plain_bits_times_limbs,
)
from gradindex.influence.exact import Rescorer, rescore
from gradindex.influence.gradients import backward
from gradindex.influence.preconditioned import Preconditioned
from gradindex.influence.split_batches import Splits
from gradindex.model.devices import wait_for
from gradindex.model.load_errors import quiet_transformers
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import tracked_modules
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.records import Record
from indexer.dry_run.estimate import estimate
from indexer.encode import encode_batches
from indexer.fit.batch_sums import add_covariances, add_eigenvalues, fit_batch
from indexer.fit.eigen import eigenvectors_of_all


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    device: str
    layers: int = 24
    hidden: int = 2048
    vocabulary: int = 50304
    length: int = 512
    batch: int = 16  # sequences
    sequences: int = 128
    bits: int = 131072
    rows: int = 1 << 20  # codes
    matrices: tuple[int, ...] = (2048, 5504, 11008)
    documents: int = 2048
    dtype: torch.dtype = torch.bfloat16


SMALL = Scale("cpu", layers=2, hidden=64, vocabulary=512, length=32, batch=4, sequences=16,
              bits=1024, rows=2048, matrices=(64, 96), documents=160, dtype=torch.float32)


def network_of(scale: Scale, **changes: Any) -> GPTNeoXForCausalLM:
    settings = {"hidden_size": scale.hidden, "num_hidden_layers": scale.layers,
                "num_attention_heads": scale.hidden // 64 if scale.hidden > 64 else 2,
                "intermediate_size": 4 * scale.hidden, "vocab_size": scale.vocabulary,
                "max_position_embeddings": scale.length}
    torch.manual_seed(0)
    with torch.device(scale.device):
        network = GPTNeoXForCausalLM(GPTNeoXConfig(**{**settings, **changes}))
    return network.to(scale.dtype).eval()


def tokens_of(scale: Scale, count: int, vocabulary: int) -> np.ndarray:
    """Rows that repeat phrases, so that some are about the same."""
    random = np.random.default_rng(0)
    phrases = random.integers(0, vocabulary, (64, scale.length // 4))
    return phrases[random.integers(0, 64, (count, 4))].reshape(count, -1).astype(np.int32)


def records_of(tokens: np.ndarray) -> list[Record]:
    return [Record(number, row, np.ones(len(row), bool), []) for number, row in enumerate(tokens)]


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The least of some runs after one that warms up."""
    taken = []
    for _ in range(repeats + 1):
        wait_for([device])
        start = time.perf_counter()
        work()
        wait_for([device])
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def say(name: str, value: str, target: str = "") -> None:
    print(f"  {name:<56} {value:>32}   {target}".rstrip(), flush=True)


# ---- (a) the same numbers on both


def agree(scale: Scale) -> None:
    """A float32 model of the demo's size: a build on the CPU, one on the device, and searches."""
    small = Scale(scale.device, layers=2, hidden=192, vocabulary=4096, length=64,
                  dtype=torch.float32, documents=scale.documents)
    network = network_of(small).cpu()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "tokens.npy"
        np.save(data, tokens_of(small, small.documents, 4096))
        settings = {"bits": 16384, "fit_sequences": 512, "batch_tokens": 4096}
        built = dict[str, Any]()
        # with --small a CPU beside itself, which says that this part runs and no more
        devices = ("cpu", scale.device)
        for number, device in enumerate(devices):
            start = time.perf_counter()
            built[device] = gradindex.build(network, data, Path(folder) / f"{number}.index",
                                            device=device, **settings)
            say(f"build of {small.documents:,} sequences on {device}",
                f"{time.perf_counter() - start:.1f} s")
        query = {"token_ids": tokens_of(small, 1, 4096)[0].tolist(),
                 "labels": [-100] * 48 + tokens_of(small, 1, 4096)[0].tolist()[48:]}
        one = built[scale.device].snapshot.path
        ids = range(small.documents)
        scores = {device: np.array([hit.influence for hit in gradindex.open(
            one, model=network, device=device).rescore(**query, ids=ids)])
            for device in ("cpu", scale.device)}
        error = np.abs(scores[scale.device] - scores["cpu"]).max() / np.abs(scores["cpu"]).max()
        say("exact scores of one index, device against CPU, relative", f"{error:.1e}", "≤ 1e-3")
        top = {device: np.argsort(-found)[:100] for device, found in scores.items()}
        border = np.sort(scores["cpu"])[-100]
        odd = [place for place in set(top["cpu"]) ^ set(top[scale.device])
               if abs(scores["cpu"][place] - border) > 1e-3 * abs(border)]
        say("of the top 100, others than ties within 1e-3", f"{len(odd)}", "0")
        found = {device: [hit.id for hit in index.search(**query, k=10)]
                 for device, index in built.items()}
        say("of the top 10 of the two builds, the same", str(len(
            set(found["cpu"]) & set(found[scale.device]))))


# ---- (b) a model of 1.4 B parameters


@dataclass
class Bench:
    """A random model with a curvature of Q = I and Λ = 1, which takes the same work as any."""

    scale: Scale
    network: Any

    def __post_init__(self) -> None:
        scale = self.scale
        self.model = LanguageModel(self.network, None, ModelSource(self.network))
        self.device = self.model.device
        self.modules = tracked_modules(self.network, "mlp")
        # of all maps, the embedding left out, which is none
        self.parameters = sum(one.numel() for one in self.network.parameters()) \
            - scale.vocabulary * scale.hidden
        like = torch.zeros((), device=self.device)
        square: dict[int, torch.Tensor] = {}
        table: dict[tuple[int, int], torch.Tensor] = {}
        for module in self.modules:  # those of one shape share memory: only time is measured
            for side in module.shape:
                square.setdefault(side, identity(side, side, like))
            table.setdefault(module.shape, like.new_ones(module.shape))
        self.ekfac = {module.name: Curvature(square[module.shape[1]], square[module.shape[0]],
                                             table[module.shape]) for module in self.modules}
        self.records = records_of(tokens_of(scale, scale.sequences, scale.vocabulary))
        self.some = self.records[: scale.batch]
        self.tokens = scale.batch * scale.length

    def pass_alone(self) -> None:
        with torch.no_grad():
            backward(self.model, self.modules, self.model.batch(self.some), lambda *_: None)


def model(scale: Scale) -> None:
    """Fit and encode a model of 1.4 B parameters, beside a step of its training."""
    network = network_of(scale).requires_grad_(False)
    _encoding(Bench(scale, network))
    gc.collect()
    _fitting(Bench(scale, network))
    gc.collect()
    _memory(scale, network)


def _rate(bench: "Bench", name: str, taken: float, flops: float) -> None:
    """Tokens and operations a second; `flops` are those a token beyond the passes'."""
    total = bench.tokens * (4 * bench.parameters + flops)
    say(name, f"{bench.tokens / taken:,.0f} tokens/s, {total / taken / 1e12:.1f} TFLOP/s")


def _encoding(bench: "Bench") -> None:
    """Encode, beside the passes alone and a step of training."""
    scale = bench.scale
    print(f"  {bench.parameters / 1e9:.2f} B parameters in maps, {len(bench.modules)} tracked, "
          f"{scale.length} tokens, batches of {bench.tokens:,} tokens, {scale.dtype}", flush=True)
    alone = seconds(bench.pass_alone, bench.device)
    _rate(bench, "forward and activation-backward", alone, 0)
    step = seconds(_training_step(bench), bench.device)
    _rate(bench, "a step of training (forward, backward, SGD)", step, 2 * bench.parameters)
    codes = Codes(bench.modules, bench.ekfac,
                  CodeSettings.of(scale.bits, bench.modules, 0, 0.1))
    projected = sum(2 * (k_s * module.shape[0] + k_a * module.shape[1] + k_s * k_a)
                    for module in bench.modules for k_s, k_a in [codes.settings.sides(module)])
    encode = seconds(lambda: list(encode_batches(
        bench.model, codes, bench.some, bench.tokens, Splits())), bench.device)
    _rate(bench, f"encode, K = {scale.bits:,}", encode, projected)
    say("encode's tokens a second to those of training", f"{step / encode:.2f}", "≥ 1.2")


def _fitting(bench: "Bench") -> None:
    """A batch of each of the fit's passes."""
    squares = {name: torch.zeros(shape, device=bench.device)
               for name, shape in covariance_shapes(bench.modules, 1).items()}
    outer = sum(2 * side * side for module in bench.modules for side in module.shape)

    def fit(stage: Callable[..., None], stream: Stream, *sums: Any) -> None:
        with torch.no_grad():
            stage(bench.model, bench.modules, *sums,
                  *fit_batch(bench.model, bench.some, "model", 0, stream))

    _rate(bench, "covariance", seconds(
        lambda: fit(add_covariances, Stream.COVARIANCE_LABELS, squares), bench.device), outer / 2)
    vectors = {f"{module.name}/{side}": getattr(bench.ekfac[module.name],
                                                f"eigenvectors_{side.lower()}")
               for module in bench.modules for side in "AS"}
    tables = {module.name: torch.zeros(module.shape, device=bench.device)
              for module in bench.modules}
    _rate(bench, "eigenvalues", seconds(
        lambda: fit(add_eigenvalues, Stream.EIGENVALUE_LABELS, vectors, tables), bench.device),
        outer)


def _training_step(bench: Bench) -> Callable[[], None]:
    """A step of training: all gradients, and SGD."""
    def step() -> None:
        network = bench.network.requires_grad_(True)
        batch = bench.model.batch(bench.some)
        network(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss.backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.sub_(parameter.grad, alpha=1e-9)
        network.requires_grad_(False)
        network.zero_grad(set_to_none=True)
    return step


def _memory(scale: Scale, network: Any) -> None:
    """A build's peak beside what a dry run says of it."""
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "tokens.npy", Path(folder) / "index"
        np.save(data, tokens_of(scale, scale.sequences, scale.vocabulary))
        settings = {"seq_len": scale.length, "covariance_blocks": 4, "bits": scale.bits,
                    "fit_sequences": scale.sequences // 2}
        start = time.perf_counter()
        said = estimate(network, data, out, **settings)
        say("dry run", f"{time.perf_counter() - start:.1f} s")
        if scale.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        gradindex.build(network, data, out, **settings)
        took = time.perf_counter() - start
        say(f"build of {scale.sequences} sequences, A and S in 4 blocks",
            f"{took:.1f} s; {said.seconds:.1f} s said")
        if scale.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
            say("peak memory; what the dry run said", f"{peak / 1e9:.2f} GB; "
                f"{said.memory.device / 1e9:.2f} GB", "within 10 %")


# ---- (c) rescoring


def rescoring(scale: Scale) -> None:
    """Exact scores for one query and for 32 at rank 32, beside the passes alone."""
    bench = Bench(scale, network_of(scale).requires_grad_(False))
    alone = seconds(bench.pass_alone, bench.device)
    by = Rescorer(bench.model, bench.modules, bench.ekfac, 0.1, bench.tokens)
    for count, rank, terms in ((1, None, False), (1, None, True), (32, 32, False)):
        queries = Preconditioned({}, rank)
        for module in bench.modules:  # one by one: at full rank, 32 queries take 100 GB
            queries.add({module.name: torch.randn(count, *module.shape, device=bench.device)})

        def run(queries: Preconditioned = queries, terms: bool = terms) -> None:
            list(rescore(by, queries, bench.some, terms=terms, one_chunk=True))

        taken = seconds(run, bench.device)
        what = f"{count} quer{'ies' if count > 1 else 'y'}" + (f" of rank {rank}" if rank else "") \
            + (" with terms" if terms else "")
        say(f"rescoring, {what}: of the speed of the passes", f"{alone / taken:.2f} "
            f"({bench.tokens / taken:,.0f} tokens/s)", "≥ .8" if count == 1 and not terms else "")


# ---- (d) codes


def scan(scale: Scale) -> None:
    """Score a million codes of 16 KiB as a search does, beside copying them."""
    device, length = torch.device(scale.device, 0) if scale.device == "cuda" else \
        torch.device("cpu"), scale.bits
    random = np.random.default_rng(0)
    segment = CodeIndex(length)
    rows = min(scale.rows, 4096)
    some = segment.encode(random.standard_normal((256, length)).astype(np.float32))
    segment.add(np.tile(some, (rows // len(some), 1)))
    codes = DeviceCodes([segment] * (scale.rows // rows), length, device, room=1 << 62)
    size = scale.rows * length // 8
    one = torch.empty(size // 2, dtype=torch.uint8, device=device)
    copy = seconds(partial(torch.empty_like(one).copy_, one), device)
    del one
    say("copy, bytes read and written", f"{size / copy / 1e9:,.2f} GB/s")
    signs = torch.from_numpy(segment.signs(slice(None))[0]).to(device)
    for count in (1, 16):
        queries = random.standard_normal((count, length)).astype(np.float32)
        limbs = RoundedQueries(torch.from_numpy(queries).to(device)).limbs
        if has_kernel(device):
            same = torch.equal(bits_times_limbs(signs, limbs), plain_bits_times_limbs(signs, limbs))
            say(f"{count} queries: kernel and plain operations give the same sums", str(same))
        taken = seconds(lambda queries=queries: codes.scores(queries), device)
        kernel = seconds(lambda limbs=limbs: bits_times_limbs(signs, limbs), device)
        plain = seconds(lambda limbs=limbs: plain_bits_times_limbs(signs, limbs), device)
        say(f"{count} queries, scores on the host: bytes read",
            f"{size / taken / 1e9:,.2f} GB/s", "≥ half the copy's" if count == 1 else "")
        name = "kernel" if has_kernel(device) else "plain"
        say(f"{count} queries, one segment alone: {name}; plain operations",
            f"{signs.nbytes / kernel / 1e9:,.2f}; {signs.nbytes / plain / 1e9:,.2f} GB/s",
            "the kernel's is larger")


# ---- (e) eigendecompositions


def eigen(scale: Scale) -> None:
    """Eigenvectors of one matrix of each size, in float64 and float32, and how sound they are."""
    device = torch.device(scale.device)
    for n in scale.matrices:
        rows = torch.randn(2 * n, n, dtype=torch.float64, device=device)
        matrix = (rows.T @ rows / (2 * n)).cpu()
        del rows
        for dtype in (torch.float64, torch.float32):
            told: list[str] = []
            start = time.perf_counter()
            [found] = eigenvectors_of_all([(f"{n}", matrix, device)], dtype, told.append)
            taken = time.perf_counter() - start
            q = found.to(device)
            a = q.T @ matrix.to(device) @ q
            off = float((a - a.diagonal().diag()).norm() / a.norm())
            say(f"eigenvectors of {n} × {n} in {str(dtype)[6:]}",
                f"{taken:.2f} s, off-diagonal {off:.0e}", "; ".join(told))


FAILED: list[str] = []
PARTS = {"agree": agree, "model": model, "rescore": rescoring, "scan": scan, "eigen": eigen}


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    start = time.perf_counter()
    print(f"{name}: {PARTS[name].__doc__}", flush=True)
    try:
        yield
    except Exception:
        traceback.print_exc()
        say("FAILED", name)
        FAILED.append(name)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)


@click.command(help=__doc__)
@click.option("--part", default=",".join(PARTS), show_default=True)
@click.option("--small", is_flag=True)
def main(part: str, small: bool) -> None:
    quiet_transformers()
    chosen = part.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise click.UsageError(f"--part {unknown[0]}: expected some of {', '.join(PARTS)}.")
    if not small and not torch.cuda.is_available():
        raise click.UsageError("there is no GPU; --small runs every part on the CPU.")
    print(", ".join(_versions(small)), flush=True)
    for name in chosen:
        with told(name):
            PARTS[name](SMALL if small else Scale("cuda"))
    sys.exit(bool(FAILED))


def _versions(small: bool) -> Iterator[str]:
    """The card, its driver, and what of libraries has a part in the figures."""
    yield "CPU" if small else torch.cuda.get_device_name()
    if not small:
        with contextlib.suppress(OSError):
            yield "driver " + subprocess.run(
                ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                capture_output=True, text=True, check=False).stdout.strip()
    yield f"Python {platform.python_version()}"
    yield f"CUDA {torch.version.cuda}"
    for library in ("torch", "transformers", "triton", "faiss-cpu", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{library} {importlib.metadata.version(library)}"
    yield f"{torch.get_num_threads()} threads"
    yield time.strftime("%Y-%m-%d")


if __name__ == "__main__":
    main()
