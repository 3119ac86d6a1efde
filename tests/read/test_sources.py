"""Data files of every form: where each sequence came from, and what is damaged or none."""

import hashlib
import json

import datasets
import numpy as np
import pytest

from gradindex.errors import InputError
from gradindex.storage.build_plan import CorpusSettings
from indexer.read.corpus import Corpus
from indexer.read.discover import discover
from indexer.read.sources import token_file_width
from support.corpora import (
    DATA_FORMS,
    ROWS,
    VOCABULARY,
    as_dataset,
    as_gzip,
    as_jsonl,
    as_list,
    as_parquet,
    as_saved_dataset,
    as_zstd,
    decoded,
    make_corpus,
    read,
    write_lines,
)
from support.documents import save
from support.tokenizers import byte_tokenizer, plain_ids


@pytest.mark.parametrize("form", DATA_FORMS)
def test_every_form_gives_the_same_sequences(form, tmp_path):
    data = form(tmp_path)
    first, second = read(data, id_field="url", keep_fields=("year", "none"))
    assert first.tokens.tolist() == plain_ids(byte_tokenizer(), "hello world")
    assert second.tokens.tolist() == plain_ids(byte_tokenizer(), "naïve 😀")
    source = "the data given" if form in (as_list, as_dataset) else str(data)
    for record, number, end, url, year in ((first, 0, 11, "a", 1), (second, 1, 7, "b", None)):
        assert (record.id, record.tokens.dtype, record.scored.all()) == (number, np.int32, True)
        [part] = record.parts
        assert (part.document, part.source, part.row) == (number, source, number + 1)
        assert (part.start, part.end, part.token) == (0, end, 0)
        assert (part.user_id, part.fields) == (url, {"year": year, "none": None})


@pytest.mark.parametrize("form", DATA_FORMS)
def test_every_form_knows_its_size_and_content(form, tmp_path):
    data = form(tmp_path)
    [fact] = make_corpus(data).data_facts()
    if form in (as_list, as_dataset):
        rows = "".join(json.dumps(row) + "\n" for row in data)
        assert fact == {"name": "the data given", "size": 2, "sha256": sha256(rows.encode())}
        changed = [dict(row) for row in data]
        changed[1]["text"] = changed[1]["text"][::-1]
        [other] = make_corpus(changed).data_facts()
    else:
        files = sorted((tmp_path / "saved").iterdir()) if form is as_saved_dataset else [data]
        lines = "".join(f"{file.name} {sha256(file.read_bytes())}\n" for file in files)
        assert fact == {"name": str(data), "size": sum(file.stat().st_size for file in files),
                        "sha256": sha256(lines.encode())}
        corpus = make_corpus(data)
        files[0].write_bytes(files[0].read_bytes()[:-1] + b"~")  # of the same size
        [other] = corpus.data_facts()
    assert other["size"] == fact["size"] and other["sha256"] != fact["sha256"]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "story.md"
    path.write_bytes("\ufeffhello\r\nworld".encode())
    [record] = read(path)
    assert decoded([record]) == ["hello\r\nworld"]
    assert (record.parts[0].source, record.parts[0].row) == (str(path), 1)


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path):
    texts, records = tmp_path / "texts", tmp_path / "records"
    for folder in (texts / "b", texts / ".git", records / "b"):
        folder.mkdir(parents=True)
    for name in ("b/2.txt", "a.txt", "c.txt", ".hidden.txt", ".git/config"):
        (texts / name).write_text(f"file {name}")
    as_parquet(records)
    as_saved_dataset(records / "b")
    write_lines(records, {"text": "line"}, name="z.jsonl")
    assert decoded(read(texts, str(texts / "a.txt"))) == [
        "file a.txt", "file b/2.txt", "file c.txt", "file a.txt"]
    assert decoded(read(records)) == [
        "hello world", "naïve 😀", "hello world", "naïve 😀", "line"]


def test_a_folder_of_splits_names_them(tmp_path):
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS)
                                   for name in ("train", "test")})
    splits.save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match=r"several splits; give one of them: .*/train, .*/test"):
        make_corpus(tmp_path / "both")
    with pytest.raises(InputError, match=r"is a DatasetDict; expected paths, or .* one split"):
        make_corpus(splits)
    assert decoded(read(tmp_path / "both" / "test")) == ["hello world", "naïve 😀"]


@pytest.mark.parametrize(("data", "kind"), [((row for row in ROWS), "generator"), (5, "int")])
def test_objects_that_cant_be_read_twice_are_refused(data, kind):
    with pytest.raises(InputError, match=f"is a {kind}; expected paths, or records"):
        make_corpus(data)


