"""Between the host and GPUs: nothing waits for a device but where its numbers are needed.

A GPU works on behind the host's back. A copy to it from memory that is pinned (which the system
leaves where it is) doesn't stop the host, and a copy from it need not either, if the host asks for
the numbers later. On a CPU all of this is nothing, and no number is copied.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

TILE = 1 << 28  # bytes that are on their way at once

T = TypeVar("T")


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device; the host doesn't wait.

    >>> to_device(np.array([1.0, 2.0]), torch.device("cpu"))
    tensor([1., 2.], dtype=torch.float64)
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    # the copy of a pinned tensor keeps it until it is done, also where nothing else does
    return tensor.pin_memory().to(device, non_blocking=True)


class Arriving:
    """Tensors on their way to the host, which goes on working until it asks for them.

    >>> Arriving([torch.ones(2)]).arrays()
    [array([1., 1.], dtype=float32)]
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._events = []
        for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    def arrays(self) -> list[np.ndarray]:
        """The numbers, once they are there: at most one wait for each device they come from."""
        while self._events:
            event = self._events.pop()
            if not event.query():  # what was sent later may have been waited for before
                event.synchronize()
        return [copy.numpy() for copy in self._copies]


def as_they_arrive(
    under_way: Iterable[tuple[T, Arriving]]
) -> Iterator[tuple[T, list[np.ndarray]]]:
    """Each item with its arrays: a device is at work on the next one's by then.

    >>> list(as_they_arrive([("one", Arriving([torch.ones(1)]))]))
    [('one', [array([1.], dtype=float32)])]
    """
    before: tuple[T, Arriving] | None = None
    for item, arriving in under_way:
        if before is not None:
            yield before[0], before[1].arrays()
        before = item, arriving
    if before is not None:
        yield before[0], before[1].arrays()


def stacked_on_host(parts: Sequence[Tensor]) -> np.ndarray:
    """Tensors of one shape [...], on any devices, as one array of the host, [n, ...].

    >>> stacked_on_host([torch.zeros(2), torch.ones(2)]).tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    # one copy for each device, and not one for each of hundreds of modules
    by_device: dict[torch.device, list[int]] = {}
    for number, part in enumerate(parts):
        by_device.setdefault(part.device, []).append(number)
    arrays = Arriving([torch.stack([parts[number] for number in own])
                       for own in by_device.values()]).arrays()
    found = np.empty((len(parts), *parts[0].shape), dtype=arrays[0].dtype)
    for own, array in zip(by_device.values(), arrays, strict=True):
        found[own] = array
    return found


def in_turn(tensors: Sequence[Tensor], tile: int = TILE) -> Iterator[np.ndarray]:
    """The tensors as arrays of the host, one after the other, while the next are on their way.

    At most two tiles of `tile` bytes are held, or two tensors that are larger.

    >>> [array.tolist() for array in in_turn([torch.zeros(2), torch.ones(1)])]
    [[0.0, 0.0], [1.0]]
    """
    before: Arriving | None = None
    for own in _tiles(tensors, tile):
        arriving = Arriving(own)
        if before is not None:
            yield from before.arrays()
        before = arriving
    if before is not None:
        yield from before.arrays()


def _tiles(tensors: Sequence[Tensor], tile: int) -> Iterator[list[Tensor]]:
    """Tensors that follow each other, together of at most `tile` bytes; a larger one is alone."""
    own: list[Tensor] = []
    for tensor in tensors:
        if own and sum(each.nbytes for each in own) + tensor.nbytes > tile:
            yield own
            own = []
        own.append(tensor)
    if own:
        yield own
