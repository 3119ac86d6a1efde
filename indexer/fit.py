"""Fit the EK-FAC curvature: covariances, eigenvectors, corrected eigenvalues.

Three steps over the same sequences (Grosse et al. 2023, §2.3 and App. A):
1. A and S: averages of a aᵀ and d dᵀ over all real positions, prompt and last position included.
2. Q_A and Q_S: their eigenvectors, in float64.
3. Λ: the average over sequences of (Q_Sᵀ G Q_A)², G the sum over the sequence's tokens.
Labels are sampled from the model (the Fisher, not the empirical Fisher), independently in 1 and 3,
by numbers keyed by (seed, step, sequence id): nothing depends on batching.

Sums are taken in float32 (float64 for a float64 model) within a block of sequences and added in
order in float64. The running sum is committed after every block, so a kill costs one block and
the resumed fit ends with the same bytes. What had to be done otherwise on the way (a batch halved
because memory ran out, a sequence or a module left out) is noted in fit.json, before it is tried.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pydantic
import scipy.linalg
import torch
from torch import Tensor

from gradindex import curvature, signed
from gradindex.checked import CheckedFiles
from gradindex.curvature import Curvature, Ekfac, read_tensors, write_tensors
from gradindex.errors import DamagedIndexError, GradindexError
from gradindex.files import FileFacts, atomic_write, make_folder, rename_folder
from gradindex.gradients import (
    Batch,
    Splits,
    apply_inputs,
    backward,
    in_batches,
    make_batch,
    why_not_finite,
)
from gradindex.model import LanguageModel
from gradindex.modules import Module
from gradindex.progress import Progress
from gradindex.records import Record
from indexer.quarantine import SHARE, check_quarantine

LARGEST_BLOCK = 256  # sequences
NOTES = "fit.json"
SOUND = 1e-8  # of eigenvectors in float64: residual and departure from orthogonality, relative

Read = Callable[[list[int]], list[Record]]


@dataclass(frozen=True)
class FitSettings:
    """Which sequences (ids in order), whose labels ("model" or "data"), block and batch size.

    `bad` is the share of sequences that may be left out, their gradient not being finite.
    """

    ids: list[int]
    labels: str
    block: int
    batch_tokens: int
    seed: int
    bad: float = SHARE


@dataclass
class FitNotes:
    """`fit.json`: what was done otherwise than planned, and the facts of the files of curvature.

    `splits` are batches that were halved, as (first row, rows), by "stage block"; `quarantined`
    says of ids why they were left out, `left_out` of modules.
    """

    splits: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    quarantined: dict[int, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileFacts] = field(default_factory=dict)

    def write(self, folder: Path) -> FileFacts:
        content = {**asdict(self), "quarantined": {str(one): why for one, why in
                                                   sorted(self.quarantined.items())}}
        return atomic_write(folder / NOTES, signed.sign(content))

    @classmethod
    def read(cls, folder: Path) -> "FitNotes":
        """The notes in a folder, empty where there are none. Raises DamagedIndexError."""
        path = folder / NOTES
        if not path.is_file():
            return cls()
        try:
            content = signed.check(signed.parse(path.read_bytes()))
            return pydantic.TypeAdapter(cls).validate_json(content)
        except ValueError:
            raise DamagedIndexError(
                f"{path} can't be read. Remove {folder} and run the build again; it fits again."
            ) from None


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
) -> tuple[Ekfac, FitNotes]:
    """Fit, or go on fitting, and write `index/curvature`; returns what is on disk there.

    Modules without a gradient are left out of it, and noted. `after` is the number of sequences to
    be encoded afterwards, for the expected time. Raises GradindexError where no module is left, too
    many sequences are not finite, or eigenvectors can't be found; ResourceError.
    """
    folder = index / "curvature"
    if not folder.is_dir():
        partial = index / "curvature.partial"
        if not partial.is_dir():
            make_folder(partial)
        notes = FitNotes.read(partial)
        if not notes.files:
            fitting = _Fit(model, modules, read, settings, partial, progress, after, notes)
            vectors = fitting.eigenvectors()
            eigenvalues = fitting.eigenvalues(vectors)
            stored = torch.float64 if model.dtype == torch.float64 else torch.float32
            files = {}
            for module in modules:
                if module.name in notes.left_out:
                    continue
                q_a, q_s = vectors[f"{module.name}/A"], vectors[f"{module.name}/S"]
                files[curvature.path_of(Path(), module).name] = curvature.save(
                    partial, module, Curvature(
                        q_a.to(stored), q_s.to(stored), eigenvalues[module.name].to(stored)))
            notes.files = files
            notes.write(partial)
        for name in ("covariance", "eigenvectors", "eigenvalues"):
            (partial / f"{name}.safetensors").unlink(missing_ok=True)
        rename_folder(partial, folder)
    notes = FitNotes.read(folder)
    _report(notes, progress)
    kept = [module for module in modules if module.name not in notes.left_out]
    checked = CheckedFiles(folder, notes.files)

    def where(module: Module) -> Path:
        return checked.path(curvature.path_of(Path(), module).name)

    return curvature.load(where, kept, model.device, model.accumulate), notes


def _report(notes: FitNotes, progress: Progress) -> None:
    for name, reason in notes.left_out.items():
        progress.say(f"module {name} is left out: {reason}")
    for one, reason in notes.quarantined.items():
        progress.say(f"sequence {one} is left out of the fit: {reason}")
    if halved := sum(map(len, notes.splits.values())):
        progress.say(f"memory ran out on {halved} batches of the fit, which were halved; smaller "
                     "--batch-tokens avoid that")


@dataclass
class _Fit:
    model: LanguageModel
    modules: list[Module]
    read: Read
    settings: FitSettings
    folder: Path
    progress: Progress
    after: int
    notes: FitNotes

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
        def add(sums: dict[str, Tensor], batch: Batch, numbers: Tensor | None) -> None:
            add_covariances(self.model, self.modules, sums, batch, numbers)

        return self._sum_blocks("covariance", 2, covariance_shapes(self.modules), add)

    def eigenvalues(self, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Λ [o, i] of every module, float64."""
        place = {
            name: tensor.to(self.model.device, self.model.accumulate)
            for name, tensor in vectors.items()
        }

        def add(sums: dict[str, Tensor], batch: Batch, numbers: Tensor | None) -> None:
            add_eigenvalues(self.model, self.modules, place, sums, batch, numbers)

        zeros = {module.name: module.shape for module in self.modules}
        sums, _ = self._sum_blocks("eigenvalues", 3, zeros, add)
        count = len(self.settings.ids) - len(self.notes.quarantined)
        self.notes.left_out = {
            name: f"it has no gradient on any of the {count} fit sequences, so no curvature"
            for name, total in sums.items() if not total.any()
        }
        if len(self.notes.left_out) == len(sums):
            raise GradindexError(
                f"no tracked module has a gradient on any of the {count} fit sequences. Is the "
                "model the one that was trained on this data? Choose others with --modules."
            )
        return {name: total / count for name, total in sums.items()}

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
            here = ids[start : start + size]
            sums = None
            while sums is None:
                sums = self._sum_block(stage, blocks, step, here, shapes, add)
            for name, part in sums.items():
                totals[name] += part.to("cpu", torch.float64)
            positions += sum(len(record.ids) for record in self._records(here))
            blocks += 1
            write_tensors(path, totals, {"blocks": str(blocks), "positions": str(positions)})
        self.progress.finish()
        return totals, positions

    def _records(self, ids: list[int]) -> list[Record]:
        return self.read([one for one in ids if one not in self.notes.quarantined])

    def _sum_block(
        self, stage: str, block: int, step: int, ids: list[int],
        shapes: dict[str, tuple[int, int]],
        add: Callable[[dict[str, Tensor], Batch, Tensor | None], None],
    ) -> dict[str, Tensor] | None:
        """A block's sums; None where it has to be summed again, as the notes now say.

        A batch adds to the sums as it goes, so one that fails half-way spoils them.
        """
        sums = {
            name: torch.zeros(shape, dtype=self.model.accumulate, device=self.model.device)
            for name, shape in shapes.items()
        }
        records, done = self._records(ids), 0

        def run(rows: list[int]) -> int:
            add(sums, *self._batch([records[row] for row in rows], step))
            return len(rows)

        def keep(made: list[tuple[int, int]]) -> None:
            self.notes.splits[f"{stage} {block}"] = made
            self.notes.write(self.folder)
            raise _SumAgainError

        splits = Splits(self.notes.splits.get(f"{stage} {block}", []), keep)
        lengths = [len(record.ids) for record in records]
        try:
            for _, count in in_batches(lengths, self.settings.batch_tokens, splits, run):
                done += count
                self.progress.update(count)
                if self.progress.measured and step == 2:
                    each = self.progress.seconds_each()
                    self.progress.say_expected(each * (2 * len(self.settings.ids) + self.after))
        except _SumAgainError:
            self.progress.update(-done)
            return None
        odd = [name for name, part in sums.items() if not torch.isfinite(part).all()]
        if not odd:
            return sums
        self._quarantine(records, step, f"the {stage} of {odd[0]}")
        self.progress.update(-done)
        return None

    def _batch(self, members: list[Record], step: int) -> tuple[Batch, Tensor | None]:
        return fit_batch(self.model, members, self.settings.labels, self.settings.seed, step)

    def _quarantine(self, records: list[Record], step: int, what: str) -> None:
        """Note the sequences that make a sum not finite. Raises GradindexError."""
        found = {
            record.id: reason for record in records
            if (reason := why_not_finite(self.model, self.modules, *self._batch([record], step)))
        }
        if not found:
            raise GradindexError(
                f"{what} is not finite within sequences {records[0].id} to {records[-1].id}, "
                "though each gradient is. Try --dtype float32."
            )
        self.notes.quarantined.update(found)
        check_quarantine(self.notes.quarantined, len(self.settings.ids), self.settings.bad,
                         "of the fit")
        self.notes.write(self.folder)


