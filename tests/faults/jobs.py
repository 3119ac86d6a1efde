"""What a child process of the harness does, in this file so that each child finds it imported.

A job gets plain arguments and returns a plain dictionary. `probe` opens an index, asks it questions
and returns the answer; `bare_*` read one file as the library alone would.
"""

import contextlib
import hashlib
import json
import random
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import faiss
import lmdb
import numpy as np
import safetensors.torch
import scipy.sparse

import gradindex
from gradindex import memory
from gradindex.errors import GradindexError
from gradindex.model.load_tokenizer import load_tokenizer
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.storage import (
    background_file,
    code_index,
    layout,
    manifest,
    records,
    row_file,
    sealed_json,
    segments,
    token_file,
)
from gradindex.storage.build_plan import CorpusSettings
from gradindex.storage.tensors import write_tensors
from indexer.read.corpus import Corpus

QUESTION = {"prompt": "The apple number", "completion": " 8 grows"}
MODEL: dict[str, Any] = {}  # the loaded model of `load`, shared by forked children


def load(model: str) -> dict[str, Any]:
    """Load the model once, before any child is forked, and use every part once."""
    "".encode("cp437")  # of archives: another user may have no right to read Python's own files
    source = ModelSource(model, device="cpu")
    MODEL.update(model=LanguageModel.load(source).network, tokenizer=load_tokenizer(source))
    return {}


def build(model: str, data: str, out: str, settings: dict[str, Any]) -> dict[str, Any]:
    gradindex.build(model, data, out, **settings)
    return {"files": files_of(out)}


def append(index: str, data: str, model: str) -> dict[str, Any]:
    gradindex.append(index, data, model=model)
    return {"files": files_of(index)}


def delete(index: str, ids: list[int]) -> dict[str, Any]:
    gradindex.delete(index, ids)
    return {"files": files_of(index)}


def compact(index: str) -> dict[str, Any]:
    gradindex.compact(index)
    return {"files": files_of(index)}


def verify(index: str, **options: Any) -> dict[str, Any]:
    return gradindex.verify(
        index, **({} if options.get("no_model") else MODEL), **options).to_dict()


def info(index: str) -> dict[str, Any]:
    from search.study.describe import describe, summary

    return {"said": summary(describe(Path(index)))}


def discard(index: str) -> dict[str, Any]:
    gradindex.append(index, discard=True)
    return {}


def probe(index: str, **options: Any) -> dict[str, Any]:
    """What a search of everything answers."""
    return {"answer": answer(index, **options)}


def answer(index: str, **options: Any) -> str:
    """A digest of everything that an index says to two questions, and of what it says it is."""
    from search.study.describe import describe

    searcher = gradindex.open(index, **MODEL, **options)
    said: list[Any] = [] if options else [{**describe(Path(index)), "index": ""}]
    for controls in ({"shortlist": "all", "k": min(20, len(searcher))},
                     {"shortlist": 10, "k": 5, "candidates": "both"}):
        result = searcher.search(**QUESTION, **controls).to_dict()
        said.append({**result, "seconds": None, "index": ""})
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read_until(index: str, begun: str, over: str) -> dict[str, Any]:
    """Answers seen by opening again and again, in order, and by one searcher opened first.

    It makes a file `begun` then, and ends when there is a file `over`.
    """
    first = gradindex.open(index, **MODEL)
    Path(begun).touch()
    seen, held, queries = [], set(), 0
    while not queries or not Path(over).exists():
        now = plain_answer(gradindex.open(index, **MODEL))
        if not seen or seen[-1] != now:
            seen.append(now)
        held.add(plain_answer(first))
        queries += 2
    return {"seen": seen, "held": sorted(held), "queries": queries}


def cut(index: str, names: list[str], mapped: bool = False, **options: Any) -> dict[str, Any]:
    """Answers before and after some files of an open index are cut; `mapped`: its codes are."""
    if mapped:
        memory.available = lambda: 0
    searcher = gradindex.open(index, **MODEL, **options)
    before = plain_answer(searcher)
    for name in names:
        with (Path(index) / name).open("r+b") as file:
            file.truncate(0)
    return {"before": before, "after": plain_answer(searcher)}


def committed(index: str) -> dict[str, Any]:
    """What a reader that opens the index now is to answer."""
    return {"answer": plain_answer(gradindex.open(index, **MODEL))}


def plain_answer(searcher: Any) -> str:
    hits = searcher.search(**QUESTION, shortlist="all", k=len(searcher)).hits
    said = [(hit.id, hit.influence, hit.text, hit.duplicates) for hit in hits]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def fuzz(target: str, seed: str, number: int, count: int) -> dict[str, Any]:
    """Feed mutations of the file `seed` to a reader; only errors of ours may come of it."""
    dice = random.Random(f"{target} {number}")
    content, refused = Path(seed).read_bytes(), 0
    read = {"manifest": fuzz_manifest, "record": fuzz_record, "jsonl": fuzz_jsonl,
            "segment.json": fuzz_segment, "rows.npy": fuzz_rows, "tokens.npz": fuzz_tokens,
            "vectors.faiss": fuzz_vectors, layout.BACKGROUND: fuzz_background}[target]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            try:
                read(mutated(content, dice), Path(folder), dice)
            except GradindexError:
                refused += 1
    return {"executions": count, "refused": refused}


