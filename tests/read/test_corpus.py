"""Data files → sequences: where each came from, how it is cut, what is skipped."""

import datetime
import gzip
import hashlib
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gradindex.errors import InputError
from indexer.read import sources
from indexer.read.corpus import Corpus, CorpusSettings
from indexer.read.sources import token_file_width
from support.tokenizers import (
    CHAT,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    REWRITING,
    byte_tokenizer,
    plain_ids,
)

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


# ---- forms of data


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


FORMS = [as_jsonl, as_gzip, as_zstd, as_parquet, as_saved_dataset, as_list, as_dataset]


@pytest.mark.parametrize("form", FORMS)
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


@pytest.mark.parametrize("form", FORMS)
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
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b/2.txt", "a.txt", "c.txt", ".hidden.txt", ".git/config"):
        (tmp_path / name).write_text(f"file {name}")
    as_parquet(tmp_path)
    as_saved_dataset(tmp_path / "b")
    write_lines(tmp_path, {"text": "line"}, name="z.jsonl")
    assert decoded(read(tmp_path, str(tmp_path / "a.txt"))) == [
        "file a.txt", "file b/2.txt", "hello world", "naïve 😀", "file c.txt", "hello world",
        "naïve 😀", "line", "file a.txt"]


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
    with pytest.raises(InputError, match=r"none\.jsonl does not exist; expected a .jsonl"):
        make_corpus(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=rf"no data files were found in {tmp_path}; expected a"):
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


def save(path, array):
    np.save(path, array)
    return path


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
    assert token_file_width([path]) == 3


def test_a_token_stream_is_cut_into_windows(tmp_path):
    path = save(tmp_path / "tokens.npy", np.arange(10, 17))
    made = make_corpus(path, sequence_length=3)
    assert [record.tokens.tolist() for record in made.sequences()] == [[10, 11, 12], [13, 14, 15]]
    assert made.facts.skipped == {"sequence without a scored token": 1}
    assert token_file_width([path, ROWS]) is None


@pytest.mark.parametrize(("array", "found"), [
    (np.zeros((2, 3)), r"float64 of shape \(2, 3\)"), (np.ones(3, bool), r"bool of shape \(3,\)"),
    (np.zeros((2, 2, 2), int), r"int64 of shape \(2, 2, 2\)"), (np.int64(5), r"of shape \(\)"),
    (np.zeros((0, 4), int), r"of shape \(0, 4\)"),
])
def test_token_files_of_another_kind_are_refused(array, found, tmp_path):
    path = save(tmp_path / "tokens.npy", array)
    for reader in (read, lambda path: token_file_width([path])):
        with pytest.raises(InputError, match=rf"tokens\.npy holds .*{found}; expected int"):
            reader(path)


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
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


# ---- which fields


PAIR = {"prompt": "hello", "completion": " world"}


@pytest.mark.parametrize(("row", "flags", "task", "found"), [
    ({"text": "yes and no"}, {}, "text", "yes and no"),
    ({"text": "yes and no", **PAIR}, {}, "text", "yes and no"),
    (PAIR, {}, "completion", "hello world"),
    ({"messages": CHAT[:2]}, {}, "messages",
     "<|user|>is water cold<|end|>\n<|assistant|> yes <|end|>\n"),
    ({"body": "yes and no", "text": "no"}, {"text_field": "body"}, "text", "yes and no"),
    ({"q": "hello", "a": " yes"}, {"prompt_field": "q", "completion_field": "a"}, "completion",
     "hello yes"),
    ({**PAIR, "text": "no"}, {"prompt_field": "prompt"}, "completion", "hello world"),
    ({"prompt": "hello", "a": " yes"}, {"completion_field": "a"}, "completion", "hello yes"),
    ({"chat": CHAT[1:2], "text": "no"}, {"messages_field": "chat"}, "messages",
     "<|assistant|> yes <|end|>\n"),
])
def test_fields_are_recognised_or_named(row, flags, task, found, tmp_path):
    tokenizer = byte_tokenizer(template=PLAIN_TEMPLATE)
    made = make_corpus([row], tokenizer=tokenizer, sequence_length=99, **flags)
    assert made.task == task
    assert decoded(made.sequences()) == [found]
    parquet = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), parquet)
    assert decoded(read(parquet, tokenizer=tokenizer, sequence_length=99, **flags)) == [found]


