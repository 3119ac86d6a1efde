"""The tree in docs/architecture.md, from what each file says of itself: `python docs/make_tree.py`.

A folder has the words of its `__init__.py`, a file those that its docstring begins with. Wings come
in reading order, files by name.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
OPENING, CLOSING = "<!-- tree: written by docs/make_tree.py -->", "<!-- end of tree -->"
PACKAGES = ("gradindex", "indexer", "search")
WINGS = ("storage", "model", "influence", "demo", "read", "fit", "parallel", "upkeep", "dry_run",
         "ask", "rank", "show", "serve", "study")
LEFT_OUT = {"__init__.py", "py.typed"}  # a folder's own words, and a mark for type checkers
FEWEST = 20  # letters that say enough
WORDS = 30  # the column that the words begin in
WIDTH = 106


def gist(path: Path) -> str:
    """What a Python file begins to say of itself, up to where it says enough."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(said.split("\n\n")[0].split())
    for end in re.finditer(r"[:;?](?= )|[.?]$|\.(?= [A-Z])", first):  # not that of "et al. 2023"
        if end.start() >= FEWEST:
            return first[: end.start()]
    return first


def branches(folder: Path, depth: int = 0) -> list[str]:
    """The lines of a folder: its own, then its files, then its folders."""
    own = folder / "__init__.py"
    lines = [_line(depth, f"{folder.name}/", gist(own) if own.is_file() else "")]
    entries = [one for one in sorted(folder.iterdir()) if one.name not in LEFT_OUT]
    python = [one for one in entries if one.suffix == ".py"]
    others = [one.name for one in entries if one.is_file() and one.suffix != ".py"]
    folders = [one for one in entries if one.is_dir() and one.name != "__pycache__"]
    lines += [_line(depth + 1, one.name, gist(one)) for one in python]
    row = ""
    for name in others:  # templates and the like, which say nothing of themselves
        if row and len(row) + len(name) > WIDTH - 2 * depth - 6:
            lines.append(_line(depth + 1, f"{row},", ""))
            row = ""
        row = f"{row}, {name}" if row else name
    lines += [_line(depth + 1, row, "")] if row else []
    order = {name: number for number, name in enumerate(WINGS)}
    for one in sorted(folders, key=lambda one: (order.get(one.name, len(order)), one.name)):
        lines += branches(one, depth + 1)
    return lines


def _line(depth: int, name: str, words: str) -> str:
    line = f"{'  ' * depth + name:<{WORDS}}{words}".rstrip()
    if len(line) <= WIDTH:
        return line
    cut = line[:WIDTH]
    breath, _, rest = cut.rpartition(",")
    return breath if rest and len(breath) > WORDS + FEWEST else f"{cut.rsplit(' ', 1)[0]} …"


def tree() -> str:
    """The block between the marks of the page."""
    lines = [line for package in PACKAGES for line in branches(ROOT / package)]
    return "\n".join([OPENING, "```text", *lines, "```", CLOSING])


def with_block(page: str, block: str) -> str:
    """A page with a block replaced, which lies between its own first and last line."""
    opening, closing = block.split("\n")[0], block.split("\n")[-1]
    before, found, rest = page.partition(opening)
    _, end, after = rest.partition(closing)
    if not found or not end:
        raise ValueError(f"the page has no block from {opening} to {closing}.")
    return before + block + after


if __name__ == "__main__":
    PAGE.write_text(with_block(PAGE.read_text(encoding="utf-8"), tree()), encoding="utf-8")
