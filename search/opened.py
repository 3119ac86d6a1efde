"""What a search reads: the manifest at once, model, curvature, codes and records at first use."""

import contextlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradindex import curvature as ekfac_files
from gradindex import manifest, tfidf, vectors
from gradindex.codes import Codes, CodeSettings
from gradindex.curvature import Ekfac
from gradindex.errors import DamagedIndexError, IndexMismatchError, InputError
from gradindex.files import sha256
from gradindex.manifest import segment_folder
from gradindex.model import LanguageModel, ModelSource, check_identity, tokenizer_digest
from gradindex.records import Record
from gradindex.records import read as read_records

BACKGROUND = 64  # random sequences rescored with every query
UNPACK_FROM = 4  # queries: from here on unpacking the codes once is faster than scanning for each


class OpenIndex:
    """An index folder and the model it belongs to.

    Raises DamagedIndexError for missing or changed files, InputError where there is no index.
    """

    def __init__(
        self, path: Path, model: Any, tokenizer: Any, device: str, trust_remote_code: bool,
        allow_pickle: bool,
    ):
        self.path = path
        self.manifest = manifest.load(path)
        self.digest = sha256(path / manifest.NAME)[:16]
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
        self._tokenizer: Any | None = None
        self._tokenizer_read = False
        self._config: Any = None
        self._ekfac: Ekfac | None = None
        self._codes: Codes | None = None
        self._segments: list[vectors.CodeIndex] | None = None
        self._norms: np.ndarray | None = None
        self._tokens: tfidf.TokenMatrix | None = None

    @property
    def model(self) -> LanguageModel:
        """The model, loaded and checked at first use. Raises IndexMismatchError for another."""
        if self._model is None:
            facts = self.manifest
            self._source.tokenizer = self.tokenizer  # not read twice
            with self._explained():
                model = self._source.load(self._device,
                                          "auto" if self._is_object else facts.dtype)
            dtype = str(model.dtype).removeprefix("torch.")
            if dtype != facts.dtype:
                raise IndexMismatchError(
                    f"the model is loaded as {dtype}, the index was built with {facts.dtype}. "
                    f"Load it with dtype={facts.dtype}."
                )
            check_identity(model, facts.model)
            self._model = model
        return self._model

    @property
    def tokenizer(self) -> Any | None:
        """The model's tokenizer, if it has one. Raises IndexMismatchError for another."""
        if not self._tokenizer_read:
            with self._explained():
                self._config = self._source.load_config()
                tokenizer = self._source.load_tokenizer()
            expected, found = self.manifest.model["tokenizer"], tokenizer_digest(tokenizer)
            if tokenizer is not None and expected not in (None, found):
                raise IndexMismatchError(
                    f"the tokenizer (digest {str(found)[:12]}) is not the one the index was built "
                    f"with ({expected[:12]}). Pass the right model with --model, or its tokenizer "
                    "with --tokenizer."
                )
            self._tokenizer, self._tokenizer_read = tokenizer, True
        return self._tokenizer

    @property
    def config(self) -> Any:
        """The model's configuration."""
        _ = self.tokenizer  # read with it
        return self._config

    @property
    def _is_object(self) -> bool:
        return not isinstance(self._source.model, (str, Path))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Where the model can't be had, say what it was and how to say where it is."""
        if not self._model_given and self.manifest.model["files"] is None:
            raise InputError(
                "this index was built from a model object; pass the model (--model PATH, or "
                "gradindex.open(index, model=…))."
            )
        try:
            yield
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

    def load(self) -> None:
        """Read the model, the curvature and the codes now."""
        _ = self.codes, self.segments(), self.norms

    def segments(self) -> list[vectors.CodeIndex]:
        """The codes of every segment, read at first use."""
        if self._segments is None:
            length = self.manifest.code["length"]
            self._segments = [
                vectors.CodeIndex.read(
                    segment_folder(self.path, segment.name) / "vectors.faiss", length, segment.rows
                ) for segment in self.manifest.segments
            ]
        return self._segments

    def code_scores(self, queries: np.ndarray) -> np.ndarray:
        """The code score of every sequence, by id, for query vectors [q, K]: float32 [q, N]."""
        codes = self.segments()
        if len(queries) < UNPACK_FROM:
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                parts = list(pool.map(
                    lambda one: np.stack([one.scores(query) for query in queries]), codes))
        else:  # a matrix product, which has threads of its own
            parts = [one.many_scores(queries) for one in codes]
        return np.concatenate(parts, axis=1)

    @property
    def norms(self) -> np.ndarray:
        """‖v_m‖ of every sequence, by id: float64 [N]."""
        if self._norms is None:
            self._norms = np.concatenate([
                np.load(io.BytesIO(
                    (segment_folder(self.path, segment.name) / "norms.npy").read_bytes()
                ), allow_pickle=False) for segment in self.manifest.segments
            ]).astype(np.float64)
        return self._norms

    @property
    def tokens(self) -> tfidf.TokenMatrix:
        """Which tokens each sequence holds."""
        if self._tokens is None:
            self._tokens = tfidf.TokenMatrix([
                tfidf.read(segment_folder(self.path, segment.name) / "tokens.npz", segment.rows)
                for segment in self.manifest.segments
            ])
        return self._tokens

    def records(self, ids: list[int]) -> list[Record]:
        """What the sequences of these ids are, in that order."""
        starts = np.array([segment.first for segment in self.manifest.segments])
        homes = np.searchsorted(starts, ids, side="right") - 1
        found: dict[int, Record] = {}
        for home in np.unique(homes):
            segment = self.manifest.segments[home]
            here = [one for one, own in zip(ids, homes, strict=True) if own == home]
            path = segment_folder(self.path, segment.name) / "records.lmdb"
            rows = [one - segment.first for one in here]
            found.update(zip(here, read_records(path, rows), strict=True))
        return [found[one] for one in ids]

    def background(self) -> list[int]:
        """Ids of a fixed random sample of the index."""
        raw = np.random.Philox(
            key=np.array([self.manifest.code["seed"], 4], dtype=np.uint64)
        ).random_raw(4 * BACKGROUND)
        drawn = dict.fromkeys(int(value) for value in raw % np.uint64(self.manifest.sequences))
        return sorted(list(drawn)[:BACKGROUND])
