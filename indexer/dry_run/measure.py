"""What the stages of a build take, from two batches of each: seconds, and memory at the worst.

A batch's seconds are x · (padded tokens) + y · (sequences) with x, y ≥ 0, from two batches of the
stage's own plan of batches: one at a quarter of its padded tokens, longest sequences first, one at
three quarters. The first run of a stage warms up and doesn't count. The whole stage's tokens and
sequences come from its plan, which depends on the lengths alone.

Memory, in each stage: the process with the model loaded, as measured; what the stage holds, which
follows from the modules' shapes (below); what a batch takes on top (activations, logits), measured
as the peak while batches ran, less the other two; and, on the host, what is still taken when they
are done: the C library keeps freed pieces below 32 MB, into which batches of other shapes, still
to come, don't fit.
With c = Σ (i² + o²), or what their blocks have, and e = Σ o·i entries over modules, w bytes an
entry of sums and curvature (4; 8 for a float64 model):
- covariance, eigenvectors, eigenvalues: see `FitMoments`;
- encode: curvature w·(c + e), the codes' projections, a segment's records and codes;
- calibrate: curvature, projections, and P_u of all queries.
What is kept on the model's device and what in the host's memory is told apart.
"""

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gradindex.draws import Stream
from gradindex.influence.blockwise import block_rows, covariance_shapes, identity, square_blocks
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.curvature import Curvature, Ekfac
from gradindex.influence.exact import exact_scores
from gradindex.influence.preconditioned import Preconditioned
from gradindex.influence.split_batches import plan_batches
from gradindex.memory import Allowance, resident
from gradindex.model.config import vocabulary_size
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective import Batch
from gradindex.storage import token_file
from gradindex.storage.code_index import UNPACKED_ROWS, CodeIndex
from gradindex.storage.layout import code_bytes
from gradindex.storage.records import Record
from indexer.calibrate import CALIBRATION_QUERIES, prepare_query, stacked_queries
from indexer.encode import encode_batch
from indexer.fit.batch_memory import forget_peak, peak, used
from indexer.fit.batch_sums import add_covariances, add_eigenvalues, fit_batch
from indexer.fit.budget import FitMoments, curvature_bytes, held_bytes, partitions, projection_bytes
from indexer.fit.eigen import eigenvectors
from indexer.fit.notes import FitSettings

LARGEST_MATRIX = 1024  # decomposed to be timed; larger ones take (n / 1024)³ times that
ENOUGH = 2.0  # seconds: a batch is run again until it took so long, or REPEATS times
REPEATS = 5
WRITING = 300e6  # bytes a second, assumed of the disk: to measure it, something would be written
RECORD_BYTES = 2000  # of a Record in memory besides its tokens


@dataclass(frozen=True)
class Work:
    """Padded tokens and sequences of some batches."""

    padded_tokens: int
    sequences: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], batch_tokens: int) -> "Work":
        """The work on groups of lengths; each group is put into batches by itself.

        >>> Work.of([[5, 3, 3]], batch_tokens=6)  # a batch of one, and one of two
        Work(padded_tokens=11, sequences=3)
        """
        padded_tokens = sequences = 0
        for lengths in groups:
            padded_tokens += sum(lengths[batch[0]] * len(batch)
                                 for batch in plan_batches(lengths, batch_tokens))
            sequences += len(lengths)
        return cls(padded_tokens, sequences)


@dataclass(frozen=True)
class Speed:
    """Seconds a padded token and a sequence."""

    token: float
    sequence: float

    def __mul__(self, work: Work) -> float:
        return self.token * work.padded_tokens + self.sequence * work.sequences


@dataclass
class Memory:
    """Bytes on the host and on the model's device, which is the host where there is no GPU."""

    host: int = 0
    device: int = 0


