"""Fit the EK-FAC curvature: covariances, eigenvectors, corrected eigenvalues.

Three steps over the same sequences (Grosse et al. 2023, §2.3 and App. A):
1. A and S: averages of a aᵀ and d dᵀ over all real positions, prompt and last position included.
2. Q_A and Q_S: their eigenvectors, in float64.
3. Λ: the average over sequences of (Q_Sᵀ G Q_A)², G the sum over the sequence's tokens.
Labels are sampled from the model (the Fisher, not the empirical Fisher), independently in 1 and 3,
by numbers keyed by (seed, step, sequence id): nothing depends on batching.

Sums are taken in float32 (float64 for a float64 model) within a block of sequences and added in
order in float64. The running sum is committed after every block, so a kill costs one block and
the resumed fit ends with the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradindex import curvature
from gradindex.curvature import Curvature, Ekfac, read_tensors, write_tensors
from gradindex.errors import GradindexError
from gradindex.files import rename_folder
from gradindex.gradients import Batch, apply_inputs, backward, make_batch, plan_batches
from gradindex.model import LanguageModel
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.records import Record

LARGEST_BLOCK = 256  # sequences

Read = Callable[[list[int]], list[Record]]


@dataclass(frozen=True)
class FitSettings:
    """Which sequences (ids in order), whose labels ("model" or "data"), block and batch size."""

    ids: list[int]
    labels: str
    block: int
    batch_tokens: int
    seed: int


def choose_sequences(count: int, wanted: int, seed: int) -> list[int]:
    """Ids of `wanted` of `count` sequences, drawn without replacement, ascending."""
    if wanted >= count:
        return list(range(count))
    raw = np.random.Philox(key=np.array([seed, 1], dtype=np.uint64)).random_raw(count)
    return sorted(int(index) for index in raw.argsort(kind="stable")[:wanted])


def uniforms(seed: int, step: int, sequence: int, count: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [count], keyed by (seed, step, sequence id)."""
    raw = np.random.Philox(
        key=np.array([seed, step], dtype=np.uint64),
        counter=np.array([0, 0, sequence, 0], dtype=np.uint64),
    ).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def fit(
    model: LanguageModel, modules: list[Module], read: Read, settings: FitSettings, index: Path,
    progress: Progress, after: int,
) -> Ekfac:
    """Fit, or go on fitting, and write `index/curvature`; returns what is on disk there.

    `after` is the number of sequences to be encoded afterwards, for the expected time.
    Raises GradindexError for a module without gradients or whose eigenvectors can't be found.
    """
    folder = index / "curvature"
    if not folder.is_dir():
        partial = index / "curvature.partial"
        partial.mkdir(exist_ok=True)
        if not all(curvature.path_of(partial, module).is_file() for module in modules):
            fitting = _Fit(model, modules, read, settings, partial, progress, after)
            vectors = fitting.eigenvectors()
            eigenvalues = fitting.eigenvalues(vectors)
            stored = torch.float64 if model.dtype == torch.float64 else torch.float32
            for module in modules:
                q_a, q_s = vectors[f"{module.name}/A"], vectors[f"{module.name}/S"]
                curvature.save(partial, module, Curvature(
                    q_a.to(stored), q_s.to(stored), eigenvalues[module.name].to(stored)
                ))
        for name in ("covariance", "eigenvectors", "eigenvalues"):
            (partial / f"{name}.safetensors").unlink(missing_ok=True)
        rename_folder(partial, folder)
    return curvature.load(folder, modules, model.device, model.accumulate)


