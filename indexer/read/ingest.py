"""New sequences on their way into an index: first their records, then their codes.

A build brings the first run of sequences, every append another. A run fills segments of its own,
from the first number and the first id that were never given.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gradindex.errors import InputError, ResourceError
from gradindex.model.class_labels import FRACTION
from gradindex.model.label_numbers import check_numbers
from gradindex.progress import Progress, size
from gradindex.storage import code_index, layout, records, row_file, segments
from gradindex.storage.build_plan import CorpusSettings
from gradindex.storage.files import FileFacts, facts_of, make_folder
from gradindex.storage.integrity import CheckedFiles
from gradindex.storage.layout import PARTIAL, segment_folder
from gradindex.storage.manifest import Segment
from gradindex.storage.records import Record
from gradindex.storage.segments import SegmentFacts, SegmentReader
from gradindex.task import TASKS, Task
from indexer.read.corpus import Corpus, CorpusFacts
from indexer.read.label_names import advice

FEW = 100  # sequences
FEW_CLASSES = 10  # that are counted one by one in a line


@dataclass(frozen=True)
class Run:
    """`count` sequences with ids from `first` on, in segments of `size` numbered from `number`."""

    index: Path
    first: int
    number: int
    count: int
    size: int
    _checked: dict[Path, CheckedFiles] = field(default_factory=dict, compare=False, repr=False)

    @property
    def segments(self) -> list[Segment]:
        """Its segments in order; all but the last are full."""
        return [
            Segment(layout.segment_name(number), min(self.size, self.count - done))
            for number, done in enumerate(range(0, self.count, self.size), self.number)
        ]

    def folder(self, segment: Segment) -> Path:
        """Where a segment is now: sealed, or still being made."""
        sealed = segment_folder(self.index, segment.name)
        return sealed if sealed.is_dir() else layout.partial_folder(self.index, segment.name)

    def records(self, ids: list[int]) -> list[Record]:
        """The records of ids of this run, in that order."""
        by_id: dict[int, Record] = {}
        for segment, within in self._by_segment(ids):
            stored = self.reader(segment).records(self._rows_of(within))
            by_id.update(zip(within, stored, strict=True))
        return [by_id[sequence] for sequence in ids]

    def codes(self, ids: list[int], length: int) -> tuple[code_index.CodeIndex, np.ndarray]:
        """The codes [ids, K] of sealed segments and their ‖v‖ [ids]; ids ascending."""
        joined, norms = code_index.CodeIndex(length), []
        for codes, rows in self.coded(ids, length):
            joined.add(codes)
            norms.append(rows["norm"])
        return joined, np.concatenate(norms)

    def coded(self, ids: list[int], length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Codes uint8 [n, bytes] and rows, row_file.ROW [n], of ascending ids by sealed segment."""
        for segment, within in self._by_segment(ids):
            rows = self._rows_of(within)
            reader = self.reader(segment)
            yield reader.codes(length).codes(rows), reader.rows()[rows]

    def rows(self, segment: Segment) -> np.ndarray:
        """The rows of a sealed segment, row_file.ROW."""
        return self.reader(segment).rows()

    def reader(self, segment: Segment) -> SegmentReader:
        """A segment's files, checked against what was noted when they were written."""
        folder = self.folder(segment)
        # by folder: what was read while it was being made is looked at again once it is sealed
        if folder not in self._checked:
            self._checked[folder] = CheckedFiles(folder, segments.read_facts(folder).files)
        return SegmentReader(self._checked[folder], "", segment.rows)

    def _by_segment(self, ids: list[int]) -> list[tuple[Segment, list[int]]]:
        """The segments that have some of the ids, in order, each with its own of them."""
        by_number: dict[int, list[int]] = {}
        for sequence in ids:
            by_number.setdefault((sequence - self.first) // self.size, []).append(sequence)
        every = self.segments
        return [(every[number], within) for number, within in sorted(by_number.items())]

    def _rows_of(self, ids: list[int]) -> list[int]:
        """The rows that ids of one segment have in it."""
        return [(sequence - self.first) % self.size for sequence in ids]


def write_records(corpus: Corpus, run: Run, progress: Progress) -> CorpusFacts:
    """Tokenise everything into segments of records; `run.count` isn't known before.

    What an earlier attempt left is replaced. Raises InputError where there is nothing to index,
    ResourceError.
    """
    remove_unsealed(run.index, run.number)  # perhaps of other data, or cut otherwise
    number, waiting = run.number, list[Record]()
    progress.start("read", 0, "sequences")
    for record in corpus.sequences():
        record.id += run.first
        waiting.append(record)
        progress.update(1)
        if len(waiting) == run.size:
            write_partial(run.index, layout.segment_name(number), waiting)
            number, waiting = number + 1, []
    if waiting:
        write_partial(run.index, layout.segment_name(number), waiting)
    progress.finish()
    check_read(corpus)
    for line in corpus.said_of_rows():
        progress.say(line)
    return corpus.facts


def write_partial(index: Path, segment: str, sequences: list[Record]) -> Path:
    """Begin a segment: its folder, with the records alone. Raises ResourceError."""
    folder, name = layout.partial_folder(index, segment), layout.RECORDS.name
    make_folder(folder)
    segments.write_facts(folder, SegmentFacts(
        len(sequences), files={name: records.write(folder / name, sequences)}))
    return folder


def check_read(corpus: Corpus) -> None:
    """Raise InputError where a corpus, read, gave nothing to index, or lacks a field to keep.

    And where a classifier's labels, all of them seen, were read wrongly.
    """
    facts, labels = corpus.facts, corpus.settings.labels
    if labels:
        check_numbers(facts.found, labels, corpus.settled)
        if (fractions := facts.skipped.get(FRACTION, 0)) > facts.sequences:
            raise InputError(
                f"{fractions:,} labels are no whole numbers, {facts.sequences:,} are classes of "
                "the model: such numbers are learned by a regression, which is no task here. "
                "Expected the classes' names or numbers; name their field with --label-field.")
    if not facts.sequences:
        skipped = [f"Skipped: {by_reason(facts.skipped)}."] if facts.skipped else []
        task = corpus.settings.task
        raise InputError(" ".join([
            "the data holds no sequence with a token to predict; expected at least one text of two "
            "tokens." if task == "causal" else
            f"the data holds no row that can be used; expected rows of {TASKS[task]}.",
            *skipped, *[f"{'; '.join(facts.examples[:3])}."] * bool(facts.examples),
            advice(facts.found, labels)]).strip())
    # a misspelt name would otherwise give an index that lacks the field, noticed too late
    absent = set(corpus.settings.keep_fields) - corpus.fields_seen
    if absent and corpus.kind != "tokens":
        raise InputError(
            f"--keep-fields: no record has a field {sorted(absent)[0]!r}; found "
            f"{', '.join(sorted(corpus.fields_seen)) or 'none'}."
        )


def remove_unsealed(index: Path, number: int) -> None:
    """Remove every segment folder numbered `number` or above, sealed or not."""
    for folder in (index / layout.SEGMENTS).iterdir():
        name = folder.name.removesuffix(PARTIAL)
        if name.isdecimal() and int(name) >= number:
            remove_any(folder)


def remove_any(path: Path) -> None:
    """Remove a file, a link itself, or a folder with what is in it."""
    if path.is_dir() and not path.is_symlink():  # never what a link leads to
        shutil.rmtree(path)
    else:
        path.unlink()


def amount(facts: CorpusFacts, settings: CorpusSettings) -> str:
    """How much was read, in words.

    >>> amount(CorpusFacts(40, 40, 960), CorpusSettings(14, task="reward"))
    '40 pairs of texts of at most 14 tokens each, 960 tokens'
    """
    what, each = f"{facts.documents:,} documents → {facts.sequences:,} sequences", ""
    if settings.task != "causal":  # a row is one sequence
        of_pairs = Task(settings.task).of_pairs
        what = f"{facts.sequences:,} {'pairs of texts' if of_pairs else 'labelled texts'}"
        each = " each" * of_pairs
    return f"{what} of at most {settings.sequence_length} tokens{each}, {facts.tokens:,} tokens"


def report_read(facts: CorpusFacts, settings: CorpusSettings, progress: Progress) -> None:
    """Say what was read."""
    more = ""
    if settings.task == "causal":
        more = f", {facts.scored_tokens:,} scored"
    elif facts.labels:
        counts = [f"{facts.labels[name]:,} × {name}" for name in settings.labels
                  if name in facts.labels]
        more = f": {', '.join(counts[:FEW_CLASSES])}" + ", …" * (len(counts) > FEW_CLASSES)
    progress.say(f"data: {amount(facts, settings)}{more}")
    if facts.skipped:
        progress.say(f"skipped: {by_reason(facts.skipped)}")
        for example in facts.examples:
            progress.say(f"  {example}")


def check_classes(facts: CorpusFacts, settings: CorpusSettings, progress: Progress) -> None:
    """Say which classes of a classifier have no row. Raises InputError where all rows have one."""
    if not settings.labels:
        return
    without = [name for name in settings.labels if name not in facts.labels]
    if len(facts.labels) == 1:
        [(name, count)] = facts.labels.items()
        first = " --limit takes the first rows of the data, which may be sorted." * (
            settings.limit is not None)
        raise InputError(
            f"all {count:,} rows are of one class, {name}: they are not what a classifier learned "
            f"to tell it from {', '.join(without)[:200]} by, and every answer would be {name}. "
            f"Give rows of every class.{first}"
            + f" Skipped: {by_reason(facts.skipped)}." * bool(facts.skipped)
            + f" {advice(facts.found, settings.labels)}".rstrip())
    if without:
        progress.say(f"warning: no row is of the class {', '.join(without)}; found " + ", ".join(
            f"{count:,} × {name}" for name, count in facts.labels.items()) + ". Give all that the "
            "model was trained on, and see that the labels are those of its classes (--labels)")


def warn_few(sequences: int, progress: Progress) -> None:
    """Say where an index has too few sequences for an order among them to mean anything."""
    if sequences < FEW:
        progress.say(f"warning: {sequences:,} sequences are few: ranks and percentiles among fewer "
                     f"than {FEW} are mostly noise, and so is a curvature that was fitted on them. "
                     "Give all that the model was trained on.")


def by_reason(counts: dict[str, int]) -> str:
    """What was left out, in words.

    >>> by_reason({"no token": 1200, "empty text": 3})
    '3 × empty text, 1,200 × no token'
    """
    return ", ".join(f"{count:,} × {reason}" for reason, count in sorted(counts.items()))


def check_disk(run: Run, length: int, fit: int) -> None:
    """Raise ResourceError where the disk hasn't room for the codes that are yet to be made.

    Beside them it has to hold `fit` bytes of a fit. `length` is K.
    """
    rows = sum(run.segments[number].rows for number in unsealed(run))  # records are there already
    codes = rows * (layout.code_bytes(length) + row_file.ROW.itemsize)
    free = shutil.disk_usage(run.index).free
    if codes + fit > free:
        raise ResourceError(
            f"the codes need {size(codes)} and the fit {size(fit)}; {run.index} has {size(free)} "
            f"free. Free some space, use fewer --bits (now {length}) or --modules, or another "
            "folder; the same command goes on."
        )


def is_sealed(index: Path, segment: Segment) -> bool:
    """Whether a segment is whole."""
    return segment_folder(index, segment.name).is_dir()


def unsealed(run: Run) -> list[int]:
    """Which of a run's segments are not whole yet, by their numbers in it."""
    return [number for number, segment in enumerate(run.segments)
            if not is_sealed(run.index, segment)]


def file_facts(run: Run) -> dict[str, FileFacts]:
    """The facts of all files of sealed segments, by their names in the index."""
    facts: dict[str, FileFacts] = {}
    for segment in run.segments:
        facts |= sealed_files(run.index, segment, segments.read_facts(run.folder(segment)))
    return facts


def sealed_files(index: Path, segment: Segment, facts: SegmentFacts) -> dict[str, FileFacts]:
    """The facts of one sealed segment's files, by their names in the index."""
    # segment.json lists the files that were written before it, and so not itself
    notes = segment_folder(index, segment.name) / layout.NOTES.name
    return {f"{layout.SEGMENTS}/{segment.name}/{name}": file
            for name, file in {**facts.files, layout.NOTES.name: facts_of(notes)}.items()}
