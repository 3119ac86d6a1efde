"""How much of an index is searched: what is damaged, what can't be reached."""

from dataclasses import dataclass

from gradindex.errors import GradindexError


class LostError(GradindexError):
    """Segments can't be reached any more, by name, and `why`; the others can be searched."""

    def __init__(self, segments: frozenset[str], why: str):
        super().__init__(f"{why}. Try again, when it is back.")
        self.segments, self.why = segments, why


@dataclass(frozen=True)
class Coverage:
    """How much of an index is searched, where damaged or lost segments are left out."""

    sequences: int
    of_sequences: int  # the index's, when it was whole
    damaged: tuple[str, ...]  # the names of the segments left out
    lost: tuple[str, ...] = ()  # the names of those that can't be reached, see LostError
    why: str = ""

    @property
    def share(self) -> float:
        """The share of the index's sequences that is searched."""
        return self.sequences / self.of_sequences if self.of_sequences else 1.0

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return not (self.damaged or self.lost)

    def __str__(self) -> str:
        """What to say of it where it isn't all."""
        left_out = [f"{_named(names)} {'is' if len(names) == 1 else 'are'} {what} and left out"
                    for names, what in ((self.damaged, "damaged"),
                                        (self.lost, f"out of reach ({self.why})")) if names]
        return (f"coverage {self.share:.1%}: {self.sequences:,} of {self.of_sequences:,} sequences "
                f"are searched; {', '.join(left_out)}, and the recall statement is about the rest")


def _named(segments: tuple[str, ...]) -> str:
    """Segments by their names, after the word for them."""
    # a few: a lost machine may have thousands
    shown = ", ".join(segments[:3]) + ", …" * (len(segments) > 3)
    return f"{'segment' if len(segments) == 1 else 'segments'} {shown}"
