"""What a pass takes on this machine, and what each stage's modules take besides.

Two batches run through the model, at a quarter and at three quarters of the padded tokens of a
plan, longest sequences first. On the way the inputs and output gradients of a few modules of each
shape are kept; each stage's work on them is then timed by itself, and counts for all modules of the
shape. So the whole of a build is reckoned from a few passes, whatever the model.
Seconds are x · (padded tokens) + y · (sequences) with x, y ≥ 0, from the two batches. What a module
does first with a batch of its size warms caches up, and counts only where it takes long.
"""

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gradindex.influence.blockwise import covariance_shapes, identity, square_blocks, square_shapes
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.curvature import Curvature
from gradindex.influence.device_codes import many_scores
from gradindex.influence.gradients import backward
from gradindex.influence.preconditioned import Whole, add_query_vectors, precondition
from gradindex.influence.split_batches import plan_batches
from gradindex.influence.vocabulary import OutputGradients
from gradindex.memory import resident, return_freed
from gradindex.model.config import vocabulary_size
from gradindex.model.devices import wait_for
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective.batch import Batch
from gradindex.progress import Progress
from gradindex.storage import token_file
from gradindex.storage.build_plan import Plan
from gradindex.storage.code_index import UNPACKED_ROWS, CodeIndex
from gradindex.storage.layout import code_bytes
from gradindex.storage.records import Record
from indexer.background_queries import BACKGROUND_QUERIES
from indexer.fit.batch_memory import forget_peak, peak, used
from indexer.fit.batch_sums import add_products, add_squares
from indexer.fit.eigen import eigenvectors_of_all
from indexer.pace.ahead import Ahead
from indexer.pace.speed import Speed, fit_speed

Look = Callable[[Module, Tensor, OutputGradients, Tensor], None]

OF_A_SHAPE = 3  # modules of each shape that are timed
LARGEST_MATRIX = 1024  # decomposed to be timed; larger ones take (n / 1024)³ times that
ENOUGH, REPEATS = 0.2, 4  # a piece of work is run again until it took so many seconds


@dataclass
class Pace:
    """How fast this machine does the work of a build.

    Speeds are of a pass through the model, and of what each stage's modules take besides: sums A
    and S, sums Λ, codes, exact scores of `together` queries, vectors of queries. In seconds:
    `precondition` of one query, `decompositions` of all A and S, `drawing` of the codes' numbers,
    `sealing` of a sequence's tokens, `scan` of a sequence's code for all background queries.
    `hashing` is bytes of SHA-256 a second. In bytes: `batch`, the most that a batch took, and
    `kept`, what the C library keeps once batches are done.
    """

    one_pass: Speed
    covariance: Speed
    eigenvalues: Speed
    codes: Speed
    scores: Speed
    queries: Speed
    precondition: float
    decompositions: float
    drawing: float
    sealing: float
    scan: float
    hashing: float
    batch: int
    kept: int


@dataclass
class _Seen:
    """What a module was handed of a batch: a [b, t, i] and d [b, t, o]."""

    module: Module
    a: Tensor
    d: OutputGradients
    batch: Batch

    @property
    def real_inputs(self) -> Tensor:
        """Its inputs that are of real tokens: [n, i]."""
        return self.batch.real_inputs(self.module, self.a)