def covariance_shapes(modules: list[Module]) -> dict[str, tuple[int, int]]:
    """The shapes of A [i, i] and S [o, o] by `name/A` and `name/S`."""
    shapes = {}
    for module in modules:
        o, i = module.shape
        shapes[f"{module.name}/A"] = (i, i)
        shapes[f"{module.name}/S"] = (o, o)
    return shapes


def add_covariances(
    model: LanguageModel, modules: list[Module], sums: dict[str, Tensor], batch: Batch,
    numbers: Tensor | None,
) -> None:
    """Add a batch's Σ a aᵀ and Σ d dᵀ to the sums, by `name/A` and `name/S`."""
    real = batch.real.flatten()

    def each(module: Module, a: Tensor, d: Tensor) -> None:
        wide = model.accumulate
        rows = a.flatten(0, 1)[real].to(wide)
        if module.bias:
            rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
        sums[f"{module.name}/A"].addmm_(rows.T, rows)
        rows = d.flatten(0, 1).to(wide)  # zero where nothing real is
        sums[f"{module.name}/S"].addmm_(rows.T, rows)

    backward(model, modules, batch, each, numbers)


def add_eigenvalues(
    model: LanguageModel, modules: list[Module], vectors: dict[str, Tensor],
    sums: dict[str, Tensor], batch: Batch, numbers: Tensor | None,
) -> None:
    """Add a batch's Σ_m (Q_Sᵀ G_m Q_A)² [o, i] to the sums, by module name."""
    def each(module: Module, a: Tensor, d: Tensor) -> None:
        wide = model.accumulate
        rotated_a = apply_inputs(a.to(wide), vectors[f"{module.name}/A"].T, module.bias)
        rotated_d = d.to(wide) @ vectors[f"{module.name}/S"]
        total = sums[module.name]
        for one_a, one_d in zip(rotated_a, rotated_d, strict=True):
            g = one_d.T @ one_a
            total.addcmul_(g, g)

    backward(model, modules, batch, each, numbers)


