"""What many tests begin with: a small model, its documents, and an index of both."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import gradindex
from gradindex.demo.small_model import train_tokenizer
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.objective.batch import Text
from gradindex.results import Result
from indexer import background_queries, calibrate
from search.engine import Searcher
from support.documents import FRUIT, PLACES, small_documents
from support.indexes import APPLES, SMALL
from support.models import SIZES, VOCABULARY, other_model, random_network
from support.needed import missing
from support.shapes import install

install()  # of the checks of shapes


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path) -> Any:
    """Collect tests here, and no examples: a look for these would import every script."""
    collectors = yield
    return [one for one in collectors if type(one).__name__ != "DoctestModule"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share out the tests among workers as support/workers.py says."""
    from support.workers import Scheduling

    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was skipped for want of what, and how to get it."""
    if lines := missing(terminalreporter.stats.get("skipped", [])):
        terminalreporter.section("skipped for want of")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(params=list(SIZES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_model() -> Callable[..., LanguageModel]:
    def make(family: str = "gpt_neox", **changes: Any) -> LanguageModel:
        network = random_network(family, **changes)
        return LanguageModel(network.requires_grad_(False), None, ModelSource(network))
    return make


@pytest.fixture
def sequences() -> list[Text]:
    """Plain text, masked prompts, different lengths."""
    random = np.random.default_rng(3)
    made = []
    for length, prompt in ((11, 0), (7, 3), (9, 0), (5, 2), (11, 6), (2, 0)):
        ids = random.integers(0, VOCABULARY, length).astype(np.int32)
        scored = np.arange(length) >= prompt
        made.append(Text(ids, scored))
    return made


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-NeoX with a tokenizer, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([document["text"] for document in small_documents()], 400)
    tokenizer.save_pretrained(folder)
    random_network("gpt_neox", torch.float32, vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    folder = tmp_path_factory.mktemp("other") / "base"
    network = AutoModelForCausalLM.from_pretrained(model_folder)
    other_model(network).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in small_documents()))
    return path


@pytest.fixture(scope="session")
def index_folder(
    model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An index of the forty documents; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("index") / "small.index"
    gradindex.build(str(model_folder), data_file, out, **SMALL)
    return out


@pytest.fixture(scope="module")
def index(index_folder: Path) -> Searcher:
    """That index, open; tests that change what is opened open it themselves."""
    return gradindex.open(index_folder)


@pytest.fixture(scope="module")
def result(index: Searcher) -> Result:
    """Exact hits of a question that shares words with several documents."""
    return index.search(**APPLES, k=12, shortlist="all")


@pytest.fixture(scope="session")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty further documents, to be appended."""
    path = tmp_path_factory.mktemp("more") / "more.jsonl"
    path.write_text("".join(json.dumps({
        "text": f"A late {FRUIT[n % 8]} ripens in the {PLACES[n % 5]}, number {n}.",
        "url": f"late/{n}", "place": PLACES[n % 5]}) + "\n" for n in range(20)))
    return path


@pytest.fixture
def few_queries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A build asks two queries each and computes in one thread, for time."""
    monkeypatch.setattr(calibrate, "CALIBRATION_QUERIES", 2)
    monkeypatch.setattr(background_queries, "BACKGROUND_QUERIES", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
