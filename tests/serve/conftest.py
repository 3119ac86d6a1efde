"""A server for the tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gradindex
from search.engine import Searcher
from support.server import Running


@pytest.fixture(scope="module")
def searcher(index_folder: Path) -> Searcher:
    return gradindex.open(index_folder)


@pytest.fixture(scope="module")
def running(searcher: Searcher) -> Iterator[Running]:
    """One for all tests that leave it as it was."""
    one = Running(searcher)
    yield one
    one.stop()


@pytest.fixture
def start(searcher: Searcher) -> Iterator[Callable[..., Running]]:
    """Starts further ones with other settings."""
    started: list[Running] = []

    def make(own: Searcher | None = None, **settings: Any) -> Running:
        started.append(Running(own or searcher, **settings))
        return started[-1]

    yield make
    for one in started:
        one.stop()
