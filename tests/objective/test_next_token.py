"""What is scored of a sequence: counted tokens, targets, the half that is asked about."""

import numpy as np
import pytest
import torch

from gradindex.objective.batch import Text
from gradindex.objective.next_token import NextToken
from gradindex.results import UNSCORED
from gradindex.storage.records import Record
from search.rank.query_gradient import by_token

TOKENS = np.array([5, 6, 7, 8], np.int32)


@pytest.mark.parametrize("scored, counted, targets", [
    ([1, 1, 1, 1], [0, 1, 1, 1], [6, 7, 8, UNSCORED]),
    ([0, 0, 1, 1], [0, 0, 1, 1], [UNSCORED, 7, 8, UNSCORED]),
    ([1, 0, 0, 0], [0, 0, 0, 0], [UNSCORED] * 4),
])
def test_a_token_is_predicted_one_position_before_it(scored, counted, targets):
    mask = np.array(scored, bool)
    assert NextToken().counted(mask).astype(int).tolist() == counted
    assert NextToken().targets(TOKENS, mask).tolist() == targets
    assert mask.tolist() == [bool(one) for one in scored]  # which stays as it was


@pytest.mark.parametrize("scored, later", [
    ([1, 1, 1, 1], [0, 0, 1, 1]),  # three count: the later two
    ([1, 1, 1, 0], [0, 0, 1, 0]),
    ([1, 0, 0, 0], [0, 0, 0, 0]),
])
def test_a_sequence_is_asked_about_its_later_half(scored, later):
    record = Record(0, TOKENS, np.array(scored, bool), [])
    assert NextToken().as_query(record).scored.astype(int).tolist() == later


def test_a_batch_is_padded_on_the_right():
    texts = [Text(TOKENS, np.ones(4, bool)), Text(TOKENS[:2], np.ones(2, bool))]
    batch = NextToken().batch(texts, torch.device("cpu"))
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [5, 6, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8, UNSCORED], [6, *[UNSCORED] * 3]]
    assert batch.real.tolist() == [[True] * 4, [True, True, False, False]]


def test_numbers_that_draw_labels_are_those_of_each_text():
    texts = [Text(TOKENS, np.ones(4, bool)), Text(TOKENS[:2], np.ones(2, bool))]
    objective = NextToken()
    batch = objective.batch(texts, torch.device("cpu"))
    numbers = objective.label_numbers(batch, lambda row, count: np.full(count, row + 0.5))
    assert numbers.tolist() == [[0.5] * 4, [1.5, 1.5, 0.0, 0.0]]


def test_log_p_of_a_token_stands_one_position_before_it():
    assert by_token([-1.0, -2.0, 0.0], 3) == [0.0, -1.0, -2.0]
