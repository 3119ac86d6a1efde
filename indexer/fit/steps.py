"""What one batch adds to the sums of a fit: A and S in the first pass, Λ in the second.

Labels are sampled from the model (the Fisher, not the empirical Fisher), independently in both
passes, by numbers keyed by (seed, stream, sequence id): nothing depends on batching.
"""

from collections.abc import Callable

from torch import Tensor

from gradindex.draws import Stream, uniforms
from gradindex.influence.blockwise import add_outer, rotator
from gradindex.influence.gradients import backward
from gradindex.influence.queries import slices
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective import Batch
from gradindex.storage.records import Record

# adds a batch, and the numbers that draw its labels, to sums by name
Add = Callable[[dict[str, Tensor], Batch, Tensor | None], None]


def add_covariances(
    model: LanguageModel, modules: list[Module], sums: dict[str, Tensor], batch: Batch,
    numbers: Tensor | None,
) -> None:
    """Add a batch's Σ a aᵀ and Σ d dᵀ to the sums, in blocks, by `name/A` and `name/S`.

    The average that is taken of them runs over all real positions, also for an expert that saw a
    part of them: a factor of A and S changes neither their eigenvectors nor Λ.
    """
    def each(module: Module, a: Tensor, d: Tensor) -> None:
        wide = model.accumulate
        real = batch.real_inputs(module)
        rows = (a.flatten(0, 1) if real.all() else a[real]).to(wide)
        add_outer(sums[f"{module.name}/A"], rows, module.bias)
        rows = d.flatten(0, 1).to(wide)  # zero where nothing real is
        add_outer(sums[f"{module.name}/S"], rows)

    backward(model, modules, batch, each, numbers)


def add_eigenvalues(
    model: LanguageModel, modules: list[Module], vectors: dict[str, Tensor],
    sums: dict[str, Tensor], batch: Batch, numbers: Tensor | None,
) -> None:
    """Add a batch's Σ_m (Q_Sᵀ G_m Q_A)² [o, i] to the sums, by module name.

    `vectors` are Q_A and Q_S, in blocks, by `name/A` and `name/S`.
    """
    def each(module: Module, a: Tensor, d: Tensor) -> None:
        rotated = rotator(module, a, d,
                          *(vectors[f"{module.name}/{side}"] for side in ("A", "S")))
        for rows in slices(module, len(a)):  # the gradients of a whole batch may not fit
            sums[module.name] += rotated(rows).square_().sum(0)

    backward(model, modules, batch, each, numbers)


def fit_batch(
    model: LanguageModel, members: list[Record], labels: str, seed: int, stream: Stream
) -> tuple[Batch, Tensor | None]:
    """The batch of some sequences, and the numbers that draw their labels, from a stream.

    None for `labels` other than "model": the data's own are taken.
    """
    batch = model.batch(members)
    if labels != "model":
        return batch, None
    return batch, model.objective.label_numbers(
        batch, members, lambda row, count: uniforms(stream, seed, members[row].id, count))
