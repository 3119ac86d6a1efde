"""Fields that are made of a pair of answers, beside those that the data bring.

What people prefer in an answer for its length, a reward model learns as well. So the lengths are
fields like any other: groups, audits and tables take them by name.
"""

from collections.abc import Callable, Iterable

from gradindex.model.tokenise import Tokenised
from gradindex.task import LENGTH_DIFFERENCE, LONGER_CHOSEN


def length_difference(pair: Tokenised) -> int:
    """Tokens of the chosen answer less those of the rejected, as training saw both.

    Counted over the whole texts: the prompt is that of both, and takes itself away.
    """
    assert pair.border is not None
    return pair.border - (len(pair.tokens) - pair.border)


def longer_chosen(pair: Tokenised) -> bool:
    """Whether the chosen answer has more tokens than the rejected; of equal lengths false."""
    return length_difference(pair) > 0


_MAKE: dict[str, Callable[[Tokenised], int | bool]] = {
    LENGTH_DIFFERENCE: length_difference, LONGER_CHOSEN: longer_chosen}


def derived(names: Iterable[str], pair: Tokenised) -> dict[str, int | bool]:
    """The fields of these names, made of a pair's tokens, chosen and rejected one behind the other.

    >>> import numpy as np
    >>> pair = Tokenised(np.arange(7), np.ones(7, bool), np.zeros((7, 2)), border=5)
    >>> derived(["length-difference", "longer-chosen"], pair)
    {'length-difference': 3, 'longer-chosen': True}
    """
    return {name: _MAKE[name](pair) for name in names}
