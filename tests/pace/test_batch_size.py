"""How many tokens a batch gets: the usual, or what was measured, within memory."""

import numpy as np
import pytest
import torch

from gradindex.influence.split_batches import plan_batches
from gradindex.model.tracked import tracked_modules
from gradindex.progress import Progress
from gradindex.storage.records import Record
from indexer.pace import batch_size
from indexer.pace.batch_size import choose_batch_tokens, fewest_near_best, held_bytes_a_token


def records_of(lengths):
    return [Record(number, np.arange(1, length + 1, dtype=np.int32) % 30, np.ones(length, bool), [])
            for number, length in enumerate(lengths)]


@pytest.fixture
def model(make_model):
    return make_model("gpt_neox", dtype=torch.float32)


@pytest.mark.parametrize("throughputs, expected", [
    ([100, 100, 100, 0], 1), ([50, 96, 100, 100, 100], 2), ([10, 20, 40, 80, 160], 16),
    ([100, 90, 80, 500], 1),  # after two in vain no more is tried
    ([100, 90, 120, 110, 100], 4)])
def test_the_fewest_tokens_near_the_best(throughputs, expected):
    asked = iter([(1 << number, float(value)) for number, value in enumerate(throughputs)])
    assert fewest_near_best(asked) == expected


def test_a_small_model_gets_the_usual_batch_unmeasured(model, monkeypatch):
    monkeypatch.setattr(batch_size, "_throughputs", None)  # would be called to measure
    sample = records_of([20, 30, 9])
    assert choose_batch_tokens(model, tracked_modules(model.network), sample, None, Progress()) == \
        batch_size.USUAL


def test_a_large_one_gets_what_memory_allows(model, monkeypatch):
    """At two sizes that the bound leaves, both of which run."""
    monkeypatch.setattr(batch_size, "LITTLE", 0)
    modules, sample = tracked_modules(model.network), records_of([20, 30, 9] * 8)
    each = held_bytes_a_token(model, modules, batch_size._batch_of(
        model, sample, batch_size.SMALLEST))
    ran = []
    real = batch_size.seconds_of_pass
    monkeypatch.setattr(batch_size, "seconds_of_pass", lambda *asked: ran.append(
        len(asked[2]) * max(len(record.tokens) for record in asked[2])) or real(*asked))
    bound = int(600 * each / batch_size.MOST)
    found = choose_batch_tokens(model, modules, sample, bound, Progress())
    assert found in (256, 512) and 200 < min(ran) <= 256 < max(ran) <= 512
    # one sequence is the least
    long = records_of([300, 12])
    assert choose_batch_tokens(model, modules, long, 1, Progress()) == 300


def test_what_a_batch_holds_grows_as_its_tokens(model):
    """Counted, not watched: the same each time, and little else than the tokens decides it."""
    modules, sample = tracked_modules(model.network), records_of([16] * 64)
    found = [held_bytes_a_token(model, modules, sample[:rows]) for rows in (8, 8, 32)]
    assert found[0] == found[1] == pytest.approx(found[2], rel=0.1)
    config = model.network.config
    # at least the inputs of the tracked maps, and the logits
    least = 4 * (sum(module.d_in for module in modules) + config.vocab_size)
    assert least / 2 < found[0] < 40 * least


def test_a_batch_is_one_of_those_of_a_long_run(model):
    sample = records_of([5, 9, 7])
    batch = batch_size._batch_of(model, sample, 64)
    lengths = [len(record.tokens) for record in sample * 13]
    assert [len(record.tokens) for record in batch] in [
        [lengths[row] for row in rows] for rows in plan_batches(lengths, 64)]
