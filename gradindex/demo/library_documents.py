"""The text that every machine with Python has: its standard library, as documents.

Three kinds, none of which repeats another's text: docstrings; sources (a function, a method, a
small class, or a run of other statements), without their docstrings; and paragraphs of the
language reference, as `help()` shows it. Tests and bundles are left out, and so is what some
distributions package separately.
"""

import ast
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

LEFT_OUT = {
    "__phello__", "__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib",
    "lib2to3", "pydoc_data", "site-packages", "sitecustomize.py", "test", "tests", "tkinter",
    "turtle.py", "turtledemo",
}
GENERATED = ("config-", "_sysconfigdata")
LEGAL = re.compile(r"copyright|licen[cs]e|all rights reserved", re.IGNORECASE)
SHORTEST = 60  # characters; anything shorter says too little
LONG_CLASS = 1000  # characters, from which on the methods of a class are documents of their own

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Piece = tuple[str, str, str]  # name, text, kind


class Document(TypedDict):
    """`id` is file:name; `kind` is docstring, source or topic (of the language reference)."""

    id: str
    text: str
    module: str
    kind: str


def standard_library_documents(folder: Path | None = None) -> list[Document]:
    """All documents of the running Python's standard library (or of `folder`), in a fixed order."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    documents: dict[str, Document] = {}
    seen = set()
    for path in [root / "pydoc_data" / "topics.py", *_module_files(root)]:
        name = path.relative_to(root).as_posix()
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for part, text, kind in _pieces(path, module):
            words = " ".join(text.split())
            if len(words) < SHORTEST or words in seen or LEGAL.search(words):
                continue
            seen.add(words)
            identity, again = f"{name}:{part}", 1
            while identity in documents:  # a property's setter, a second paragraph
                again += 1
                identity = f"{name}:{part}#{again}"
            documents[identity] = Document(id=identity, text=text, module=module, kind=kind)
    return list(documents.values())


def _module_files(root: Path) -> list[Path]:
    return [
        path for path in sorted(root.rglob("*.py"))
        if not any(part in LEFT_OUT or part.startswith(GENERATED)
                   for part in path.relative_to(root).parts)
    ]


def _pieces(path: Path, module: str) -> Iterator[Piece]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError):  # a few files are no UTF-8, on purpose
        return
    if module == "pydoc_data.topics":
        yield from _topics(tree)
    else:
        yield from _docstrings(tree, "")
        yield from _sources(tree, "", source.splitlines())


def _topics(tree: ast.Module) -> Iterator[Piece]:
    """Paragraphs, each with the indented examples that follow it; long topics repeat short ones."""
    table = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    topics: dict[str, str] = ast.literal_eval(table)
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        for paragraph in re.split(r"\n{2,}(?! )", topics[name].strip()):
            yield name, paragraph, "topic"


def _docstrings(node: ast.Module | Definition, prefix: str) -> Iterator[Piece]:
    paragraphs = (ast.get_docstring(node) or "").split("\n\n")
    text = "\n\n".join(part for part in paragraphs if not LEGAL.search(part)).strip()
    yield f"{prefix}__doc__", text, "docstring"
    for child in node.body:
        if isinstance(child, Definition):
            yield from _docstrings(child, f"{prefix}{child.name}.")


def _sources(node: ast.Module | ast.ClassDef, prefix: str, lines: list[str]) -> Iterator[Piece]:
    """Every definition in `node`, and every run of other statements without a blank line."""
    run: list[str] = []
    end = 0
    for child in node.body[1:] if ast.get_docstring(node) else node.body:
        if isinstance(child, ast.Import | ast.ImportFrom):
            continue
        text = _code(child, lines)
        if isinstance(child, ast.ClassDef) and len(text) > LONG_CLASS:
            yield from _sources(child, f"{prefix}{child.name}.", lines)
        elif isinstance(child, Definition):
            yield f"{prefix}{child.name}", text, "source"
        else:
            if any(not line.strip() for line in lines[end:child.lineno - 1]):
                yield f"{prefix}<body>", "\n".join(run), "source"
                run = []
            run.append(text)
            end = child.end_lineno or child.lineno
    yield f"{prefix}<body>", "\n".join(run), "source"


def _code(node: ast.stmt, lines: list[str]) -> str:
    """The lines of a statement, without the docstrings in it."""
    decorators = node.decorator_list if isinstance(node, Definition) else []
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    docstrings: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, Definition) and ast.get_docstring(inner):
            text = inner.body[0]
            start = max(text.lineno, inner.lineno + 1)  # never the line of the `def`
            docstrings.update(range(start, (text.end_lineno or start) + 1))
    kept = [lines[number - 1] for number in range(first, (node.end_lineno or first) + 1)
            if number not in docstrings]
    return textwrap.dedent("\n".join(kept)).strip("\n")
