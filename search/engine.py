"""The journey of a search: gradient → approximate hits → exact, n of m → result.

`Searcher` is an open index. `Searcher.stages` yields each stage as it ends, so that a bar or a
page can show it; `Searcher.search` drains them.
"""

import io
import operator
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradindex import curvature as ekfac_files
from gradindex import manifest, vectors
from gradindex.codes import Codes, CodeSettings, score_error
from gradindex.curvature import Ekfac
from gradindex.errors import DamagedIndexError, IndexMismatchError, InputError
from gradindex.gradients import make_batch
from gradindex.influence import Gradients, precondition, query_coordinates
from gradindex.manifest import Segment, segment_folder
from gradindex.model import (
    UNSCORED,
    LanguageModel,
    ModelSource,
    check_identity,
    tokenizer_digest,
)
from gradindex.records import Record
from gradindex.records import read as read_records
from gradindex.results import Hit, Query, Recall, Result
from search.hits import fold_duplicates, forget_terms, make_hit
from search.query import make_query
from search.recall import estimated_recall, inclusion_probability
from search.rescore import LARGEST_CHUNK, Scored, chunk_ends, rescore

DEFAULT_HITS = 20
DEFAULT_SHORTLIST = 1000
BACKGROUND = 64  # random sequences rescored with every query
SMALLEST_SAMPLE = 32  # of these, before anything is said of the error on this query
ODD_CALIBRATION = 1.5  # c on this query's background, as a factor of the index's: warn beyond it


@dataclass
class Stage:
    """Where a search stands: `name` is gradient, approximate, exact or result.

    `hits` are there after `approximate` (by code score), `result` at the end. `done` of `total`
    sequences are exact.
    """

    name: str
    done: int = 0
    total: int = 0
    query: Query | None = None
    hits: list[Hit] | None = None
    result: Result | None = None


@dataclass
class _Target:
    """A query made ready: v_q [K], P_u by module, and what it is."""

    query: Query
    vector: np.ndarray
    preconditioned: Gradients


def open(
    index: str | Path, model: Any = None, tokenizer: Any = None, device: str = "auto",
    trust_remote_code: bool = False, allow_pickle: bool = False, batch_tokens: int | None = None,
) -> "Searcher":
    """Open an index for searching. Nothing heavy is loaded before the first search.

    `model` (a folder, hub id or loaded model) is where the weights are now, if not where they were
    at the build; other weights are refused. `batch_tokens` bounds the memory of a batch [the
    build's]. Raises InputError where there is no index,
    DamagedIndexError for missing or changed files.
    """
    return Searcher(Path(index), model, tokenizer, device, trust_remote_code, allow_pickle,
                    batch_tokens)