@dataclass
class _Times:
    """Seconds of a stage's work on all modules, for each of the batches."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, batch: int, name: str, seconds: float) -> None:
        """Add what modules of a shape took."""
        taken = self.seconds.setdefault(name, [])
        taken += [0.0] * (batch + 1 - len(taken))
        taken[batch] += seconds


def measure_pace(
    model: LanguageModel, modules: list[Module], sample: list[Record], ahead: Ahead, plan: Plan,
    progress: Progress, look: Look | None = None,
) -> Pace:
    """Run two batches of a sample, and the stages' work on some of what they gave.

    `look` is shown what the timed modules were handed: a [b, t, i], d [b, t, o] and the inputs of
    real tokens [n, i]. Raises ResourceError where memory runs out on a batch.
    """
    batch_tokens, code, together = ahead.batch_tokens, ahead.code, ahead.together
    return_freed()
    base = used(model.devices)
    chosen = _some_of_each_shape(model, modules)
    counts = {shape: sum(module.shape == shape for module in modules) for shape in chosen}
    times, shapes, passes = _Times(), list[tuple[int, int]](), list[float]()
    drawing = precondition_seconds = 0.0
    most = transient = 0  # bytes
    progress.start("pace", 0, "pieces of work timed")
    for number, records in enumerate(_two_batches(model, sample, batch_tokens)):
        tokens = len(records) * max(model.lengths(records))
        shapes.append((tokens, len(records)))
        forget_peak(model.devices)
        seen: dict[tuple[int, int], list[_Seen]] = {}
        passes.append(_seconds(partial(_pass, model, modules, records, chosen, seen)))
        progress.update(1)
        most = max(most, (peak(model.devices) - base) * max(tokens, batch_tokens) // tokens)
        for shape, parts in seen.items():
            forget_peak(model.devices)
            before = used(model.devices)
            bench = _Bench(model, shape, [part.module for part in parts],
                           plan.covariance_blocks, code, together)
            held = used(model.devices) - before
            for name, work in bench.stages(parts):
                times.add(number, name, counts[shape] * _seconds(work) / len(parts))
                progress.update(1)
            transient = max(transient, peak(model.devices) - before - held)
            if number == 0:  # these depend on no batch
                drawing += counts[shape] * bench.drawing / len(parts)
                precondition_seconds += counts[shape] * _seconds(bench.precondition) / together
            del bench  # it would count as the next one's, or as the next pass's
            if look is not None:
                for part in parts:
                    look(part.module, part.a, part.d, part.real_inputs)
    progress.finish()
    speeds = {name: fit_speed(shapes, taken) for name, taken in times.seconds.items()}
    return Pace(
        one_pass=fit_speed(shapes, passes), **speeds, precondition=precondition_seconds,
        decompositions=_decompositions(model.device, modules, plan), drawing=drawing,
        sealing=_sealing(model, sample), scan=_scan(code.length, model.device), hashing=_hashing(),
        batch=max(0, most) + transient,
        kept=0 if model.device.type == "cuda" else max(0, resident() - base),
    )


def _two_batches(
    model: LanguageModel, sample: list[Record], batch_tokens: int
) -> Iterator[list[Record]]:
    """The batches at a quarter and at three quarters of the padded tokens of a sample."""
    lengths = model.lengths(sample)
    plan = plan_batches(lengths, batch_tokens)
    padded = np.array([lengths[batch[0]] * len(batch) for batch in plan])
    middle = (np.cumsum(padded) - padded / 2) / padded.sum()
    for share in (0.25, 0.75):
        number = int(np.abs(middle - share).argmin())
        yield [sample[row] for row in plan[number]]


def _some_of_each_shape(
    model: LanguageModel, modules: list[Module]
) -> dict[tuple[int, int], list[Module]]:
    """Modules of each shape, spread over the model, or over what of it is on one device."""
    alike: dict[tuple[int, int], list[Module]] = {}
    for module in modules:
        same = alike.setdefault(module.shape, [])
        if not same or model.device_of(module) == model.device_of(same[0]):
            same.append(module)
    return {shape: [same[number] for number in sorted(
        {len(same) * part // OF_A_SHAPE for part in range(OF_A_SHAPE)})]
        for shape, same in alike.items()}


def _pass(
    model: LanguageModel, modules: list[Module], records: list[Record],
    keep: dict[tuple[int, int], list[Module]], seen: dict[tuple[int, int], list[_Seen]],
) -> None:
    """A forward and a backward pass; what the modules to `keep` are handed goes to `seen`."""
    batch = model.batch(records)
    seen.clear()  # of a pass before
    names = {module.name for kept in keep.values() for module in kept}

    def each(module: Module, a: Tensor, d: OutputGradients) -> None:
        if module.name in names:
            seen.setdefault(module.shape, []).append(
                _Seen(module, a, d, batch))

    with torch.no_grad():
        backward(model, modules, batch, each)
    wait_for(model.devices)


class _Bench:
    """What each stage does with modules of one shape."""

    def __init__(
        self, model: LanguageModel, shape: tuple[int, int], modules: list[Module],
        covariance_blocks: int, code: CodeSettings, together: int,
    ):
        o, i = shape
        like = torch.zeros((), dtype=model.accumulate, device=model.device_of(modules[0]))
        self._devices = model.devices
        squares = square_shapes(modules[0], covariance_blocks)
        self._sum_a, self._sum_s = like.new_zeros(squares["A"]), like.new_zeros(squares["S"])
        # written to: zeros take no memory before, and it would count as the work's
        self._total = like.new_empty(o, i).fill_(0)
        # nothing is fitted yet; with Q = I and Λ = 1 the same work is done as with a real curvature
        self._curvature = Curvature(
            identity(*squares["A"], like), identity(*squares["S"], like), like.new_ones(o, i))
        self._damping = code.damping
        start = time.perf_counter()
        self._codes = Codes(modules, {module.name: self._curvature for module in modules}, code)
        self.drawing = time.perf_counter() - start
        self._whole = Whole(like.new_empty(together, o, i).fill_(0))

    def stages(self, parts: list[_Seen]) -> Iterator[tuple[str, Callable[[], None]]]:
        """Each stage's name (a speed of `Pace`), and its work on what modules were handed."""
        q_a, q_s = self._curvature.eigenvectors_a, self._curvature.eigenvectors_s
        vectors = self._codes.empty(len(parts[0].a))

        def covariance(part: _Seen) -> None:
            if not part.module.diagonal:
                assert isinstance(part.d, Tensor)
                add_products(self._sum_a, self._sum_s, part.real_inputs, part.d)

        def eigenvalues(part: _Seen) -> None:
            add_squares(self._total, part.module, part.a, part.d, q_a, q_s)

        def codes(part: _Seen) -> None:
            self._codes.add(vectors, part.module, part.a, part.d)

        def scores(part: _Seen) -> None:
            self._whole.scores(part.module, part.a, part.d)

        def queries(part: _Seen) -> None:
            add_query_vectors(self._codes, vectors, self._curvature, part.module, part.a, part.d)

        for work in (covariance, eigenvalues, codes, scores, queries):
            yield work.__name__, partial(self._all, parts, work)

    def precondition(self) -> None:
        """The preconditioned gradients of as many queries as are scored together."""
        precondition({"": self._curvature}, {"": self._whole.p})
        wait_for(self._devices)

    def _all(self, parts: list[_Seen], work: Callable[[_Seen], None]) -> None:
        for part in parts:
            work(part)
        wait_for(self._devices)


