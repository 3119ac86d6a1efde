"""A corpus of two rows, and the rows in every form in which data come."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet

from gradindex.storage.build_plan import CorpusSettings
from indexer.read.corpus import Corpus
from support.tokenizers import byte_tokenizer

END = 0
VOCABULARY = 340
ROWS = [{"text": "hello world", "url": "a", "year": 1}, {"text": "naïve 😀", "url": "b"}]


def make_corpus(*data, tokenizer=None, sequence_length=16, strict=False, **settings):
    tokenizer = tokenizer or byte_tokenizer()
    return Corpus(data, tokenizer, CorpusSettings(sequence_length, **settings), VOCABULARY, END,
                  strict)


def read(*data, **settings):
    return list(make_corpus(*data, **settings).sequences())


def decoded(records, tokenizer=None):
    return [(tokenizer or byte_tokenizer()).decode(record.tokens.tolist()) for record in records]


def scored_texts(records):
    return [byte_tokenizer().decode(record.tokens[record.scored].tolist()) for record in records]


def jsonl(*rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_lines(folder, *rows, name="data.jsonl"):
    path = folder / name
    path.write_bytes(jsonl(*rows))
    return path


def as_jsonl(folder):
    return write_lines(folder, *ROWS)


def as_gzip(folder):
    path = folder / "data.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(*ROWS)))
    return path


def as_zstd(folder):
    path = folder / "data.jsonl.zst"  # two frames, as parallel writers leave them
    path.write_bytes(b"".join(
        pyarrow.compress(jsonl(row), codec="zstd", asbytes=True) for row in ROWS))
    return path


def as_parquet(folder):
    path = folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "other": 1} for row in ROWS]),
                                path)
    return path


def as_saved_dataset(folder):
    datasets.Dataset.from_list([ROWS[0], *ROWS]).select([1, 2]).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_list(folder):
    return ROWS


def as_dataset(folder):
    return datasets.Dataset.from_list(ROWS)


DATA_FORMS = [as_jsonl, as_gzip, as_zstd, as_parquet, as_saved_dataset, as_list, as_dataset]
