"""What happened on the pretend devices: waits, bytes copied, float64 numbers, memory.

Everything is counted by the line of the product that asked for it, so that a test can say which.
"""

import collections
import os
import sys
import threading
import weakref
from pathlib import Path

PRODUCT = tuple(f"{os.sep}{part}{os.sep}" for part in ("gradindex", "indexer", "search"))
DEVICES = 2
CAPACITY = 141 << 30  # bytes of each device, unless a test bounds it


class Ledger:
    """Counts since `forget`: by place for waits and operations, by (place, way) for bytes.

    `wide` is the most numbers in float64 that an operation had at once, by (place, operation).

    `capacity` bounds the memory of each device in bytes. `lost_after`: how many operations from now
    a device is lost; None, never.
    """

    def __init__(self) -> None:
        self.capacity = int(os.environ.get("PRETEND_CAPACITY", CAPACITY))
        self.lost_after: int | None = None
        if "PRETEND_LOST_AFTER" in os.environ:
            self.lost_after = int(os.environ["PRETEND_LOST_AFTER"])
        self.used = [0] * DEVICES
        self._lock = threading.RLock()  # backward passes run in threads of their own
        self._allocations: weakref.WeakValueDictionary[int, Allocation]
        self._allocations = weakref.WeakValueDictionary()
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.peak = list(self.used)
        self.operations: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.copied: collections.Counter[tuple[str, str]] = collections.Counter()
        self.wide: dict[tuple[str, str], int] = {}
        self.devices: set[int] = set()

    def allocate(
        self, storage: int, size: int, device: int, error: type[Exception]
    ) -> "Allocation":
        """The allocation of `size` bytes of a storage, known by its address, on a device.

        Raises `error` where the device's memory has run out.
        """
        with self._lock:
            found = self._allocations.get(storage)
            if found is None:
                if self.used[device] + size > self.capacity:
                    raise error(
                        f"CUDA out of memory. Tried to allocate {size} bytes. GPU {device} has a "
                        f"total capacity of {self.capacity} of which "
                        f"{self.capacity - self.used[device]} is free.")
                found = self._allocations[storage] = Allocation(self, size, device)
                self.used[device] += size
                self.peak[device] = max(self.peak[device], self.used[device])
        return found

    def free(self, size: int, device: int) -> None:
        """Note that an allocation is gone."""
        with self._lock:
            self.used[device] -= size


class Allocation:
    """Bytes of a device, taken as long as any tensor refers to this."""

    def __init__(self, ledger: Ledger, size: int, device: int):
        self._free = weakref.finalize(self, ledger.free, size, device)
        self._free.atexit = False


_short: dict[str, str] = {}  # how a file is called, "" for those that aren't the product's


def place() -> str:
    """The line of the product that is under way, as file:line."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name not in _short:
            ours = any(part in name for part in PRODUCT) and "site-packages" not in name and \
                f"{os.sep}tests{os.sep}" not in name
            _short[name] = "/".join(Path(name).parts[-2:]) if ours else ""
        if _short[name]:
            return f"{_short[name]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


LEDGER = Ledger()
