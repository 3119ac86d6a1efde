"""kronfluence 1.0.1 on a classifier and a reward model, from a committed golden file.

`make_golden_tasks.py` made it. Labels are the data's own, damping 0.1 · mean Λ, float64.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import BertConfig, BertForSequenceClassification

from gradindex.influence.exact import exact_scores
from gradindex.influence.preconditioned import Preconditioned, precondition, query_coordinates
from gradindex.model.tracked import examine, tracked_modules
from gradindex.objective.batch import Text
from gradindex.progress import Progress
from gradindex.task import Task
from indexer.fit.notes import FitSettings
from indexer.fit.schedule import fit
from support.fits import records_of
from support.task_models import model_of

GOLDEN = Path(__file__).parent / "kronfluence_tasks.safetensors"


def rows_of(tensors, prefix, case):
    tokens, mask = (tensors[f"{prefix}{name}"].numpy() for name in ("tokens", "mask"))
    if case == "reward":
        return [Text(pair.reshape(-1).astype(np.int32), np.ones(pair.size, bool), pair.shape[1])
                for pair in tokens]
    return [Text(row[real.astype(bool)].astype(np.int32), np.ones(real.sum(), bool),
                 label=int(label))
            for row, real, label in zip(tokens, mask, tensors[f"{prefix}labels"], strict=True)]


@pytest.mark.parametrize("case", ["classifier", "reward"])
def test_scores_equal_kronfluence(case, tmp_path):
    with safe_open(GOLDEN, framework="pt") as file:
        config, names = (json.loads(file.metadata()[name]) for name in ("config", "modules"))
        tensors = {name.removeprefix(f"{case}/"): file.get_tensor(name)
                   for name in file.keys() if name.startswith(f"{case}/")}  # noqa: SIM118
    network = BertForSequenceClassification(BertConfig(
        **config, num_labels=3 if case == "classifier" else 1))
    network.load_state_dict({name.removeprefix("weights/"): tensor
                             for name, tensor in tensors.items() if name.startswith("weights/")})
    network = network.double().eval().requires_grad_(False)
    task = "classification" if case == "classifier" else "reward"
    model = model_of(network, task)
    modules = tracked_modules(network, "all", examine(network, Task(task)))
    assert [module.name for module in modules] == names
    rows = records_of(rows_of(tensors, "", case))
    settings = FitSettings(list(range(12)), "data", 5, 36, 0)
    ekfac, _ = fit(model, modules, lambda ids: [rows[n] for n in ids], settings, tmp_path,
                   Progress())
    for module in modules:
        mean = float(tensors[f"lambda_mean/{module.name}"])
        assert float(ekfac[module.name].eigenvalues.mean()) == pytest.approx(mean, rel=1e-9)
    coordinates, _ = query_coordinates(
        model, modules, ekfac, model.batch(rows_of(tensors, "query_", case)), 0.1)
    preconditioned = precondition(ekfac, coordinates)
    with torch.no_grad():
        found = exact_scores(model, modules, Preconditioned(dict(preconditioned)), rows, 36)
        close(found, tensors["pairwise"])
        for module in modules:
            own = Preconditioned({module.name: preconditioned[module.name]})
            close(exact_scores(model, [module], own, rows, 36),
                  tensors[f"per_module/{module.name}"])


def close(found, expected):
    expected = expected.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
