"""kronfluence's fit of EK-FAC factors, as its own documentation has it. Needs kronfluence 1.0.1."""

import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gradindex.modules import Module


class _Sequences(Dataset):  # type: ignore[type-arg]
    def __init__(self, tokens: Tensor):
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, place: int) -> Tensor:
        return self._tokens[place]


def fit_by_kronfluence(
    network: nn.Module, modules: list[Module], tokens: Tensor
) -> tuple[float, float, float]:
    """Seconds of its covariance, eigendecomposition and Λ steps, batches of 32 sequences."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Language(Task):
        def compute_train_loss(self, batch: Tensor, model: nn.Module, sample: bool = False
                               ) -> Tensor:
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            labels = batch[:, 1:].flatten()
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(torch.softmax(logits.detach(), -1), 1).flatten()
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Tensor, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return [module.name for module in modules]

        def get_attention_mask(self, batch: Any) -> None:
            return None

    task = Language()
    model = prepare_model(network.eval(), task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(analysis_name="peer", model=model, task=task, cpu=True,
                            output_dir=folder, disable_tqdm=True)
        settings = FactorArguments(strategy="ekfac")
        seconds = []
        given = {"factors_name": "f", "overwrite_output_dir": True}
        data = {"dataset": _Sequences(tokens), "per_device_batch_size": 32}
        for step in (
            lambda: analyzer.fit_covariance_matrices(**given, **data, factor_args=settings),
            lambda: analyzer.perform_eigendecomposition(**given, factor_args=settings),
            lambda: analyzer.fit_lambda_matrices(**given, **data, factor_args=settings),
        ):
            begun = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begun)
    return seconds[0], seconds[1], seconds[2]
