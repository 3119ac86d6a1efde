"""CSV and TSV: separators, quotes and line ends as programs write them."""

import csv
import gzip

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from gradindex.errors import BadRowError, InputError
from indexer.read.tables import table_rows
from support.corpora import decoded, make_corpus, read

VALUE = some.text(some.sampled_from("ab ,;\t\"'\n\r\\é😀{"), max_size=8)
TABLE = some.lists(some.tuples(VALUE, VALUE), min_size=1, max_size=6)


def rows_of(path, names=()):
    return list(table_rows(path, names))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@given(rows=TABLE)
@settings(max_examples=60, deadline=None)
def test_what_was_written_is_read(rows, separator, ending, tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        # csv writes a lone \\r without quotes where lines end in \\n
        quoting = csv.QUOTE_ALL if ending == "\n" else csv.QUOTE_MINIMAL
        writer = csv.writer(file, delimiter=separator, lineterminator=ending, quoting=quoting)
        writer.writerows([("text", "label"), *rows])
    assert rows_of(path) == [dict(zip(("text", "label"), row, strict=True)) for row in rows]


def test_what_pandas_writes_is_read(tmp_path):
    table = pandas.DataFrame({"text": ['say "no"', "a,b\nc", "", " x "], "n": [1, 2, 3, 4]})
    for name, options in (("a.csv", {}), ("b.tsv", {"sep": "\t"}), ("c.csv", {"sep": ";"}),
                          ("d.csv.gz", {}), ("e.tsv", {"sep": "\t", "quoting": csv.QUOTE_ALL})):
        table.to_csv(tmp_path / name, **options)
        found = rows_of(tmp_path / name)
        assert [row["text"] for row in found] == table["text"].tolist(), name
        assert [row["column 1"] for row in found] == list("0123")


def test_tabs_without_quotes(tmp_path):
    lines = ['" so " good\t1', 'the 5" disk\t0', '"all of it\t1', "no\t0"]
    (tmp_path / "a.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    assert [row["text"] for row in rows_of(tmp_path / "a.tsv")] == [
        line.split("\t")[0] for line in lines]
    # however long it is
    (tmp_path / "b.tsv").write_text("text\tlabel\n" + '"open\t1\nshut\t0\n' * 40_000)
    assert len(rows_of(tmp_path / "b.tsv")) == 80_000
    (tmp_path / "c.tsv").write_text("text\tlabel\n" + '"in\ttwo"\t1\n' * 40_000)
    assert {row["text"] for row in rows_of(tmp_path / "c.tsv")} == {"in\ttwo"}


def test_spaces_before_quotes(tmp_path):
    (tmp_path / "a.csv").write_text('text, label\n"a, b", "1"\n')
    assert rows_of(tmp_path / "a.csv") == [{"text": "a, b", "label": "1"}]


def test_a_header_in_the_middle_is_a_bad_row(tmp_path):
    (tmp_path / "a.csv").write_text("text,n\nyes no,1\ntext,n\nno fire,2\n")
    for columns in ((), ("text", "n")):
        made = make_corpus(tmp_path / "a.csv", columns=columns)
        assert decoded(made.sequences()) == ["yes no", "no fire"]
        assert made.facts.skipped == {"the header again": 1}


def test_spaces_and_separators_within_quotes(tmp_path):
    (tmp_path / "a.csv").write_text('text;label\n"; "; \n')
    assert rows_of(tmp_path / "a.csv") == [{"text": "; ", "label": " "}]


def test_the_separator_that_excel_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("sep=|\r\ntext|n\r\na;b,c|1\r\n", newline="")
    assert rows_of(tmp_path / "a.csv") == [{"text": "a;b,c", "n": "1"}]


def test_the_first_row_or_names(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("hello world\t1\n\nyes no\t0\n")
    made = make_corpus(path, columns=("text", "label"), keep_fields=("label",))
    records = list(made.sequences())
    assert decoded(records) == ["hello world", "yes no"]
    assert [one.parts[0].fields for one in records] == [{"label": "1"}, {"label": "0"}]
    assert [one.parts[0].row for one in records] == [1, 3]
    with pytest.raises(InputError, match=r"fields hello world, 1; .* no header, name its col"):
        read(path)
    with pytest.raises(InputError, match=r"2 columns in its first row; --columns names 1 \(text\)"):
        read(path, columns=("text",))
    for header in ("text\tlabel", "Text\tLABEL "):
        path.write_text(f"{header}\nhello world\t1\n")
        assert decoded(read(path, columns=("text", "label"))) == ["hello world"]
    with pytest.raises(InputError, match="text,text has a name twice; name each column once"):
        read(path, columns=("text", "text"))


@pytest.mark.parametrize("header", [
    ("text", "label"), ("Body Text", "id"), ("n", "body"), ("Sentence", "n"),
    ("PROMPT", "completion"), ("texto", "etiqueta"), ("Kommentar", "Anzahl Sterne"),
])
def test_a_header_is_no_record_whatever_the_columns_are_called(header, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",".join(header) + "\nhello world,1\nyes no,2\n")
    options = {"columns": ("body", "n"), "text_field": "body"}
    with pytest.raises(InputError, match=rf"looks like a header \({', '.join(header)}\), but -"):
        read(path, **options)
    path.write_text("hello world,1\n" + ",".join(header) + "\n")
    assert len(read(path, **options)) >= 1
    path.write_text("yes no,positive\nthe text,1\n")
    assert decoded(read(path, **options)) == ["yes no", "the text"]


def test_rows_that_cant_be_used(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,n\nhello world,1\na,b,c\nyes\n\ncaf\xe9,2\n,3\nyes no,4\n")
    made = make_corpus(path)
    assert decoded(made.sequences()) == ["hello world", "yes no"]
    assert made.facts.skipped == {"another number of columns": 2, "invalid UTF-8": 1,
                                  "empty text": 1}
    assert made.facts.examples[0] == (
        f"{path}:2: another number of columns (3, the first row has 2)")
    assert isinstance(rows_of(path)[1], BadRowError) and rows_of(path)[3] is None


@pytest.mark.parametrize(("content", "reason"), [
    ('text,n\n"a b" c,1\n', r"no table at line 2: ',' expected after"),
    ('text,n\n"a,1\nb,2\n', r"no table at line 3: unexpected end of data"),
    ("text,text\na,b\n", "two columns 'text' in its first row"),
    (b"t\xe9xt,n\na,b\n", "not UTF-8 in its first row. Convert it: iconv -f CP1252"),
])
def test_tables_that_are_none(content, reason, tmp_path):
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"a\.csv (is|has) {reason}"):
        read(tmp_path / "a.csv")


def test_an_empty_table_and_one_of_a_header_alone(tmp_path):
    for content in ("", "\n", "text,label\n"):
        (tmp_path / "a.csv").write_text(content)
        assert read(tmp_path / "a.csv") == []


def test_long_values_and_compressed_tables(tmp_path):
    long = "word " * 100_000
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(f'text\n"{long}"\n'.encode()))
    assert rows_of(tmp_path / "a.csv.gz") == [{"text": long}]
