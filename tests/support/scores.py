"""Every sequence's score on a question: by its code, and exactly."""

import numpy as np
import torch

from gradindex.influence.exact import Terms, collect, exact_scores
from gradindex.influence.preconditioned import Preconditioned, precondition, query_coordinates
from gradindex.objective.batch import Text
from search.ask.controls import Controls
from search.ask.settings import settle
from search.rank.query_gradient import form_gradients


def codes_of(index, question, **controls):
    """Every sequence's code score."""
    settings = settle(Controls(**controls), index.manifest)
    [target], _ = form_gradients(index.snapshot, [index.make_query(**question)], settings, 96)
    return index.snapshot.code_scores(target.vector[None])[0]


def exact(index, question, damping=0.1, modules=None, **parts):
    """Influence of every sequence by id, by the many-query routine."""
    modules = index.manifest.modules if modules is None else modules
    ekfac = index.snapshot.ekfac
    query = index.make_query(**question, **parts)
    total = 0.0
    stored = index.snapshot.records(list(range(len(index))))
    for text in query.texts:
        batch = index.model.batch(
            [Text(np.array(text.tokens, np.int32), np.array(text.labels) != -100)])
        c, _ = query_coordinates(index.model, modules, ekfac, batch, damping)
        p = Preconditioned(precondition(ekfac, c))
        total = total + text.weight * exact_scores(index.model, modules, p, stored, 96)[0]
    return total



def score(model, modules, preconditioned, batch):
    """The terms of each sequence's influence on one query: [b, t, u], summing to I over t, u."""
    collector = Terms(preconditioned, batch)
    collect(model, modules, batch, collector)
    return torch.from_numpy(collector.stacked(modules))