class Bench:
    """Runs two batches of each stage, and keeps what they took.

    Raises ResourceError where memory runs out on one.
    """

    def __init__(
        self, model: LanguageModel, modules: list[Module], sample: list[Record],
        settings: FitSettings, code: CodeSettings, segment: int, allowance: Allowance,
    ):
        self.model, self.modules, self.sample = model, modules, sample
        self.settings, self.code, self.segment = settings, code, segment
        # queries that are scored in a pass
        self.together = min(CALIBRATION_QUERIES, stacked_queries(modules, allowance))
        self.memory: dict[str, Memory] = {}
        self.batch = 0  # the most bytes that a batch took
        self._blocks, self._width = settings.covariance_blocks, model.accumulate.itemsize
        self.partitions = partitions(modules, self._blocks, self._width, allowance.planned)
        self._largest = max(self.partitions, key=lambda group: held_bytes(
            group, self._blocks, self._width))
        self._fit = FitMoments.of(self._largest, self._blocks, self._width)
        self._curvature_room = allowance.curvature
        self._base = used(model.device)
        self._host = resident()

    # ---- the stages

    def covariance(self) -> tuple[Speed, dict[str, Tensor]]:
        """The speed of a partition's pass for A and S, and the sums of the batches that ran."""
        sums = _zeros(self.model, covariance_shapes(self._largest, self._blocks))

        def run(records: list[Record]) -> None:
            batch, numbers = self._batch(records, Stream.COVARIANCE_LABELS)
            add_covariances(self.model, self._largest, sums, batch, numbers)

        moment = self._fit.covariance
        speed, batch = self._two(run, self.settings.block, moment.device)
        self._note("covariance", [(moment.host, moment.device + batch)])
        return speed, sums

    def decompositions(self, sums: dict[str, Tensor]) -> float:
        """Seconds of all eigendecompositions, from one of each size (a part of a large one)."""
        seconds: dict[int, float] = {}
        for name, matrix in sums.items():
            for block in square_blocks(matrix):
                n = min(len(block), LARGEST_MATRIX)
                if n not in seconds:  # of each size one; what is in a matrix matters little
                    part = block[:n, :n].to("cpu", torch.float64).nan_to_num()
                    seconds[n] = _seconds(partial(eigenvectors, part, name))
        self._note("eigenvectors", [(self._fit.eigenvectors.host, 0)])
        total = 0.0
        for n, rows in covariance_shapes(self.modules, self._blocks).values():
            for first in range(0, n, rows):
                size = min(rows, n - first)
                like = min(seconds, key=lambda known: abs(known - size))
                total += seconds[like] * (size / like) ** 3
        return total

    def eigenvalues(self) -> Speed:
        """The speed of a partition's pass for Λ. Any eigenvectors will do, so the identity."""
        like = torch.zeros((), dtype=self.model.accumulate, device=self.model.device)
        vectors = {name: identity(n, rows, like) for name, (n, rows)
                   in covariance_shapes(self._largest, self._blocks).items()}
        sums = _zeros(self.model, {module.name: module.shape for module in self._largest})

        def run(records: list[Record]) -> None:
            batch, numbers = self._batch(records, Stream.EIGENVALUE_LABELS)
            add_eigenvalues(self.model, self._largest, vectors, sums, batch, numbers)

        moment = self._fit.eigenvalues
        speed, batch = self._two(run, self.settings.block, moment.device)
        self._note("eigenvalues", [(moment.host, moment.device + batch),
                                   (self._fit.curvature.host, 0)])
        return speed

    def encode(self) -> tuple[Speed, float, Codes, Ekfac]:
        """The speed of encoding, the seconds of drawing projections, the codes, their curvature."""
        kinds: dict[tuple[int, int], Curvature] = {}  # modules of a shape share theirs
        # nothing is fitted yet; with Λ = 1 and Q = I the same work is done as with a real curvature
        for o, i in {module.shape for module in self.modules}:
            ones = torch.ones(o, i, dtype=self.model.accumulate, device=self.model.device)
            eye_a, eye_s = (identity(n, block_rows(n, self._blocks), ones) for n in (i, o))
            kinds[o, i] = Curvature(eye_a, eye_s, ones)
        ekfac = {module.name: kinds[module.shape] for module in self.modules}
        start = time.perf_counter()
        codes = Codes(self.modules, ekfac, self.code)
        drawing = time.perf_counter() - start
        code_index = CodeIndex(self.code.length)

        def run(records: list[Record]) -> None:
            vectors = encode_batch(self.model, codes, records).float().cpu().numpy()
            norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
            code_index.encode(vectors[np.isfinite(norms)])

        held = self._held()
        # this process holds less than a build, whose modules don't share their curvature
        speed, batch = self._two(run, self.segment, self._held_here())
        longest = max(len(record.tokens) for record in self.sample)
        texts = self.segment * (RECORD_BYTES + 5 * longest)
        coded = self.segment * code_bytes(self.code.length)
        self._note("encode", [(texts + coded, held + batch), (texts + 3 * coded, held)])
        return speed, drawing, codes, ekfac

    def calibrate(self, codes: Codes, ekfac: Ekfac) -> tuple[Speed, float]:
        """The speed of exact scores, and the seconds of making one query ready.

        The scores are of so many queries as are scored together.
        """
        # a sequence of middle length: queries are drawn from all of them
        typical = sorted(self.sample, key=lambda record: len(record.tokens))[len(self.sample) // 2]
        with torch.no_grad():
            seconds = _seconds(lambda: prepare_query(self.model, codes, ekfac, typical))
            queries = Preconditioned.join([prepare_query(self.model, codes, ekfac, typical)[1]
                                           for _ in range(self.together)])
        tables = [self._width * self.together * module.size for module in self.modules]
        stack = sum(tables)

        def run(records: list[Record]) -> None:
            # so many tokens a batch that the records are one
            exact_scores(self.model, self.modules, queries, records,
                         sum(len(record.tokens) for record in records) * len(records))

        speed, batch = self._two(run, min(128, len(self.sample)), self._held_here() + stack)
        self._note("calibrate", [(0, self._held() + stack + max(batch, *tables))])
        return speed, seconds

    def background_queries(self, queries: int, length: int) -> float:
        """Seconds a row of scoring codes of K = `length` for so many queries together."""
        code_index = CodeIndex(length)
        code_index.add(np.zeros((UNPACKED_ROWS, code_bytes(length)), dtype=np.uint8))
        vectors = np.zeros((queries, length), dtype=np.float32)
        return _seconds(lambda: code_index.many_scores(vectors)) / UNPACKED_ROWS

    def commits(self) -> tuple[float, float]:
        """Seconds of adding up and writing a block's sums of a partition: A and S, and Λ."""
        shapes = {module.name: module.shape for module in self._largest}
        square = covariance_shapes(self._largest, self._blocks)
        return self._commit(square), self._commit(shapes)

    def token_matrices(self) -> float:
        """Seconds a sequence of making a segment's token matrix."""
        sequences = [record.tokens for record in self.sample[:512]]
        vocabulary = vocabulary_size(self.model.network.config)
        return _seconds(lambda: token_file.pack(sequences, vocabulary)) / len(sequences)

    # ---- measuring

    def _two(
        self, run: Callable[[list[Record]], None], group: int, held: int
    ) -> tuple[Speed, int]:
        """The speed of a stage on two batches, and the bytes that batches take beyond `held`.

        The batches are those of `group` sequences of the sample.
        """
        records = self.sample[:group]
        lengths = [len(record.tokens) for record in records]
        plan = plan_batches(lengths, self.settings.batch_tokens)
        padded = np.array([lengths[batch[0]] * len(batch) for batch in plan])
        middle = (np.cumsum(padded) - padded / 2) / padded.sum()
        forget_peak(self.model.device)
        with torch.no_grad():
            for extreme in (plan[0], max(plan, key=len)):  # warm up; memory is largest at the ends
                run([records[row] for row in extreme])
            shapes, seconds = [], []
            for share in (0.25, 0.75):  # of the padded tokens, at which a batch stands
                number = int(np.abs(middle - share).argmin())
                batch = [records[row] for row in plan[number]]
                shapes.append((padded[number], len(batch)))
                seconds.append(_seconds(partial(_run_to_its_end, run, batch, self.model.device)))
        over = max(0, peak(self.model.device) - self._base - held)
        if self.model.device.type != "cuda":
            over += max(0, resident() - self._base - held)  # freed, and kept by the C library
        self.batch = max(self.batch, over)  # of any stage, for the table of memory
        return _fit_speed(shapes, seconds), over

    def _note(self, stage: str, moments: list[tuple[int, int]]) -> None:
        """Keep the most that a stage takes, of (host, device) bytes at several moments."""
        # without a GPU the model's device is the host: both add up there
        gpu = self.model.device.type == "cuda"
        self.memory[stage] = Memory(
            self._host + max(host + (0 if gpu else device) for host, device in moments),
            self._base + max(device for _, device in moments) if gpu else 0,
        )

    def _held(self) -> int:
        """Bytes of curvature and projections that a build holds while it encodes."""
        whole = curvature_bytes(self.modules, self._blocks, self._width)
        return projection_bytes(self.modules, self._width, self.code.width) + (
            whole if self._curvature_room is None else min(whole, self._curvature_room))

    def _held_here(self) -> int:
        """The same in this process, where modules of a shape share their curvature."""
        kinds = {module.shape: module for module in self.modules}
        return projection_bytes(self.modules, self._width, self.code.width) + curvature_bytes(
            list(kinds.values()), self._blocks, self._width)

    def _batch(self, records: list[Record], stream: Stream) -> tuple[Batch, Tensor | None]:
        return fit_batch(self.model, records, self.settings.labels, self.settings.seed, stream)

    def _commit(self, shapes: dict[str, tuple[int, int]]) -> float:
        """Seconds of adding a block's sums of these shapes to the running sum, and writing it."""
        totals = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        start = time.perf_counter()
        sums = _zeros(self.model, shapes)
        for name, part in sums.items():
            torch.isfinite(part).all()
            totals[name] += part.to("cpu", torch.float64)
        written = sum(part.nbytes for part in totals.values())
        for part in totals.values():
            for _ in range(2):  # the file's own digest, and that of the whole file
                hashlib.sha256(part.numpy().data).digest()
        return time.perf_counter() - start + written / WRITING


def _zeros(model: LanguageModel, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=model.accumulate, device=model.device)
            for name, shape in shapes.items()}


