"""What a file holds is told by its bytes: records under any name, and what can't be read."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import sqlite3
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from gradindex.errors import InputError
from indexer.read import json_rows
from indexer.read.recognise import PEEK
from support.corpora import ROWS, decoded, jsonl, make_corpus, read

LINES = jsonl(*ROWS)
TEXTS = ["hello world", "naïve 😀"]
PRETTY = "\n".join(json.dumps(row, indent=2) for row in ROWS).encode()


@pytest.mark.parametrize("name", [
    "a.jl", "a.ndjson", "a.jsonlines", "a.JSONL", "a.json", "a.JSON", "part-00000", "a.txt",
    "a.log", "a.md", "a.csv", "a.data",
])
def test_lines_of_json_are_records_under_any_name(name, tmp_path):
    for content in (LINES, b"\xef\xbb\xbf\n \n" + LINES.replace(b"\n", b"\r\n"), LINES.strip()):
        (tmp_path / name).write_bytes(content)
        assert decoded(read(tmp_path / name)) == TEXTS
        assert decoded(read(tmp_path)) == TEXTS  # in a folder, too


@pytest.mark.parametrize("content", [
    json.dumps(ROWS).encode(), json.dumps(ROWS, indent=1).encode(), PRETTY,
    b" \n[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n",
    b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode(),
])
@pytest.mark.parametrize("name", ["a.json", "a.txt", "a", "a.json.gz"])
def test_arrays_and_objects_that_span_lines_are_records(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    records = read(path, id_field="url")
    assert decoded(records) == TEXTS
    assert [(one.parts[0].row, one.parts[0].user_id) for one in records] == [(1, "a"), (2, "b")]


def test_one_object_is_one_record(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(ROWS[0], indent=1))
    assert decoded(read(tmp_path / "a.json", tmp_path)) == ["hello world"] * 3


def test_values_are_the_same_wherever_a_chunk_ends(tmp_path, monkeypatch):
    values = [{"text": "naïve 😀 \\ \" \n", "n": [1.5e3, {"a": [[]]}], "l": "x" * 50}, {"text": ""},
              {"a": None, "b": [True, -12]}]
    path = tmp_path / "a.json"
    for content in (json.dumps(values, ensure_ascii=False), json.dumps(values, indent=3),
                    "\n".join(json.dumps(value, indent=1) for value in values) + "\n\n"):
        path.write_text(content)
        for chunk in (1, 2, 3, 7, 1000):
            monkeypatch.setattr(json_rows, "CHUNK", chunk)
            assert list(json_rows.json_rows(path)) == values


@pytest.mark.parametrize(("content", "reason"), [
    (b'[{"text": "a"}, {"text": "b', r"behind record 1: Unterminated string"),
    (b'[{"text": "a"} {"text": "b"}]', r"behind record 1: a comma or \] is missing"),
    (b'[{"text": "a"},]', r"behind record 1: Expecting value"),
    (b'[{"text": "a"}', r"behind record 1: a comma or \] is missing"),
    (b'[{"text": "a"}]]', r"behind record 1: something follows the array"),
    (b'{\n "text": "a"\n}\n{\n "text": }', r"behind record 1: Expecting value"),
])
def test_json_that_is_none_ends_the_build(content, reason, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json is no JSON {reason}.* an object a line, "):
        read(tmp_path / "a.json")


def test_other_values_and_bytes_in_an_array_are_bad_rows(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "hello world"}, 5, "a", {"text": "\xff"}]')
    made = make_corpus(tmp_path / "a.json")
    assert decoded(made.sequences()) == ["hello world"]
    assert made.facts.skipped == {"not an object": 2, "invalid UTF-8": 1}


def test_a_first_line_longer_than_what_is_looked_at(tmp_path):
    rows = [{"text": "hello " + "world " * PEEK}, ROWS[0]]
    for name, content in (("a.json", jsonl(*rows)), ("b.json", json.dumps(rows).encode())):
        (tmp_path / name).write_bytes(content)
        made = make_corpus(tmp_path / name, limit=2)
        assert len({record.parts[0].document for record in made.sequences()}) == 2


COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress,
                "zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True)}


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compression_is_told_by_the_bytes(ending, tmp_path):
    compressed = COMPRESSIONS[ending](LINES)
    for name, content in ((f"c4.json.{ending}", compressed), ("a.jsonl", compressed),
                          (f"b.{ending}", compressed), (f"plain.jsonl.{ending}", LINES)):
        (tmp_path / name).write_bytes(content)
        assert decoded(read(tmp_path / name)) == TEXTS
    (tmp_path / f"t.txt.{ending}").write_bytes(COMPRESSIONS[ending](b"hello world"))
    assert decoded(read(tmp_path / f"t.txt.{ending}")) == ["hello world"]
    (tmp_path / f"cut.json.{ending}").write_bytes(compressed[:-9])
    with pytest.raises(InputError, match=r"is damaged, cut short or can't be read"):
        read(tmp_path / f"cut.json.{ending}")


@pytest.mark.parametrize("name", ["train", "a.arrow", "a.feather", "a.txt"])
def test_tables_of_arrow_under_any_name(name, tmp_path):
    table, path = pyarrow.Table.from_pylist(ROWS), tmp_path / name
    pyarrow.feather.write_feather(table, path)
    assert decoded(read(path, id_field="url")) == TEXTS
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    assert decoded(read(path)) == TEXTS
    if name in ("train", "a.txt"):
        pyarrow.parquet.write_table(table, path)
        assert decoded(read(path)) == TEXTS
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()
    place = content.rindex((11).to_bytes(4, "little"))  # where the second text begins
    path.write_bytes(content[:place] + (1 << 30).to_bytes(4, "little") + content[place + 4:])
    made = make_corpus(path)
    assert list(made.sequences()) == [] and made.facts.skipped == {"damaged": 2}
    path.write_bytes(b"ARROW1\0\0no table")
    with pytest.raises(InputError, match=r"can't be read as Arrow: .* Expected version 2 of Fea"):
        read(path)


def test_token_files_under_any_name(tmp_path):
    with (tmp_path / "tokens").open("wb") as file:
        np.save(file, np.array([[1, 2], [3, 4]]))
    assert [one.tokens.tolist() for one in read(tmp_path / "tokens")] == [[1, 2], [3, 4]]


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.jsonl", LINES)


def tar(path):
    (path.parent / "0.json").write_bytes(LINES)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as file:
        file.add(path.parent / "0.json", "0.json")


def data_base(path):
    base = sqlite3.connect(path)
    base.execute("create table a(t)")
    base.commit()
    base.close()


def table(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path.with_name("t"))
    path.write_bytes(gzip.compress(path.with_name("t").read_bytes()))


UNREAD = [
    ("a.xlsx", archive, "a spreadsheet", "as CSV"), ("a.zip", archive, "an archive", "Unpack it"),
    ("a", archive, "an archive", "Unpack it"), ("a.npz", archive, "a NumPy archive", r"\.npy"),
    ("shard-000.tar", tar, "an archive", "Unpack it"), ("shard", tar, "an archive", "Unpack it"),
    ("a.tar.gz", tar, "an archive, compressed with gzip", "Unpack it"),
    ("a.sqlite", data_base, "a data base", r"\.jsonl"), ("a", data_base, "a data base", "jsonl"),
    ("a.parquet.gz", table, r"a \.parquet file, compressed with gzip", "Decompress it"),
    *((name, lambda path, content=content: path.write_bytes(content), what, remedy)
      for name, content, what, remedy in [
        ("a.pkl", pickle.dumps(ROWS), "a pickle", r"\.jsonl"),
        ("a", pickle.dumps(ROWS), "a pickle", r"\.jsonl"),
        ("old.pickle", pickle.dumps(ROWS, 0), "a pickle", r"\.jsonl"),
        ("a.msgpack", b"\x81\xa4text\xa1a", "a binary file of records", r"\.jsonl"),
        ("a.safetensors", (8).to_bytes(8, "little") + b"{}      ", "a file of tensors", r"\.npy"),
        ("a.pdf", b"%PDF-1.7 x", "a PDF", r"\.txt"), ("a", b"%PDF-1.7 x", "a PDF", r"\.txt"),
        ("a.bin", bytes(256), "a binary file", r"\.npy"),
        ("a.idx", b"MMIDIDX\0\0", "a binary file", r"\.npy"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0", "an image", "Leave it out"),
        ("a", b"\xff\xd8\xff\xe0\0", "an image", "Leave it out"),
        ("a.exe", b"MZ\0\0", "no text", "Leave it out"),
        ("a.txt", "wide text".encode("utf-16"), "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "UTF-16LE text", "iconv -f UTF-16LE"),
        ("a.csv", "text,n\r\na,1".encode("utf-16-be"), "UTF-16BE text", "iconv -f UTF-16BE"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
         "a pointer of Git LFS", "git lfs pull"),
        ("CC-MAIN.warc", b"WARC/1.0\r\n", "a web archive", r"\.jsonl"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>Sign in", "a web page", "Download it again"),
        ("a.txt", b"{'text': 'a'}\n{'text': 'b'}\n", "lines in braces that are no JSON", "quotes"),
        *((name, b'1\t{"text": "a"}\n2\t{"text": "b"}\n', "JSON objects that each have something",
           r"sed 's/\^\[\^{\]\*//'") for name in ("a.txt", "a.jsonl", "train")),
        ("train", b'[1] {"text": "a"}\n[2] {"text": "b"}\n', "JSON objects that each have", "sed"),
        ("a.log", b'data: {"text": "a"}\n\ndata: {"text": "b"}\n', "JSON objects that each", "sed"),
        ("a.json", b'// made\n{\n"text": "a"\n}\n', "JSON behind a comment", "Take the com"),
    ]),
]


@pytest.mark.parametrize(("name", "write", "what", "remedy"), UNREAD)
def test_what_cant_be_read_is_refused_by_name(name, write, what, remedy, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / name)
    for other in set(folder.iterdir()) - {folder / name}:
        other.unlink()
    with pytest.raises(InputError, match=rf"{name} is {what}.*; expected JSON lines, .*{remedy}"):
        make_corpus(folder / name)
    (folder / "b.txt").write_text("hello world")
    if what in ("an image", "no text"):
        made = make_corpus(folder)
        assert decoded(made.sequences()) == ["hello world"]
        assert made.facts.skipped == {}
        assert [note for note in made.notes if name in note]
    else:
        with pytest.raises(InputError, match=rf"{name} is {what}.* move it out of the folder"):
            make_corpus(folder)


@pytest.mark.parametrize("text", [
    "ORC ARMY\n", "RIFF raff", "GIF8 words", "BM is an abbreviation", "[1] A reference\n[2] More",
    "{% if x %}hello{% endif %}\nworld", "{ x | x > 0 }, a set", "\ufeffhello, world\n", "BZh",
    "[link](a) and more", "a\0" + "text for all that, " * 9, "a,b\n1,2\n", "text\nhello\n, world",
    "# A title\n\nhello", 'the set {"a": 1}', 'x = {"a": 1}\ny = 2\n', "text, and\nmore", "text,n",
    '# A title\n{"a": 1}\nis an object\nof one field',
    "question, answer\n\nQ: what, when\nA: this, that, other\n",
    "|text|n|\n|---|---|\n|a|b|\n", "text, and more\nmore, again\n", "[a] b\n[c] d {e}\n",
])
def test_texts_that_begin_like_other_files_are_texts(text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    [record] = read(tmp_path / "a.txt", sequence_length=999)
    assert decoded([record]) == [text.removeprefix("\ufeff")]


@pytest.mark.parametrize("name", ["train", "a.txt", "part-00000", "a.csv.1", "train.gz"])
@pytest.mark.parametrize("content", [
    'text,url\nhello world,a\n"naïve 😀",b\n', 'text\turl\nhello world\ta\nnaïve 😀\tb\n5" disk\n',
    'url, text\na,hello world\nb,naïve 😀',
    '"text";"url"\r\n"hello world";"a"\r\nnaïve 😀;b\r\n',
])
def test_tables_under_any_name_are_told_by_their_columns(name, content, tmp_path):
    raw = content.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    for path in (tmp_path / name, tmp_path):
        assert [text.strip() for text in decoded(read(path, id_field="url"))] == TEXTS


def test_what_may_be_a_table_is_a_text_and_said(tmp_path):
    for name, content in (("a.txt", "body\tn\nyes no\t1\n"), ("b.txt", "Yes, no\nno, yes\n"),
                          ("c.md", "# A\n\n* yes, no\n* no, yes\n"), ("d.txt", "Yes,\nno,\n")):
        (tmp_path / name).write_text(content)
    made = make_corpus(tmp_path)
    assert decoded(made.sequences())[:2] == ["body\tn\nyes no\t1\n", "Yes, no\nno, yes\n"]
    assert made.notes[1] == (f"texts: {tmp_path}/a.txt read as one document each, though the lines "
                             "look like a table's; call a table .csv or .tsv")
    assert decoded(read(tmp_path / "a.txt", text_field="body")) == ["yes no"]
    (tmp_path / "d").write_text("# exported\ntext,n\nyes no,1\n")
    assert make_corpus(tmp_path / "d").notes[0].startswith(f"texts: {tmp_path}/d read as one ")
    (tmp_path / "d").write_text('text,n\n"yes" no,1\n')
    with pytest.raises(InputError, match="d is no table at line 2"):
        read(tmp_path / "d")
    (tmp_path / "c").write_text("prompt,chosen,rejected\na,b,c\n")
    with pytest.raises(InputError, match="holds preferences"):
        read(tmp_path / "c")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "train", "a.json"])
@pytest.mark.parametrize("comment", [b"// made by hand\n", b"# a\n\n# b\n", b"-- a\n"])
def test_a_comment_before_lines_of_json_costs_a_row(name, comment, tmp_path):
    (tmp_path / name).write_bytes(comment + LINES)
    made = make_corpus(tmp_path / name)
    assert decoded(made.sequences()) == TEXTS
    assert made.facts.skipped == {"invalid JSON": comment.count(b"\n", 0, -1) or 1}


def test_texts_without_names_are_bad_rows_with_what_to_write(tmp_path):
    for name, content in (("a.json", b'["yes no", "no"]'), ("train", b'["yes no", "no"]'),
                          ("a.jsonl", b'"yes no"\n"no"\n')):
        (tmp_path / name).write_bytes(content)
        made = make_corpus(tmp_path / name)
        assert list(made.sequences()) == [] and made.facts.skipped == {"not an object": 2}
        assert made.facts.examples[0].endswith('(a str; write it as {"text": …})')
    (tmp_path / "train").write_text('["yes no", 1]\n["no", 2]\n')
    made = make_corpus(tmp_path / "train")
    assert list(made.sequences()) == [] and made.facts.skipped == {"not an object": 2}
    assert made.facts.examples[0].endswith("(a list; write its values with names)")


@pytest.mark.parametrize(("name", "what"), [
    ("a.yaml", "YAML"), ("a.yml", "YAML"), ("a.XML", "XML"), ("a.json5", "JSON5"),
])
def test_what_may_hold_records_is_a_text_among_texts_alone(name, what, tmp_path):
    (tmp_path / name).write_text("- text: hello")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(InputError, match=rf"is {what}, which isn't read as .* call it \.txt"):
            make_corpus(path)
    (tmp_path / "b.txt").write_text("yes no")
    assert decoded(read(tmp_path)) == ["- text: hello", "yes no"]


def test_a_damaged_line_among_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES * 40 + b'{"text": "a\0b"}\n' + LINES)
    made = make_corpus(tmp_path / "a.jsonl")
    assert len(list(made.sequences())) == 82 and made.facts.skipped == {"invalid JSON": 1}


def test_the_reason_why_a_text_is_none(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    made = make_corpus(tmp_path / "a.txt")
    assert list(made.sequences()) == [] and made.facts.skipped == {"invalid UTF-8": 1}
    assert "iconv -f CP1252 -t UTF-8" in made.facts.examples[0]


def seeds(folder):
    """A small file of each form."""
    rows = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(rows, folder / "a")
    pyarrow.feather.write_feather(rows, folder / "b", compression="uncompressed")
    with pyarrow.ipc.new_stream(folder / "c", rows.schema) as writer:
        writer.write_table(rows)
    with (folder / "d").open("wb") as file:
        np.save(file, np.arange(9))
    yield from (path.read_bytes() for path in sorted(folder.iterdir()))
    yield from (LINES, json.dumps(ROWS, indent=1).encode(), b'text;n\n"a ""b"";";1\nyes;2\n')
    yield from (compress(LINES) for compress in COMPRESSIONS.values())


def damaged(content, random):
    """Bytes changed, cut off, put in, doubled or taken out."""
    changed, place = bytearray(content), int(random.integers(len(content) + 1))
    match int(random.integers(5)):
        case 0:
            changed[place : place + 1] = bytes([random.integers(256)])
        case 1:
            del changed[place:]
        case 2:
            changed[place:place] = [b'"', b"{", b"]", b"\0", b"\xff", b"\n"][random.integers(6)]
        case 3:
            changed += bytes(changed)
        case 4:
            del changed[place : place + 9]
    return bytes(changed)


def test_damaged_files_end_in_words(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "seeds").mkdir()
    read_whole = refused = 0
    for content in seeds(tmp_path / "seeds"):
        for name in ("a.jsonl", "a.json", "a.csv", "a", "a.parquet", "a.arrow", "a.npy", "a.gz"):
            path = tmp_path / name
            path.write_bytes(damaged(damaged(content, random), random))
            try:
                made = make_corpus(path)
                for _ in made.sequences():
                    pass
                read_whole += 1
            except InputError:
                refused += 1
    assert read_whole > 9 and refused > 9


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be someone else")
def test_files_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as place:  # which others may enter, unlike pytest's
        folder, file = Path(place) / "data", Path(place) / "b.jsonl"
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(LINES)
        file.write_bytes(LINES)
        Path(place).chmod(0o755)
        file.chmod(0)
        folder.chmod(0)
        os.seteuid(65534)
        try:
            for path in (file, folder, folder / "a.jsonl"):
                with pytest.raises(InputError, match=rf"{path} can't be read: Permission denied\."):
                    make_corpus(path)
        finally:
            os.seteuid(0)
            folder.chmod(0o755)


def test_a_file_that_vanishes(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    made = make_corpus(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    for read_it in (lambda: list(made.sequences()), made.data_facts):
        with pytest.raises(InputError, match=r"a\.jsonl can't be read: No such file or directory"):
            read_it()
