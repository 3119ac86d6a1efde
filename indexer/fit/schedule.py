"""Fit the EK-FAC curvature: covariances, eigenvectors, corrected eigenvalues.

Three steps over the same sequences (Grosse et al. 2023, §2.3 and App. A):
1. A and S: averages of a aᵀ and d dᵀ over all real positions, prompt and last position included.
2. Q_A and Q_S: their eigenvectors, in float64.
3. Λ: the average over sequences of (Q_Sᵀ G Q_A)², G the sum over the sequence's tokens.
Labels are sampled from the model (the Fisher, not the empirical Fisher), independently in 1 and 3,
by numbers keyed by (seed, stream, sequence id): nothing depends on batching.

Sums are taken within blocks of sequences and added up in order (`sums.py`), so a kill costs one
block and the resumed fit ends with the same bytes. Where not all modules' matrices fit in memory,
partitions of the modules are fitted one after the other, each in passes of its own. Several
processes can share the blocks and the eigenvectors (`shards.py`). What had to be done otherwise
on the way (a batch halved because memory ran out, a sequence or a module left out) is noted in
fit.json, before it is tried.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pydantic
import scipy.linalg
import torch
from torch import Tensor

from gradindex.draws import Stream, uniforms
from gradindex.errors import DamagedIndexError, GradindexError
from gradindex.influence import curvature
from gradindex.influence.batches import Splits, in_batches
from gradindex.influence.blockwise import (
    add_outer,
    covariance_shapes,
    rotator,
    square_blocks,
    symmetric,
)
from gradindex.influence.curvature import Curvature, Ekfac
from gradindex.influence.gradients import backward, why_not_finite
from gradindex.influence.queries import slices
from gradindex.memory import Allowance, return_freed
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import untracked
from gradindex.modules import Module
from gradindex.objective import Batch
from gradindex.progress import Progress
from gradindex.storage import sealed_json
from gradindex.storage.files import FileFacts, atomic_write, facts_of, make_folder, rename_folder
from gradindex.storage.integrity import CheckedFiles
from gradindex.storage.records import Record
from gradindex.storage.tensors import read_tensors, write_tensors
from indexer.fit.budget import held_bytes, partitions
from indexer.fit.quarantine import SHARE, check_quarantine
from indexer.fit.sums import Block, BlockNotes, Sums
from indexer.shards import Shard, Share, Stage

LARGEST_BLOCK = 256  # sequences
NOTES = "fit.json"
AHEAD = 4  # blocks that a shard sums up before the first one added them
SOUND = 1e-8  # of eigenvectors in float64: residual and departure from orthogonality, relative

Read = Callable[[list[int]], list[Record]]
Add = Callable[[dict[str, Tensor], Batch, Tensor | None], None]  # a batch, to sums by name


@dataclass(frozen=True)
class FitSettings:
    """Which sequences (ids in order), whose labels ("model" or "data"), block and batch size.

    `covariance_blocks` are those of A and of S; `bad` is the share of sequences that may be left
    out, their gradient not being finite.
    """

    ids: list[int]
    labels: str
    block: int
    batch_tokens: int
    seed: int
    bad: float = SHARE
    covariance_blocks: int = 1


@dataclass
class FitNotes:
    """`fit.json`: what was done otherwise than planned, and the facts of the files of curvature.

    `partitions` are the numbers of modules that are fitted together, until all are. `splits` are
    batches that were halved, as (first row, rows), by "stage block"; `quarantined` says of ids why
    they were left out, `left_out` of modules. `untracked` are shares of the model's parameters that
    have no curvature, by what they are.
    """

    partitions: list[list[int]] = field(default_factory=list)
    splits: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    quarantined: dict[int, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileFacts] = field(default_factory=dict)
    untracked: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> FileFacts:
        content = {
            **asdict(self), "splits": dict(sorted(self.splits.items())),
            "quarantined": {str(one): why for one, why in sorted(self.quarantined.items())},
        }
        return atomic_write(folder / NOTES, sealed_json.sign(content))

    @classmethod
    def read(cls, folder: Path) -> "FitNotes":
        """The notes in a folder, empty where there are none. Raises DamagedIndexError."""
        path = folder / NOTES
        if not path.is_file():
            return cls()
        try:
            content = sealed_json.check(sealed_json.parse(path.read_bytes()))
            return pydantic.TypeAdapter(cls).validate_json(content)
        except ValueError:
            raise DamagedIndexError(
                f"{path} can't be read. Remove {folder} and run the build again; it fits again."
            ) from None


def fit(
    model: LanguageModel, modules: list[Module], read: Read, settings: FitSettings, index: Path,
    progress: Progress, after: int, share: Share | None = None, allowance: Allowance | None = None,
) -> tuple[Ekfac, FitNotes]:
    """Fit, or go on fitting, and write `index/curvature`; returns what is on disk there.

    Modules without a gradient are left out of it, and noted. `after` is the number of sequences to
    be encoded afterwards, for the expected time. A process that has but a `share` of the units
    waits for the others. `allowance` bounds the memory.
    Raises GradindexError where no module is left, too many sequences are not finite, eigenvectors
    can't be found, or other shards don't come; ResourceError.
    """
    folder = index / "curvature"
    share, may = share or Shard(), allowance or Allowance()
    if not folder.is_dir():
        unfinished = index / "curvature.partial"
        if share.first and not unfinished.is_dir():
            make_folder(unfinished)
        share.wait(Stage("fit"), lambda: [] if unfinished.is_dir() or folder.is_dir() else [0])
        Fit(model, modules, read, settings, unfinished, progress, after, share).run(may)
        if share.first:
            rename_folder(unfinished, folder)
        share.wait(Stage("fit"), lambda: [] if folder.is_dir() else [0])
    return fitted(model, modules, settings.covariance_blocks, index, progress, may)


def fitted(
    model: LanguageModel, modules: list[Module], covariance_blocks: int, index: Path,
    progress: Progress, allowance: Allowance,
) -> tuple[Ekfac, FitNotes]:
    """The curvature that was fitted, and what was done otherwise than planned; says so."""
    folder = index / "curvature"
    notes = FitNotes.read(folder)
    _report(notes, progress)
    kept = [module for module in modules if module.name not in notes.left_out]
    checked = CheckedFiles(folder, notes.files)

    def where(module: Module) -> Path:
        return checked.path(curvature.path_of(Path(), module).name)

    return curvature.FiledEkfac(
        where, kept, model.device, model.accumulate, covariance_blocks, allowance.curvature), notes


def _report(notes: FitNotes, progress: Progress) -> None:
    for name, reason in notes.left_out.items():
        progress.say(f"module {name} is left out: {reason}")
    for one, reason in notes.quarantined.items():
        progress.say(f"sequence {one} is left out of the fit: {reason}")
    if halved := sum(map(len, notes.splits.values())):
        progress.say(f"memory ran out on {halved} batches of the fit, which were halved; smaller "
                     "--batch-tokens avoid that")


LABELS = {"covariance": Stream.COVARIANCE_LABELS, "eigenvalues": Stream.EIGENVALUE_LABELS}


class Fit:
    """A fit in `folder`, one partition of modules after the other.

    What is there is not done again. The first shard alone writes fit.json and the running sums.
    """

    def __init__(
        self, model: LanguageModel, modules: list[Module], read: Read, settings: FitSettings,
        folder: Path, progress: Progress, after: int, share: Share,
    ):
        self.model, self.modules, self.read, self.settings = model, modules, read, settings
        self.folder, self.progress, self.after, self.share = folder, progress, after, share
        self.notes = FitNotes.read(folder)
        ids, size = settings.ids, settings.block
        self.blocks = [ids[start : start + size] for start in range(0, len(ids), size)]
        self._at_hand: tuple[Stage, Sums, Add] | None = None  # of `do`

    def run(self, allowance: Allowance) -> None:
        """Fit everything; the folder then holds curvature and notes alone."""
        if self.notes.files:
            return
        self._settle_partitions(allowance)
        for number in range(len(self.notes.partitions)):
            if self._unfitted(self._partition(number)):
                self._fit(number)
        if self.share.first:
            self._finish()

    def do(self, stage: Stage, unit: int) -> None:
        """Do one unit and leave it for the process that goes through the stages.

        What units of a stage read alike is kept until one of another stage comes, or `forget`.
        """
        self.notes = FitNotes.read(self.folder)
        if self._at_hand is None or self._at_hand[0] != stage:
            self.forget()
            name = "covariance" if stage.name == "eigenvectors" else stage.name
            self._at_hand = (stage, self._sums(Stage(name, stage.partition)),
                             self._adder(stage.name, self._partition(stage.partition)))
        _, sums, add = self._at_hand
        if stage.name == "eigenvectors":
            self._decompose_one(unit, sums)
        elif not sums.has(unit):
            sums.keep(unit, self._sum_block(stage, unit, sums, add))

    def forget(self) -> None:
        """Free the memory of what `do` keeps."""
        self._at_hand = None

    def _settle_partitions(self, allowance: Allowance) -> None:
        """Take the partitions from fit.json; the first shard writes them.

        They stay as they are while each still fits. Else those of what is left are made anew.
        """
        if not self.share.first:
            self.share.wait(Stage("fit"), lambda: [0] if self.folder.is_dir() and
                            not FitNotes.read(self.folder).partitions else [])
            self.notes = FitNotes.read(self.folder)
            return
        blocks, before = self.settings.covariance_blocks, self.notes.partitions
        width, held = self.model.accumulate.itemsize, allowance.fit
        if before and (held is None or all(
                len(some) == 1 or
                held_bytes([self.modules[one] for one in some], blocks, width) <= held
                for some in before)):
            return
        left = [self.modules[one] for one in self._unfitted(self.modules)]
        self.notes.partitions = [
            [self.modules.index(module) for module in some]
            for some in partitions(left, blocks, width, allowance.planned)]
        if before:
            self.progress.say(
                f"--max-memory is less than it was: what is left is fitted in "
                f"{len(self.notes.partitions)} partitions, the one under way from its beginning; "
                "other shards have to be started again")
        self.notes.write(self.folder)

    def _partition(self, number: int) -> list[Module]:
        return [self.modules[one] for one in self.notes.partitions[number]]

    def _sums(self, stage: Stage) -> Sums:
        numbers, modules = self.notes.partitions[stage.partition], self._partition(stage.partition)
        shapes = covariance_shapes(modules, self.settings.covariance_blocks) \
            if stage.name == "covariance" else {module.name: module.shape for module in modules}
        name = f"{stage.name}-{numbers[0]}-{numbers[-1]}"  # other partitions have other files
        return Sums(self.folder, name, shapes, len(self.blocks))

    def _fit(self, number: int) -> None:
        stages = [Stage("covariance", number), Stage("eigenvalues", number)]
        modules, (covariance, eigenvalues) = self._partition(number), map(self._sums, stages)
        if self._undecomposed(modules):
            self._sum(stages[0], covariance, self._undecomposed)
            self._decompose(Stage("eigenvectors", number), covariance, modules)
            covariance.forget()
        self._sum(stages[1], eigenvalues, self._unfitted)
        if self.share.first:
            self._save(eigenvalues, modules)
            for sums in (covariance, eigenvalues):
                sums.remove()
            for module in modules:
                self._vectors_path(module).unlink(missing_ok=True)
        self.share.wait(Stage("curvature", number), lambda: [0] * bool(self._unfitted(modules)))

    # ---- sums over blocks of sequences

    def _sum(self, stage: Stage, sums: Sums, undone: Callable[[list[Module]], list[int]]) -> None:
        """Sum up this shard's blocks, and wait until the running sum has all, or `undone` tells
        that what is made of it is there."""
        if not self.share.first:
            self.notes = FitNotes.read(self.folder)
        modules = self._partition(stage.partition)
        add = self._adder(stage.name, modules)
        own = [block for block in range(len(self.blocks)) if self.share.takes(block)]
        left = [block for block in own if not sums.has(block)]
        sequences = sum(len(self.blocks[block]) for block in own)
        if own:
            self.progress.start(str(stage), sequences, "sequences", done=sequences - sum(
                len(self.blocks[block]) for block in left))
        for block in left:
            self._keep_step(stage, block, sums, undone)
            found = self._sum_block(stage, block, sums, add)
            self._add_waiting(stage, sums)
            if self.share.first and sums.added() == block:
                self._add(stage, block, found, sums)
            else:
                sums.keep(block, found)
        if own:
            self.progress.finish()

        def missing() -> list[int]:
            self._add_waiting(stage, sums)
            if sums.added() == len(self.blocks) or not undone(modules):
                return []
            there = [block for block in range(len(self.blocks)) if not sums.has(block)]
            return there or [0]  # else the first has yet to add them

        self.share.wait(stage, missing)
        return_freed()  # what batches took is no use to what follows

    def _keep_step(
        self, stage: Stage, block: int, sums: Sums, undone: Callable[[list[Module]], list[int]]
    ) -> None:
        """Let the first shard catch up, so that no more than AHEAD blocks of each shard wait."""
        if not self.share.first:
            modules = self._partition(stage.partition)
            self.share.wait(stage, lambda: [0] if undone(modules) and
                            block >= sums.added() + AHEAD * self.share.of else [])

    def _add_waiting(self, stage: Stage, sums: Sums) -> None:
        if self.share.first:
            for block, found in sums.waiting():
                self._add(stage, block, found, sums)

    def _add(self, stage: Stage, block: int, found: Block, sums: Sums) -> None:
        if found.notes.splits:
            self.notes.splits[f"{stage} {block}"] = found.notes.splits
        self._note_quarantined(found.notes.quarantined)
        sums.add(block, found)

    def _note_quarantined(self, found: dict[int, str]) -> None:
        """Raises GradindexError where they are too many."""
        self.notes.quarantined.update(found)
        check_quarantine(self.notes.quarantined, len(self.settings.ids), self.settings.bad,
                         "of the fit")
        if self.notes.quarantined or self.notes.splits:
            self.notes.write(self.folder)

    def _sum_block(self, stage: Stage, block: int, sums: Sums, add: Add) -> Block:
        """A block's sums.

        A batch adds to the sums as it goes, so where one fails half-way, or they are not finite,
        the block is summed again, as its notes then say. The first shard writes those down at once.
        """
        key, ids = f"{stage} {block}", self.blocks[block]
        notes, found = BlockNotes(self.notes.splits.get(key, [])), None
        while found is None:
            kept = [one for one in ids
                    if one not in self.notes.quarantined and one not in notes.quarantined]
            records = self.read(kept)
            found = self._try_block(stage.name, key, records, sums, add, notes)
        return Block(found, sum(len(record.tokens) for record in records), notes)

    def _try_block(
        self, stage: str, key: str, records: list[Record], sums: Sums, add: Add, notes: BlockNotes,
    ) -> dict[str, Tensor] | None:
        found = sums.zeros(self.model.accumulate, self.model.device)
        done, stream = 0, LABELS[stage]

        def run(rows: list[int]) -> int:
            add(found, *self._batch([records[row] for row in rows], stream))
            return len(rows)

        def keep(made: list[tuple[int, int]]) -> None:
            notes.splits = made
            if self.share.first:
                self.notes.splits[key] = made
                self.notes.write(self.folder)
            raise _SumAgainError

        splits = Splits(notes.splits, keep)
        lengths = [len(record.tokens) for record in records]
        try:
            for _, count in in_batches(lengths, self.settings.batch_tokens, splits, run):
                done += count
                self.progress.update(count)
                if self.progress.measured and stage == "covariance":
                    left = 2 * len(self.settings.ids) + self.after
                    self.progress.say_expected(
                        self.progress.seconds_each() * left / self.share.of)
        except _SumAgainError:
            self.progress.update(-done)
            return None
        odd = [name for name, part in found.items() if not torch.isfinite(part).all()]
        if not odd:
            return found
        notes.quarantined.update(self._why_not_finite(records, stream, f"the {stage} of {odd[0]}"))
        if self.share.first:
            self._note_quarantined(notes.quarantined)
        self.progress.update(-done)
        return None

    def _batch(self, members: list[Record], stream: Stream) -> tuple[Batch, Tensor | None]:
        return fit_batch(self.model, members, self.settings.labels, self.settings.seed, stream)

    def _why_not_finite(self, records: list[Record], stream: Stream, what: str) -> dict[int, str]:
        """The sequences that make a sum not finite, and why. Raises GradindexError for none."""
        found = {
            record.id: reason for record in records
            if (reason := why_not_finite(self.model, self.modules, *self._batch([record], stream)))
        }
        if not found:
            raise GradindexError(
                f"{what} is not finite within sequences {records[0].id} to {records[-1].id}, "
                "though each gradient is. Try --dtype float32."
            )
        return found

    def _adder(self, stage: str, modules: list[Module]) -> Add:
        if stage == "covariance":
            return partial(add_covariances, self.model, modules)
        vectors: dict[str, Tensor] = {}

        def add(sums: dict[str, Tensor], batch: Batch, numbers: Tensor | None) -> None:
            if not vectors:  # read by who has something to sum up, all or none
                vectors.update({
                    f"{module.name}/{side}": tensor.to(self.model.device, self.model.accumulate)
                    for module in modules for side, tensor in self._vectors(module).items()})
            add_eigenvalues(self.model, modules, vectors, sums, batch, numbers)

        return add

    # ---- what is made of the sums

    def _vectors_path(self, module: Module) -> Path:
        return self.folder / f"{module.name}.eigenvectors.safetensors"

    def _vectors(self, module: Module) -> dict[str, Tensor]:
        """Q_A and Q_S of a module, in blocks, by side, "A" and "S", float64."""
        return read_tensors(self._vectors_path(module))[0]

    def _decompose(self, stage: Stage, covariance: Sums, modules: list[Module]) -> None:
        """The eigenvectors of this shard's modules; then wait for the others'."""
        own = [number for number in self._undecomposed(modules) if self.share.takes(number)]
        if own:
            self.progress.start(str(stage), 2 * len(own), "matrices")
        for number in own:
            self._decompose_one(number, covariance)
        if own:
            self.progress.finish()
        self.share.wait(stage, lambda: self._undecomposed(modules))

    def _decompose_one(self, number: int, covariance: Sums) -> None:
        sums, positions = covariance.totals()
        module, found = self.modules[number], {}
        for side in ("A", "S"):
            name = f"{module.name}/{side}"
            total = sums[name]
            found[side] = torch.zeros_like(total)
            for own, block in zip(square_blocks(found[side]), square_blocks(total),
                                  strict=True):
                own.copy_(eigenvectors(block / positions, name))
            self.progress.update(1)
        write_tensors(self._vectors_path(module), found)
        return_freed()

    def _undecomposed(self, modules: list[Module]) -> list[int]:
        """The numbers of modules whose eigenvectors aren't there, and are still needed."""
        if not self._unfitted(modules):
            return []
        return [self.modules.index(module) for module in modules
                if not self._vectors_path(module).is_file()]

    def _save(self, eigenvalues: Sums, modules: list[Module]) -> None:
        sums, _ = eigenvalues.totals()
        stored = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        count = len(self.settings.ids) - len(self.notes.quarantined)
        for module in modules:
            total = sums[module.name]
            if not total.any():
                self.notes.left_out[module.name] = (
                    f"it has no gradient on any of the {count} fit sequences, so no curvature")
                continue
            vectors = self._vectors(module)
            curvature.save(self.folder, module, Curvature(
                vectors["A"].to(stored), vectors["S"].to(stored), (total / count).to(stored)))
        if self.notes.left_out:
            self.notes.write(self.folder)

    def _unfitted(self, modules: list[Module]) -> list[int]:
        """The numbers of modules whose curvature isn't there; none once the folder has its name."""
        left = [module for module in modules
                if not curvature.path_of(self.folder, module).is_file()]
        if left and not self.share.first and self.folder.is_dir():
            self.notes = FitNotes.read(self.folder)
        return [self.modules.index(module) for module in left
                if module.name not in self.notes.left_out and self.folder.is_dir()]

    def _finish(self) -> None:
        """Note the files, and remove all others."""
        kept = [module for module in self.modules if module.name not in self.notes.left_out]
        if not kept:
            raise GradindexError(
                f"no tracked module has a gradient on any of the {len(self.settings.ids)} fit "
                "sequences. Is the model the one that was trained on this data? Choose others with "
                "--modules."
            )
        files = {(path := curvature.path_of(self.folder, module)).name: facts_of(path)
                 for module in kept}
        for path in self.folder.iterdir():
            if path.name not in (*files, NOTES):
                path.unlink()
        self.notes.files, self.notes.partitions = files, []
        self.notes.untracked = {what: round(share, 6) for what, share
                                in untracked(self.model.network, kept).items()}
        self.notes.write(self.folder)


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
    """Add a batch's Σ_m (Q_Sᵀ G_m Q_A)² [o, i] to the sums, by module name."""
    def each(module: Module, a: Tensor, d: Tensor) -> None:
        some = rotator(module, a, d, *(vectors[f"{module.name}/{side}"] for side in ("A", "S")))
        for rows in slices(module, len(a)):
            sums[module.name] += some(rows).square_().sum(0)

    backward(model, modules, batch, each, numbers)


