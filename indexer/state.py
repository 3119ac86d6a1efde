"""How far a build or an append has come: `build.json` or `append.json`.

It holds the plan (what was asked for, resolved) until the manifest takes its place.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pydantic
import torch
from typing_extensions import TypedDict

from gradindex.errors import DamagedIndexError, InputError
from gradindex.model.identity import check_identity, identify
from gradindex.model.network import LanguageModel
from gradindex.progress import Progress
from gradindex.storage import manifest, sealed_json
from gradindex.storage.files import TEMPORARY, atomic_write
from gradindex.storage.integrity import open_inside
from gradindex.storage.locks import NOTE, is_lock
from gradindex.storage.plan import Plan

BUILD, APPEND = "build.json", "append.json"
LARGEST = 1 << 26  # bytes of either


@dataclass
class State:
    """`build.json` or `append.json`: the plan and how far it has come."""

    path: Path
    plan: dict[str, Any]
    threads: int
    corpus: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    asked: dict[str, Any] | None = None  # besides the plan: what doesn't decide the codes

    @classmethod
    def open(
        cls, index: Path, plan: Plan, say: Progress, anew: bool = True
    ) -> "State":
        """The state of the build in `index`, or a new one. Raises as `find` does; ResourceError."""
        state = cls.find(index, plan, say, anew)
        if state is None:
            state = cls(index / BUILD, plan.to_dict(), torch.get_num_threads())
            state.save()
        return state

    @classmethod
    def resumed(cls, index: Path) -> "State | None":
        """The state of the build in `index` as it is now, whatever its plan; None for none."""
        path = index / BUILD
        return _stored(path) if path.is_file() else None

    @classmethod
    def joined(cls, index: Path, plan: Plan) -> "State | None":
        """The state of a build that another process began, once its data and model are known.

        Raises InputError for another plan, if something was fitted: else it may yet begin anew.
        """
        state = cls.resumed(index)
        if state is None:
            return None
        if _fitted(index):
            refuse_difference(index, state.plan, plan.to_dict())
        known = state.corpus is not None and state.model is not None
        return state if known and not _differences(state.plan, plan.to_dict()) else None

    @classmethod
    def find(
        cls, index: Path, plan: Plan, say: Progress, anew: bool = True
    ) -> "State | None":
        """The state of the build in `index`, which may not exist; None where it begins anew.

        Another plan is adopted as long as nothing was fitted, so that a command that failed early
        can be corrected; afterwards, or where other processes may be at work (not `anew`), it is
        refused. Raises InputError.
        """
        path, wanted = index / BUILD, plan.to_dict()
        if manifest.exists(index):
            refuse_difference(index, manifest.load(index).plan.to_dict(), wanted)
            return cls(path, wanted, torch.get_num_threads())
        if path.is_file():
            stored = _stored(path)
            if _fitted(index) or not anew or not _differences(stored.plan, wanted):
                refuse_difference(index, stored.plan, wanted)
                return stored
            say.say(f"starting over in {index}, where nothing was fitted yet: "
                    + "; ".join(_differences(stored.plan, wanted)))
        elif index.is_dir() and any(
                entry.name not in (BUILD + TEMPORARY, NOTE) and not is_lock(entry)
                for entry in index.iterdir()):
            raise InputError(
                f"{index} is not empty and holds no index. Give a new folder with -o, or empty it."
            )
        return None

    @classmethod
    def open_append(cls, index: Path, plan: dict[str, Any], threads: int) -> "State":
        """The state of the append to `index`, or a new one. Raises InputError for another plan."""
        path = index / APPEND
        stored = unfinished_append(index, plan["first"])
        if stored is not None:
            if changes := _differences(stored.plan, plan):
                raise InputError(
                    f"{index} has an unfinished append of other data ({'; '.join(changes)}). Run "
                    "that command again to finish it, or drop what it did with --discard."
                )
            return stored
        state = cls(path, plan, threads)
        state.save()
        return state

    @property
    def build_plan(self) -> Plan:
        """The plan of a build. Raises DamagedIndexError where it can't be read as one."""
        return Plan.from_dict(self.plan)

    def save(self) -> None:
        content = {"plan": self.plan, "threads": self.threads, "corpus": self.corpus,
                   "model": self.model, "asked": self.asked}
        atomic_write(self.path, sealed_json.sign(content))

    def check_model(self, model: LanguageModel) -> None:
        """Remember the weights' digest, or raise IndexMismatchError if they changed."""
        if self.model is None:
            self.model = identify(model)
            self.save()
        else:
            check_identity(model, self.model)


def _fitted(index: Path) -> bool:
    """Whether a build has fitted anything."""
    return (index / "curvature").is_dir() or any(
        (index / "curvature.partial").glob("*.safetensors"))


def unfinished_append(index: Path, next_id: int) -> State | None:
    """The append under way, if there is one.

    One that begins below `next_id` was killed right after its commit: it is finished.
    """
    path = index / APPEND
    stored = _stored(path) if os.path.lexists(path) else None
    return stored if stored is not None and stored.plan.get("first") == next_id else None


def finished_append(index: Path, plan: dict[str, Any]) -> bool:
    """Whether the append of `plan` was killed right after its commit: nothing is left to do.

    Its `first` is below that of `plan`, which is the index's next id.
    """
    path = index / APPEND
    stored = _stored(path) if os.path.lexists(path) else None
    return stored is not None and stored.plan.get("first") != plan["first"] and \
        not _differences({**stored.plan, "first": None}, {**plan, "first": None})


class _Stored(TypedDict):
    plan: dict[str, Any]
    threads: Annotated[int, pydantic.Field(gt=0, le=1 << 16)]
    corpus: dict[str, Any] | None
    model: dict[str, Any] | None
    asked: NotRequired[dict[str, Any] | None]


_ADAPTER: pydantic.TypeAdapter[_Stored] = pydantic.TypeAdapter(_Stored)


def _stored(path: Path) -> State:
    try:
        with os.fdopen(open_inside(path.parent, path.name), "rb") as file:
            content = _ADAPTER.validate_json(
                sealed_json.check(sealed_json.parse(file.read(LARGEST))))
    except ValueError as error:
        raise DamagedIndexError(
            f"{path} can't be read ({str(error).splitlines()[0][:120]}). It says how far a command "
            "came: drop an append with `gradindex append INDEX --discard`; begin a build again in "
            "another folder."
        ) from None
    return State(path, **content)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {before.get(name)!r} before, {now.get(name)!r} now"
        for name in sorted({*before, *now}) if before.get(name) != now.get(name)
    ]


def refuse_difference(index: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changes = _differences(before, now)
    if changes:
        raise InputError(
            f"{index} was begun with another command ({'; '.join(changes)}). Run the first command "
            "again to go on, or give another folder with -o. To add documents to a finished index: "
            f"gradindex append {index} DATA."
        )
