"""The folder of a fit under way: what is there already, and where each part of it lies.

    fit.json                            what was done otherwise than planned (`notes.py`)
    covariance-0-7.safetensors, …       sums (`running_sums.py`)
    NAME.eigenvectors.safetensors       Q_A and Q_S of a module, float64
    NAME.safetensors                    its curvature, in place of all these
"""

from pathlib import Path

from torch import Tensor

from gradindex.influence.blockwise import covariance_shapes
from gradindex.modules import Module
from gradindex.storage.layout import module_file
from gradindex.storage.tensors import read_tensors
from indexer.fit.notes import FitNotes, FitSettings
from indexer.fit.quarantine import check_quarantine
from indexer.fit.running_sums import BlockNotes, Sums
from indexer.shards import BuildStage


class FitFolder:
    """What a fit of `modules` has written to the folder `path`. A module is known by its number.

    `blocks` are the ids of each block of sequences. `first`: whether this process alone writes
    fit.json; the others read it again where it matters.
    """

    def __init__(self, path: Path, modules: list[Module], settings: FitSettings, first: bool):
        self.path, self.modules, self.settings, self.first = path, modules, settings, first
        self.notes = FitNotes.read(path)
        ids, size = settings.ids, settings.block
        self.blocks = [ids[start : start + size] for start in range(0, len(ids), size)]

    def read_notes(self) -> None:
        """Read fit.json again: another process may have written it."""
        self.notes = FitNotes.read(self.path)

    def partition(self, number: int) -> list[Module]:
        """The modules that are fitted together."""
        return [self.modules[module] for module in self.notes.partitions[number]]

    def sums(self, stage: BuildStage) -> Sums:
        """The sums of a stage, "covariance" or "eigenvalues", of its partition."""
        numbers, modules = self.notes.partitions[stage.partition], self.partition(stage.partition)
        shapes = covariance_shapes(modules, self.settings.covariance_blocks) \
            if stage.name == "covariance" else {module.name: module.shape for module in modules}
        name = f"{stage.name}-{numbers[0]}-{numbers[-1]}"  # other partitions have other files
        return Sums(self.path, name, shapes, len(self.blocks))

    def vectors_path(self, module: Module) -> Path:
        """Where a module's eigenvectors lie until its curvature is there."""
        return self.path / f"{module.name}.eigenvectors.safetensors"

    def vectors(self, module: Module) -> dict[str, Tensor]:
        """Q_A and Q_S of a module, in blocks, by side, "A" and "S", float64."""
        return read_tensors(self.vectors_path(module))[0]

    def undecomposed(self, modules: list[Module]) -> list[int]:
        """The numbers of modules without eigenvectors that still need them."""
        if not self.unfitted(modules):  # the first shard removed them with the last curvature
            return []
        return [self.modules.index(module) for module in modules
                if not self.vectors_path(module).is_file()]

    def unfitted(self, modules: list[Module]) -> list[int]:
        """The numbers of modules without curvature; none once the folder has its final name."""
        missing = [module for module in modules
                   if not (self.path / module_file(module)).is_file()]
        # whoever fitted last may have found that a module has no gradient, or renamed the folder
        if missing and not self.first and self.path.is_dir():
            self.read_notes()
        return [self.modules.index(module) for module in missing
                if module.name not in self.notes.left_out and self.path.is_dir()]

    def note(self, stage: BuildStage, number: int, notes: BlockNotes) -> None:
        """Write down what happened in a block, before anything is made of it.

        Raises GradindexError where too many sequences are quarantined by now.
        """
        if notes.splits:
            self.notes.splits[f"{stage} {number}"] = notes.splits
        self.notes.quarantined.update(notes.quarantined)
        check_quarantine(self.notes.quarantined, len(self.settings.ids), self.settings.bad,
                         "of the fit")
        if self.notes.quarantined or self.notes.splits:  # most fits have nothing to note
            self.notes.write(self.path)