def fit_batch(
    model: LanguageModel, members: list[Record], labels: str, seed: int, stream: Stream
) -> tuple[Batch, Tensor | None]:
    """The batch of some sequences, and the numbers that draw their labels, from a stream."""
    batch = model.batch(members)
    if labels != "model":
        return batch, None
    return batch, model.objective.label_numbers(
        batch, members, lambda row, count: uniforms(stream, seed, members[row].id, count))


class _SumAgainError(Exception):
    """A block has to be summed again, with a batch halved."""


def eigenvectors(covariance: Tensor, name: str) -> Tensor:
    """Eigenvectors (columns, ascending eigenvalues) of a symmetric float64 matrix.

    Its upper triangle is read, which is all that `add_outer` sums.
    The sign of each is fixed: its entry of largest magnitude is positive. Where the first method
    (divide and conquer) fails or gives something unsound, QR iteration is tried, then once more on
    the matrix with 1e-12 of its mean eigenvalue added. Raises GradindexError, naming the matrix.
    """
    matrix = symmetric(covariance)
    reasons = []
    for solve, jitter in ((_divide_and_conquer, 0.0), (_qr_iteration, 0.0),
                          (_qr_iteration, 1e-12)):
        matrix.diagonal().add_(jitter * matrix.diagonal().mean())
        try:
            values, vectors = solve(matrix)
        except (torch.linalg.LinAlgError, scipy.linalg.LinAlgError, ValueError) as error:
            reasons.append(" ".join(str(error).split()))
            continue
        if (wrong := _wrong(matrix, values, vectors)) is None:
            largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
            return vectors.mul_(torch.where(largest < 0, -1.0, 1.0))
        reasons.append(wrong)
    raise GradindexError(
        f"the covariance {name} has no eigendecomposition ({'; '.join(reasons)[:300]}). Leave the "
        "module out with --modules REGEX, or fit on more sequences with --fit-sequences."
    )


def _divide_and_conquer(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _qr_iteration(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = scipy.linalg.eigh(matrix.numpy(), driver="ev")
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _wrong(matrix: Tensor, values: Tensor, vectors: Tensor) -> str | None:
    """What is unsound about an eigendecomposition, or None."""
    residual = torch.linalg.norm((matrix @ vectors).addcmul_(vectors, values, value=-1))
    product = vectors.T @ vectors
    product.diagonal().sub_(1)
    turned = torch.linalg.norm(product)
    size = torch.linalg.norm(matrix)
    sound = residual <= SOUND * size and turned <= SOUND * len(matrix)
    return None if sound else f"residual {residual:.1e} of {size:.1e}, orthogonal to {turned:.1e}"
