"""What a data set calls its classes, against what the model calls its own."""

from collections.abc import Mapping, Sequence

from gradindex.errors import InputError
from gradindex.model.class_labels import UNLABELLED, called_by_numbers, read_label
from gradindex.model.label_numbers import SHOWN
from indexer.read.sources import DataSource, noted_features


def class_names_of(source: DataSource, field: str) -> list[str] | None:
    """The names that `datasets` noted for the numbers in a field (ClassLabel); None for none."""
    feature = noted_features(source).get(field)
    found = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return None
    return found


def compare_names(
    name: str, field: str, found: Sequence[str], labels: Sequence[str]
) -> str | None:
    """What to say of the names for the numbers in a field of a source; None for nothing.

    Raises InputError where they are the model's `labels` in another order.
    """
    theirs, ours = ([name.strip().casefold() for name in names] for names in (found, labels))
    if theirs == ours:
        return None
    of_data, of_model = ",".join(found)[:200], ",".join(labels)[:200]
    if sorted(theirs) == sorted(ours):
        raise InputError(
            f"the numbers in {field} of {name} stand for {of_data}, those of the model's "
            f"config.json for {of_model}. Say with --labels in which order the model learned them: "
            f"--labels {of_data} if it was trained on these numbers.")
    return (f"labels: the numbers in {field} stand for {of_data} in {name}, and for "
            f"{of_model} here; they are taken as numbers (--labels gives other names)")


def advice(found: Mapping[str, int], labels: Sequence[str]) -> str:
    """What to do about labels of the data that are none of the model's; empty for nothing."""
    numbers = called_by_numbers(labels) or list(map(float, range(len(labels))))
    if len(found) != len(labels):  # else −1 may be one of two classes
        numbers = [*numbers, UNLABELLED]
    ours = {label.strip().casefold() for label in labels}
    strange = [label for label in found if label.casefold() not in ours
               and read_label(label) not in numbers]
    if not strange:
        return ""
    theirs = sorted(found, key=_numbers_in_order)
    shown = ", ".join(theirs[:SHOWN]) + ", …" * (len(theirs) > SHOWN)
    example = f" {','.join(theirs)} if {theirs[0]} is {labels[0]}" \
        if len(theirs) == len(labels) else ""
    return (f"The labels of the data are {shown}; the model's classes are "
            f"{', '.join(labels)[:200]}. Where they are the same by other names, build an "
            f"index with those of the data, in the model's order: --labels{example or ' A,B,…'}.")


def _numbers_in_order(label: str) -> float:
    """By what labels are sorted for a message: numbers, and names as they came."""
    number = read_label(label)
    return number if isinstance(number, (int, float)) else float("inf")
