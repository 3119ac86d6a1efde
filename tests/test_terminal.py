"""Text that a terminal would obey is shown in every output, and none of it is lost in JSON."""

import csv
import errno
import html
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from gradindex import cli
from gradindex.errors import GradindexError, InputError
from gradindex.progress import Progress
from gradindex.results import Hit, Query, Recall, Result
from gradindex.terminal import json_text, shell_word, visible, visible_lines
from search import cli as search_cli
from search.ask import query_files
from search.ask.question import Question
from search.show.data_files import csv_table, json_lines
from search.show.html import render_html
from search.show.terminal_text import render_terminal
from search.study import describe
from support.commands import run_here

CATEGORIES = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}
OWN_COLORS = re.compile(r"\x1b\[(?:44;97;1|43;30;1|1;94|1;33|0)m")

HOSTILE = {  # name → text, and how it is shown in one line
    "clear the screen": ("a\x1b[2Jb", r"a\x1b[2Jb"),
    "OSC 8": ("\x1b]8;;http://x\x1b\\y\x1b]8;;\x1b\\", r"\x1b]8;;http://x\x1b\y\x1b]8;;\x1b" "\\"),
    "OSC 52": ("\x1b]52;c;eA==\x07", r"\x1b]52;c;eA==\x07"),
    "own colour": ("\x1b[44;97;1mx\x1b[0m", r"\x1b[44;97;1mx\x1b[0m"),
    "CSI of one byte": ("\x9b31m", r"\x9b31m"),
    "next line": ("a\x85b", r"a\x85b"),
    "delete": ("a\x7fb", r"a\x7fb"),
    "null": ("a\0b", r"a\x00b"),
    "carriage return": ("good\rbad", r"good\x0dbad"),
    "backspace": ("good\b\b\b\bbad", r"good\x08\x08\x08\x08bad"),
    "form feed and vertical tab": ("a\fb\vc", r"a\x0cb\x0bc"),
    "bidi override": ("a\u202eb", r"a\u202eb"),
    "bidi isolate": ("a\u2066b\u2069", r"a\u2066b\u2069"),
    "zero width": ("a\u200bb\u200dc", r"a\u200bb\u200dc"),
    "byte order mark": ("\ufeffa", r"\ufeffa"),
    "soft hyphen": ("a\xadb", r"a\xadb"),
    "line and paragraph separator": ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
    "lone surrogate": ("a\ud800b", r"a\ud800b"),
    "a byte that is not UTF-8": ("caf\udcff", r"caf\udcff"),
    "private use": ("a\ue000b\uf8ff", r"a\ue000b\uf8ff"),
    "private use beyond the BMP": ("a\U0010fffdb", r"a\U0010fffdb"),
    "tags": ("a\U000e0041\U000e007fb", r"a\U000e0041\U000e007fb"),
    "after a backslash": ("\\\x1b\\\u202e\\", "\\" r"\x1b" "\\" r"\u202e" "\\"),
    "newline and tab": ("a\n\tb", "a⏎→b"),
}
ALL = "|".join(text for text, _ in HOSTILE.values())
ALL_SHOWN = "|".join(shown for _, shown in HOSTILE.values())
ORDINARY = ("naïve café", "日本語、ไทย", "עברית عربي", "😀 👍🏽 ❤️",
            "∇log p = −1\xa0⟦x⟧", "e\u0301", "\\x1b", "")


def assert_inert(text, keep="\n", color=False):
    """Nothing in `text` that a terminal may obey, but the characters of `keep` and our colours."""
    text = OWN_COLORS.sub("", text) if color else text
    found = {letter for letter in text if unicodedata.category(letter) in CATEGORIES}
    assert found <= set(keep), sorted(map(ascii, found - set(keep)))


def test_the_hidden_are_those_of_unicode():
    """The ranges are written out; what a Unicode newer than this Python's adds is unassigned."""
    changed = {letter for letter in map(chr, range(sys.maxunicode + 1))
               if visible_lines(letter) != letter}
    hidden = {letter for letter in map(chr, range(sys.maxunicode + 1))
              if unicodedata.category(letter) in CATEGORIES}
    assert hidden - changed == {"\t", "\n"}
    assert {unicodedata.category(letter) for letter in changed - hidden} == {"Cn"}
    assert visible("\t\n") == "→⏎"


