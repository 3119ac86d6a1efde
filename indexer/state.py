"""How far a build or an append has come: `build.json` and `append.json`.

Each holds a plan (what was asked for, resolved) until the manifest takes its place. Its names in
JSON are those of its first version, so that what an earlier gradindex began goes on.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

import pydantic
import torch
from typing_extensions import TypedDict

from gradindex.errors import DamagedIndexError, InputError
from gradindex.model.identity import check_identity, identify
from gradindex.model.network import LanguageModel
from gradindex.progress import Progress
from gradindex.storage import sealed_json
from gradindex.storage.build_plan import DataFacts, Plan
from gradindex.storage.files import TEMPORARY, atomic_write
from gradindex.storage.integrity import read_inside
from gradindex.storage.layout import APPEND, BUILD, CURVATURE, CURVATURE_PARTIAL, WRITER
from gradindex.storage.locks import is_lock
from gradindex.storage.manifest import exists as index_exists
from gradindex.storage.manifest import load as load_manifest
from gradindex.storage.upgrades import newest_plan
from gradindex.terminal import shell_word
from indexer.read.corpus import CorpusFacts

LARGEST_STATE = 1 << 26  # bytes of either file
LONGEST_SHOWN = 200  # characters of a value, where two plans differ

Threads = Annotated[int, pydantic.Field(gt=0, le=1 << 16)]


@dataclass(frozen=True)
class RequestFacts:
    """The part of a build's request that goes into the manifest without affecting the codes."""

    task: str  # the kind of the records, by its name in the first format
    train_sequences: int | None
    max_bad: float
    tokenizer_name: str | None


@dataclass(frozen=True)
class ModelIdentity:
    """What the model was when it was first loaded, see `identity.identify`."""

    files: str | None
    tensors: str
    config: dict[str, Any]
    also: dict[str, "ModelIdentity"] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LanguageModel) -> "ModelIdentity":
        """The identity of a model that is loaded."""
        return _IDENTITY.validate_python(identify(model))


@dataclass
class Settled:
    """What a build chose for good where its plan left it open, and measured on the way.

    `batch_tokens` are the padded tokens of a batch. `bits` is K, None until it is known.
    `influence` [q, s] are the exact scores that tell it (`calibrate.py`), None until they are
    there; None among them for a gradient that isn't finite. `recipe` is that of the codes
    (`codes.RECIPES`): what an earlier version began to encode goes on as it began.
    """

    batch_tokens: int
    bits: int | None
    influence: list[list[float | None]] | None = None
    recipe: int = 2  # as long as there was no other to choose


# ---- a build


