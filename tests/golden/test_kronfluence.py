"""The numbers of kronfluence 1.0.1, the reference implementation, from a committed golden file.

`tests/golden/make_golden.py` made it. Labels are the data's own, damping 0.1 · mean Λ, float64, no
padding; the "masked" cases don't score the first four positions.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import gradindex
from gradindex.influence.preconditioned import Preconditioned, precondition, query_coordinates
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import tracked_modules
from gradindex.objective.batch import Text
from gradindex.progress import Progress
from indexer.fit.notes import FitSettings
from indexer.fit.schedule import fit
from support.fits import records_of
from support.scores import score

GOLDEN = Path(__file__).parent / "kronfluence.safetensors"
# GPT-NeoX rounds its rotary angles to float32, and in eager attention its softmax too.
CASES = {"gpt2": 1e-9, "gpt2_masked": 1e-9, "neox": 1e-6, "neox_masked": 1e-6, "neox_eager": 1e-6}


class Golden:
    """One case of the golden file."""

    def __init__(self, case: str):
        with safe_open(GOLDEN, framework="pt") as file:
            self.about = json.loads(file.metadata()[case])
            self._tensors = {
                name.removeprefix(f"{case}/"): file.get_tensor(name)
                for name in file.keys() if name.startswith(f"{case}/")  # noqa: SIM118
            }

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name].numpy()

    def network(self) -> Any:
        config = AutoConfig.for_model(self.about["model_type"], **self.about["config"])
        network = AutoModelForCausalLM.from_config(
            config, attn_implementation=self.about["attn_implementation"]
        )
        network.load_state_dict({
            name.removeprefix("weights/"): tensor for name, tensor in self._tensors.items()
            if name.startswith("weights/")
        })
        return network.double().eval().requires_grad_(False)


def close(found: Any, expected: np.ndarray, tolerance: float) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_kronfluence(case, tmp_path):
    golden = Golden(case)
    network = golden.network()
    model = LanguageModel(network, None, ModelSource(network))
    modules = tracked_modules(network, "mlp,attention")
    assert [module.name for module in modules] == golden.about["modules"]
    sequences = [Text(row.astype(np.int32), labels != -100)
                 for row, labels in zip(golden["tokens"], golden["labels"], strict=True)]
    records = records_of(sequences)
    settings = FitSettings(list(range(12)), "data", 5, 36, 0)
    ekfac, _ = fit(model, modules, lambda ids: [records[n] for n in ids], settings, tmp_path,
                   Progress())
    for module in modules:
        mean = golden[f"lambda_mean/{module.name}"]
        assert float(ekfac[module.name].eigenvalues.mean()) == pytest.approx(float(mean), rel=1e-6)
    batch = model.batch(sequences)
    for row in range(3):
        query = Text(golden["query_tokens"][row].astype(np.int32),
                     golden["query_labels"][row] != -100)
        coordinates, _ = query_coordinates(model, modules, ekfac,
                                           model.batch([query]), 0.1)
        p = Preconditioned(precondition(ekfac, coordinates))
        terms = score(model, modules, p, batch).numpy()
        tolerance = CASES[case]
        close(terms.sum((1, 2)), golden["pairwise"][row], tolerance)
        close(terms.sum(2), golden["per_token"][row], tolerance)
        for place, module in enumerate(modules):
            close(terms[:, :, place].sum(1), golden[f"per_module/{module.name}"][row],
                  10 * tolerance)
            close(terms[:, :, place], golden[f"per_module_token/{module.name}"][row],
                  10 * tolerance)


def test_the_whole_product_gives_the_same_scores(tmp_path):
    """Build and search through the public functions, from a token file and a model object."""
    golden = Golden("gpt2")
    np.save(tmp_path / "tokens.npy", golden["tokens"])
    index = gradindex.build(
        golden.network(), tmp_path / "tokens.npy", tmp_path / "index", modules="mlp,attention",
        fit_labels="data", bits=1024, batch_tokens=36,
    )
    assert index.manifest.dtype == "float64"
    assert torch.float64 == index.snapshot.ekfac[golden.about["modules"][0]].eigenvalues.dtype
    for row in range(3):
        result = index.search(
            token_ids=golden["query_tokens"][row], labels=golden["query_labels"][row], k=12
        )
        by_id = sorted(result, key=lambda hit: hit.id)
        close([hit.influence for hit in by_id], golden["pairwise"][row], 1e-9)
        close([hit.token_influence for hit in by_id], golden["per_token"][row], 1e-9)
        for name in golden.about["modules"]:
            close([hit.module_influence[name] for hit in by_id],
                  golden[f"per_module/{name}"][row], 1e-9)