@pytest.mark.parametrize("text, shown", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_shown(text, shown):
    assert visible(text) == shown
    assert visible_lines(text) == shown.replace("⏎", "\n").replace("→", "\t")
    assert_inert(visible(text), keep="")
    assert_inert(visible_lines(text), keep="\n\t")
    assert visible(shown) == visible_lines(shown) == shown


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays_as_it_is(text):
    assert visible(text) == visible_lines(text) == text
    assert json_text(text) == json.dumps(text, ensure_ascii=False)


@pytest.mark.parametrize("text", [*(text for text, _ in HOSTILE.values()), ALL, *ORDINARY])
def test_json_is_inert_and_loses_nothing(text):
    value = {text: [text, {"x": [text] * 2}], "n": [1, 0.1, None, True]}
    for options in ({}, {"sort_keys": True}, {"separators": (",", ":")}):
        written = json_text(value, **options)
        assert json.loads(written) == value
        assert_inert(written, keep="")
    for indent in (1, "\t"):
        written = json_text(value, indent=indent)
        assert json.loads(written) == value
        assert_inert(written, keep="\n\t")
        assert written.count("\n") == json.dumps(value, indent=indent).count("\n")


def test_json_escapes():
    assert json_text("\x1b\n\t\x7f\x9b\u202e\ud800\U000f0000é😀") == \
        r'"\u001b\n\t\u007f\u009b\u202e\ud800\udb80\udc00é😀"'
    assert json.loads(json_text("\ud83d\ude00")) == "😀"  # as with any JSON
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            json_text([number])


# ---- a result


def hostile_query(weight=1.0, others=()):
    pieces = ["start ", *(text for text, _ in HOSTILE.values()), *ORDINARY]
    tokens = list(range(len(pieces)))
    return Query(tokens, [-100, *tokens[1:]], prompt=ALL, completion=ALL, id=ALL, weight=weight,
                 others=list(others), notes=[ALL], token_texts=pieces,
                 token_log_p=[-1.0] * len(pieces))


def hostile_hit(user_id):
    pieces = [*(text for text, _ in HOSTILE.values()), *ORDINARY, "<script>alert(1)</script>"]
    size = len(pieces)
    return Hit(
        id=3, influence=12.5, nats=0.5, exact=True, code_score=1.0, code_rank=1,
        text="".join(pieces), source=ALL, row=7, document=5, start=0, end=9, user_id=user_id,
        fields={ALL: ALL, "nested": [{ALL: ALL}]}, parts=[{"source": ALL, "fields": {ALL: ALL}}],
        tokens=pieces, token_ids=list(range(size)),
        token_influence=[(-1.0) ** place for place in range(size)], layer_influence=[1.0, -0.5],
        module_influence={ALL: 12.5}, token_layer_influence=[[0.5, 0.5]] * size)


@pytest.fixture
def result():
    return Result(
        query=hostile_query(others=[hostile_query(-1.0)]),
        hits=[hostile_hit(ALL), hostile_hit([ALL, {ALL: 1}]), hostile_hit("=\x1b[2J"),
              hostile_hit(None)],
        recall=Recall(k=4, estimate=0.5, cutoff=1.0, c=1.0, asked=0.9, shortlist_for_95=500),
        sequences=1000, shortlist=100, rescored=100, train_sequences=1000,
        train_sequences_given=False, layers=[0, 1],
        controls={"rescore": True, "opponents": False, "normalize": "none", "damping": 0.1,
                  "modules": [ALL], "shortlist": 100},
        seconds={"scan": 1.0}, warnings=[ALL], model=ALL, index="0123")


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("width", [24, 40, 60, 100, 160])
def test_the_terminal(result, color, width):
    shown = render_terminal(result, width=width, color=color)
    assert_inert(shown, color=color)
    plain = OWN_COLORS.sub("", shown) if color else shown
    assert width - 10 < max(map(len, plain.split("\n"))) <= width
    together = re.sub(r"\s", "", OWN_COLORS.sub("", shown) if color else shown)
    for _, one in HOSTILE.values():
        assert together.count(re.sub(r"\s", "", one)) > len(result), one
    for one in ("日本語", "😀", "é"):
        assert one in together
    if color:
        assert "\x1b[44;97;1m" in shown and "\x1b[43;30;1m" in shown


def test_a_row_that_is_text_is_shown_too(result):
    """A hostile record may hold anything where a number is expected."""
    result[0].row = result[0].id = "\x1b[2J"
    assert_inert(render_terminal(result, width=100))
    assert_inert(csv_table(result), keep="\n\t")
    assert_inert(render_html(result), keep="\n\t")


def test_json_of_a_result(result):
    written = result.to_json()
    assert_inert(written, keep="")
    assert json.loads(written) == result.to_dict()
    lines = json_lines(result.hits, result.units)
    assert_inert(lines)
    assert [json.loads(line) for line in lines.split("\n")[:-1]] == [
        {**hit, "units": result.units} for hit in result.to_list()]


def test_csv(result):
    table = csv_table(result)
    assert_inert(table, keep="\n\t")
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["source"] for row in rows] == [visible_lines(ALL)] * 4
    assert [row["text"] for row in rows] == [visible_lines(result[0].text)] * 4
    assert rows[0]["user_id"] == visible_lines(ALL) and rows[2]["user_id"] == r"'=\x1b[2J"


