"""What one batch adds to the sums of a fit: A and S in the first pass, Λ in the second.

Labels are sampled from the model (the Fisher, not the empirical Fisher), independently in both
passes, by numbers keyed by (seed, stream, sequence id): nothing depends on batching.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gradindex.draws import Stream, uniforms
from gradindex.influence.blockwise import add_outer, pieces, rotator
from gradindex.influence.gradients import backward
from gradindex.influence.vocabulary import OutputGradients
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective.batch import Batch
from gradindex.storage.records import Record

# adds a batch, and the numbers that draw its labels, to sums by name
Add = Callable[[dict[str, Tensor], Batch, Tensor | None], None]


def sum_devices(model: LanguageModel, modules: list[Module]) -> dict[str, torch.device]:
    """Where the sums of modules are, beside their maps, by `name/A`, `name/S` and module name."""
    return {name: device for module in modules for device in [model.device_of(module)]
            for name in (f"{module.name}/A", f"{module.name}/S", module.name)}


def add_covariances(
    model: LanguageModel, modules: list[Module], sums: dict[str, Tensor], batch: Batch,
    numbers: Tensor | None,
) -> None:
    """Add a batch's Σ a aᵀ and Σ d dᵀ to the sums, in blocks, by `name/A` and `name/S`.

    The average that is taken of them runs over all real positions, also for an expert that saw a
    part of them: a factor of A and S changes neither their eigenvectors nor Λ.
    """
    def each(module: Module, a: Tensor, d: OutputGradients) -> None:
        assert isinstance(d, Tensor)
        add_products(sums[f"{module.name}/A"], sums[f"{module.name}/S"],
                     batch.real_inputs(module, a), d)

    # of those that are diagonal nothing is needed here
    if decomposed := [module for module in modules if not module.diagonal]:
        backward(model, decomposed, batch, each, numbers)


def add_products(sum_a: Tensor, sum_s: Tensor, inputs: Tensor, d: Tensor) -> None:
    """Add Σ a aᵀ over the inputs [n, i] of real tokens, and Σ d dᵀ over d [b, t, o].

    Only the upper triangle is summed, see `add_outer`. d has to be zero where nothing real is.

    >>> inputs, d = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0], [0.0]]])
    >>> sum_a, sum_s = torch.zeros(2, 2), torch.zeros(1, 1)
    >>> add_products(sum_a, sum_s, inputs, d)
    >>> sum_a.triu().tolist(), sum_s.tolist()
    ([[1.0, 2.0], [0.0, 4.0]], [[9.0]])
    """
    add_outer(sum_a, inputs.to(sum_a.dtype))
    add_outer(sum_s, d.flatten(0, 1).to(sum_s.dtype))


def add_eigenvalues(
    model: LanguageModel, modules: list[Module], vectors: dict[str, Tensor],
    sums: dict[str, Tensor], batch: Batch, numbers: Tensor | None,
) -> None:
    """Add a batch's Σ_m (Q_Sᵀ G_m Q_A)² [o, i] to the sums, by module name.

    `vectors` are Q_A and Q_S, in blocks, by `name/A` and `name/S`.
    """
    def each(module: Module, a: Tensor, d: OutputGradients) -> None:
        add_squares(sums[module.name], module, a, d, vectors[f"{module.name}/A"],
                    vectors[f"{module.name}/S"])

    backward(model, modules, batch, each, numbers)


def add_squares(
    total: Tensor, module: Module, a: Tensor, d: OutputGradients, q_a: Tensor, q_s: Tensor
) -> None:
    """Add Σ (Q_Sᵀ G Q_A)² [o, i] over the sequences of a [b, t, i] and d [b, t, o].

    The square is taken of each sequence's gradient G = Σ_t d_t a_tᵀ, after its tokens are added up.

    >>> module = Module("m", 0, "mlp", 1, 1, False)
    >>> a, d = torch.ones(2, 3, 1), torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [0.0], [0.0]]])
    >>> total, one = torch.zeros(1, 1), torch.ones(1, 1)
    >>> add_squares(total, module, a, d, one, one)  # (1 + 2 + 3)² + 4²
    >>> total.item()
    52.0
    """
    rotate = rotator(module, a, d, q_a, q_s)
    for rows, outputs in pieces(module, len(a)):  # the gradients of a whole batch may not fit
        total[outputs] += rotate(rows, outputs).square_().sum(0)


def fit_batch(
    model: LanguageModel, records: list[Record], labels: str, seed: int, stream: Stream
) -> tuple[Batch, Tensor | None]:
    """The batch of some sequences, and the numbers that draw their labels, from a stream.

    None for `labels` other than "model": the data's own are taken.
    """
    batch = model.batch(records)  # whose targets are the data's own labels
    if labels != "model":
        return batch, None
    return batch, model.objective.label_numbers(
        batch, lambda row, count: uniforms(stream, seed, records[row].id, count))