class Searcher:
    """An open index. Made by `gradindex.open` and `gradindex.build`."""

    def __init__(
        self, path: Path, model: Any, tokenizer: Any, device: str, trust_remote_code: bool,
        allow_pickle: bool, batch_tokens: int | None,
    ):
        self.path = path
        self.manifest = manifest.load(path)
        if batch_tokens is not None and batch_tokens < 1:
            raise InputError(f"--batch-tokens {batch_tokens}: expected a number above 0.")
        self._batch_tokens = batch_tokens
        self._device = device
        self._model_given = model is not None
        facts = self.manifest.model
        at_build = facts["name"] if facts["revision"] is None \
            else f"{facts['name']}@{facts['revision']}"
        self._source = ModelSource(
            at_build if model is None else model,
            facts["tokenizer_name"] if tokenizer is None and model is None else tokenizer,
            trust_remote_code, allow_pickle,
        )
        self._model: LanguageModel | None = None
        self._ekfac: Ekfac | None = None
        self._codes: Codes | None = None
        self._segments: list[tuple[Segment, vectors.CodeIndex, np.ndarray]] | None = None

    def __len__(self) -> int:
        return self.manifest.sequences

    # ---- what is asked

    def search(
        self, prompt: str | None = None, completion: str | None = None, *,
        token_ids: Sequence[int] | None = None, labels: Sequence[int] | None = None,
        messages: list[dict[str, Any]] | None = None, k: int | None = None,
        shortlist: int | str | None = None, opponents: bool = False,
        train_sequences: int | None = None,
    ) -> Result:
        """The k sequences with the most positive influence on log p(completion | prompt).

        The query is a prompt and a completion (without one, the model's own greedy continuation),
        or `token_ids` with `labels` (−100 where nothing is scored), or chat `messages` whose last
        is scored. `k` defaults to min(20, N), `shortlist` to min(N, max(1000, 10 k)); "all"
        rescores every sequence. With `opponents`, the most negative influence.
        Interrupted (Ctrl-C) while rescoring, it returns what is exact so far.
        Raises InputError for an unusable query, IndexMismatchError for another model.
        """
        query = self.make_query(prompt, completion, token_ids, labels, messages)
        return drain(self.stages(query, k=k, shortlist=shortlist, opponents=opponents,
                                 train_sequences=train_sequences))

    def rescore(
        self, prompt: str | None = None, completion: str | None = None, *, ids: Iterable[int],
        token_ids: Sequence[int] | None = None, labels: Sequence[int] | None = None,
        messages: list[dict[str, Any]] | None = None, train_sequences: int | None = None,
    ) -> list[Hit]:
        """Exact influence of the named sequences, in the order given. Raises like `search`."""
        query = self.make_query(prompt, completion, token_ids, labels, messages)
        return [hit for batch in self.rescore_stream(query, ids, train_sequences) for hit in batch]

    def rescore_stream(
        self, query: Query, ids: Iterable[int], train_sequences: int | None = None
    ) -> Iterator[list[Hit]]:
        """Like `rescore`, a chunk at a time."""
        n_train = self._n_train(train_sequences)
        wanted = [self._known(one) for one in ids]
        target = self._prepare(query)
        all_codes = self._code_scores(target.vector)
        for first in range(0, len(wanted), LARGEST_CHUNK):
            chunk = wanted[first : first + LARGEST_CHUNK]
            sequences = self._records(chunk)
            by_position: dict[int, Scored] = {}
            for found in self._rescore(target, sequences):
                by_position.update(found)
            codes = all_codes[chunk]
            yield [
                self._hit(sequences[place], by_position[place], float(codes[place]), -1, n_train)
                for place in range(len(chunk))
            ]

    def make_query(
        self, prompt: str | None = None, completion: str | None = None,
        token_ids: Sequence[int] | None = None, labels: Sequence[int] | None = None,
        messages: list[dict[str, Any]] | None = None,
    ) -> Query:
        """Tokenise and check a query. Raises InputError, before anything is computed."""
        return make_query(self.model, prompt, completion, token_ids, labels, messages)

    # ---- the stages

    def stages(
        self, query: Query, *, k: int | None = None, shortlist: int | str | None = None,
        opponents: bool = False, train_sequences: int | None = None,
    ) -> Iterator[Stage]:
        """Search, yielding a Stage as each step ends; the last one holds the result."""
        total = self.manifest.sequences
        k, length = _sizes(k, shortlist, total)
        n_train = self._n_train(train_sequences)
        seconds: dict[str, float] = {}
        clock = _Clock(seconds)

        # 1) the query's gradient, preconditioned, as a vector and in full
        target = self._prepare(query)
        clock.lap("gradient")
        yield Stage("gradient", query=query)

        # 2) every sequence's code score; the best make the shortlist
        sign = -1.0 if opponents else 1.0
        codes = self._code_scores(target.vector)
        order = np.lexsort((np.arange(total), -sign * codes))
        sequences = self._records([int(one) for one in order[:length]])
        clock.lap("scan")
        yield Stage("approximate", 0, length, query, [
            self._hit(record, None, float(codes[record.id]), rank, n_train)
            for rank, record in enumerate(sequences[:k], 1)
        ])

        # 3) exact influence of the shortlist, best first, and of the background
        scored: dict[int, Scored] = {}
        background: list[tuple[int, float]] = []
        complete = 0
        interrupted = False
        ends = set(chunk_ends(length))
        held: dict[int, Scored] = {}  # those whose terms are still there
        try:
            for found in self._rescore(target, sequences):
                scored.update(found)
                held.update(found)
                forget_terms(held, sign, max(256, 4 * k))
                complete = len(scored) if len(scored) in ends else complete
                yield Stage("exact", len(scored), length, query)
            background = self._background(target)
        except KeyboardInterrupt:
            interrupted = True
        clock.lap("rescore")

        # 4) the top k and how complete it is; an interrupted shortlist is as long as it got
        cutoff = float(sign * codes[order[complete]]) if complete < total else None
        result = self._conclude(
            query, target, sequences[:complete], scored, codes, cutoff, sign, k, n_train, background
        )
        result.shortlist, result.rescored, result.seconds = length, complete, seconds
        result.interrupted = interrupted
        result.train_sequences_given = bool(train_sequences or self.manifest.train_sequences)
        if interrupted:
            result.warnings.append(f"interrupted: {complete} of {length} sequences are exact")
        clock.lap("conclude")
        yield Stage("result", complete, length, query, result.hits, result)

    def _conclude(
        self, query: Query, target: _Target, sequences: list[Record], scored: dict[int, Scored],
        codes: np.ndarray, cutoff: float | None, sign: float, k: int, n_train: int,
        background: list[tuple[int, float]],
    ) -> Result:
        ranked = sorted(range(len(sequences)),
                        key=lambda place: (-sign * scored[place].influence, sequences[place].id))
        groups = fold_duplicates(ranked, sequences)
        influence = np.array([sign * scored[group[0]].influence for group in groups])
        ids = [sequences[group[0]].id for group in groups]
        norms = self._norms()
        c, size = self.manifest.calibration["c"], len(target.vector)
        query_norm = float(np.linalg.norm(target.vector))
        error = score_error(c, query_norm, norms[ids], size) if ids else np.zeros(0)
        estimate = 1.0 if cutoff is None else estimated_recall(
            inclusion_probability(influence, error, cutoff), k)
        truth = np.array([value for _, value in background])
        c_here = self._error_here(background, codes, query_norm, size)
        warnings = []
        wrong = sum(value <= 0 for value in influence[:k])
        if wrong:
            warnings.append(
                f"{wrong} of these hits have influence of the other sign: fewer than {k} "
                f"sequences of the shortlist are {'opponents' if sign < 0 else 'proponents'}"
            )
        if c_here is not None and not c / ODD_CALIBRATION < c_here < c * ODD_CALIBRATION:
            warnings.append(
                f"on this query the code's error is {c_here / c:.1f} times what the index was "
                "calibrated to, so the recall statement is "
                + ("too hopeful" if c_here > c else "too cautious") + "; a longer --shortlist helps"
            )
        hits = []
        for group in groups[:k]:
            record, own = sequences[group[0]], scored[group[0]]
            if own.terms is None:
                [[(_, own)]] = self._rescore(target, [record])
            rank = group[0] + 1
            hit = self._hit(record, own, float(codes[record.id]), rank, n_train)
            hit.duplicates = [sequences[place].id for place in group[1:]]
            if len(truth):
                hit.percentile = float(np.mean(truth <= hit.influence) * 100)
            hits.append(hit)
        return Result(
            query=query, hits=hits, recall=Recall(k, estimate, cutoff, c, c_here),
            sequences=self.manifest.sequences, shortlist=0, rescored=0, train_sequences=n_train,
            train_sequences_given=False, opponents=sign < 0, layers=self.manifest.layers,
            seconds={}, warnings=warnings, model=self.model.source.name,
        )

    # ---- the parts

    @property
    def model(self) -> LanguageModel:
        """The model, loaded and checked at first use. Raises IndexMismatchError for another."""
        if self._model is None:
            facts = self.manifest
            if not self._model_given and facts.model["files"] is None:
                raise InputError(
                    "this index was built from a model object; pass the model (--model PATH, or "
                    "gradindex.open(index, model=…))."
                )
            model = self._load_model()
            dtype = str(model.dtype).removeprefix("torch.")
            if dtype != facts.dtype:
                raise IndexMismatchError(
                    f"the model is loaded as {dtype}, the index was built with {facts.dtype}. "
                    f"Load it with dtype={facts.dtype}."
                )
            check_identity(model, facts.model)
            found = tokenizer_digest(model.tokenizer)
            if model.tokenizer is not None and facts.model["tokenizer"] not in (None, found):
                raise IndexMismatchError(
                    f"the tokenizer (digest {str(found)[:12]}) is not the one the index was built "
                    f"with ({facts.model['tokenizer'][:12]}). Pass the right one with --tokenizer."
                )
            self._model = model
        return self._model

    def _load_model(self) -> LanguageModel:
        if not isinstance(self._source.model, (str, Path)):
            return self._source.load()
        try:
            return self._source.load(self._device, self.manifest.dtype)
        except InputError as error:
            if self._model_given or "--device" in str(error):
                raise
            raise InputError(
                f"{error} At the build it was {self._source.name}; if it was moved, say where it "
                "is with --model PATH (gradindex.open(index, model=…))."
            ) from None

    @property
    def ekfac(self) -> Ekfac:
        """The curvature of every tracked module."""
        if self._ekfac is None:
            self._ekfac = ekfac_files.load(
                self.path / "curvature", self.manifest.tracked, self.model.device,
                self.model.accumulate,
            )
        return self._ekfac

    @property
    def codes(self) -> Codes:
        """The code's projections. Raises DamagedIndexError if they can't be drawn again."""
        if self._codes is None:
            facts = self.manifest.code
            self._codes = Codes(self.manifest.tracked, self.ekfac, CodeSettings(
                facts["length"], facts["width"], facts["seed"], facts["damping"]
            ))
            if self._codes.digest != facts["digest"]:
                raise DamagedIndexError(
                    "the random numbers of the code came out differently from the build's "
                    f"(digest {self._codes.digest[:12]}, expected {facts['digest'][:12]}). Use the "
                    f"numpy of the build ({self.manifest.versions['numpy']})."
                )
        return self._codes

    def _n_train(self, given: int | None) -> int:
        if given is not None and given < 1:
            raise InputError(f"--train-sequences {given}: expected a number above 0.")
        return given or self.manifest.train_sequences or self.manifest.sequences

    def _known(self, one: Any) -> int:
        """A sequence's id as a plain int. Raises InputError where there is no such sequence."""
        try:
            number = -1 if isinstance(one, bool) else operator.index(one)
        except TypeError:
            number = -1
        if not 0 <= number < self.manifest.sequences:
            raise InputError(
                f"no sequence has the id {one!r}; expected 0 to {self.manifest.sequences - 1}."
            )
        return number

    def _error_here(
        self, background: list[tuple[int, float]], codes: np.ndarray, query_norm: float, size: int
    ) -> float | None:
        """c measured on this query's background sample, or None where that says too little."""
        there = [one for one, _ in background]
        unit = score_error(1.0, query_norm, self._norms()[there], size)
        error = codes[there] - np.array([value for _, value in background])
        real = unit > 0
        if real.sum() < SMALLEST_SAMPLE:
            return None
        return float(np.sqrt(np.mean((error[real] / unit[real]) ** 2)))

    def _prepare(self, query: Query) -> _Target:
        scored = np.array(query.labels) != UNSCORED
        batch = make_batch([(np.array(query.tokens, np.int32), scored)], self.model.device)
        coordinates, log_p = query_coordinates(
            self.model, self.manifest.tracked, self.ekfac, batch, self.manifest.damping
        )
        # log p of token t stands at position t − 1, where it is predicted
        query.token_log_p = [0.0, *(float(value) for value in log_p[:-1])]
        vector = self.codes.query_vector(coordinates).float().cpu().numpy()
        if not np.isfinite(vector).all():
            raise InputError("the query's gradient is not finite. Try an index with "
                             "--dtype float32.")
        return _Target(query, vector, precondition(self.ekfac, coordinates))

    def _open_segments(self) -> list[tuple[Segment, vectors.CodeIndex, np.ndarray]]:
        if self._segments is None:
            self._segments = []
            for segment in self.manifest.segments:
                folder = segment_folder(self.path, segment.name)
                index = vectors.CodeIndex.read(
                    folder / "vectors.faiss", self.manifest.code["length"], segment.rows
                )
                norms = np.load(io.BytesIO((folder / "norms.npy").read_bytes()), allow_pickle=False)
                self._segments.append((segment, index, norms))
        return self._segments

    def _code_scores(self, vector: np.ndarray) -> np.ndarray:
        """The code score of every sequence, float64, by id."""
        segments = self._open_segments()
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            parts = list(pool.map(lambda opened: opened[1].scores(vector), segments))
        return np.concatenate(parts).astype(np.float64)

    def _norms(self) -> np.ndarray:
        return np.concatenate([norms for _, _, norms in self._open_segments()])

    def _records(self, ids: list[int]) -> list[Record]:
        found: dict[int, Record] = {}
        for segment in self.manifest.segments:
            here = [one for one in ids if segment.first <= one < segment.first + segment.rows]
            if here:
                path = segment_folder(self.path, segment.name) / "records.lmdb"
                rows = [one - segment.first for one in here]
                found.update(zip(here, read_records(path, rows), strict=True))
        return [found[one] for one in ids]

    def _rescore(
        self, target: _Target, sequences: list[Record]
    ) -> Iterator[list[tuple[int, Scored]]]:
        return rescore(self.model, self.manifest.tracked, target.preconditioned, sequences,
                       self._batch_tokens or self.manifest.batch_tokens)

    def _background(self, target: _Target) -> list[tuple[int, float]]:
        """(id, exact influence) of a fixed random sample of the index."""
        total = self.manifest.sequences
        raw = np.random.Philox(
            key=np.array([self.manifest.code["seed"], 4], dtype=np.uint64)
        ).random_raw(4 * BACKGROUND)
        drawn = dict.fromkeys(int(value) for value in raw % np.uint64(total))
        ids = sorted(list(drawn)[:BACKGROUND])
        sequences = self._records(ids)
        return [
            (sequences[place].id, one.influence)
            for found in self._rescore(target, sequences) for place, one in found
        ]

    def _hit(
        self, record: Record, scored: Scored | None, code_score: float, rank: int, n_train: int
    ) -> Hit:
        return make_hit(self.manifest, self.model.tokenizer, record, scored, code_score, rank,
                        n_train)


