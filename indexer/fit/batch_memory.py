"""What memory a batch of a fit takes, measured by running it.

All else that a fit holds follows from the shapes of its modules (`budget.py`).
"""

from collections.abc import Collection
from functools import partial

import torch

from gradindex.draws import Stream
from gradindex.influence.blockwise import covariance_shapes, identity
from gradindex.influence.split_batches import plan_batches
from gradindex.memory import available, forget_most, most, resident, return_freed
from gradindex.model.devices import free_on, on_host
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.storage.records import Record
from indexer.fit.batch_sums import add_covariances, add_eigenvalues, fit_batch, sum_devices
from indexer.fit.notes import FitSettings


def batch_bytes(
    model: LanguageModel, modules: list[Module], sample: list[Record], settings: FitSettings
) -> int:
    """The most that a batch of the fit's passes takes beyond what these hold, in bytes.

    Measured on the batches of the longest and of the most sequences of a sample, with all modules
    tracked; those of a shape share their sums. Raises ResourceError.
    """
    squares = covariance_shapes(modules, settings.covariance_blocks)
    devices = sum_devices(model, modules)
    kinds = {name: (shape, devices[name]) for name, shape in
             {**squares, **{module.name: module.shape for module in modules}}.items()}
    like = {device: torch.zeros((), dtype=model.accumulate, device=device)
            for device in model.devices}
    shared = {(shape, device): like[device].new_empty(shape).fill_(0)  # zeros() takes no memory yet
              for shape, device in set(kinds.values())}
    sums = {name: shared[kind] for name, kind in kinds.items()}
    identities = {(shape, device): identity(*shape, like[device])
                  for shape, device in {kinds[name] for name in squares}}
    vectors = {name: identities[kinds[name]] for name in squares}
    plan = plan_batches(model.lengths(sample), settings.batch_tokens)
    forget_peak(model.devices)
    base = used(model.devices)
    with torch.no_grad():
        for rows in (plan[0], max(plan, key=len)):
            batch = partial(fit_batch, model, [sample[row] for row in rows], settings.labels,
                            settings.seed)
            add_covariances(model, modules, sums, *batch(Stream.COVARIANCE_LABELS))
            add_eigenvalues(model, modules, vectors, sums, *batch(Stream.EIGENVALUE_LABELS))
    return max(0, peak(model.devices) - base)


def available_on(devices: Collection[torch.device]) -> int:
    """Bytes of memory to be had where a model is, this process's own among them."""
    if on_host(devices):
        return available()
    return sum(map(free_on, devices)) + used(devices)


def used(devices: Collection[torch.device]) -> int:
    """Bytes of memory that are in use now: the GPUs', or this process's on the host."""
    return resident() if on_host(devices) else sum(
        torch.cuda.memory_allocated(device) for device in devices)


def forget_peak(devices: Collection[torch.device]) -> None:
    """Measure the peak of memory anew from now on."""
    return_freed()
    if on_host(devices):
        forget_most()
        return
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)


def peak(devices: Collection[torch.device]) -> int:
    """The most bytes in use at once since `forget_peak`; of several GPUs, each at its own time."""
    return most() if on_host(devices) else sum(
        torch.cuda.max_memory_allocated(device) for device in devices)