TOKENS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u0000", b"\\ud800", b"null", b"NaN",
          b"-1", b"1e999", b"9" * 40, b"\n", b"\r\n", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xc3",
          b'"text"', b'"text":', b"../", b"[" * 2000, b"\x7f\xff\xff\xff\xff\xff\xff\xff"]


def mutated(content: bytes, dice: random.Random) -> bytes:
    """A few changes: bytes flipped, cut out, doubled, moved, or a meaningful piece put in."""
    for _ in range(dice.choice([1, 1, 2, 4, 8])):
        place = dice.randrange(len(content) + 1)
        length = dice.choice([1, 2, 4, 8, 64])
        piece = content[place : place + length]
        content = content[:place] + dice.choice([
            dice.randbytes(len(piece)), b"", piece + piece, dice.choice(TOKENS) + piece,
            dice.choice(TOKENS), piece[::-1],
        ]) + content[place + length :]
    return content or b"\0"


def fuzz_manifest(content: bytes, folder: Path, dice: random.Random) -> None:
    try:  # with the right digest, or every mutation would end at the digest
        parsed = sealed_json.parse(content)
        parsed.pop(sealed_json.KEY, None)
        content = sealed_json.with_digest(parsed)
    except ValueError:
        pass
    (folder / layout.MANIFEST).write_bytes(content)
    manifest.load(folder)


def fuzz_record(content: bytes, folder: Path, dice: random.Random) -> None:
    value = content[4:]
    if dice.random() < 0.8:  # past the checksum
        value = struct.pack("<I", zlib.crc32(value)) + value
    records._unpack(value, Path("records.lmdb"), 0)


def fuzz_jsonl(content: bytes, folder: Path, dice: random.Random) -> None:
    path = folder / "train.jsonl"
    path.write_bytes(content)
    settings = CorpusSettings(sequence_length=24, id_field="url", keep_fields=("place",))
    corpus = Corpus([path], MODEL["tokenizer"], settings, vocabulary=10**6)
    for record in corpus.sequences():
        records._unpack(records._pack(record), path, 0)


def fuzz_segment(content: bytes, folder: Path, dice: random.Random) -> None:
    try:
        parsed = sealed_json.parse(content)
        parsed.pop(sealed_json.KEY, None)
        content = sealed_json.with_digest(parsed)
    except ValueError:
        pass
    segments.parse_facts(content, Path("segment.json"))


def fuzz_rows(content: bytes, folder: Path, dice: random.Random) -> None:
    row_file.parse_rows(content, 18, Path("rows.npy"))


def fuzz_tokens(content: bytes, folder: Path, dice: random.Random) -> None:
    vocabulary = MODEL["model"].config.vocab_size
    matrix = token_file.parse(content, 18, 24, vocabulary, Path("tokens.npz"))
    token_file.TokenMatrix([matrix], np.ones(18, bool)).scores([1, 2])


def fuzz_vectors(content: bytes, folder: Path, dice: random.Random) -> None:
    codes = code_index.CodeIndex.parse(content, 512, 18, Path("vectors.faiss"))
    codes.scores(np.ones(512, np.float32))


def fuzz_background(content: bytes, folder: Path, dice: random.Random) -> None:
    path = folder / layout.BACKGROUND
    path.write_bytes(content)
    if dice.random() < 0.8:
        with contextlib.suppress(Exception):  # past its own digest, where it is a file of tensors
            write_tensors(path, safetensors.torch.load_file(path))
    queries = background_file.load(path, 52, 512)
    queries.rates(np.ones((len(queries), 3), np.float32), np.zeros((3, 2), np.uint64))


def files_of(folder: str) -> dict[str, str]:
    """The digest of every file of a folder, by relative name."""
    root = Path(folder)
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*")) if path.is_file()}


def bare(path: str) -> dict[str, Any]:
    """What the library alone reads of one file, as a digest."""
    reader = {".faiss": bare_faiss, ".lmdb": bare_lmdb, ".safetensors": bare_safetensors,
              ".npy": bare_npy, ".npz": bare_npz, ".json": bare_json}[Path(path).suffix]
    return {"answer": hashlib.sha256(reader(path)).hexdigest()}


def bare_faiss(path: str) -> bytes:
    index = faiss.read_index(path)
    query = np.sin(np.arange(index.d, dtype=np.float32))[None]
    scores, rows = index.search(query, 5)
    return scores.tobytes() + rows.tobytes()


def bare_lmdb(path: str) -> bytes:
    with lmdb.open(path, subdir=False, readonly=True, lock=False) as environment, \
            environment.begin() as transaction:
        return b"".join(key + value for key, value in transaction.cursor())


def bare_safetensors(path: str) -> bytes:
    tensors = safetensors.torch.load_file(path)
    return b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))


def bare_npy(path: str) -> bytes:
    return np.load(path, allow_pickle=False).tobytes()


def bare_npz(path: str) -> bytes:
    matrix = scipy.sparse.load_npz(path)
    return matrix.toarray().tobytes()


def bare_json(path: str) -> bytes:
    return json.dumps(json.loads(Path(path).read_bytes()), sort_keys=True).encode()