@pytest.mark.parametrize("flags", [
    {"text_field": "a", "messages_field": "b"}, {"prompt_field": "a", "text_field": "b"},
    {"completion_field": "a", "messages_field": "b"},
])
def test_flags_of_two_kinds_exclude_each_other(flags):
    with pytest.raises(InputError, match="--text-field, --prompt-field/--completion-field and "):
        make_corpus(ROWS, **flags)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "rows"])
def test_unknown_fields_are_shown_with_the_flags(form, tmp_path):
    row = {"body": "x", "prompt" if form == "rows" else "title": "y", "url": "a"}
    data = tmp_path / f"data.{form}"
    if form == "rows":
        data = [row]
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), data)
    else:
        data.write_bytes(b"\nno JSON\n" + jsonl(row))
    (tmp_path / "0.jsonl").touch()
    with pytest.raises(InputError) as error:
        make_corpus(tmp_path / "0.jsonl", data, id_field="url")
    source = "the data given" if form == "rows" else str(data)
    assert f"record of {source} has the fields {', '.join(row)}; expected te" in str(error.value)
    for flag in ("--text-field", "--prompt-field", "--completion-field", "--messages-field"):
        assert flag in str(error.value)


# ---- rows that can't be used


BAD_TEXT = [
    (b'{"text": "cut', "invalid JSON", "Unterminated string"),
    (b"[" * 100_000, "invalid JSON", "recursion"),
    (b'{"text": "\xff"}', "invalid UTF-8", "byte 10"),
    (b'{"text": "\\ud83d"}', "invalid UTF-8", "a lone surrogate in 'text'"),
    (b'{"body": "hello"}', "missing field 'text'", ""),
    (b'{"text": " \\n"}', "empty text", ""),
    (b'{"text": 5}', "field 'text' is not text", "a int"),
    (b'{"text": null}', "field 'text' is not text", "a NoneType"),
    (b'["hello"]', "not an object", "a list"),
    (b"null", "not an object", "a NoneType"),
]