def drain(stages: Iterator[Stage], follow: Callable[[Stage], None] | None = None) -> Result:
    """Run a search to its end, showing each stage to `follow`.

    A KeyboardInterrupt, wherever it strikes during rescoring, is handed to the search, which then
    concludes from what is exact.
    """
    result = None
    while result is None:
        try:
            stage = next(stages)
            if follow is not None:
                follow(stage)
        except KeyboardInterrupt:
            assert isinstance(stages, Generator)
            stage = stages.throw(KeyboardInterrupt())
        result = stage.result
    return result


class _Clock:
    def __init__(self, seconds: dict[str, float]):
        self._seconds = seconds
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[name] = round(now - self._since, 3)
        self._since = now


def _sizes(k: int | None, shortlist: int | str | None, total: int) -> tuple[int, int]:
    if k is not None and not 1 <= k <= total:
        raise InputError(f"-k {k}: expected 1 to {total}, the sequences in the index.")
    k = min(DEFAULT_HITS, total) if k is None else k
    if shortlist == "all":
        return k, total
    if shortlist is None:
        return k, min(total, max(DEFAULT_SHORTLIST, 10 * k))
    try:
        length = int(shortlist)
    except ValueError:
        raise InputError(f"--shortlist {shortlist}: expected a number or all.") from None
    if length < k:
        raise InputError(f"--shortlist {length}: expected at least -k, {k}.")
    return k, min(length, total)