@dataclass
class _Fit:
    model: LanguageModel
    modules: list[Module]
    read: Read
    settings: FitSettings
    folder: Path
    progress: Progress
    after: int

    def eigenvectors(self) -> dict[str, Tensor]:
        """Q_A and Q_S of every module, float64 or as stored, by `name/A` and `name/S`."""
        path = self.folder / "eigenvectors.safetensors"
        if not path.is_file():
            sums, positions = self._covariance_sums()
            self.progress.start("eigenvectors", len(sums), "matrices")
            vectors = {}
            for name, total in sums.items():
                vectors[name] = eigenvectors(total / positions, name)
                self.progress.update(1)
            self.progress.finish()
            write_tensors(path, vectors)
        return read_tensors(path)[0]

    def _covariance_sums(self) -> tuple[dict[str, Tensor], int]:
        zeros = {}
        for module in self.modules:
            o, i = module.shape
            zeros[f"{module.name}/A"] = (i, i)
            zeros[f"{module.name}/S"] = (o, o)

        def add(sums: dict[str, Tensor], batch: Batch, numbers: Tensor | None) -> None:
            real = batch.real.flatten()

            def each(module: Module, a: Tensor, d: Tensor) -> None:
                wide = self.model.accumulate
                rows = a.flatten(0, 1)[real].to(wide)
                if module.bias:
                    rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
                sums[f"{module.name}/A"].addmm_(rows.T, rows)
                rows = d.flatten(0, 1).to(wide)  # zero where nothing real is
                sums[f"{module.name}/S"].addmm_(rows.T, rows)

            backward(self.model, self.modules, batch, each, numbers)

        return self._sum_blocks("covariance", 2, zeros, add)

    def eigenvalues(self, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Λ [o, i] of every module, float64."""
        place = {
            name: tensor.to(self.model.device, self.model.accumulate)
            for name, tensor in vectors.items()
        }

        def add(sums: dict[str, Tensor], batch: Batch, numbers: Tensor | None) -> None:
            def each(module: Module, a: Tensor, d: Tensor) -> None:
                wide = self.model.accumulate
                rotated_a = apply_inputs(a.to(wide), place[f"{module.name}/A"].T, module.bias)
                rotated_d = d.to(wide) @ place[f"{module.name}/S"]
                total = sums[module.name]
                for one_a, one_d in zip(rotated_a, rotated_d, strict=True):
                    g = one_d.T @ one_a
                    total.addcmul_(g, g)

            backward(self.model, self.modules, batch, each, numbers)

        zeros = {module.name: module.shape for module in self.modules}
        sums, _ = self._sum_blocks("eigenvalues", 3, zeros, add)
        for name, total in sums.items():
            if not total.any():
                raise GradindexError(
                    f"module {name} has no gradient on any of the {len(self.settings.ids)} fit "
                    "sequences, so it has no curvature. Leave it out with --modules REGEX."
                )
        return {name: total / len(self.settings.ids) for name, total in sums.items()}

    def _sum_blocks(
        self, stage: str, step: int, shapes: dict[str, tuple[int, int]],
        add: Callable[[dict[str, Tensor], Batch, Tensor | None], None],
    ) -> tuple[dict[str, Tensor], int]:
        """Sums over all fit sequences in float64, and the number of real positions."""
        path = self.folder / f"{stage}.safetensors"
        totals = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        blocks = positions = 0
        if path.is_file():
            totals, about = read_tensors(path)
            blocks, positions = int(about["blocks"]), int(about["positions"])
        ids, size = self.settings.ids, self.settings.block
        self.progress.start(stage, len(ids), "sequences", done=min(blocks * size, len(ids)))
        for start in range(blocks * size, len(ids), size):
            sums = {
                name: torch.zeros(shape, dtype=self.model.accumulate, device=self.model.device)
                for name, shape in shapes.items()
            }
            positions += self._add_block(ids[start : start + size], step, sums, add)
            for name, part in sums.items():
                if not torch.isfinite(part).all():
                    raise GradindexError(
                        f"the {stage} of {name} is not finite within sequences {ids[start]} to "
                        f"{ids[min(start + size, len(ids)) - 1]}. Try --dtype float32, or leave "
                        "those sequences out."
                    )
                totals[name] += part.to("cpu", torch.float64)
            blocks += 1
            write_tensors(path, totals, {"blocks": str(blocks), "positions": str(positions)})
        self.progress.finish()
        return totals, positions

    def _add_block(
        self, ids: list[int], step: int, sums: dict[str, Tensor],
        add: Callable[[dict[str, Tensor], Batch, Tensor | None], None],
    ) -> int:
        records = self.read(ids)
        lengths = [len(record.ids) for record in records]
        for rows in plan_batches(lengths, self.settings.batch_tokens):
            members = [records[row] for row in rows]
            batch = make_batch([(m.ids, m.scored) for m in members], self.model.device)
            numbers = None
            if self.settings.labels == "model":
                numbers = torch.zeros(batch.tokens.shape, dtype=torch.float64)
                for row, member in enumerate(members):
                    drawn = uniforms(self.settings.seed, step, member.id, len(member.ids))
                    numbers[row, : len(member.ids)] = torch.from_numpy(drawn)
                numbers = numbers.to(self.model.device)
            add(sums, batch, numbers)
            self.progress.update(len(rows))
            if self.progress.measured and step == 2:
                each = self.progress.seconds_each()
                self.progress.say_expected(each * (2 * len(self.settings.ids) + self.after))
        return sum(lengths)


def eigenvectors(covariance: Tensor, name: str) -> Tensor:
    """Eigenvectors (columns, ascending eigenvalues) of a symmetric float64 matrix.

    The sign of each is fixed: its entry of largest magnitude is positive.
    """
    symmetric = (covariance + covariance.T) / 2
    try:
        _, vectors = torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError as error:
        raise GradindexError(
            f"the covariance {name} has no eigendecomposition ({error}). Leave the module out with "
            "--modules REGEX, or fit on more sequences with --fit-sequences."
        ) from error
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
