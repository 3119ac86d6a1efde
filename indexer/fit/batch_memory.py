"""What memory a batch of a fit takes, measured by running it.

All else that a fit holds follows from the shapes of its modules (`budget.py`).
"""

from functools import partial

import torch

from gradindex.draws import Stream
from gradindex.influence.blockwise import covariance_shapes, identity
from gradindex.influence.split_batches import plan_batches
from gradindex.memory import available, forget_most, most, resident, return_freed
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.storage.records import Record
from indexer.fit.batch_sums import add_covariances, add_eigenvalues, fit_batch
from indexer.fit.notes import FitSettings


def batch_bytes(
    model: LanguageModel, modules: list[Module], sample: list[Record], settings: FitSettings
) -> int:
    """The most that a batch of the fit's passes takes beyond what these hold, in bytes.

    Measured on the batches of the longest and of the most sequences of a sample, with all modules
    tracked; those of a shape share their sums. Raises ResourceError.
    """
    like = torch.zeros((), dtype=model.accumulate, device=model.device)
    squares = covariance_shapes(modules, settings.covariance_blocks)
    shapes = squares | {module.name: module.shape for module in modules}
    shared = {shape: like.new_empty(shape).fill_(0)  # zeros() would take no memory yet
              for shape in set(shapes.values())}
    sums = {name: shared[shape] for name, shape in shapes.items()}
    identities = {shape: identity(*shape, like) for shape in set(squares.values())}
    vectors = {name: identities[shape] for name, shape in squares.items()}
    plan = plan_batches([len(record.tokens) for record in sample], settings.batch_tokens)
    forget_peak(model.device)
    base = used(model.device)
    with torch.no_grad():
        for rows in (plan[0], max(plan, key=len)):
            batch = partial(fit_batch, model, [sample[row] for row in rows], settings.labels,
                            settings.seed)
            add_covariances(model, modules, sums, *batch(Stream.COVARIANCE_LABELS))
            add_eigenvalues(model, modules, vectors, sums, *batch(Stream.EIGENVALUE_LABELS))
    return max(0, peak(model.device) - base)


def available_on(device: torch.device) -> int:
    """Bytes of memory to be had where the model is, this process's own among them."""
    if device.type != "cuda":
        return available()
    return int(torch.cuda.mem_get_info(device)[0]) + int(torch.cuda.memory_reserved(device))


def used(device: torch.device) -> int:
    """Bytes of memory that are in use now: the GPU's, or this process's on the host."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()


def forget_peak(device: torch.device) -> None:
    """Measure the peak of memory anew from now on."""
    return_freed()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_most()


def peak(device: torch.device) -> int:
    """The most bytes in use at once since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else most()
