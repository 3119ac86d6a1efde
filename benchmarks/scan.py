"""How fast codes are scanned, and how finely the query must be quantised for it.

    python -m benchmarks.scan

First, on a trained model: c, and the true top 10 and 100 inside shortlists, with the query kept in
1 to 8 bits and whole. Then nanoseconds a code on one core beside the speed of reading memory, for
codes of several lengths. Last, `--rows` codes of each length (the workload's own, resampled into
segments), one query and several, as a search scans them: in memory, and mapped from the disk.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import faiss
import numpy as np
import torch

from benchmarks.workload import Size, Workload, make_workload
from gradindex.influence.codes import Codes, CodeSettings, score_error
from gradindex.influence.exact import exact_scores
from gradindex.influence.preconditioned import Preconditioned, precondition, query_coordinates
from gradindex.progress import stderr_progress
from gradindex.storage import code_index
from gradindex.storage.code_index import CodeIndex, scan
from gradindex.storage.integrity import CheckedFiles
from gradindex.storage.layout import code_bytes
from indexer.encode import encode_batch

LENGTHS = (32768, 131072, 524288)  # bits: codes of 4, 16 and 64 KiB
SEGMENT = 4096  # sequences
SHORTLISTS = ((10, 100), (100, 1000))


def median(run: Callable[[], object], repeats: int) -> float:
    """Median seconds after a warm-up."""
    run()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def coder(work: Workload, length: int) -> Codes:
    return Codes(work.modules, work.ekfac, CodeSettings.of(length, work.modules, 0, 0.1))


def encoded(work: Workload, codes: Codes, count: int) -> tuple[CodeIndex, np.ndarray]:
    """Codes of the first sequences, and their ‖v‖."""
    index, norms = CodeIndex(codes.settings.length), []
    for first in range(0, count, 16):
        found = encode_batch(work.model, codes, work.train[first : min(first + 16, count)]).numpy()
        index.add(index.encode(found))
        norms.append(np.linalg.norm(found.astype(np.float64), axis=1))
    return index, np.concatenate(norms)


def queries_of(work: Workload, codes: Codes, count: int) -> tuple[np.ndarray, Preconditioned]:
    """Vectors [q, K] and preconditioned gradients of some held-out queries."""
    with torch.no_grad():
        batch = work.model.batch(work.queries[:count])
        coordinates, _ = query_coordinates(work.model, work.modules, work.ekfac, batch, 0.1)
        return (codes.query_vectors(coordinates).numpy(),
                Preconditioned(precondition(work.ekfac, coordinates)))


def recall(work: Workload, queries: int) -> None:
    """c and recall for each quantisation of the query."""
    codes = coder(work, LENGTHS[0])
    index, norms = encoded(work, codes, len(work.train))
    asked, preconditioned = queries_of(work, codes, queries)
    exact = exact_scores(work.model, work.modules, preconditioned, work.train, 4096)
    sigma = np.stack([score_error(1.0, float(np.linalg.norm(one)), norms, LENGTHS[0])
                      for one in asked])
    print(f"\n{work.summary()}\nK = {LENGTHS[0]:,}, {len(asked)} queries")
    print("| bits of the query | c | r10@100 | r100@1000 | ns a code, one core |")
    print("|---|---|---|---|---|")
    for bits in (1, 2, 3, 4, 6, 8, None):
        if bits is None:
            scores, each = index.many_scores(asked), float("nan")
        else:
            code_index.QUERY_BITS = bits
            scores = np.stack([index.scores(one) for one in asked])
            each = median(lambda: index.scores(asked[0]), 5) / len(index)
        error = np.sqrt((((scores - exact) / sigma) ** 2).mean())
        shares = [
            np.mean([len(set(np.argsort(-truth)[:k]) & set(np.argsort(-found)[:among])) / k
                     for truth, found in zip(exact, scores, strict=True)])
            for k, among in SHORTLISTS]
        shown = "–" if bits is None else f"{each * 1e9:.0f}"
        print(f"| {bits or 'whole'} | {error:.3f} | {shares[0]:.4f} | {shares[1]:.4f} | {shown} |",
              flush=True)
    code_index.QUERY_BITS = 4


def memory_speed() -> float:
    """Bytes a second of reading memory once, one core."""
    content = np.ones(1 << 27, dtype=np.uint64)
    return content.nbytes / median(content.sum, 5)


def resampled(index: CodeIndex, rows: int, seed: int) -> CodeIndex:
    chosen = np.random.default_rng(seed).integers(0, len(index), rows)
    made = CodeIndex(index._index.d)
    made.add(index.codes(chosen.tolist()))
    return made


def large(work: Workload, length: int, rows: int, threads: int, room: float) -> None:
    """A scan of many codes in memory, as far as `room` bytes allow, and mapped."""
    codes = coder(work, length)
    own, _ = encoded(work, codes, 256)
    asked, _ = queries_of(work, codes, 16)
    held = min(rows, int(room / code_bytes(length)) // SEGMENT * SEGMENT)
    segments = [resampled(own, min(SEGMENT, held - first), first)
                for first in range(0, held, SEGMENT)]
    size = held * code_bytes(length)
    print(f"\ncodes of {code_bytes(length):,} bytes, {held:,} of them ({size / 1e9:.1f} GB) in "
          f"{len(segments)} segments, {threads} threads")
    one_core = median(lambda: segments[0].scores(asked[0]), 5) / len(segments[0])
    print(f"one segment, one core: {one_core * 1e9:.0f} ns a code, "
          f"{code_bytes(length) / one_core / 1e9:.1f} GB/s")
    for count in (1, 4, 16):
        seconds = median(lambda count=count: scan(segments, asked[:count], threads), 3)
        scaled = f"; {rows:,} codes: {seconds * rows / held:.2f} s" if held < rows else ""
        print(f"{count:>2} {'query' if count == 1 else 'queries'}: {seconds:.3f} s, "
              f"{count * size / seconds / threads / 1e9:.1f} GB/s a core{scaled}", flush=True)
    whole = [resampled(own, min(held, 1 << 16), 0)]
    seconds = median(lambda: scan(whole, asked[:1], threads), 3)
    print(f"a single segment of {len(whole[0]):,}: "
          f"{len(whole[0]) * code_bytes(length) / seconds / threads / 1e9:.1f} GB/s a core")
    few = segments[: max(1, int(2e9 / code_bytes(length) / SEGMENT))]
    with tempfile.TemporaryDirectory() as folder:
        facts = {f"{n}.faiss": one.write(Path(folder) / f"{n}.faiss") for n, one in enumerate(few)}
        files = CheckedFiles(Path(folder), facts)
        begun = time.perf_counter()
        mapped = [CodeIndex.parse(files.map(f"{n}.faiss"), length, len(one), Path(folder))
                  for n, one in enumerate(few)]
        opened = time.perf_counter() - begun
        seconds = median(lambda: scan(mapped, asked[:1], threads), 3)
        bytes_mapped = sum(map(len, few)) * code_bytes(length)
        print(f"mapped, in the page cache: {bytes_mapped / seconds / threads / 1e9:.1f} GB/s a "
              f"core; digesting and mapping {bytes_mapped / opened / 1e9:.1f} GB/s")


@click.command()
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--rows", type=int, default=1_000_000, show_default=True, help="Codes scanned last.")
@click.option("--room", type=float, default=14e9, show_default=True, help="Bytes of codes held.")
@click.option("--sequences", type=int, default=4096, show_default=True)
@click.option("--steps", type=int, default=500, show_default=True)
@click.option("--queries", type=int, default=48, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".demo/benchmark"))
def main(threads: int, rows: int, room: float, sequences: int, steps: int, queries: int,
         cache: Path) -> None:
    """Print c and recall by the query's quantisation, then speeds."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(1)
    work = make_workload(cache, Size(sequences=sequences, steps=steps, fit_sequences=2048), queries,
                         stderr_progress())
    recall(work, queries)
    print(f"\nreading memory, one core: {memory_speed() / 1e9:.1f} GB/s")
    for length in LENGTHS:
        large(work, length, rows, threads, room)


if __name__ == "__main__":
    main()
