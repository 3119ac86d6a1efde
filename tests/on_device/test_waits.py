"""The host waits for the device a few times a batch, however many maps a model has."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from gradindex.draws import Stream
from gradindex.influence.blockwise import covariance_shapes
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.curvature import Curvature
from gradindex.influence.exact import Rescorer, rescore
from gradindex.influence.preconditioned import Preconditioned
from gradindex.influence.split_batches import Splits
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import examine, tracked_modules
from gradindex.objective.batch import Text
from gradindex.storage.records import Record
from gradindex.task import Task
from indexer.encode import encode_batches
from indexer.fit.batch_sums import add_covariances, add_eigenvalues, fit_batch
from search.study.class_means import add_classes
from support.models import MIXTURES, SIZES, random_network
from support.pretend.ledger import LEDGER
from support.task_models import network_of_texts

MOST = 6  # waits a batch
DEVICE = torch.device("cuda")


def batch_works(texts: list[Text], family: str, **sizes: Any) -> dict[str, Callable[[], object]]:
    """The work of each stage on one batch of a random language model's, by name."""
    return works_of(random_network(family, torch.float32, **sizes), texts)


def works_of(
    network: Any, texts: list[Text], task: str = "causal"
) -> dict[str, Callable[[], object]]:
    """The work of each stage on one batch of a network's, by name."""
    network = network.to(DEVICE).requires_grad_(False)
    model = LanguageModel(network, None, ModelSource(network, task=Task(task)))
    modules = tracked_modules(network, "all", examine(network, model.source.task))
    records = [Record(number, text.tokens, text.scored, [], text.border, text.label, text.offset)
               for number, text in enumerate(texts)]

    def eye(n: int) -> torch.Tensor:
        return torch.eye(n, device=DEVICE)

    ekfac = {m.name: Curvature(eye(m.shape[1]), eye(m.shape[0]), torch.ones(m.shape, device=DEVICE))
             for m in modules}
    codes = Codes(modules, ekfac, CodeSettings.of(1024, modules, 0, 0.1))
    squares = {name: torch.zeros(shape, device=DEVICE)
               for name, shape in covariance_shapes(modules, 1).items()}
    tables = {m.name: torch.zeros(m.shape, device=DEVICE) for m in modules}
    vectors = {name: eye(len(square)) for name, square in squares.items()}
    one, two = (Preconditioned({m.name: torch.ones(count, *m.shape, device=DEVICE)
                                for m in modules}) for count in (1, 2))
    by = Rescorer(model, modules, ekfac, 0.1, 4096)
    labels = partial(fit_batch, model, records, "model", 0)

    def rescored(queries: Preconditioned | None, **wanted: bool) -> None:
        list(rescore(by, queries, records, one_chunk=True, **wanted))

    def class_sums() -> None:
        sums = {m.name: torch.zeros(4, *m.shape, device=DEVICE) for m in modules}
        slots = np.arange(len(records)) % 2
        add_classes(by, sums, records, np.ones(len(records)), slots, lambda tokens: None)

    return {
        "class sums": class_sums,
        "covariance": lambda: add_covariances(
            model, modules, squares, *labels(Stream.COVARIANCE_LABELS)),
        "eigenvalues": lambda: add_eigenvalues(
            model, modules, vectors, tables, *labels(Stream.EIGENVALUE_LABELS)),
        "encode": lambda: list(encode_batches(model, codes, records, 4096, Splits())),
        "rescore": lambda: rescored(one),
        "rescore two": lambda: rescored(two),
        "rescore with terms and sizes": lambda: rescored(one, terms=True, sizes=True),
        "rescore by module": lambda: rescored(two, by_module=True, sizes=True),
        "sizes alone": lambda: rescored(None, sizes=True),
    }


def waits(work: Callable[[], object]) -> int:
    with torch.no_grad():
        work()
        LEDGER.forget()
        work()
    return sum(LEDGER.waits.values())


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_waits_do_not_grow_with_the_number_of_maps(sequences, family):
    few, many = (batch_works(sequences, family, num_hidden_layers=layers) for layers in (1, 3))
    for name, work in many.items():
        assert waits(work) <= MOST, (name, LEDGER.waits)
        assert waits(work) == waits(few[name]), (name, LEDGER.waits)


def test_a_mixture_waits_once_more_for_each_block_of_experts(sequences, monkeypatch):
    """Who goes where decides sizes; how many experts there are makes no difference."""
    monkeypatch.setitem(SIZES, "mixtral", MIXTURES["mixtral"])
    one, two, wide = (
        batch_works(sequences, "mixtral", num_hidden_layers=layers, num_local_experts=experts)
        for layers, experts in ((1, 3), (2, 3), (1, 6)))
    for name, work in one.items():
        least = waits(work)
        assert least <= MOST, (name, LEDGER.waits)
        assert waits(two[name]) == least + 1, (name, LEDGER.waits)
        assert waits(wide[name]) == least, (name, LEDGER.waits)


def test_nothing_of_size_is_reckoned_in_float64(sequences):
    """Consumer cards do that at a sixty-fourth of their speed; sums of scores are a few numbers."""
    texts = sequences * 4
    tokens = len(texts) * max(len(text.tokens) for text in texts)
    for name, work in batch_works(texts, "llama").items():
        waits(work)
        assert max(LEDGER.wide.values(), default=0) <= tokens, (name, LEDGER.wide)


def test_scores_their_log_p_and_sizes_are_waited_for_once(sequences):
    works = batch_works(sequences, "llama")
    for name in ("rescore", "rescore two", "rescore with terms and sizes", "rescore by module",
                 "sizes alone"):
        waits(works[name])
        assert [count for (at, _), count in LEDGER.waits.items()
                if "transfers.py" in at or "exact.py" in at] == [1], (name, LEDGER.waits)


@pytest.mark.parametrize("task, outputs", [
    ("classification", 2), ("classification", 3), ("reward", 1)])
def test_whole_texts_wait_no_more(sequences, task, outputs):
    """However many maps there are, and however many rows."""
    rows = [Text(text.tokens[:12], text.scored[:12], 5 if task == "reward" else None,
                 number % 2 if task == "classification" else None, 0.5 * (task == "reward"))
            for number, text in enumerate(sequences)]
    one, deep, wide = (
        works_of(network_of_texts("bert", outputs, torch.float32, num_hidden_layers=layers,
                                  vocab_size=1000), texts, task)
        for layers, texts in ((1, rows), (3, rows), (1, rows * 2)))
    for name, work in one.items():
        least = waits(work)
        assert least <= MOST, (name, LEDGER.waits)
        assert waits(deep[name]) == waits(wide[name]) == least, (name, LEDGER.waits)
