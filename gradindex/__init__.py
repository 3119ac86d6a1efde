"""gradindex: which training sequences made this model do that?

    import gradindex
    index = gradindex.build("EleutherAI/pythia-160m", "pile.jsonl", out="pile.index")
    result = index.search(prompt="Water is composed of", completion=" hydrogen and oxygen.")
    result.recall, result[0].influence, result[0].text

Names are imported on first use, so that `import gradindex` loads neither torch nor FAISS.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gradindex.version import VERSION

if TYPE_CHECKING:
    from gradindex.errors import (
        DamagedIndexError,
        GradindexError,
        IndexMismatchError,
        InputError,
        ResourceError,
    )
    from gradindex.facade import append, build, merge
    from gradindex.results import Group, Hit, Query, Recall, Result
    from indexer.dry_run.estimate import Estimate, estimate
    from indexer.upkeep.compact import compact
    from indexer.upkeep.delete import delete
    from indexer.upkeep.verify import verify
    from search.engine import Searcher
    from search.opening import open
    from search.show.html import render_html

__version__ = VERSION

# One table says where each public name lives; the imports above repeat it for type checkers alone,
# which can't follow `__getattr__`.
_HOMES = {name: home for home, names in {
    "gradindex.errors": ("DamagedIndexError", "GradindexError", "IndexMismatchError", "InputError",
                         "ResourceError"),
    "gradindex.results": ("Group", "Hit", "Query", "Recall", "Result"),
    "gradindex.facade": ("append", "build", "merge"),
    "indexer.dry_run.estimate": ("Estimate", "estimate"),
    "indexer.upkeep.compact": ("compact",),
    "indexer.upkeep.delete": ("delete",),
    "indexer.upkeep.verify": ("verify",),
    "search.engine": ("Searcher",),
    "search.opening": ("open",),
    "search.show.html": ("render_html",),
}.items() for name in names}

__all__ = [
    "DamagedIndexError", "Estimate", "GradindexError", "Group", "Hit", "IndexMismatchError",
    "InputError", "Query", "Recall", "ResourceError", "Result", "Searcher", "append", "build",
    "compact", "delete", "estimate", "merge", "open", "render_html", "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradindex' has no attribute {name!r}")
    home = _HOMES[name]
    # Only names that lead to `indexer` or `search` need them: `except gradindex.InputError` works
    # where another package hides one of the two.
    if home.split(".")[0] != "gradindex" or home == "gradindex.facade":
        _check_siblings()
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _check_siblings() -> None:
    """Raise GradindexError where another `indexer` or `search` hides the ones installed here."""
    from pathlib import Path

    from gradindex.errors import GradindexError

    # Both are common words: a user's own search.py in the working directory would be imported, and
    # fail in ways that name neither it nor us.
    for name in ("indexer", "search"):
        origin = importlib.import_module(name).__file__
        expected = Path(__file__).parent.parent / name / "__init__.py"
        if origin is None or Path(origin).resolve() != expected.resolve():
            raise GradindexError(
                f"`import {name}` finds {origin or 'a folder without __init__.py'}, which hides "
                f"gradindex's own {expected}. Rename it, or run from another folder."
            )
