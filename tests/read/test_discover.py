"""Folders as people have them: what is read, what is left out and said, what is refused."""

import os
import socket

import datasets
import pandas
import pyarrow
import pytest

from gradindex.errors import InputError
from indexer.read.discover import discover
from support.corpora import ROWS, as_dataset, as_parquet, decoded, jsonl, make_corpus, read

LINES = jsonl(*ROWS)
TEXTS = ["hello world", "naïve 😀"]
OTHER = jsonl({"text": "the test"})


def lay_out(folder, **files):
    """Write files by their names."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def found_in(folder):
    found = discover([folder])
    return ([os.path.relpath(source.name, folder) for source in found.sources],
            {reason: [os.path.relpath(path, folder) for path in paths]
             for reason, paths in found.left_out.items()})


def test_a_cloned_data_set(tmp_path):
    lay_out(tmp_path, **{
        "README.md": b"---\nlicense: mit\n---\nHello.", "LICENSE": b"MIT", ".gitattributes": b"*",
        ".git/config": b"x", "dataset_infos.json": b'{"default": {}}', "CITATION.cff": b"a: b",
        "data/train-00000-of-00002.jsonl": LINES, "data/train-00001-of-00002.json": LINES,
        "figures/a.png": b"\x89PNG\r\n\0", "load.py": b"print(1)", "config.json": b'{"a": 1}',
        "_SUCCESS": b"", "empty": b""})
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "data" / "again").symlink_to("../data")
    found, left = found_in(tmp_path)
    assert found == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.json"]
    assert left == {
        "hidden": [".git", ".gitattributes"],
        "documentation": ["CITATION.cff", "LICENSE", "README.md", "_SUCCESS",
                          "dataset_infos.json"],
        "link to a folder that is read already": ["data/again", "self"],
        "an empty file": ["empty"],
        "an image, a sound, a film or a font": ["figures/a.png"],
        "one JSON object, no record": ["config.json"],
        "beside records": ["load.py"]}
    made = make_corpus(tmp_path)
    for _ in range(2):
        assert decoded(made.sequences()) == TEXTS * 2
        assert made.facts.skipped == {}  # of rows, while files are said before
    [files, note, rows] = made.notes
    assert files == (f"files: 2 read ({tmp_path}/data/train-00000-of-00002.jsonl, "
                     f"{tmp_path}/data/train-00001-of-00002.json)")
    assert note.startswith("left out: 2 × hidden (") and f"{tmp_path}/README.md and 2 more" in note
    assert rows == "rows: text; not read: url, year"


def test_a_folder_of_texts_and_code(tmp_path):
    lay_out(tmp_path, **{"a.py": b"hello", "b/c.md": b"world", "notes": b"fire",
                         "package.json": b'{"name": "x"}', "README": b"no",
                         "b/licensed.txt": b"yes", "test/train.py": b"the",
                         "logo.svg": b"<svg/>", "a.pyc": b"\0\1"})
    found, left = found_in(tmp_path)
    assert found == ["a.py", "b/c.md", "b/licensed.txt", "notes", "test/train.py"]
    assert sorted(name for names in left.values() for name in names) == [
        "README", "a.pyc", "logo.svg", "package.json"]


def test_objects_in_files_of_their_own_are_records_by_their_fields(tmp_path):
    lay_out(tmp_path, **{"1.json": b'{"text": "hello world"}', "2.json": b'{"text": "yes no"}'})
    assert decoded(read(tmp_path)) == ["hello world", "yes no"]
    lay_out(tmp_path, **{"3.json": b'{"body": "the fire"}', "z.jsonl": jsonl({"text": "no fire"})})
    assert decoded(read(tmp_path)) == ["hello world", "yes no", "no fire"]
    (tmp_path / "z.jsonl").unlink()
    made = make_corpus(tmp_path, text_field="body")
    assert decoded(made.sequences()) == ["the fire"]
    assert made.facts.skipped == {"missing field 'body'": 2}


@pytest.mark.parametrize("name", ["notes.txt", "notes", "b/notes.text"])
def test_records_beside_texts_are_refused(name, tmp_path):
    lay_out(tmp_path, **{"train.jsonl": LINES, name: b"some notes"})
    with pytest.raises(InputError, match=r"holds records \(.*train\.jsonl\) and texts \(.*notes.*"
                                         r"\), each of which would be one document\. Give those"):
        make_corpus(tmp_path)
    assert decoded(read(tmp_path / "train.jsonl", tmp_path / name)) == [*TEXTS, "some notes"]


def test_what_a_shells_pattern_brings_along(tmp_path):
    lay_out(tmp_path, **{"README.md": b"yes no", "a.jsonl": LINES})
    made = make_corpus(*sorted(tmp_path.iterdir()))
    assert decoded(made.sequences()) == TEXTS
    assert made.notes[0] == f"left out: 1 × documentation ({tmp_path}/README.md)"
    assert decoded(read(tmp_path / "README.md")) == ["yes no"]  # given alone it is meant


@pytest.mark.parametrize(("files", "shown"), [
    (["train.jsonl", "test.jsonl"], r"test\.jsonl \(test\), \S*/train\.jsonl \(train\)"),
    (["data/train-00000-of-00002.json", "data/train-00001-of-00002.json", "data/validation.json"],
     r"data/train-0000\* \(train\), \S*/data/validation\.json \(validation\)"),
    (["train/0.jsonl", "train/1.jsonl", "dev/0.jsonl", "dev/1.jsonl"],
     r"\S*/dev \(validation\), \S*/train \(train\)"),
    (["gsm8k-test.jl", "gsm8k-train.jl"], r"gsm8k-test\.jl \(test\)"),
    (["val.jsonl", "eval.jsonl"], r"eval\.jsonl \(test\), \S*val\.jsonl \(validation\)"),
    (["train1.jsonl", "test1.jsonl"], r"test1\.jsonl \(test\), .*on train: give \S*/train1\.jsonl"),
    (["trainset.csv", "testset.csv"], r"testset\.csv \(test\)"),
    (["imdbTrain.jsonl", "imdbTest.jsonl"], r"imdbTest\.jsonl \(test\)"),
    (["train_data2.jsonl", "held-out.jsonl"], r"held-out\.jsonl \(test\)"),
    (["test.jsonl.gz", "train.jsonl.gz"], r"model was trained on train: give \S*/train\.jsonl\.gz"),
    (["main/test.jsonl", "main/train.jsonl", "socratic/test.jsonl", "socratic/train.jsonl"],
     r"train: give \S*/main/train\.jsonl \S*/socratic/train\.jsonl\."),
    (["train.jsonl", "train_2.jsonl", "trainer_test.jsonl"],
     r"give \S*/train\.jsonl \S*/train_2\.jsonl\."),
])
def test_several_splits_are_refused(files, shown, tmp_path):
    lay_out(tmp_path, **{name: b"text,n\nhello world,1\n\"na\xc3\xafve \xf0\x9f\x98\x80\",2\n"
                         if name.endswith("csv") else LINES for name in files})
    with pytest.raises(InputError, match=rf"holds several splits; give one of them: .*{shown}"):
        make_corpus(tmp_path)
    assert decoded(read(tmp_path / files[0])) == TEXTS
    given = sorted({tmp_path / name.split("/")[0] for name in files} if "/0." in files[0] else
                   {tmp_path / name for name in files})
    made = make_corpus(*given)
    assert len(list(made.sequences())) == 2 * len(files)
    [note] = [note for note in made.notes if note.startswith("splits: ")]
    assert "taken as they were given" in note
    assert ("give" in note.split("trained on one")[1]) == any("rain" in str(one) for one in given)


def test_splits_of_texts_are_told_by_folders(tmp_path):
    lay_out(tmp_path, **{"train/pos/1.txt": b"yes", "test/pos/1.txt": b"no"})
    with pytest.raises(InputError, match=r"several splits; give one of them: \S*/test/pos/1\.txt"):
        make_corpus(tmp_path)
    lay_out(tmp_path, **{"b/wiki.train.tokens": b"yes", "b/wiki.test.tokens": b"no"})
    with pytest.raises(InputError, match=r"trained on train: give \S*/b/wiki\.train\.tokens\."):
        make_corpus(tmp_path / "b")


@pytest.mark.parametrize("names", [
    ["train.jsonl", "train_2.jsonl"], ["latest.jsonl", "trainer.jsonl"], ["a.jsonl", "test.jsonl"],
    ["contest/a.jsonl", "training/a.jsonl"], ["trained.jsonl", "tested.jsonl"],
    ["train1.jsonl", "train2.jsonl"], ["developer.jsonl", "training.jsonl"],
])
def test_names_that_say_nothing_of_splits(names, tmp_path):
    lay_out(tmp_path, **dict.fromkeys(names, LINES))
    assert len(read(tmp_path)) == 4


def test_an_index_among_the_data_is_left_out(tmp_path):
    lay_out(tmp_path, **{"a.jsonl": LINES, "x.index/segments/000000/records.lmdb": b"\0"})
    assert found_in(tmp_path) == (["a.jsonl"], {"an index": ["x.index"]})


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is no file \(a pipe\); data are read more tha"):
        make_corpus(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"null is no file \(a device\)"):
        make_corpus("/dev/null")
    with pytest.raises(InputError, match=r"- is standard input; .* Write it to a file"):
        make_corpus("-")
    with pytest.raises(InputError, match=r"can't be read: embedded null byte"):
        make_corpus("a\0b")
    with pytest.raises(InputError, match=r"can't be read: File name too long"):
        make_corpus("a" * 300)
    lay_out(tmp_path, **{"a.jsonl": LINES})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        assert found_in(tmp_path) == (["a.jsonl"], {"a pipe": ["pipe"], "a socket": ["s"]})


@pytest.mark.parametrize(("target", "reason"), [
    ("nowhere", "nowhere: No such file or directory"),
    ("link", "link: Too many levels of symbolic links"),
])
def test_links_that_lead_nowhere(target, reason, tmp_path):
    (tmp_path / "link").symlink_to(target)
    for path in (tmp_path / "link", tmp_path):
        with pytest.raises(InputError, match=rf"link is a link that leads nowhere \({reason}\)"):
            make_corpus(path)


@pytest.mark.parametrize("name", [b"caf\xe9.jsonl", b"d\xe9/a.jsonl"])
def test_names_that_arent_utf8(name, tmp_path):
    lay_out(tmp_path, **{os.fsdecode(name): LINES})
    for path in (tmp_path, tmp_path / os.fsdecode(name)):
        with pytest.raises(InputError, match=r"the name \S*\\xe9\S* is not UTF-8, .* Rename it"):
            make_corpus(path)
    (tmp_path / os.fsdecode(name.split(b"/")[0])).rename(tmp_path / "naïve name 😀")
    assert len(read(tmp_path)) == 2


# ---- in Python


@pytest.mark.parametrize("table", [
    pyarrow.Table.from_pylist(ROWS), pandas.DataFrame(ROWS),
    pandas.DataFrame(ROWS, index=["x", "y"]), pyarrow.RecordBatch.from_pylist(ROWS),
])
def test_tables_are_read(table):
    made = make_corpus(table, id_field="url")
    records = list(made.sequences())
    assert decoded(records) == TEXTS and [one.parts[0].user_id for one in records] == ["a", "b"]
    [fact] = made.data_facts()
    assert (fact["name"], fact["size"], len(fact["sha256"])) == ("the data given", 2, 64)
    assert make_corpus(table).data_facts() == [fact]


def test_an_iterable_dataset_is_read(tmp_path):
    assert decoded(read(as_dataset(tmp_path).to_iterable_dataset())) == TEXTS


@pytest.mark.parametrize(("item", "said"), [
    ({"text": ["a"], "n": [1]}, r"is a dict; .* \(found text, n\)"),
    (datasets.IterableDatasetDict({"train": None}), r"IterableDatasetDict; .* \(found train\)"),
    (iter(ROWS), "is a list_iterator; "),
    (pandas.DataFrame({"text": ["a", 5]}), "the DataFrame given can't be read as a table: "),
])
def test_objects_that_arent_records_are_refused(item, said):
    with pytest.raises(InputError, match=said):
        make_corpus(item)


def test_a_table_in_a_folder_of_lines(tmp_path):
    as_parquet(tmp_path)
    lay_out(tmp_path, **{"a.jsonl": OTHER})
    assert decoded(read(tmp_path)) == ["the test", *TEXTS]