@dataclass
class BuildState:
    """`build.json`: `corpus`, `model`, `request` and `settled` are None until they are known.

    `saved_plan` is the plan as it lies there, with what later versions added: two are compared in
    this form.
    """

    path: Path
    saved_plan: dict[str, Any]
    threads: int
    corpus: CorpusFacts | None = None
    model: ModelIdentity | None = None
    request: RequestFacts | None = None
    settled: Settled | None = None

    @classmethod
    def open(
        cls, index: Path, plan: Plan, progress: Progress, anew: bool = True
    ) -> "BuildState":
        """The state of the build in `index`, or a new one. Raises as `find` does; ResourceError."""
        state = cls.find(index, plan, progress, anew)
        if state is None:
            # as many threads as now, for good: each number of them sums in an order of its own
            state = cls(index / BUILD, plan.to_dict(), torch.get_num_threads())
            state.save()
        return state

    @classmethod
    def resumed(cls, index: Path) -> "BuildState | None":
        """The state of the build in `index` as it is now, whatever its plan; None for none."""
        path = index / BUILD
        if not path.is_file():
            return None
        stored = _read_state(path, _BUILD)
        state = cls(path, newest_plan(stored["plan"]), stored["threads"], stored["corpus"],
                    stored["model"], stored.get("asked"), stored.get("settled"))
        plan = state.saved_plan  # of a build begun before anything was left open
        if "settled" not in stored and isinstance(plan.get("batch_tokens"), int):
            state.settled = Settled(plan["batch_tokens"], plan.get("bits"))
        return state

    @classmethod
    def joined(cls, index: Path, plan: Plan) -> "BuildState | None":
        """The state of a build that another process began, once its data and model are known.

        Raises InputError for another plan, if something was fitted: else it may yet begin anew.
        """
        state = cls.resumed(index)
        if state is None:
            return None
        # before that the first shard may begin anew with this plan, so it is waited for
        if _is_fitted(index):
            _refuse_difference(index, state.saved_plan, plan.to_dict())
        known = None not in (state.corpus, state.model, state.settled)
        return state if known and not _differences(state.saved_plan, plan.to_dict()) else None

    @classmethod
    def find(
        cls, index: Path, plan: Plan, progress: Progress, anew: bool = True
    ) -> "BuildState | None":
        """The state of the build in `index`, which may not exist; None where it begins anew.

        Another plan is adopted as long as nothing was fitted, so that a command that failed early
        can be corrected; afterwards, or where other processes may be at work (not `anew`), it is
        refused. Raises InputError.
        """
        current = plan.to_dict()
        if index_exists(index):
            _refuse_difference(index, load_manifest(index).plan.to_dict(), current)
            return cls(index / BUILD, current, torch.get_num_threads())
        state = cls.resumed(index)
        if state is not None:
            changes = _differences(state.saved_plan, current)
            if _is_fitted(index) or not anew or not changes:
                _refuse_difference(index, state.saved_plan, current)
                return state
            progress.say(f"starting over in {index}, where nothing was fitted yet: "
                         + "; ".join(changes))
        # what a killed process leaves before its first file is whole is no reason to refuse
        elif index.is_dir() and any(
                entry.name not in (BUILD + TEMPORARY, WRITER) and not is_lock(entry)
                for entry in index.iterdir()):
            raise InputError(
                f"{index} is not empty and holds no index. Give a new folder with -o, or empty it."
            )
        return None

    @property
    def plan(self) -> Plan:
        """The plan. Raises DamagedIndexError where it can't be read as one."""
        return Plan.from_dict(self.saved_plan)

    @property
    def batch_tokens(self) -> int:
        """The padded tokens of a batch, once they are settled."""
        assert self.settled is not None
        return self.settled.batch_tokens

    def reread_bits(self) -> int | None:
        """K as the first process wrote it down, None as long as it didn't."""
        assert self.settled is not None
        if self.settled.bits is None and (now := BuildState.resumed(self.path.parent)) is not None:
            self.settled = now.settled
        return self.settled.bits if self.settled is not None else None

    @property
    def influence(self) -> list[list[float | None]]:
        """The exact scores that calibrate the codes, once they are there."""
        assert self.settled is not None and self.settled.influence is not None
        return self.settled.influence

    @property
    def bits(self) -> int:
        """K, once it is settled."""
        assert self.settled is not None and self.settled.bits is not None
        return self.settled.bits

    @property
    def recipe(self) -> int:
        """How codes are made, once it is settled."""
        assert self.settled is not None
        return self.settled.recipe

    def save(self) -> None:
        """Write build.json. Raises ResourceError."""
        _write_state(self.path, self.saved_plan, self.threads, self.corpus, self.model,
                     self.request, self.settled)

    def check_model(self, model: LanguageModel) -> None:
        """Remember the weights' digest, or raise IndexMismatchError if they changed."""
        # the first process to get here; before the data are read, the model may yet be another
        if self.model is None or self.corpus is None:
            self.model = ModelIdentity.of(model)
            self.save()
        else:
            check_identity(model, asdict(self.model))


def _is_fitted(index: Path) -> bool:
    """Whether a build has fitted anything."""
    return (index / CURVATURE).is_dir() or any(
        (index / CURVATURE_PARTIAL).glob("*.safetensors"))


# ---- an append


@dataclass(frozen=True)
class AppendPlan:
    """What an append was asked for, and the id that its first sequence gets."""

    data: list[DataFacts]
    limit: int | None
    first: int


