"""The two demos: what each makes, asks and takes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradindex.demo.expected_time import DemoParts, meaningless, seconds_of_a_step
from gradindex.demo.make_classifier import prepare_classifier
from gradindex.demo.make_demo import Settings, prepare
from gradindex.demo.questions import (
    LABEL_QUERIES,
    QUERIES,
    label_arguments,
    search_arguments,
    try_next,
    try_next_with_labels,
)
from gradindex.demo.small_classifier import LABELS, ClassifierSettings, new_classifier
from gradindex.demo.small_model import DemoSettings, new_model
from gradindex.progress import Progress

# in training steps of .15 s of processor time, of which two cores do with about .11 s
LANGUAGE_PARTS = DemoParts(documents=90, build=720, search=30, later_search=12)
# in training steps of .054 s of processor time
CLASSIFIER_PARTS = DemoParts(documents=150, build=450, search=75, later_search=60)


@dataclass(frozen=True)
class Demo:
    """A demo: `prepare(folder, progress, library)` makes its model and documents.

    `build_flags` are those of `gradindex build` beside the usual ones, `questions` the arguments
    of each search and `try_next` what to go on with, of an index.
    """

    settings: Settings
    parts: DemoParts
    prepare: Callable[[Path, Progress, Path | None], dict[str, Any]]
    seconds_of_a_step: Callable[[], float]
    build_flags: tuple[str, ...]
    questions: Callable[[Path], list[list[str]]]
    try_next: Callable[[Path], list[str]]


def language_demo(settings: DemoSettings) -> Demo:
    """A language model of the standard library, asked why it says what it says."""
    def measured() -> float:
        ids = meaningless(settings.vocabulary, settings.batch)
        return seconds_of_a_step(new_model(settings), {"input_ids": ids, "labels": ids})

    return Demo(
        settings, LANGUAGE_PARTS,
        lambda out, progress, library: prepare(out, settings, progress, library), measured,
        ("--keep-fields", "module,kind", "--fit-sequences", "2048"),
        lambda index: [search_arguments(index, *query) for query in QUERIES], try_next)


def classifier_demo(settings: ClassifierSettings) -> Demo:
    """A classifier of the standard library's texts, asked why it labels them as it does."""
    def measured() -> float:
        ids = meaningless(settings.vocabulary, settings.batch)
        return seconds_of_a_step(new_classifier(settings), {
            "input_ids": ids, "labels": torch.arange(settings.batch) % len(LABELS)})

    return Demo(
        settings, CLASSIFIER_PARTS,
        lambda out, progress, library: prepare_classifier(out, settings, progress, library),
        measured, ("--keep-fields", "family,planted", "--fit-sequences", "1024"),
        lambda index: [label_arguments(index, *query) for query in LABEL_QUERIES],
        try_next_with_labels)
