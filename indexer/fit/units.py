"""The units of a fit that can be shared out: a block of sequences summed up, a module's Q.

Each is a function of the model and of what the folder holds, whoever does it and when.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gradindex.draws import Stream
from gradindex.errors import GradindexError
from gradindex.influence.blockwise import identity, square_blocks, square_entries
from gradindex.influence.gradients import why_not_finite
from gradindex.influence.split_batches import Splits, in_batches
from gradindex.memory import return_freed
from gradindex.model.network import LanguageModel
from gradindex.objective.batch import Batch
from gradindex.progress import Progress
from gradindex.storage.records import Record
from gradindex.storage.tensors import write_tensors
from gradindex.transfers import stacked_on_host
from indexer.fit.batch_sums import Add, add_covariances, add_eigenvalues, fit_batch, sum_devices
from indexer.fit.eigen import TOGETHER, eigenvectors_of_all
from indexer.fit.folder import FitFolder
from indexer.fit.running_sums import Block, BlockNotes, Sums
from indexer.shards import BuildStage

Read = Callable[[list[int]], list[Record]]  # the records of ids, in their order
LABEL_STREAMS = {"covariance": Stream.COVARIANCE_LABELS, "eigenvalues": Stream.EIGENVALUE_LABELS}


class FitUnits:
    """Does units of a fit in `folder`, one at a time."""

    def __init__(
        self, model: LanguageModel, read: Read, folder: FitFolder, progress: Progress
    ):
        self.model, self.read, self.folder = model, read, folder
        self.progress = progress
        self._at_hand: tuple[BuildStage, Sums, Add] | None = None  # of `do`

    def do(self, stage: BuildStage, unit: int) -> None:
        """Do one unit and leave its result in the folder, for the process that runs the stages.

        What units of a stage read alike is kept until one of another stage comes, or `forget`.
        """
        self.folder.read_notes()
        if self._at_hand is None or self._at_hand[0] != stage:
            self.forget()
            name = "covariance" if stage.name == "eigenvectors" else stage.name
            self._at_hand = (stage, self.folder.sums(BuildStage(name, stage.partition)),
                             self.adder(stage))
        _, sums, add = self._at_hand
        if stage.name == "eigenvectors":
            self.decompose([unit], sums)
        elif not sums.has(unit):  # else another did it, while this one was taken for dead
            sums.keep(unit, self.sum_block(stage, unit, sums, add))

    def forget(self) -> None:
        """Free the memory of what `do` keeps."""
        self._at_hand = None

    def adder(self, stage: BuildStage) -> Add:
        """What adds a batch to the sums of a stage."""
        modules = self.folder.partition(stage.partition)
        if stage.name == "covariance":
            return partial(add_covariances, self.model, modules)
        vectors: dict[str, Tensor] = {}  # of the whole partition, on the model's device

        def add(sums: dict[str, Tensor], batch: Batch, numbers: Tensor | None) -> None:
            if not vectors:  # read by who has something to sum up, all or none
                vectors.update({
                    f"{module.name}/{side}": tensor.to(
                        self.model.device_of(module), self.model.accumulate)
                    for module in modules for side, tensor in self.folder.vectors(module).items()})
            add_eigenvalues(self.model, modules, vectors, sums, batch, numbers)

        return add

    def decompose(self, numbers: list[int], covariance: Sums) -> None:
        """Find the eigenvectors of modules, by their numbers, and write them.

        Raises GradindexError where they can't be found, ResourceError.
        """
        totals, positions = covariance.totals()
        modules = [self.folder.modules[number] for number in numbers]
        names = [(f"{module.name}/{side}", self.model.device_of(module))
                 for module in modules for side in ("A", "S")]
        found = eigenvectors_of_all(
            ((name, block / positions, device) for name, device in names
             if totals[name].shape[1] > 1 for block in square_blocks(totals[name])),
            getattr(torch, self.folder.settings.eigen_dtype), self.progress.say)
        for module in modules:
            vectors = {}
            for side in ("A", "S"):
                total = totals[f"{module.name}/{side}"]
                n, m = total.shape
                vectors[side] = identity(n, m, like=total)
                # block by block, into the file's layout: blocks of rows, one below the other; the
                # eigenvector of a block of one row is there already
                for target in square_blocks(vectors[side]) if m > 1 else ():
                    target.copy_(next(found))
                self.progress.update(1)
            write_tensors(self.folder.vectors_path(module), vectors)
        return_freed()  # the solver's work space, before the next module asks for its own

    def decomposed_together(self, numbers: list[int]) -> Iterator[list[int]]:
        """Modules whose matrices a GPU decomposes at once; each alone on the host."""
        group: list[int] = []
        entries = 0
        for number in numbers:
            own = square_entries(self.folder.modules[number],
                                 self.folder.settings.covariance_blocks)
            if group and (self.model.device.type == "cpu" or entries + own > TOGETHER):
                yield group
                group, entries = [], 0
            group.append(number)
            entries += own
        if group:
            yield group

    # ---- a block

    def sum_block(self, stage: BuildStage, number: int, sums: Sums, add: Add) -> Block:
        """Sum up a block of sequences, again and again until its sums are sound.

        A batch adds to the sums as it goes, so where one fails half-way, or they are not finite,
        they are spoilt and the block is summed again, as its notes then say. The first shard writes
        those down at once.
        """
        notes = BlockNotes(self.folder.notes.splits.get(f"{stage} {number}", []))
        while True:
            left_out = {*self.folder.notes.quarantined, *notes.quarantined}
            records = self.read([sequence for sequence in self.folder.blocks[number]
                                 if sequence not in left_out])
            tensors = self._try_block(stage, number, records, sums, add, notes)
            if tensors is not None:
                return Block(tensors, sum(len(record.tokens) for record in records), notes)

    def _try_block(
        self, stage: BuildStage, number: int, records: list[Record], sums: Sums, add: Add,
        notes: BlockNotes,
    ) -> dict[str, Tensor] | None:
        """The sums of a block; None where it has to be summed again, as `notes` then say."""
        tensors = sums.zeros(self.model.accumulate, sum_devices(
            self.model, self.folder.partition(stage.partition)))
        stream, done = LABEL_STREAMS[stage.name], 0

        def keep(halved: list[tuple[int, int]]) -> None:
            notes.splits = halved
            if self.folder.first:
                self.folder.note(stage, number, notes)

        splits = Splits(notes.splits, keep)
        planned = len(splits.halved)

        def run(rows: list[int]) -> bool:
            """Add a batch, unless one before it was halved: what that left behind spoils all."""
            if len(splits.halved) > planned:
                return False
            add(tensors, *self._batch([records[row] for row in rows], stream))
            return True

        lengths = self.model.lengths(records)
        for rows, added in in_batches(lengths, self.folder.settings.batch_tokens, splits, run):
            if not added:
                self.progress.update(-done)
                return None
            done += len(rows)
            self.progress.update(len(rows))
        finite = stacked_on_host([torch.isfinite(part).all() for part in tensors.values()])
        names = [name for name, sound in zip(tensors, finite, strict=True) if not sound]
        if not names:
            return tensors
        # found in the sums, not sequence by sequence: to look at each would take another pass
        notes.quarantined.update(
            self._why_not_finite(records, stream, f"the {stage.name} of {names[0]}"))
        if self.folder.first:
            self.folder.note(stage, number, notes)
        self.progress.update(-done)
        return None

    def _batch(self, records: list[Record], stream: Stream) -> tuple[Batch, Tensor | None]:
        settings = self.folder.settings
        return fit_batch(self.model, records, settings.labels, settings.seed, stream)

    def _why_not_finite(self, records: list[Record], stream: Stream, what: str) -> dict[int, str]:
        """The sequences that make a sum not finite, and why. Raises GradindexError for none."""
        reasons = {
            record.id: reason for record in records if (reason := why_not_finite(
                self.model, self.folder.modules, *self._batch([record], stream)))
        }
        if not reasons:
            raise GradindexError(
                f"{what} is not finite within sequences {records[0].id} to {records[-1].id}, "
                "though each gradient is. Try --dtype float32."
            )
        return reasons
