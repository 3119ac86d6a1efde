"""What safety costs: opening an index of many segments, the first search's digests, verify.

    python -m benchmarks.opening [--segments 1000] [--rows 64]

Makes an index of so many segments by writing the sequences of a small one again and again under new
ids, and prints each time beside what it would be without the checks.
"""

import argparse
import hashlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gradindex
from gradindex.storage import layout, manifest, records, row_file, segments, token_file
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.contents import Contents
from gradindex.storage.files import facts_of
from gradindex.storage.segments import SegmentFacts

LENGTH = 128  # tokens
BITS = 16384
VOCABULARY = 37


def main() -> None:
    """Make the index, then measure."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--segments", type=int, default=1000)
    flags.add_argument("--rows", type=int, default=64)
    asked = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index, network = make(Path(folder), asked.segments, asked.rows)
        measure(index, network)


def make(folder: Path, count: int, rows: int) -> tuple[Path, object]:
    """An index of `count` segments of `rows` sequences."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "gpt_neox", hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, vocab_size=VOCABULARY, max_position_embeddings=LENGTH))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (rows, LENGTH))
    np.save(folder / "tokens.npy", tokens)
    index = folder / "index"
    gradindex.build(network, folder / "tokens.npy", index, bits=BITS, segment_size=rows)
    facts = manifest.load(index)
    contents = Contents(index, facts)
    first = facts.segments[0]
    held, codes = contents.records(range(rows)), contents.codes_of(np.arange(rows))
    made, files = [first], dict(facts.files)
    for number in range(1, count):
        segment = manifest.Segment(f"{number:06d}", rows)
        place = manifest.segment_folder(index, segment.name)
        place.mkdir()
        own = [replace(record, id=record.id + number * rows) for record in held]
        new = SegmentFacts(rows)
        new.files["records.lmdb"] = records.write(place / "records.lmdb", own)
        again = CodeIndex(BITS)
        again.add(codes)
        new.files["vectors.faiss"] = again.write(place / "vectors.faiss")
        new.files["rows.npy"] = row_file.write_rows(
            place / "rows.npy", row_file.make_rows(own, contents.rows["norm"]))
        new.files["tokens.npz"] = token_file.write(
            place / "tokens.npz", [one.tokens for one in own], VOCABULARY)
        segments.write_facts(place, new)
        new.files[layout.NOTES.name] = facts_of(place / layout.NOTES.name)
        files |= {f"segments/{segment.name}/{name}": one for name, one in new.files.items()}
        made.append(segment)
    manifest.commit(index, replace(
        facts, segments=made, files=files, sequences=count * rows, next_id=count * rows,
        next_segment=count, duplicates=(count - 1) * rows))
    return index, network


def measure(index: Path, network: object) -> None:
    """Each step, and beside it what it would take without looking."""
    facts = manifest.load(index)
    paths = [index / name for name in facts.files]
    total = sum(one.size for one in facts.files.values())
    own = (index / layout.MANIFEST).stat().st_size
    print(f"{len(facts.segments):,} segments, {facts.rows:,} sequences, {len(paths):,} files, "
          f"{total / 1e6:,.0f} MB, manifest {own / 1e6:.1f} MB")
    times = [timed(lambda: gradindex.open(index, model=network)) for _ in range(5)]
    bare = [timed(lambda: [path.stat() for path in paths]) for _ in range(5)]
    print(f"open: {min(times):.2f} s (5 times, slowest {max(times):.2f}); stat of every file "
          f"alone: {min(bare):.3f} s")
    query = {"token_ids": list(range(30)), "shortlist": 1000, "k": 10}
    searcher = gradindex.open(index, model=network)
    first = timed(lambda: searcher.search(**query))
    later = min(timed(lambda: searcher.search(**query)) for _ in range(3))
    contents: list[bytes] = []
    read = timed(lambda: contents.extend(path.read_bytes() for path in paths))
    digest = timed(lambda: [hashlib.sha256(content).digest() for content in contents])
    print(f"first search: {first:.2f} s, later ones {later:.2f} s; of every file, reading takes "
          f"{read:.2f} s and SHA-256 {digest:.2f} s more ({total / 1e9 / digest:.2f} GB/s)")
    seconds = timed(lambda: gradindex.verify(index, network, no_model=True))
    print(f"verify --no-model: {seconds:.1f} s, {total / 1e6 / seconds:.0f} MB/s, "
          f"{facts.rows / seconds:,.0f} records/s")


def timed(function) -> float:
    """Seconds."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