def test_a_missing_path_says_what_is_expected(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl does not exist; expected JSON lines, "):
        make_corpus(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=rf"no data files were found in {tmp_path}; expected J"):
        make_corpus(tmp_path)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.jsonl.gz", "empty.jsonl.zst", "empty.txt"])
def test_an_empty_file_holds_nothing(name, tmp_path):
    (tmp_path / name).touch()
    made = make_corpus(tmp_path / name)
    assert list(made.sequences()) == []
    assert made.facts.skipped == ({"empty text": 1} if name.endswith("txt") else {})


DAMAGE = {
    "cut": lambda content: content[:-10], "empty": lambda content: b"",
    "head": lambda content: b"none" + content[4:],
    "middle": lambda content: content[:12] + b"\xff" * 8 + content[20:],
}


def damaged(path, damage):
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    return path


@pytest.mark.parametrize(("form", "damage"), [
    (as_gzip, "cut"), (as_gzip, "head"), (as_gzip, "middle"), (as_zstd, "cut"), (as_zstd, "head"),
])
def test_a_damaged_compressed_file_is_named(form, damage, tmp_path):
    path = damaged(form(tmp_path), damage)
    with pytest.raises(InputError, match=rf"{path} is damaged, cut short or can't be read: "):
        read(path)


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_parquet_file_is_named(damage, tmp_path):
    path = damaged(as_parquet(tmp_path), damage)
    with pytest.raises(InputError, match=rf"{path} can't be read as Parquet: "):
        read(path)


@pytest.mark.parametrize("pattern", ["*.arrow", "state.json"])
def test_a_damaged_datasets_folder_is_named(pattern, tmp_path):
    folder = as_saved_dataset(tmp_path)
    for file in (tmp_path / "saved").glob(pattern):
        damaged(file, "cut")
    with pytest.raises(InputError, match=rf"{folder} can't be read as a datasets folder: "):
        read(folder)


# ---- token files


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, ">i4"])
def test_token_rows_stay_in_order(dtype, tmp_path):
    rows = np.array([[5, 9, 2], [300, 1, 4], [7, 7, 7]], dtype)
    path = save(tmp_path / "tokens.npy", rows)
    records = read(path, pack=True)
    assert [record.tokens.tolist() for record in records] == rows.tolist()
    assert [record.id for record in records] == [0, 1, 2]
    assert [record.parts[0].row for record in records] == [1, 2, 3]
    assert {(part.start, part.end) for record in records for part in record.parts} == {(-1, -1)}
    assert all(record.scored.all() and record.tokens.dtype == np.int32 for record in records)
    assert token_file_width(discover([path]).sources) == 3


def test_a_token_stream_is_cut_into_windows(tmp_path):
    path = save(tmp_path / "tokens.npy", np.arange(10, 17))
    made = make_corpus(path, sequence_length=3)
    assert [record.tokens.tolist() for record in made.sequences()] == [[10, 11, 12], [13, 14, 15]]
    assert made.facts.skipped == {"sequence without a scored token": 1}
    assert token_file_width(discover([path, ROWS]).sources) is None


@pytest.mark.parametrize(("array", "found"), [
    (np.zeros((2, 3)), r"float64 of shape \(2, 3\)"), (np.ones(3, bool), r"bool of shape \(3,\)"),
    (np.zeros((2, 2, 2), int), r"int64 of shape \(2, 2, 2\)"), (np.int64(5), r"of shape \(\)"),
    (np.zeros((0, 4), int), r"of shape \(0, 4\)"),
])
def test_token_files_of_another_kind_are_refused(array, found, tmp_path):
    path = save(tmp_path / "tokens.npy", array)
    for reader in (read, lambda path: token_file_width(discover([path]).sources)):
        with pytest.raises(InputError, match=rf"tokens\.npy holds .*{found}; expected int"):
            reader(path)


@pytest.mark.parametrize("content", [
    b"", b"no array", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x04\x00{'a\n",
    b"\x93NUMPY\x01\x00\x04\x00{(\0\n",
])
def test_token_files_that_are_none(content, tmp_path):
    (tmp_path / "tokens.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"tokens.npy can't be read as a .npy file: "):
        read(tmp_path / "tokens.npy")
    save(tmp_path / "objects.npy", np.array([{}], object))
    with pytest.raises(InputError, match=r"objects.npy can't be read as a .npy file: "):
        read(tmp_path / "objects.npy")


def test_tokens_outside_the_vocabulary(tmp_path):
    path = save(tmp_path / "t.npy", np.array([[1, 2], [3, VOCABULARY], [-1, 4], [5, 339]]))
    made = make_corpus(path)
    assert [record.tokens.tolist() for record in made.sequences()] == [[1, 2], [5, 339]]
    assert made.facts.skipped == {"token id outside the vocabulary": 2}
    assert made.facts.examples == [
        f"{path}:{row}: token id outside the vocabulary (found {found}, expected 0 to 339)"
        for row, found in ((2, "3 to 340"), (3, "-1 to 4"))]
    with pytest.raises(InputError, match=r"t.npy:2: token id outside the vocabulary"):
        read(path, strict=True)


def test_text_outside_the_vocabulary_means_another_tokenizer():
    made = Corpus([ROWS], byte_tokenizer(), CorpusSettings(16), vocabulary=100)
    assert list(made.sequences()) == []
    assert made.facts.skipped == {"token id outside the vocabulary": 2}


def test_token_rows_beyond_the_sequence_length(tmp_path):
    path = save(tmp_path / "tokens.npy", np.ones((1, 17), int))
    with pytest.raises(InputError, match=r"rows of 17 tokens, more than .* 16. Give --seq-len 17"):
        read(path)


def test_tokens_and_text_dont_mix(tmp_path):
    with pytest.raises(InputError, match=r"token files .* and text; an index takes one kind"):
        make_corpus(save(tmp_path / "t.npy", np.ones(3, int)), as_jsonl(tmp_path))


def test_token_files_need_no_tokenizer_and_text_does(tmp_path):
    path = save(tmp_path / "tokens.npy", np.array([1, 2]))
    [record] = Corpus([path], None, CorpusSettings(16, pack=True), VOCABULARY).sequences()
    assert record.tokens.tolist() == [1, 2]
    with pytest.raises(InputError, match=r"no tokenizer, so text can't be read. Give --tokenizer"):
        Corpus([ROWS], None, CorpusSettings(16), VOCABULARY)
