"""Names of classes that a data set brings, against those of the model."""

from collections.abc import Sequence

from gradindex.errors import InputError
from indexer.read.sources import DataSource, noted_features


def compare_names(source: DataSource, field: str, labels: Sequence[str]) -> str | None:
    """What to say of the names that `datasets` noted for the numbers in a field; None for nothing.

    Raises InputError where they are the model's `labels` in another order.
    """
    feature = noted_features(source).get(field)
    found = feature.get("names") if isinstance(feature, dict) else None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return None
    theirs, ours = ([name.strip().casefold() for name in names] for names in (found, labels))
    if theirs == ours:
        return None
    of_data, of_model = ",".join(found)[:200], ",".join(labels)[:200]
    if sorted(theirs) == sorted(ours):
        raise InputError(
            f"the numbers in {field} of {source.name} stand for {of_data}, those of the model's "
            f"config.json for {of_model}. Say with --labels in which order the model learned them: "
            f"--labels {of_data} if it was trained on these numbers.")
    return (f"labels: the numbers in {field} stand for {of_data} in {source.name}, and for "
            f"{of_model} here; they are taken as numbers (--labels gives other names)")
