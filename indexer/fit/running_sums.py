"""Sums over blocks of sequences, added up in order on the disk.

A block's sums are taken in float32 (float64 for a float64 model); the running sum adds them in
order in float64, whoever took them, so it ends with the same bytes. It is committed after every
block, or where that takes long, as the A and S of a large model do, so seldom that it takes a
twentieth of the time. A block that is summed out of turn, by one of several processes, waits in a
file of its own until then.

    covariance-0-7.safetensors         the running sum of a partition: modules 0 to 7
    covariance-0-7.000012.safetensors  a block that waits for those before it
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gradindex.errors import DamagedIndexError
from gradindex.storage.tensors import read_metadata, read_tensors, write_tensors
from gradindex.transfers import in_turn

QUICK = 0.25  # seconds: a commit that takes no longer is made after every block
MOST_TIME = 0.05  # of the time: what commits may take


@dataclass
class BlockNotes:
    """What happened in a block otherwise than planned.

    `splits` are batches that were halved, as (first row, rows); `quarantined` says of the ids of
    sequences that are left out why.
    """

    splits: list[tuple[int, int]] = field(default_factory=list)
    quarantined: dict[int, str] = field(default_factory=dict)


@dataclass
class Block:
    """A block's sums by name, of `positions` real positions, and what happened."""

    sums: dict[str, Tensor]
    positions: int
    notes: BlockNotes


class Sums:
    """The sums of one stage and partition in `folder`: `count` blocks of tensors of `shapes`."""

    def __init__(
        self, folder: Path, name: str, shapes: dict[str, tuple[int, int]], count: int
    ):
        self.count = count
        self._folder, self._name, self._shapes = folder, name, shapes
        self._path = folder / f"{name}.safetensors"
        self._totals: dict[str, Tensor] | None = None
        self._blocks = self._positions = 0
        self._uncommitted: list[int] = []  # blocks that are in memory alone, or wait in files
        self._committed, self._took = time.monotonic(), 0.0  # when, and seconds

    def zeros(
        self, dtype: torch.dtype, devices: Mapping[str, torch.device] | None = None
    ) -> dict[str, Tensor]:
        """Tensors of zero to add to, by name, each on its device [the host]."""
        return {name: torch.zeros(shape, dtype=dtype, device=devices[name] if devices else "cpu")
                for name, shape in self._shapes.items()}

    def added(self) -> int:
        """How many blocks the running sum has."""
        if self._totals is not None:  # this process adds, and so knows
            return self._blocks
        if not self._path.is_file():
            return 0
        try:
            return int(read_metadata(self._path)["blocks"])
        except DamagedIndexError:
            if self._path.is_file():
                raise
            return self.count  # removed just now: what was made of it took its place

    def has(self, number: int) -> bool:
        """Whether a block is in the running sum, or waits for those before it."""
        # in this order: a block is added before its file goes, so it is seen in one place at least
        return self._waiting(number).is_file() or number < self.added()

    def keep(self, number: int, block: Block) -> None:
        """Write a block that comes out of turn, or that another process is to add."""
        about = {"positions": str(block.positions), "splits": json.dumps(block.notes.splits),
                 "quarantined": json.dumps(block.notes.quarantined)}
        write_tensors(self._waiting(number), block.sums, about)

    def waiting(self) -> Iterator[tuple[int, Block]]:
        """Yield waiting blocks in order, as long as the caller adds each of them."""
        while self._waiting(number := self.added()).is_file():
            yield number, self._read(number)

    def add(self, number: int, block: Block) -> None:
        """Add a block, whose turn it is, to the running sum, and commit that if it is time."""
        totals = self._load()
        assert number == self._blocks
        # (a + b) + c is not a + (b + c): the order decides the last bits
        for name, part in zip(block.sums, in_turn(list(block.sums.values())), strict=True):
            totals[name] += torch.from_numpy(part)
        self._blocks += 1
        self._positions += block.positions
        self._uncommitted.append(number)
        self.commit_if_due()

    def commit_if_due(self) -> None:
        """Commit what was added: all of it at the end, before only where that costs little time."""
        since = time.monotonic() - self._committed
        due = self._took < QUICK or since >= self._took / MOST_TIME
        if self._uncommitted and (due or self._blocks == self.count):
            self._commit()

    def _commit(self) -> None:
        start = time.monotonic()
        write_tensors(self._path, self._load(), {"blocks": str(self._blocks),
                                                 "positions": str(self._positions)})
        # last: killed before, the blocks are still there, and are in the running sum already
        while self._uncommitted:
            self._waiting(self._uncommitted.pop()).unlink(missing_ok=True)
        self._committed = time.monotonic()
        self._took = self._committed - start

    def totals(self) -> tuple[dict[str, Tensor], int]:
        """The sums of all blocks, float64, and the number of real positions."""
        totals = self._load()
        assert self._blocks == self.count  # who asks has waited until all are there
        return totals, self._positions

    def forget(self) -> None:
        """Free the memory of the running sum, which is on the disk."""
        self._totals = None

    def remove(self) -> None:
        """Remove the files, once something took their place."""
        self._totals = None
        # with the dot: the sums of modules 0 to 7 are not those of 0 to 70
        for path in self._folder.glob(f"{self._name}.*safetensors"):
            path.unlink(missing_ok=True)

    def _load(self) -> dict[str, Tensor]:
        """The running sum, kept in memory from the first time on."""
        if self._totals is None:
            if self._path.is_file():
                self._totals, about = read_tensors(self._path)
                self._blocks, self._positions = int(about["blocks"]), int(about["positions"])
            else:
                self._totals = self.zeros(torch.float64)
        return self._totals

    def _waiting(self, number: int) -> Path:
        return self._folder / f"{self._name}.{number:06d}.safetensors"

    def _read(self, number: int) -> Block:
        """A block that waits. Raises DamagedIndexError."""
        sums, about = read_tensors(self._waiting(number))
        notes = BlockNotes([(first, rows) for first, rows in json.loads(about["splits"])],
                           {int(sequence): why for sequence, why in
                            json.loads(about["quarantined"]).items()})
        return Block(sums, int(about["positions"]), notes)