@pytest.mark.parametrize(("line", "reason", "detail"), BAD_TEXT)
def test_a_bad_line_is_skipped_and_counted_or_fatal(line, reason, detail, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(jsonl(ROWS[0]) + line + b"\n" + jsonl(ROWS[1]))
    made = make_corpus(path)
    assert decoded(made.sequences()) == ["hello world", "naïve 😀"]
    assert made.facts.skipped == {reason: 1}
    [example] = made.facts.examples
    assert example.startswith(f"{path}:2: {reason}")
    assert detail in example
    with pytest.raises(InputError, match=r"data\.jsonl:2: .*\. Correct it, or leave out --strict"):
        read(path, strict=True)


LONE = "\ud83d"


@pytest.mark.parametrize(("row", "good", "reason"), [
    ({"prompt": "a"}, PAIR, "missing field 'completion'"),
    ({"completion": "a"}, PAIR, "missing field 'prompt'"),
    ({"prompt": "a", "completion": " "}, PAIR, "empty completion"),
    ({"prompt": ["a"], "completion": "b"}, PAIR, "field 'prompt' is not text"),
    ({"prompt": LONE, "completion": "b"}, PAIR, "invalid UTF-8"),
    ({"text": "a"}, {"messages": CHAT}, "missing field 'messages'"),
    *(({"messages": messages}, {"messages": CHAT}, reason) for messages, reason in [
        ("a", "field 'messages' is not a list of role and content"),
        ([{"role": "user"}], "field 'messages' is not a list of role and content"),
        ([{"role": "assistant", "content": 5}],
         "field 'messages' is not a list of role and content"),
        (CHAT[:1], "no assistant message"), ([], "no assistant message"),
        ([{"role": "assistant", "content": LONE}], "invalid UTF-8"),
        ([{"role": "oracle", "content": "a"}, CHAT[1]], "the chat template refuses the messages"),
    ]),
    ("hello", ROWS[0], "not an object"),
    (None, ROWS[0], "not an object"),
])
def test_bad_records(row, good, reason):
    no_oracles = "{% if messages[0].role == 'oracle' %}{{ raise_exception('no (x)') }}{% endif %}"
    tokenizer = byte_tokenizer(template=no_oracles + PLAIN_TEMPLATE)
    made = make_corpus([good, row], tokenizer=tokenizer, sequence_length=99)
    [record] = made.sequences()
    assert record.parts[0].row == 1
    assert made.facts.skipped == {reason: 1}
    with pytest.raises(InputError, match=f"^the data given:2: {reason}"):
        read([good, row], tokenizer=tokenizer, sequence_length=99, strict=True)


def test_a_missing_id_is_a_bad_row():
    made = make_corpus(ROWS, id_field="year")
    assert [record.parts[0].user_id for record in made.sequences()] == [1]
    assert made.facts.skipped == {"missing field 'year'": 1}


def test_invalid_utf8_in_a_text_file_and_a_table(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hello\xff")
    strings = pyarrow.array([b"hello world", b"\xff", b"yes no"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "b.parquet")
    made = make_corpus(tmp_path)
    assert decoded(made.sequences()) == ["hello world", "yes no"]
    assert made.facts.skipped == {"invalid UTF-8": 2}
    assert made.facts.examples == [f"{tmp_path / 'a.txt'}:1: invalid UTF-8 (byte 5)",
                                     f"{tmp_path / 'b.parquet'}:2: invalid UTF-8 (byte 0)"]


def test_a_line_too_long_is_one_bad_row(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "LONGEST_LINE", 30)
    path = write_lines(tmp_path, ROWS[0] | {"year": "x" * 100}, {"text": "hello world"})
    made = make_corpus(path)
    [record] = made.sequences()
    assert record.parts[0].row == 2
    assert made.facts.examples == [f"{path}:1: line longer than 30 bytes"]


def test_bom_crlf_and_blank_lines_are_harmless(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + jsonl(*ROWS).replace(b"\n", b"\r\n\r\n  \r\n").rstrip())
    made = make_corpus(path, strict=True)
    records = list(made.sequences())
    assert decoded(records) == ["hello world", "naïve 😀"]
    assert [record.parts[0].row for record in records] == [2, 5]
    assert made.facts.skipped == {}


def test_only_the_first_examples_are_kept_and_all_counted():
    made = make_corpus([{"text": ""}] * 30 + ROWS)
    examples = [f"the data given:{row}: empty text" for row in range(1, 21)]
    for _ in range(2):  # reading again starts anew
        assert decoded(made.sequences()) == ["hello world", "naïve 😀"]
        assert made.facts.skipped == {"empty text": 30}
        assert made.facts.examples == examples
        assert made.facts.documents == 2


def test_limit_counts_documents():
    made = make_corpus([{"text": ""}, {"text": "hello world " * 9}, *ROWS], limit=2)
    parts = [record.parts[0] for record in made.sequences()]
    assert [part.row for part in parts] == [2, 2, 3]
    assert made.facts.documents == 2


def test_metadata_is_what_json_can_hold():
    row = {"text": "hello world", "a": float("nan"), "b": datetime.date(2020, 1, 2),
           "c": [np.int64(3), (np.float32(0.5),)], "d": {1: b"x"}}
    [record] = read([row], keep_fields=tuple("abcd"), id_field="c")
    fields = {"a": "nan", "b": "2020-01-02", "c": [3, [0.5]], "d": {"1": "b'x'"}}
    assert record.parts[0].fields == json.loads(json.dumps(fields))
    assert record.parts[0].user_id == [3, [0.5]]


# ---- windows


@pytest.mark.parametrize("trim", [False, True])
def test_a_long_document_becomes_consecutive_windows(trim):
    long = "the  water is cold \n\n and fire, " * 3
    tokenizer = byte_tokenizer(trim=trim)
    ids = plain_ids(tokenizer, long)
    made = make_corpus([{"text": "yes and no"}, {"text": long}, {"text": "no"}, {"text": "yes no"}],
                       tokenizer=tokenizer, sequence_length=5)
    records = list(made.sequences())
    windows = records[1:-1]
    assert [record.id for record in records] == list(range(len(records)))
    assert [record.parts[0].document for record in records] == [0, *[1] * len(windows), 3]
    assert [record.tokens.tolist() for record in windows] == [
        ids[start : start + 5] for start in range(0, len(ids), 5)]
    slices = [long[record.parts[0].start : record.parts[0].end] for record in windows]
    assert slices == decoded(windows)
    assert "".join(slices) == long
    assert made.facts.skipped == {"sequence without a scored token": 1}  # "no", one token
    assert made.facts.documents == 4


def test_windows_that_split_a_character_both_show_it():
    records = read([{"text": "the 😀𝄞 no"}], sequence_length=4)
    assert decoded(records) == ["the 😀�", "�� no"]
    parts = [record.parts[0] for record in records]
    assert ["the 😀𝄞 no"[part.start : part.end] for part in parts] == ["the 😀𝄞", "𝄞 no"]


def test_special_tokens_stand_at_the_ends_of_the_document():
    tokenizer = byte_tokenizer("<b> $A <e>")
    made = make_corpus([{"text": "yes and no"}], tokenizer=tokenizer, sequence_length=2)
    records = list(made.sequences())
    assert decoded(records) == ["<b>yes", " and no"]
    assert [(r.parts[0].start, r.parts[0].end) for r in records] == [(0, 3), (3, 10)]
    assert made.facts.skipped == {"sequence without a scored token": 1}  # <e> alone


def test_windows_of_the_prompt_alone_are_dropped():
    made = make_corpus([{"prompt": "the water is cold and", "completion": " fire and no"}],
                       sequence_length=3)
    records = list(made.sequences())
    assert decoded(records) == [" cold and fire", " and no"]
    assert scored_texts(records) == [" fire", " and no"]
    assert [record.id for record in records] == [0, 1]
    assert made.facts.skipped == {"sequence without a scored token": 1}
    assert made.facts.documents == 1


# ---- packing


def test_documents_are_joined_by_the_end_token_and_cut_into_full_windows():
    rows = [{"text": string, "url": place} for place, string in enumerate(
        ["yes and no", "the water", "fire", "is cold and the world is cold"])]
    records = read(rows, sequence_length=6, pack=True, id_field="url")
    assert decoded(records) == [
        "yes and no<e>the water", "<e>fire<e>is cold", " and the world is cold<e>"]
    found = [[(part.document, part.row, part.user_id, part.token, part.start, part.end)
              for part in record.parts] for record in records]
    assert found == [
        [(0, 1, 0, 0, 0, 10), (1, 2, 1, 4, 0, 9)],
        [(1, 2, 1, 0, 9, 9), (2, 3, 2, 1, 0, 4), (3, 4, 3, 4, 0, 7)],
        [(3, 4, 3, 0, 7, 29)],
    ]
    assert all(record.scored.all() for record in records)


def test_packing_adds_no_second_end_token():
    records = read([{"text": "yes"}, {"text": "no<e>"}], pack=True,
                   tokenizer=byte_tokenizer("<b> $A <e>"))
    assert decoded(records) == ["<b>yes<e><b>no<e><e>"]


def test_packed_pairs_score_completions_and_their_end():
    rows = [PAIR, {"prompt": "is fire cold", "completion": " no"}]
    [record] = read(rows, pack=True)
    assert decoded([record]) == ["hello world<e>is fire cold no<e>"]
    assert scored_texts([record]) == [" world<e> no<e>"]


def test_packing_needs_an_end_token():
    with pytest.raises(InputError, match=r"--pack joins .* the tokenizer has none. Use --no-pack"):
        Corpus([ROWS], byte_tokenizer(), CorpusSettings(16, pack=True), VOCABULARY, None)


# ---- loss masks


@pytest.mark.parametrize(("row", "settings", "text", "scored"), [
    ({"text": "yes and no"}, {}, "<b>yes and no<e>", "<b>yes and no<e>"),
    (PAIR, {}, "<b>hello world", " world"),
    ({"messages": CHAT[:2]}, {"template": PLAIN_TEMPLATE},
     "<|user|>is water cold<|end|>\n<|assistant|> yes <|end|>\n", " yes <|end|>\n"),
    ({"messages": CHAT[:2]}, {"template": MARKED_TEMPLATE},
     "<|user|>is water cold<|end|><|assistant|> yes <|end|>", " yes <|end|>"),
])
def test_what_is_scored(row, settings, text, scored):
    tokenizer = byte_tokenizer("<b> $A <e>", **settings)
    records = read([row], tokenizer=tokenizer, sequence_length=99)
    assert decoded(records) == [text]
    assert scored_texts(records) == [scored]


def test_a_template_that_rewrites_messages_names_the_record(tmp_path):
    path = write_lines(tmp_path, {"messages": CHAT[1:2]}, {"messages": CHAT})
    made = make_corpus(path, tokenizer=byte_tokenizer(template=REWRITING))
    with pytest.raises(InputError, match=r"data.jsonl:2: the chat template rewrites earlier mess"):
        list(made.sequences())


def test_a_missing_chat_template_is_an_error_before_anything_is_read():
    with pytest.raises(InputError, match=r"--messages-field chat.* no chat template"):
        make_corpus([{"chat": CHAT}], messages_field="chat")
