"""How far a build has come, and that one process alone carries it on.

`build.json` holds the plan (what was asked for, resolved) until the manifest takes its place.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradindex import manifest
from gradindex.errors import GradindexError, InputError
from gradindex.files import atomic_write
from gradindex.model import LanguageModel, check_identity, identify
from gradindex.progress import Progress


@dataclass
class State:
    """`build.json`: the plan and how far the build has come."""

    index: Path
    plan: dict[str, Any]
    threads: int
    corpus: dict[str, Any] | None = None
    model: dict[str, str | None] | None = None

    @classmethod
    def open(cls, index: Path, plan: dict[str, Any], say: Progress) -> "State":
        """The state of the build in `index`, or a new one.

        Another plan is adopted as long as nothing was fitted, so that a command that failed early
        can be corrected; afterwards it is refused. Raises InputError.
        """
        path = index / "build.json"
        if manifest.exists(index):
            refuse_difference(index, manifest.load(index).plan, plan)
            return cls(index, plan, torch.get_num_threads())
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            fitted = (index / "curvature").is_dir() or any(
                (index / "curvature.partial").glob("*.safetensors"))
            if fitted or not _differences(stored["plan"], plan):
                refuse_difference(index, stored["plan"], plan)
                return cls(index, plan, stored["threads"], stored["corpus"], stored["model"])
            say.say(f"starting over in {index}, where nothing was fitted yet: "
                    + "; ".join(_differences(stored["plan"], plan)))
        elif any(entry.name != "build.json.tmp" for entry in index.iterdir()):
            raise InputError(
                f"{index} is not empty and holds no index. Give a new folder with -o, or empty it."
            )
        state = cls(index, plan, torch.get_num_threads())
        state.save()
        return state

    def save(self) -> None:
        content = {"plan": self.plan, "threads": self.threads, "corpus": self.corpus,
                   "model": self.model}
        atomic_write(self.index / "build.json", json.dumps(content, indent=1).encode())

    def check_model(self, model: LanguageModel) -> None:
        """Remember the weights' digest, or raise IndexMismatchError if they changed."""
        if self.model is None:
            self.model = identify(model)
            self.save()
        else:
            check_identity(model, self.model)


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
            "again to go on, or give another folder with -o."
        )


@contextlib.contextmanager
def only_writer(index: Path) -> Iterator[None]:
    descriptor = os.open(index, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GradindexError(
                f"another process is building {index}. Wait for it, or stop it first."
            ) from None
        yield
    finally:
        os.close(descriptor)
