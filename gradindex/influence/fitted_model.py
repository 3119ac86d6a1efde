"""The model that an index belongs to, and what was fitted to it: its curvature and its codes."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gradindex.errors import DamagedIndexError, IndexMismatchError, InputError
from gradindex.influence import curvature as ekfac_files
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.curvature import Ekfac, FiledEkfac
from gradindex.memory import Allowance
from gradindex.model.chat_template import with_chat_template
from gradindex.model.config import vocabulary_size
from gradindex.model.devices import DEVICE
from gradindex.model.identity import check_identity, tokenizer_digest
from gradindex.model.load_tokenizer import load_tokenizer
from gradindex.model.members import load_member
from gradindex.model.model_source import ModelSource
from gradindex.model.network import LanguageModel
from gradindex.objective.objective import Objective, objective_of
from gradindex.storage.integrity import CheckedFiles
from gradindex.storage.layout import curvature_file
from gradindex.storage.manifest import Manifest, expected_identity


class FittedModel:
    """The model of an index with its curvature and codes, each loaded and checked at first use.

    `source` says where the model is now, if not where it was at the build, on what device it is to
    run, and how much memory may be used (`allowance`). `absent` says of other members that can't be
    loaded why: the others answer.
    """

    def __init__(self, manifest: Manifest, files: CheckedFiles, source: ModelSource):
        self.manifest = manifest
        self._files = files
        self._model_named = source.model is not None
        self._source = source.at_build(
            manifest.model["name"], manifest.model["revision"], manifest.model["tokenizer_name"],
            manifest.plan.adapter, manifest.task,
            {name: (facts["name"], facts["revision"]) for name, facts in manifest.also.items()})
        self._model: LanguageModel | None = None
        self.absent: dict[str, str] = {}
        self._tokenizer: Any | None = None
        self._tokenizer_read = False
        self._config: Any = None
        self._allowance: Allowance | None = None
        self._ekfac: Ekfac | None = None
        self._codes: Codes | None = None

    @property
    def source(self) -> ModelSource:
        """Where the model and its tokenizer come from."""
        return self._source

    @property
    def model(self) -> LanguageModel:
        """The model, loaded and checked at first use. Raises IndexMismatchError for another."""
        if self._model is None:
            manifest = self.manifest
            source = replace(self._source, tokenizer=self.tokenizer)  # which isn't read twice
            with self._explained():
                # A model object is never cast behind its owner's back: another dtype is refused.
                model = LanguageModel.load(source, "auto" if source.is_object else manifest.dtype)
            dtype = str(model.dtype).removeprefix("torch.")
            if dtype != manifest.dtype:
                raise IndexMismatchError(
                    f"the model is loaded as {dtype}, the index was built with {manifest.dtype}. "
                    f"Load it with dtype={manifest.dtype}, or build a new index with --dtype "
                    f"{dtype}."
                )
            for name, other in self._others(model).items():
                model.others[name] = other
            check_identity(model, expected_identity(manifest))
            vocabulary = vocabulary_size(model.network.config)
            if vocabulary != manifest.vocabulary:
                raise IndexMismatchError(
                    f"the model has {vocabulary} tokens, the index was built with "
                    f"{manifest.vocabulary}. Pass the right one with --model."
                )
            self._model = model
        return self._model

    def _others(self, model: LanguageModel) -> dict[str, LanguageModel]:
        """The other members; why one can't be loaded is noted in `absent`."""
        others = {}
        for name, given in self._source.also.items():
            dtype = str(model.dtype).removeprefix("torch.")
            try:
                if self.manifest.also[name]["files"] is None and isinstance(given, str):
                    raise InputError("it was a model object; pass it again "
                                     f"(gradindex.open(index, model={{\"{name}\": …}})).")
                others[name] = load_member(model, name, dtype)
            except InputError as error:
                # which is of a build's flag; and here nothing is built
                self.absent[name] = str(error).removeprefix(f"--also {name}: ")
        return others

    @property
    def tokenizer(self) -> Any | None:
        """The model's tokenizer, or None. Raises IndexMismatchError for another than the build's.
        """
        if not self._tokenizer_read:
            with self._explained():
                self._config = self._source.load_config()
                tokenizer = with_chat_template(
                    load_tokenizer(self._source), self.manifest.plan.chat_template)
            expected, digest = self.manifest.model["tokenizer"], tokenizer_digest(tokenizer)
            # An index of token files may have been built without one, and any may read it then.
            if tokenizer is not None and expected not in (None, digest):
                raise IndexMismatchError(
                    f"the tokenizer (digest {str(digest)[:12]}) is not the one the index was built "
                    f"with ({expected[:12]}). Pass the right model with --model, or its tokenizer "
                    "with --tokenizer."
                )
            self._tokenizer, self._tokenizer_read = tokenizer, True
        return self._tokenizer

    @property
    def config(self) -> Any:
        """The model's configuration, which needs none of its weights."""
        _ = self.tokenizer  # read with it
        return self._config

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Add to an error about a missing model where it was at the build. Raises InputError."""
        # A model object left no name: nothing can be looked for before the user passes it again.
        if not self._model_named and self.manifest.model["files"] is None:
            raise InputError(
                "this index was built from a model object; pass the model (--model PATH, or "
                "gradindex.open(index, model=…))."
            )
        try:
            yield
        except InputError as error:
            # a device that isn't there has nothing to do with where the model lies
            if self._model_named or error.argument == DEVICE:
                raise
            raise InputError(
                f"{error} At the build it was {self._source.name}; if it was moved, say where it "
                "is with --model PATH (gradindex.open(index, model=…))."
            ) from None

    @property
    def objective(self) -> Objective:
        """What the model is trained for; the model itself isn't loaded for it."""
        return objective_of(self._source.task, None)

    @property
    def allowance(self) -> Allowance:
        """What memory may be used beside the model. Raises ResourceError where it is too little."""
        if self._source.max_memory is None:
            return Allowance()
        if self._allowance is None:
            width = self.model.accumulate.itemsize
            # One module's curvature has to fit, and as much again for a batch: whatever else is
            # read, is read a module at a time.
            largest, entries = max(
                ((module, ekfac_files.file_entries(module, self._covariance_blocks))
                 for module in self.manifest.modules), key=lambda pair: pair[1])
            self._allowance = Allowance.beside(
                self.model.bytes, self._source.max_memory, width * entries,
                f"the curvature of {largest.name}", width * entries)
        return self._allowance

    @property
    def _covariance_blocks(self) -> int:
        return self.manifest.plan.covariance_blocks

    @property
    def ekfac(self) -> Ekfac:
        """The curvature of every tracked module by name, each read when it is first used."""
        if self._ekfac is None:
            self._ekfac = FiledEkfac(
                lambda module, device: self._files.tensors(curvature_file(module), device),
                self.manifest.modules,
                self.model.device_of, self.model.accumulate, self._covariance_blocks,
                self.allowance.curvature,
            )
        return self._ekfac

    @property
    def codes(self) -> Codes:
        """What makes vectors of gradients. Raises DamagedIndexError if it can't be drawn again."""
        if self._codes is None:
            facts = self.manifest.code
            self._codes = Codes(self.manifest.modules, self.ekfac, CodeSettings(
                facts["length"], facts["width"], facts["seed"], facts["damping"],
                facts["recipe"]
            ))
            # The random numbers aren't stored. Others than the build's would give scores that look
            # as good as any and mean nothing.
            if self._codes.digest != facts["digest"]:
                raise DamagedIndexError(
                    "the random numbers of the code came out differently from the build's "
                    f"(digest {self._codes.digest[:12]}, expected {facts['digest'][:12]}). Use the "
                    f"numpy of the build ({self.manifest.versions['numpy']})."
                )
        return self._codes
