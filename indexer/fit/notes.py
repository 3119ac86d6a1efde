"""How a fit is to be done, and `fit.json`: what was done otherwise, noted before it is tried.

A batch that is halved because memory ran out, a sequence or a module that is left out: whoever goes
on with a fit reads of it here and so ends with the same bytes.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath

import pydantic

from gradindex.errors import DamagedIndexError
from gradindex.progress import Progress
from gradindex.storage import layout, sealed_json
from gradindex.storage.files import FileFacts, atomic_write
from indexer.defaults import MAX_BAD

FIT_NOTES = PurePath(layout.FIT).name


@dataclass(frozen=True)
class FitSettings:
    """Which sequences (ids in order), whose labels ("model" or "data"), block and batch size.

    `covariance_blocks` are those of A and of S, `eigen_dtype` what a GPU decomposes them in; `bad`
    is the share of sequences that may be left out, their gradient not being finite.
    """

    ids: list[int]
    labels: str
    block: int
    batch_tokens: int
    seed: int
    bad: float = MAX_BAD
    covariance_blocks: int = 1
    eigen_dtype: str = "float64"


@dataclass
class FitNotes:
    """`fit.json`: what was done otherwise than planned, and the facts of the files of curvature.

    `partitions` are the numbers of modules that are fitted together, and `saved` the files of those
    that are done, until all are; then `files` are all. `splits` are batches that were halved, as
    (first row, rows), by "stage block"; `quarantined` says of ids why they were left out,
    `left_out` of modules. `untracked` are shares of the model's parameters that have no curvature,
    by what they are.
    """

    partitions: list[list[int]] = field(default_factory=list)
    splits: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    quarantined: dict[int, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileFacts] = field(default_factory=dict)
    untracked: dict[str, float] = field(default_factory=dict)
    saved: dict[str, FileFacts] = field(default_factory=dict)

    def write(self, folder: Path) -> FileFacts:
        """Write the notes into a folder. Raises ResourceError."""
        # JSON's keys are texts; in order of the numbers, the file is the same whoever wrote it
        content = {
            **asdict(self), "splits": dict(sorted(self.splits.items())),
            "quarantined": {str(sequence): why for sequence, why in
                            sorted(self.quarantined.items())},
        }
        return atomic_write(folder / FIT_NOTES, sealed_json.with_digest(content))

    @classmethod
    def read(cls, folder: Path) -> "FitNotes":
        """The notes in a folder, empty where there are none. Raises DamagedIndexError."""
        path = folder / FIT_NOTES
        if not path.is_file():  # the fit has just begun
            return cls()
        try:
            content = sealed_json.check(sealed_json.parse(path.read_bytes()))
            return pydantic.TypeAdapter(cls).validate_json(content)
        except ValueError:
            raise DamagedIndexError(
                f"{path} can't be read. Remove {folder} and run the build again; it fits again."
            ) from None


def report_fit(notes: FitNotes, progress: Progress) -> None:
    """Say what was left out of a fit, and whether memory ran out."""
    for name, reason in notes.left_out.items():
        progress.say(f"module {name} is left out: {reason}")
    for sequence, reason in notes.quarantined.items():
        progress.say(f"sequence {sequence} is left out of the fit: {reason}")
    if halved := sum(map(len, notes.splits.values())):
        progress.say(f"memory ran out on {halved} batches of the fit, which were halved; smaller "
                     "--batch-tokens avoid that")