def _run_to_its_end(
    run: Callable[[list[Record]], None], batch: list[Record], device: torch.device
) -> None:
    """Run a batch, and wait for the GPU, which works on after the call came back."""
    run(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fit_speed(shapes: list[tuple[int, int]], seconds: list[float]) -> Speed:
    """x, y ≥ 0 with x · tokens + y · sequences nearest to the seconds, both batches counting alike.

    Two unknowns: where the free solution has a negative one, that is 0.

    >>> speed = _fit_speed([(100, 2), (40, 4)], [1.04, 0.48])
    >>> round(speed.token, 6), round(speed.sequence, 6)
    (0.01, 0.02)
    """
    # each equation divided by its seconds: errors are relative, so a short batch counts as much
    rows = np.array(shapes, dtype=np.float64) / np.array(seconds)[:, None]
    ones = np.ones(len(rows))
    free = np.linalg.lstsq(rows, ones, rcond=1e-9)[0]
    if (free >= 0).all():
        return Speed(float(free[0]), float(free[1]))
    # the best with one of them alone is the best with both at least 0
    alone = [rows[:, side] @ ones / (rows[:, side] @ rows[:, side]) for side in (0, 1)]
    wrong = [float(((rows[:, side] * alone[side] - 1) ** 2).sum()) for side in (0, 1)]
    return Speed(alone[0], 0.0) if wrong[0] <= wrong[1] else Speed(0.0, alone[1])


def _seconds(run: Callable[[], object]) -> float:
    """The median of some runs, one where that takes long."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < ENOUGH:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def hashing() -> float:
    """Bytes a second of SHA-256."""
    content = bytes(1 << 25)
    return len(content) / _seconds(lambda: hashlib.sha256(content).digest())


def gpu_available(device: torch.device) -> int:
    """Bytes of GPU memory that this process may have in all; 0 where the model is on the host."""
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