def fit_batch(
    model: LanguageModel, members: list[Record], labels: str, seed: int, step: int
) -> tuple[Batch, Tensor | None]:
    """The batch of some sequences, and the numbers that draw their labels in a step of the fit."""
    batch = make_batch([(m.ids, m.scored) for m in members], model.device)
    if labels != "model":
        return batch, None
    numbers = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    for row, member in enumerate(members):
        drawn = uniforms(seed, step, member.id, len(member.ids))
        numbers[row, : len(member.ids)] = torch.from_numpy(drawn)
    return batch, numbers.to(model.device)


def disk_bytes(modules: list[Module]) -> int:
    """The most that the fit holds on the disk at once.

    Its running sums, and eigenvectors, are float64 until its end, and a file is replaced as a
    whole: A and S beside Q_A and Q_S, then Λ twice, or once beside the curvature.
    """
    square = sum(o * o + i * i for o, i in (module.shape for module in modules))
    table = sum(o * i for o, i in (module.shape for module in modules))
    return 16 * square + max(16 * table, 4 * square + 12 * table)


class _SumAgainError(Exception):
    """A block has to be summed again, with a batch halved."""


def eigenvectors(covariance: Tensor, name: str) -> Tensor:
    """Eigenvectors (columns, ascending eigenvalues) of a symmetric float64 matrix.

    The sign of each is fixed: its entry of largest magnitude is positive. Where the first method
    (divide and conquer) fails or gives something unsound, QR iteration is tried, then once more on
    the matrix with 1e-12 of its mean eigenvalue added. Raises GradindexError, naming the matrix.
    """
    symmetric = (covariance + covariance.T) / 2
    jitter = 1e-12 * symmetric.diagonal().mean() * torch.eye(len(symmetric), dtype=torch.float64)
    reasons = []
    for solve, matrix in ((_divide_and_conquer, symmetric), (_qr_iteration, symmetric),
                          (_qr_iteration, symmetric + jitter)):
        try:
            values, vectors = solve(matrix)
        except (torch.linalg.LinAlgError, scipy.linalg.LinAlgError, ValueError) as error:
            reasons.append(" ".join(str(error).split()))
            continue
        if (wrong := _wrong(matrix, values, vectors)) is None:
            largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
            return vectors * torch.where(largest < 0, -1.0, 1.0)
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
    residual = torch.linalg.norm(matrix @ vectors - vectors * values)
    turned = torch.linalg.norm(vectors.T @ vectors - torch.eye(len(matrix), dtype=matrix.dtype))
    size = torch.linalg.norm(matrix)
    sound = residual <= SOUND * size and turned <= SOUND * len(matrix)
    return None if sound else f"residual {residual:.1e} of {size:.1e}, orthogonal to {turned:.1e}"
