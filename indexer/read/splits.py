"""Splits of a data set, told by the names of folders and files, as `datasets` tells them."""

import os
import re
from pathlib import Path, PurePath

from gradindex.errors import InputError
from gradindex.model.tokenise import common_characters
from indexer.read.compressed import bare_name
from indexer.read.sources import DataSource, shown_files

WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test",
         "evaluation": "test", "validation": "validation", "valid": "validation",
         "val": "validation", "dev": "validation", "trainval": "train", "devtest": "test",
         "heldout": "test", "holdout": "test"}
# with a number or "set" behind them, too: train1, testset
_WORD = re.compile(rf"(?<![a-z])({'|'.join(WORDS)})([_-]?(set|data|split|file|part))?(?![a-z])")
PLAIN = (".txt", ".text", ".tokens", ".raw")  # endings of texts that are data
_CAPITAL = re.compile("(?<=[a-z0-9])(?=[A-Z])")


def split_of(path: PurePath, folders_only: bool = False) -> str | None:
    """train, test or validation, by the last name of a path that says so; None for none.

    >>> split_of(PurePath("main/train-00000-of-00002.parquet")), split_of(PurePath("my/testSet2"))
    ('train', 'test')
    """
    names = path.parts[:-1] if folders_only else path.parts
    for name in reversed(names):
        words = _CAPITAL.sub("_", name).lower().replace("held_out", "heldout")
        if match := _WORD.search(words.replace("held-out", "heldout")):
            return WORDS[match[1]]
    return None


def refuse_splits(folder: Path, sources: list[DataSource]) -> None:
    """Raise InputError where a folder holds several splits: a model is trained on one of them."""
    splits: dict[str, list[str]] = {}
    for source in sources:
        path = Path(source.name).relative_to(folder)
        # a program may well be called test.py, so the names of most texts say nothing
        split = split_of(path, source.kind == "text" and bare_name(path.name) == path.name.lower()
                         and path.suffix.lower() not in PLAIN)
        if split:
            splits.setdefault(split, []).append(source.name)
    if len(splits) < 2 or ("train" not in splits and all(
            source.kind == "text" for source in sources)):
        return
    called = {split: _together(folder, files, sources) for split, files in splits.items()}
    shown = ", ".join(f"{files} ({split})" for split, files in called.items())
    mostly = f" If the model was trained on train: give {called['train']}." \
        if "train" in called else ""
    raise InputError(f"{folder} holds several splits; give one of them: {shown}.{mostly}")


def note_splits(given: list[str]) -> list[str]:
    """What to say where several splits were given by name, perhaps by a pattern of the shell."""
    splits: dict[str, list[str]] = {}
    for path in given:
        if split := split_of(PurePath(PurePath(path).name)):
            splits.setdefault(split, []).append(path)
    if len(splits) < 2:
        return []
    shown = ", ".join(f"{split} ({shown_files(files)})" for split, files in splits.items())
    alone = f": give {shown_files(splits['train'])} alone" if "train" in splits else ""
    return [f"splits: {shown}, taken as they were given; a model is mostly trained on one{alone}"]


def _together(folder: Path, files: list[str], sources: list[DataSource]) -> str:
    """Some files of a folder in few words: their own folder, or a pattern for the shell."""
    if len(files) == 1:
        return files[0]
    parent = Path(os.path.commonpath(files))
    if parent != folder and split_of(parent.relative_to(folder)):
        return str(parent)
    first, last = min(files), max(files)
    begin = first[:common_characters(first, last)]
    # a shell's * goes into no folder
    if all(source.name in files or not source.name.startswith(begin) for source in sources) \
            and not any("/" in file[len(begin):] for file in files):
        return begin + "*"
    return shown_files(files).replace(",", "")