def test_html(result):
    page = result._repr_html_()
    assert_inert(page, keep="\n\t")
    assert "<script" not in page and "&lt;script&gt;" in page
    shown = 1 + 4 + 1 + 4 * 2  # warning, sources, an id, the name and value of a field
    assert page.count(html.escape(visible_lines(ALL))) == shown
    text = html.unescape(re.sub("<[^>]*>", "", page))
    assert text.count(visible_lines("".join(result[0].tokens))) == 4
    page.encode()


@pytest.mark.parametrize("form", ["auto", "json", "jsonl", "csv"])
def test_what_a_search_prints_and_writes(result, form, capsys, tmp_path):
    assert search_cli._finish(result, form, None) == 0
    printed, said = capsys.readouterr()
    search_cli._finish(result, form, tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == printed
    keep = "\n\t" if form == "csv" else "\n"
    assert_inert(printed, keep)
    assert_inert(said, keep="\n\t")
    assert (visible_lines(ALL) in said) == (form in ("jsonl", "csv"))


def test_a_file_of_results(result, tmp_path):
    """Its lines are inert, begin as they should, and are gone on with."""
    settings = SimpleNamespace(facts=lambda: result.controls)
    path = tmp_path / "results.jsonl"
    questions = {ALL: Question(ALL), "more": Question("x")}
    file = query_files.ResultsFile(path, "0123", settings, questions)
    file.write(result)
    file.close()
    content = path.read_bytes()
    assert content.startswith(query_files.OPENING) and content.count(b"\n") == 1
    assert_inert(content.decode())
    written = json.loads(content)
    written.pop("asked")
    assert written == result.to_dict()
    again = query_files.ResultsFile(path, "0123", settings, questions)
    again.close()
    assert again.done == {ALL} and path.read_bytes() == content


# ---- standard error


BAD = "\x1b[2J\x9b\r\u202e\udcff"  # no \0, which no argument holds


@pytest.mark.parametrize("arguments", [
    ("info", BAD), ("search", BAD, "-p", "a", "-c", "b"), (BAD,), ("info", f"--{BAD}"),
    ("info", "x", "--format", BAD), ("info", "x", BAD), ("search", "x", "-p", f"@{BAD}"),
    ("search", "x", "-k", BAD), ("search", "x", "-p", "a", "-o", f"{BAD}/x"),
    ("search", "x", "--messages", BAD), ("search", "x", "--queries", BAD),
    ("rescore", BAD, "-p", "a", "-c", "b", "--ids", "-"), ("eval", "x", "--queries", BAD),
    ("build", BAD, BAD, "-o", BAD),
])
def test_bad_arguments(arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = run_here(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert_inert(done.stderr)
    assert r"\x1b[2J\x9b" in done.stderr


@pytest.mark.parametrize("error, code", [
    (InputError, 2), (GradindexError, 1), (OSError, 1), (ImportError, 1),
    (click.ClickException, 1), (click.UsageError, 2), (click.BadParameter, 2),
])
def test_errors(error, code, monkeypatch):
    def fail(**_):
        raise error(f"first\n{ALL}")

    monkeypatch.setattr(cli, "main_group", fail)
    done = run_here()
    assert (done.returncode, done.stdout) == (code, "")
    assert_inert(done.stderr, keep="\n\t")
    assert done.stderr.endswith(f"first\n{visible_lines(ALL)}\n")


def test_a_traceback():
    code = ("import gradindex.cli as cli\ndef fail(**_): raise TypeError('a\\x1b[2J\\nb\\u202e')\n"
            "cli.main_group = fail; cli.main()")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert_inert(shown.stderr)
    assert shown.stderr.startswith("Traceback")
    assert shown.stderr.endswith("TypeError: a\\x1b[2J\nb\\u202e\n")


def test_progress():
    stream = io.StringIO()
    shown = Progress(stream)
    shown.say(ALL)
    shown.start(ALL, 2, ALL)
    shown.finish(ALL)
    assert_inert(stream.getvalue(), keep="\n\t")
    assert stream.getvalue().startswith(visible_lines(ALL) + "\n")
    assert stream.getvalue().count(visible_lines(ALL)) == 3


# ---- what an index is


def hostile_facts():
    return {
        "index": ALL, "format": ALL, "generation": 1, "digest": ALL,
        "model": {"name": ALL, "revision": ALL, "tensors": BAD},
        "also": {ALL: {"name": ALL, "revision": ALL, "tensors": BAD}},
        "dtype": ALL, "task": "preference", "labels": [ALL], "adapter": ALL,
        "beta": 0.1, "kinds": {ALL: 1}, "reference": {"name": ALL}, "derived": [ALL],
        "documents": 4, "sequences": 5,
        "sequence_length": ALL, "tokens": 6, "scored_tokens": 6, "skipped": {ALL: 3},
        "train_sequences": None, "next_id": 7,
        "duplicates": 1, "deleted": 2, "quarantined": {"7": ALL},
        "appended": [{"data": [{"name": ALL}], "sequences": 2, "drift": 1.0, "drift_error": 0.1}],
        "modules": [ALL], "layers": [0], "parameter_share": 0.5, "untracked": {ALL: 0.5},
        "fit": {"sequences": 4, "labels": ALL}, "effective_dimension": 3.0, "damping": ALL,
        "code": {"length": 64, "bytes": 16}, "calibration": {"c": ALL, "slope": ALL},
        "background": {"queries": 4, "sample": 5}, "segments": 1,
        "bytes": {"codes": 1, "curvature": 2, "background": 2, "words": 3, "text": 4},
        "data": [{"name": ALL}] * 2, "versions": {ALL: ALL},
    }


def test_summary():
    said = describe.summary(hostile_facts())
    assert_inert(said)
    for line in said.splitlines():  # a newline in a name begins no row
        assert re.match(r"[A-Za-z_ ]{11} \S", line)
    # adapter, classes, reference, derived, appended and other models too
    assert said.count(ALL_SHOWN) == 23


@pytest.mark.parametrize("form", ["auto", "json"])
def test_info(form, monkeypatch):
    monkeypatch.setattr(describe, "describe", lambda index: hostile_facts())
    done = run_here("info", "x", "--format", form)
    assert done.returncode == 0
    assert_inert(done.stdout)
    if form == "json":
        assert json.loads(done.stdout) == hostile_facts()


# ---- strange surroundings


def test_standard_output_that_is_full():
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-m", "gradindex", "--help"], stdout=full,
                               stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 4
    assert ended.stderr == (
        "gradindex: standard output could not be written (No space left on device). Free some "
        "space, or send it elsewhere, and run the same command again.\n")


def test_a_folder_that_was_removed(tmp_path):
    script = 'cd "$0" && rmdir "$0" && exec "$1" -m gradindex --help'
    folder = tmp_path / "gone"
    folder.mkdir()
    ended = subprocess.run(["bash", "-c", script, str(folder), sys.executable],
                           capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == ("gradindex: the folder that this command was started in was removed; "
                            "change to another one (`cd`).\n")


@pytest.mark.parametrize("error, code, said", [
    (OSError(errno.EMFILE, "Too many open files", "/x/y"), 4, "/x/y could not be used: this "
     "process has as many files open as it may"),
    (OSError(errno.EACCES, "Permission denied", "/x/y"), 4, "this user has no right to it"),
    (OSError(errno.ENOENT, "No such file or directory", "/x/y"), 1, "No such file or directory"),
    (OSError(errno.ECONNREFUSED, "Connection refused"), 1, "Connection refused"),
    (MemoryError(), 4, "out of memory; the bound is "),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4, "out of memory;"),
])
def test_what_the_system_refuses_has_an_exit_code(error, code, said, monkeypatch):
    def fail(**_):
        raise error

    monkeypatch.setattr(cli, "main_group", fail)
    done = run_here()
    told = done.stderr
    assert (done.returncode, done.stdout) == (code, "")
    assert told.startswith("gradindex: ") and said in told and told.count("\n") == 1


def test_a_path_is_one_word_of_a_shell(tmp_path):
    for name in (b"plain", b"a b", b"it's", b"\"$HOME\"", b"-x", b"a\nb\tc\\n", b"caf\xe9 'x'",
                 "索引\u202e".encode(), b"\x1b[2J", b"*", b"~", b"#a"):
        word = shell_word(os.fsdecode(name))
        assert word.isprintable()
        shown = subprocess.run(["bash", "-c", f"printf '%s' {word}"], capture_output=True)
        assert shown.stdout.removeprefix(b"./") == name, word