def _decompositions(device: torch.device, modules: list[Module], plan: Plan) -> float:
    """Seconds of all eigendecompositions, from one of each size (a part of a large one)."""
    sizes = [len(block) for n, rows in covariance_shapes(modules, plan.covariance_blocks).values()
             if rows > 1 for block in square_blocks(torch.empty(n, rows, device="meta"))]
    seconds: dict[int, float] = {}
    for n in {min(size, LARGEST_MATRIX) for size in sizes}:
        # what is in a matrix matters little; this one has all of its eigenvalues apart
        rows = torch.arange(n * n, dtype=torch.float64).sin().view(n, n)
        seconds[n] = _seconds(partial(_decompose, rows @ rows.T, device, plan.eigen_dtype))
    return sum(seconds[min(size, LARGEST_MATRIX)] * max(1.0, size / LARGEST_MATRIX) ** 3
               for size in sizes)


def _decompose(matrix: Tensor, device: torch.device, dtype: str) -> None:
    list(eigenvectors_of_all([("a matrix", matrix, device)], getattr(torch, dtype),
                             lambda _: None))


def _sealing(model: LanguageModel, sample: list[Record]) -> float:
    """Seconds a sequence of making a segment's token matrix."""
    sequences = [record.tokens for record in sample[:512]]
    vocabulary = vocabulary_size(model.network.config)
    return _seconds(lambda: token_file.pack(sequences, vocabulary)) / len(sequences)


def _scan(length: int, device: torch.device) -> float:
    """Seconds a row of scoring codes of K = `length` for all background queries together."""
    code_index = CodeIndex(length)
    code_index.add(np.zeros((UNPACKED_ROWS, code_bytes(length)), dtype=np.uint8))
    vectors = np.zeros((BACKGROUND_QUERIES, length), dtype=np.float32)
    return _seconds(lambda: many_scores(code_index, vectors, device)) / UNPACKED_ROWS


def _hashing() -> float:
    """Bytes a second of SHA-256."""
    content = bytes(1 << 24)
    return len(content) / _seconds(lambda: hashlib.sha256(content).digest())


def _seconds(run: Callable[[], object]) -> float:
    """The median of some runs after one that warms up; of that alone where it takes long."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < ENOUGH:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:] or taken)
