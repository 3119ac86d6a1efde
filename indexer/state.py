"""How far a build or an append has come: `build.json` or `append.json`.

It holds the plan (what was asked for, resolved) until the manifest takes its place.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradindex import manifest
from gradindex.errors import DamagedIndexError, InputError
from gradindex.files import TEMPORARY, atomic_write
from gradindex.locks import NOTE
from gradindex.model import LanguageModel, check_identity, identify
from gradindex.progress import Progress

BUILD, APPEND = "build.json", "append.json"


@dataclass
class State:
    """`build.json` or `append.json`: the plan and how far it has come."""

    path: Path
    plan: dict[str, Any]
    threads: int
    corpus: dict[str, Any] | None = None
    model: dict[str, Any] | None = None

    @classmethod
    def open(cls, index: Path, plan: dict[str, Any], say: Progress) -> "State":
        """The state of the build in `index`, or a new one.

        Another plan is adopted as long as nothing was fitted, so that a command that failed early
        can be corrected; afterwards it is refused. Raises InputError, ResourceError.
        """
        path = index / BUILD
        if manifest.exists(index):
            refuse_difference(index, manifest.load(index).plan, plan)
            return cls(path, plan, torch.get_num_threads())
        if path.is_file():
            stored = _stored(path)
            fitted = (index / "curvature").is_dir() or any(
                (index / "curvature.partial").glob("*.safetensors"))
            if fitted or not _differences(stored.plan, plan):
                refuse_difference(index, stored.plan, plan)
                return stored
            say.say(f"starting over in {index}, where nothing was fitted yet: "
                    + "; ".join(_differences(stored.plan, plan)))
        elif any(entry.name not in (BUILD + TEMPORARY, NOTE) for entry in index.iterdir()):
            raise InputError(
                f"{index} is not empty and holds no index. Give a new folder with -o, or empty it."
            )
        state = cls(path, plan, torch.get_num_threads())
        state.save()
        return state

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

    def save(self) -> None:
        content = {"plan": self.plan, "threads": self.threads, "corpus": self.corpus,
                   "model": self.model}
        atomic_write(self.path, json.dumps(content, indent=1).encode())

    def check_model(self, model: LanguageModel) -> None:
        """Remember the weights' digest, or raise IndexMismatchError if they changed."""
        if self.model is None:
            self.model = identify(model)
            self.save()
        else:
            check_identity(model, self.model)


def unfinished_append(index: Path, next_id: int) -> State | None:
    """The append under way, if there is one.

    One that begins below `next_id` was killed right after its commit: it is finished.
    """
    path = index / APPEND
    stored = _stored(path) if path.is_file() else None
    return stored if stored is not None and stored.plan.get("first") == next_id else None


def finished_append(index: Path, plan: dict[str, Any]) -> bool:
    """Whether the append of `plan` was killed right after its commit: nothing is left to do.

    Its `first` is below that of `plan`, which is the index's next id.
    """
    path = index / APPEND
    stored = _stored(path) if path.is_file() else None
    return stored is not None and stored.plan.get("first") != plan["first"] and \
        not _differences({**stored.plan, "first": None}, {**plan, "first": None})


def _stored(path: Path) -> State:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return State(path, content["plan"], content["threads"], content["corpus"],
                     content["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedIndexError(
            f"{path} can't be read ({str(error)[:120]}). Remove it and what is unfinished beside "
            "it, and begin again."
        ) from None


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