@dataclass
class AppendState:
    """`append.json`; the corpus is None until it was read."""

    path: Path
    plan: AppendPlan
    threads: int
    corpus: CorpusFacts | None = None

    @classmethod
    def open(cls, index: Path, plan: AppendPlan, threads: int) -> "AppendState":
        """The state of the append to `index`, or a new one. Raises InputError for another plan."""
        state = unfinished_append(index, plan.first)
        if state is None:
            state = cls(index / APPEND, plan, threads)
            state.save()
        elif changes := _differences(asdict(state.plan), asdict(plan)):
            raise InputError(
                f"{index} has an unfinished append of other data ({'; '.join(changes)}). Run "
                "that command again to finish it, or drop what it did with --discard."
            )
        return state

    @classmethod
    def resumed(cls, index: Path) -> "AppendState | None":
        """The state of the append to `index`, finished or not; None for none."""
        path = index / APPEND
        if not os.path.lexists(path):  # a link counts as there, and is refused when it is read
            return None
        stored = _read_state(path, _APPEND)
        return cls(path, stored["plan"], stored["threads"], stored["corpus"])

    def save(self) -> None:
        """Write append.json. Raises ResourceError."""
        _write_state(self.path, asdict(self.plan), self.threads, self.corpus)


def unfinished_append(index: Path, next_id: int) -> AppendState | None:
    """The append under way, if there is one.

    One that begins below `next_id` was killed right after its commit: it is finished.
    """
    state = AppendState.resumed(index)
    return state if state is not None and state.plan.first == next_id else None


def finished_append(index: Path, plan: AppendPlan) -> bool:
    """Whether the append of `plan` was killed right after its commit: nothing is left to do.

    Its `first` is below that of `plan`, which is the index's next id.
    """
    # or the same data would be in the index twice
    state = AppendState.resumed(index)
    return state is not None and state.plan.first != plan.first and \
        replace(state.plan, first=plan.first) == plan


# ---- the files


# what the files hold, under the names of their first version
class _StoredBuild(TypedDict):
    plan: dict[str, Any]
    threads: Threads
    corpus: CorpusFacts | None
    model: ModelIdentity | None
    asked: NotRequired[RequestFacts | None]
    settled: NotRequired[Settled | None]


class _StoredAppend(TypedDict):
    plan: AppendPlan
    threads: Threads
    corpus: CorpusFacts | None


_IDENTITY: pydantic.TypeAdapter[ModelIdentity] = pydantic.TypeAdapter(ModelIdentity)
_BUILD: pydantic.TypeAdapter[_StoredBuild] = pydantic.TypeAdapter(_StoredBuild)
_APPEND: pydantic.TypeAdapter[_StoredAppend] = pydantic.TypeAdapter(_StoredAppend)
_Stored = TypeVar("_Stored", _StoredBuild, _StoredAppend)


def _read_state(path: Path, adapter: pydantic.TypeAdapter[_Stored]) -> _Stored:
    """What a file holds, checked. Raises DamagedIndexError."""
    try:
        # the file may come from a stranger, with an index that was copied: no link, no size, and
        # nothing that isn't what we write
        content = read_inside(path.parent, path.name, LARGEST_STATE)
        return adapter.validate_json(sealed_json.check(sealed_json.parse(content)))
    except ValueError as error:
        raise DamagedIndexError(
            f"{path} can't be read ({str(error).splitlines()[0][:120]}). It says how far a command "
            "came: drop an append with `gradindex append INDEX --discard`; begin a build again in "
            "another folder."
        ) from None


def _write_state(
    path: Path, plan: dict[str, Any], threads: int, corpus: CorpusFacts | None,
    model: ModelIdentity | None = None, request: RequestFacts | None = None,
    settled: Settled | None = None,
) -> None:
    # append.json has all fields too: earlier versions refuse one without
    content = {
        "plan": plan, "threads": threads, "corpus": corpus and asdict(corpus),
        "model": model and asdict(model), "asked": request and asdict(request),
        "settled": settled and asdict(settled),
    }
    atomic_write(path, sealed_json.with_digest(content))


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Where two plans differ, an entry each."""
    return [
        f"{name}: {_shown(saved.get(name))} before, {_shown(current.get(name))} now"
        for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)
    ]


def _shown(value: Any) -> str:
    """A value of a plan, for an error; of a chat template only what tells it."""
    if isinstance(value, str) and len(value) > LONGEST_SHOWN:
        return f"{value[:LONGEST_SHOWN // 2]!r}… ({len(value):,} characters)"
    return repr(value)


def _refuse_difference(index: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise InputError where a plan is another than the one that was begun."""
    changes = _differences(saved, current)
    if changes:
        raise InputError(
            f"{index} was begun with another command ({'; '.join(changes)}). Run the first command "
            "again to go on, or give another folder with -o. To add documents to a finished index: "
            f"gradindex append {shell_word(index)} DATA."
        )
