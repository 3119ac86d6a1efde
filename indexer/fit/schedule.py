"""Fit the EK-FAC curvature: covariances, eigenvectors, corrected eigenvalues; who does what when.

Three steps over the same sequences (Grosse et al. 2023, §2.3 and App. A):
1. A and S: averages of a aᵀ and d dᵀ over all real positions, prompt and last position included.
2. Q_A and Q_S: their eigenvectors (`eigen.py`).
3. Λ: the average over sequences of (Q_Sᵀ G Q_A)², G the sum over the sequence's tokens.

Sums are taken within blocks of sequences and added up in order (`running_sums.py`), so a kill costs
what was summed since the last commit and the resumed fit ends with the same bytes. Where not all
modules' matrices fit in memory, partitions of the modules are fitted one after the other, each in
passes of its own. Several processes can share the blocks and the eigenvectors (`shards.py`). What
had to be done otherwise on the way (a batch halved because memory ran out, a sequence or a module
left out) is noted in fit.json, before it is tried.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gradindex.errors import GradindexError
from gradindex.influence import curvature
from gradindex.influence.curvature import Curvature, Ekfac
from gradindex.memory import Allowance, return_freed
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import examine, untracked
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.storage import layout
from gradindex.storage.files import facts_of, make_folder, rename_folder
from gradindex.storage.integrity import CheckedFiles
from indexer.fit.budget import gpu_width, held_bytes, partitions
from indexer.fit.folder import FitFolder
from indexer.fit.notes import FIT_NOTES, FitNotes, FitSettings, report_fit
from indexer.fit.running_sums import Block, Sums
from indexer.fit.units import FitUnits, Read
from indexer.shards import BuildStage, Shard, Share

BLOCK_SEQUENCES = 256  # summed up together; what a kill costs, where a commit is quick
AHEAD = 4  # blocks that a shard sums up before the first one added those before them


def fit(
    model: LanguageModel, modules: list[Module], read: Read, settings: FitSettings, index: Path,
    progress: Progress, share: Share | None = None, allowance: Allowance | None = None,
) -> tuple[Ekfac, FitNotes]:
    """Fit, or go on fitting, and write `index/curvature`; returns what is on disk there.

    Modules without a gradient are left out of it, and noted. A process that has but a `share` of
    the units waits for the others. `allowance` bounds the memory.
    Raises GradindexError where no module is left, too many sequences are not finite, eigenvectors
    can't be found, or other shards don't come; ResourceError.
    """
    folder = index / layout.CURVATURE
    share, allowance = share or Shard(), allowance or Allowance()
    if not folder.is_dir():
        unfinished = index / layout.CURVATURE_PARTIAL
        if share.first and not unfinished.is_dir():
            make_folder(unfinished)
        stage = BuildStage("fit")
        share.complete(stage, lambda: [] if unfinished.is_dir() or folder.is_dir() else [0])
        Fit(model, modules, read, settings, unfinished, progress, share).run(allowance)
        if share.first:
            rename_folder(unfinished, folder)  # from now on the curvature is there, whole
        share.complete(stage, lambda: [] if folder.is_dir() else [0])
    return read_fitted(model, modules, settings.covariance_blocks, index, progress, allowance)


def read_fitted(
    model: LanguageModel, modules: list[Module], covariance_blocks: int, index: Path,
    progress: Progress, allowance: Allowance,
) -> tuple[Ekfac, FitNotes]:
    """The curvature that was fitted, and what was done otherwise than planned; says so."""
    folder = index / layout.CURVATURE
    notes = FitNotes.read(folder)
    report_fit(notes, progress)
    fitted = [module for module in modules if module.name not in notes.left_out]
    files = CheckedFiles(folder, notes.files)
    ekfac = curvature.FiledEkfac(
        lambda module, device: files.tensors(layout.module_file(module), device), fitted,
        model.device_of,
        model.accumulate, covariance_blocks, allowance.curvature)
    return ekfac, notes


class Fit:
    """A fit in `folder`, one partition of modules after the other.

    What is there is not done again. The first shard alone writes fit.json and the running sums.
    """

    def __init__(
        self, model: LanguageModel, modules: list[Module], read: Read, settings: FitSettings,
        folder: Path, progress: Progress, share: Share,
    ):
        self.model, self.progress, self.share = model, progress, share
        self.folder = FitFolder(folder, modules, settings, share.first)
        self.units = FitUnits(model, read, self.folder, progress)

    def run(self, allowance: Allowance) -> None:
        """Fit everything; the folder then holds curvature and notes alone."""
        folder, share = self.folder, self.share
        if folder.notes.files:
            return

        # 1) which modules are fitted together
        self._settle_partitions(allowance)
        for number in range(len(folder.notes.partitions)):
            modules = folder.partition(number)
            if not folder.unfitted(modules):
                continue
            first_pass = BuildStage("covariance", number)
            second_pass = BuildStage("eigenvalues", number)
            covariance, eigenvalues = folder.sums(first_pass), folder.sums(second_pass)
            if folder.undecomposed(modules):

                # 2) A and S, a block of sequences at a time
                self._sum(first_pass, covariance, folder.undecomposed)

                # 3) Q_A and Q_S, a module at a time
                self._decompose(BuildStage("eigenvectors", number), covariance, modules)
                covariance.forget()

            # 4) Λ, a block at a time again
            self._sum(second_pass, eigenvalues, folder.unfitted)

            # 5) the curvature of these modules, in place of all that it was made of
            if share.first:
                self._save(eigenvalues, modules)
                for sums in (covariance, eigenvalues):
                    sums.remove()
                for module in modules:
                    folder.vectors_path(module).unlink(missing_ok=True)
            share.complete(BuildStage("curvature", number), partial(self._unsaved, modules))

        # 6) fit.json names the files, and no other is left
        if share.first:
            self._finish()

    def _settle_partitions(self, allowance: Allowance) -> None:
        """Take the partitions from fit.json; the first shard writes them.

        They stay as they are while each still fits. Else those of what is left are made anew.
        """
        folder = self.folder
        if not self.share.first:  # the others go by what the first one wrote
            self.share.complete(BuildStage("fit"), lambda: [0] if folder.path.is_dir() and
                                not FitNotes.read(folder.path).partitions else [])
            folder.read_notes()
            return
        blocks, planned = folder.settings.covariance_blocks, folder.notes.partitions
        width, held = self.model.accumulate.itemsize, allowance.fit
        gpu = gpu_width(self.model.device, folder.settings.eigen_dtype)
        # other partitions have other sums: what was summed up for these would be lost
        if planned and (held is None or all(
                len(numbers) == 1 or
                held_bytes([folder.modules[number] for number in numbers], blocks, width, gpu)
                <= held
                for numbers in planned)):
            return
        unfitted = [folder.modules[number] for number in folder.unfitted(folder.modules)]
        folder.notes.partitions = [
            [folder.modules.index(module) for module in together]
            for together in partitions(unfitted, blocks, width, allowance.planned, gpu)]
        if planned:
            self.progress.say(
                f"--max-memory is less than it was: what is left is fitted in "
                f"{len(folder.notes.partitions)} partitions, the one under way from its beginning; "
                "other shards have to be started again")
        folder.notes.write(folder.path)

    # ---- sums over blocks of sequences

    def _sum(
        self, stage: BuildStage, sums: Sums, undone: Callable[[list[Module]], list[int]]
    ) -> None:
        """Sum up this process's blocks, then wait until the running sum has all of them.

        The wait ends, too, when `undone` gives no module: what is made of the sums is there then.
        """
        folder, blocks = self.folder, self.folder.blocks
        if not self.share.first:
            folder.read_notes()
        modules, add = folder.partition(stage.partition), self.units.adder(stage)
        numbers = [number for number in range(len(blocks)) if self.share.takes(number)]
        pending = [number for number in numbers if not sums.has(number)]
        sequences = sum(len(blocks[number]) for number in numbers)
        if numbers:
            self.progress.start(str(stage), sequences, "sequences", done=sequences - sum(
                len(blocks[number]) for number in pending))
        for number in pending:
            self._keep_step(stage, number, sums, undone)
            block = self.units.sum_block(stage, number, sums, add)
            self._add_waiting(stage, sums)
            # the first shard's, whose turn it is, goes straight to the running sum
            if self.share.first and sums.added() == number:
                self._add(stage, number, block, sums)
            else:
                sums.keep(number, block)
        if numbers:
            self.progress.finish()

        def missing() -> list[int]:
            self._add_waiting(stage, sums)
            if sums.added() == len(blocks) or not undone(modules):
                return []
            # all may be there, and the first shard has yet to add them
            return [number for number in range(len(blocks)) if not sums.has(number)] or [0]

        self.share.complete(stage, missing)
        return_freed()  # what batches took is no use to what follows

    def _keep_step(
        self, stage: BuildStage, number: int, sums: Sums,
        undone: Callable[[list[Module]], list[int]],
    ) -> None:
        """Let the first shard catch up, so that no more than AHEAD blocks of each shard wait."""
        if not self.share.first:
            modules = self.folder.partition(stage.partition)
            self.share.complete(stage, lambda: [0] if undone(modules) and
                                number >= sums.added() + AHEAD * self.share.of else [])

    def _add_waiting(self, stage: BuildStage, sums: Sums) -> None:
        if self.share.first:
            for number, block in sums.waiting():
                self._add(stage, number, block, sums)
            sums.commit_if_due()  # others go on from what is committed

    def _add(self, stage: BuildStage, number: int, block: Block, sums: Sums) -> None:
        self.folder.note(stage, number, block.notes)
        sums.add(number, block)

    # ---- what is made of the sums

    def _decompose(self, stage: BuildStage, covariance: Sums, modules: list[Module]) -> None:
        """Find the eigenvectors of this process's modules, then wait for those of the others."""
        numbers = [number for number in self.folder.undecomposed(modules)
                   if self.share.takes(number)]
        if numbers:
            self.progress.start(str(stage), 2 * len(numbers), "matrices")
        for together in self.units.decomposed_together(numbers):
            self.units.decompose(together, covariance)
        if numbers:
            self.progress.finish()
        self.share.complete(stage, lambda: self.folder.undecomposed(modules))

    def _save(self, eigenvalues: Sums, modules: list[Module]) -> None:
        """Write the curvature of modules in its final precision; one without Λ is left out."""
        folder = self.folder
        totals, _ = eigenvalues.totals()
        stored = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        count = len(folder.settings.ids) - len(folder.notes.quarantined)
        for module in modules:
            total = totals[module.name]
            if not total.any():
                folder.notes.left_out[module.name] = (
                    f"it has no gradient on any of the {count} fit sequences, so no curvature")
                continue
            vectors = folder.vectors(module)
            folder.notes.saved[layout.module_file(module)] = curvature.save(
                folder.path, module, Curvature(
                    vectors["A"].to(stored), vectors["S"].to(stored), (total / count).to(stored)))
        folder.notes.write(folder.path)

    def _unsaved(self, modules: list[Module]) -> list[int]:
        """[0], the first shard's, as long as curvature of these modules is missing."""
        return [0] if self.folder.unfitted(modules) else []

    def _finish(self) -> None:
        """Note the files, and remove all others."""
        folder = self.folder
        fitted = [module for module in folder.modules if module.name not in folder.notes.left_out]
        if not fitted:
            raise GradindexError(
                f"no tracked module has a gradient on any of the {len(folder.settings.ids)} fit "
                "sequences. Is the model the one that was trained on this data? Choose others with "
                "--modules."
            )
        # known since they were written, but for those that a killed process wrote
        files = {name: folder.notes.saved.get(name) or facts_of(folder.path / name)
                 for name in map(layout.module_file, fitted)}
        for path in folder.path.iterdir():
            if path.name not in (*files, FIT_NOTES):
                path.unlink()
        folder.notes.files, folder.notes.saved, folder.notes.partitions = files, {}, []
        network, task = self.model.network, self.model.source.task
        rest = untracked(network, fitted, examine(network, task))
        folder.notes.untracked = {what: round(share, 6) for what, share in rest.items()}
        folder.notes.write(folder.path)
