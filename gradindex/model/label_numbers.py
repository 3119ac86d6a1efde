"""Whether numbers among labels were read rightly, which all of them together tell.

A row's label is read by itself (`class_labels.py`): numbers that count from 1 would each be taken
for the next class.
"""

import re
from collections.abc import Mapping, Sequence

from gradindex.errors import InputError
from gradindex.model.class_labels import called_by_numbers, is_number, read_label, shown_label

SHOWN = 8  # labels in a message
MOST_FOUND = 100  # different labels that are remembered


def note_label(found: dict[str, int], label: object) -> None:
    """Count a label of the data among those that were `found`, as it is shown."""
    shown = shown_label(label)
    if shown is not None and (shown in found or len(found) < MOST_FOUND):
        found[shown] = found.get(shown, 0) + 1


def check_numbers(found: Mapping[str, int], labels: Sequence[str], settled: bool) -> None:
    """Raise InputError where numbers among the labels `found` may have been read wrongly.

    They were read as names where classes are called by numbers that aren't their places, and as
    places from 0 on otherwise. `settled` says that it was said before that this is right, by
    names that are numbers or by the index that more is appended to.

    >>> check_numbers({"0": 9, "1": 9}, ["bad", "good"], settled=False)
    """
    counts = {float(number): count for label, count in found.items()
              if isinstance(number := read_label(label), (int, float))}
    ours = {label.strip().casefold() for label in labels}
    if sum(counts.values()) < sum(count for label, count in found.items()
                                  if label.casefold() in ours and not is_number(label)):
        return  # the data have names: numbers among them are stray ones, and no way of counting
    as_names, places = called_by_numbers(labels), set(map(float, range(len(labels))))
    told = [number for number in as_names or _counted(labels) or () if number is not None]
    if settled and not as_names and any(map(is_number, labels)):
        return  # --labels 0,1,2
    # where the names tell nothing, labels may still count from 1, or from −1
    for names in [set(told)] if told else [{at + 1 for at in places}, {at - 1 for at in places}]:
        of_names, of_places = (sum(counts[number] for number in only & counts.keys())
                               for only in (names - places, places - names))
        if not told and -1.0 in names and (of_places or not names <= counts.keys()):
            continue  # rows that are unlabelled
        right, wrong = (of_names, of_places) if as_names else (of_places, of_names)
        unsure = bool(told) and not right and not settled and bool(
            counts.keys() & (names | places))
        if wrong > right or unsure:
            raise _refused(counts, labels, told or sorted(names), settled, bool(as_names))


def _counted(labels: Sequence[str]) -> list[float] | None:
    """The numbers in the names of classes that are counted by these, from 0 or 1, in another order.

    >>> _counted(["1 star", "2 stars"]), _counted(["LABEL_0", "LABEL_1"]), _counted(["h1n1", "flu"])
    ([1.0, 2.0], None, None)
    """
    digits = [re.findall(r"\d+", label) for label in labels]
    if any(len(one) != 1 for one in digits):
        return None
    numbers, count = [float(one[0]) for one in digits], len(labels)
    counted = sorted(numbers) in (list(range(count)), list(range(1, count + 1)))
    return numbers if counted and numbers != list(range(count)) else None


def _refused(
    counts: Mapping[float, int], labels: Sequence[str], names: Sequence[float], settled: bool,
    by_names: bool,
) -> InputError:
    """What to say of numbers that may be names, in the model's order, or places.

    `by_names` is how they were read.
    """
    by_name = ",".join(f"{number:g}" for number in names)
    by_place = ",".join(map(str, range(len(labels))))
    numbers = ", ".join(f"{number:g}" for number in sorted(counts)[:SHOWN])
    more = ", …" * (len(counts) > SHOWN)
    found = f"the labels are the numbers {numbers}{more}, the model's classes are " \
            f"{', '.join(labels)[:200]}, and a number "
    if settled and not by_names:
        # what was settled can't be said anew by a flag: an append and a query have none
        return InputError(
            f"{found}is read as a place among them, from 0 on, as at the build, where {names[0]:g} "
            "would not be the first of them. Write the classes' names instead of numbers.")
    if settled:
        return InputError(
            f"{found}is read as a name of these, as was said when they were named. Write the "
            f"classes' names, or build an index with --labels {by_place} if the data's 0 means the "
            "first of them.")
    return InputError(
        f"{found}may be meant as a name or as a place among them, from 0 on. Say what the data "
        f"call the classes, in the model's order: --labels {by_name} if {names[0]:g} means the "
        f"first of them, --labels {by_place} if 0 does.")
