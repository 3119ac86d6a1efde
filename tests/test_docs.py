"""The documents say what is: every block of code runs, the tree, flags, links and numbers hold."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

import gradindex
from docs import make_transcript, make_tree
from gradindex import results
from gradindex.cli import COMMANDS, main_group
from gradindex.storage import manifest
from support.shell import Shell

ROOT = Path(__file__).parent.parent
MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*MANUAL, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "RESULTS.md",
         *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
         *sorted((ROOT / "examples").glob("*.md"))]
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LONGEST_README = 150  # lines


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, why it isn't run, and the line it begins at."""

    language: str
    reason: str | None
    content: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match[1].partition(" ")
        reason = rest.removeprefix("no-run:").strip() if rest else None
        assert not rest or rest.startswith("no-run: "), f"{page.name}: {match[1]}"
        found.append(Block(language, reason, match[2], text[: match.start()].count("\n") + 1))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- what is shown runs


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    made = Shell(tmp_path_factory.mktemp("shell"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def desk(
    model_folder: Path, data_file: Path, more_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with everything that the pages name; each page gets a copy of its own."""
    folder = tmp_path_factory.mktemp("desk") / "desk"
    shutil.copytree(model_folder, folder / "my-model")
    for name, source in (("train", data_file), ("more", more_data)):
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        _write_lines(folder / f"{name}.jsonl", [{**row, "site": row["place"]} for row in rows])
    _write_lines(folder / "questions.jsonl", [
        {"prompt": "The apple number", "completion": " 8 grows", "id": "apple"},
        {"prompt": "The plum number 26 grows", "completion": " by the river."}])
    (folder / "prompt.txt").write_text("The apple number 8 grows by the hill. 2 +")
    (folder / "ids.txt").write_text("3\n4\n")
    gradindex.build(str(folder / "my-model"), folder / "train.jsonl", folder / "train.index",
                    id_field="url", keep_fields=["site"], segment_size=16)
    return folder


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("page", MANUAL, ids=by_name)
def test_every_block_runs_or_says_why_not(page, desk, shell, tmp_path, monkeypatch):
    folder = shutil.copytree(desk, tmp_path / "desk")
    found = blocks(page)
    if any("-o train.index" in block.content for block in found):  # the page makes its own
        shutil.rmtree(folder / "train.index")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}  # of a page's Python, which goes on from block to block
    for block in found:
        assert block.language in ("bash", "python", "text"), f"{page.name}:{block.line}"
        if block.reason is not None:
            assert len(block.reason) > 8, f"{page.name}:{block.line} doesn't say why it isn't run"
        elif block.language == "bash":
            shell.run(block.content, folder)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.content, str(page), "exec"), names)


def test_the_transcript_of_the_demo_is_what_a_search_prints():
    saved = results.Result.from_json(make_transcript.SAVED.read_text(encoding="utf-8"))
    page = make_transcript.README.read_text(encoding="utf-8")
    assert make_tree.with_block(page, make_transcript.transcript(saved)) == page, \
        "run `make transcript`"
    assert saved.hits[0].exact and not saved.seconds


# ---- what is said holds


def test_the_tree_is_that_of_the_files():
    page = make_tree.PAGE.read_text(encoding="utf-8")
    assert make_tree.with_block(page, make_tree.tree()) == page, "run `python docs/make_tree.py`"
    listed = subprocess.run(["git", "ls-files", *make_tree.PACKAGES], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.split()
    files = [name for name in listed if (ROOT / name).is_file()]
    assert sorted(_files_in(page)) == sorted(
        name for name in files if name.rpartition("/")[2] not in make_tree.LEFT_OUT)


def _files_in(page: str) -> Iterator[str]:
    """The files that the tree of a page shows, by their whole names."""
    block = page.partition(make_tree.OPENING)[2].partition(make_tree.CLOSING)[0]
    folders: list[str] = []
    for line in block.strip().split("\n")[1:-1]:
        name = line.strip().partition("  ")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            for one in name.rstrip(",").split(", "):
                yield "".join([*folders, one])


def test_files_that_are_named_exist():
    for page in MANUAL:
        for span in SPAN.findall(prose(page)):
            if re.fullmatch(r"(?:gradindex|indexer|search|tests|benchmarks|docs)/[\w./-]+", span):
                assert (ROOT / span).exists(), f"{page.name}: {span}"


def test_the_tree_has_few_words_a_file():
    for line in make_tree.tree().split("\n"):
        assert len(line) <= make_tree.WIDTH, line


def test_numbers_of_formats():
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    assert f"This is format {manifest.FORMAT}." in page
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert rows == list(range(manifest.FORMAT, manifest.OLDEST - 1, -1))
    assert f'`"schema": {results.SCHEMA}`' in page
    for other in MANUAL:
        assert not re.search(rf"is format (?!{manifest.FORMAT}\b)\d", other.read_text()), other


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_README
    said = [number for number, line in enumerate(lines) if "GPU" in line]
    assert said[0] < 12, "that no GPU was tried is said early"


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = page if not name else (page.parent / name).resolve()
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in _anchors(there), f"{page.name}: {target}"


def _anchors(page: Path) -> set[str]:
    """What a heading is called in an address, as GitHub makes it."""
    text = prose(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {*slugs, *re.findall(r'<a id="([^"]+)">', text)}


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_pages_hold_nothing_of_how_they_were_made(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"/(?:work|home|root|tmp|Users|usr|opt)/", text)
    assert not re.search(r"(?i)\b(?:issues?|pull requests?|todo|fixme)\b|(?<![\w&])#\d", text)


# ---- names

FLAG = re.compile(r"(?<![\w-])(--?[a-z][a-z0-9-]*)")


def flags() -> dict[str, set[str]]:
    """The flags of every command."""
    found = {}
    for name in COMMANDS:
        command = main_group.get_command(click.Context(main_group), name)
        assert command is not None
        options = [one for one in command.params if isinstance(one, click.Option)]
        found[name] = {flag for one in options for flag in (*one.opts, *one.secondary_opts)}
    return found


def commands_in(page: Path) -> Iterator[str]:
    """Every `gradindex …` of a page's blocks and spans, with the lines that go on."""
    text = "\n".join(block.content for block in blocks(page) if block.language != "python")
    for line in [*text.replace("\\\n", " ").split("\n"), *SPAN.findall(prose(page))]:
        for part in re.split(r"[|;&]", line.partition("   #")[0]):
            if match := re.search(r"\bgradindex (?=[a-z])(.*)", part):
                yield match[1].strip()


@pytest.mark.parametrize("page", MANUAL, ids=by_name)
def test_flags_that_are_named_exist(page):
    known = flags()
    everywhere = set().union(*known.values())
    for command in commands_in(page):
        name = command.split()[0]
        if name in known:
            for flag in FLAG.findall(re.sub(r"\"[^\"]*\"|'[^']*'", "", command)):
                assert flag in known[name], f"{page.name}: gradindex {command}"
    for span in SPAN.findall(prose(page)):
        if span.startswith("--"):
            assert span.split()[0] in everywhere, f"{page.name}: {span}"
        if match := re.match(rf"({'|'.join(known)}) .*?(--[a-z-]+)", span):
            assert match[2] in known[match[1]], f"{page.name}: {span}"


def test_every_flag_is_named_on_some_page():
    named = set(FLAG.findall("\n".join(page.read_text(encoding="utf-8") for page in MANUAL)))
    for name, own in flags().items():
        long = {flag for flag in own if flag.startswith("--")}
        missing = {flag for flag in long - named
                   if not any(other in named and flag in _same_option(name, other)
                              for other in own - {flag})}
        assert not missing, f"gradindex {name}: {missing}"


def _same_option(command: str, flag: str) -> set[str]:
    """All ways to write the option that a flag is of: -p is --prompt."""
    found = main_group.get_command(click.Context(main_group), command)
    assert found is not None
    return next({*one.opts} for one in found.params
                if isinstance(one, click.Option) and flag in (*one.opts, *one.secondary_opts))


def test_every_command_and_public_function_is_named():
    said = "\n".join(page.read_text(encoding="utf-8") for page in MANUAL)
    for name in COMMANDS:
        assert re.search(rf"gradindex {name}\b", said), name
    for name in gradindex.__all__:
        if name.islower() and name != "render_html":  # which a notebook calls
            assert re.search(rf"gradindex\.{name}\b|`{name}`", said), name
    for name in re.findall(r"\bgradindex\.([a-z_]+)\b", "\n".join(
            span for page in MANUAL for span in SPAN.findall(prose(page)))):
        assert hasattr(gradindex, name), name


# ---- results

UNMEASURED = {  # nothing by themselves
    "__init__", "workload", "truth", "peer", "same_index", "task_shortlists", "encoder",
    "detection", "policy"}
SCRIPTS = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - UNMEASURED
WORDS = ("r10@100", "r100@1000", "claimed", "TF-IDF", "LDS", "training step", "peak memory",
         "kronfluence", "Ray", "ns")


def test_every_benchmark_has_a_page_and_a_line():
    pages = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert pages - {"faults", "journeys"} == SCRIPTS  # those two are of the tests
    table = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    assert {name for name in re.findall(r"\(results/(\w+)\.md", table)} == pages
    for word in WORDS:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", table), word


def test_every_benchmark_finds_what_it_imports():
    imports = "\n".join(f"import benchmarks.{path.stem}"
                        for path in sorted((ROOT / "benchmarks").glob("*.py")))
    done = subprocess.run([sys.executable, "-c", imports], cwd=ROOT, text=True, check=False,
                          stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"],
                         ids=by_name)
def test_figures_are_those_of_the_pages_they_link_to(page):
    for line in page.read_text(encoding="utf-8").splitlines():
        links = re.findall(r"\(((?:benchmarks/)?results/\w+\.md)[^)]*\)", line)
        cells = line.split(" | ")
        if line.startswith("| ") and links and len(cells) > 2:
            there = _figures((page.parent / links[0]).read_text(encoding="utf-8"))
            rounded = {f"{float(number):.{digits}f}".lstrip("0")
                       for number in there for digits in (1, 2) if "." in number}
            missing = _figures(cells[1]) - there - rounded
            assert not missing, f"{missing} of {line[:80]} isn't in {links[0]}"


def _figures(text: str) -> set[str]:
    """The numbers of a text, but for those of versions: .5 for 0.5, 1000 for 1,000."""
    found = re.findall(r"(?<![\w.])\.?\d[\d,.]*", text)
    return {number.replace(",", "").lstrip("0").rstrip(".") or "0"
            for number in found if number.rstrip(".").count(".") < 2}
