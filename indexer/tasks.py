"""Which task a build is for: as it was said, or as the model's class and the data tell."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from gradindex.errors import InputError
from gradindex.model import checkpoint
from gradindex.model.adapters import OF_TEXTS
from gradindex.model.load_adapter import check_adapter
from gradindex.model.model_source import ModelSource
from gradindex.task import DERIVED, TASKS, Task
from indexer.read.choose_form import are_preferences
from indexer.read.discover import discover


def choose_task(source: ModelSource, asked: str | None, data: list[Any]) -> str:
    """The task that was asked for, or the only one that the model's class and the data leave.

    Raises InputError for a task that there isn't, and for a regression.
    """
    if asked is not None:
        if asked not in TASKS:
            raise InputError(f"--task {asked}: expected one of {', '.join(TASKS)}.")
        return asked
    adapter = source.adapter
    if adapter is not None and adapter.task_type == OF_TEXTS:
        # its head is known by its weights, which are fetched here
        source = replace(source, task=Task("classification"))
        check_adapter(source)
        config, of_texts = source.load_config(), True
    else:
        config = source.load_config()
        of_texts = any("reward" in checkpoint.tasks_of(name)
                       for name in checkpoint.architectures_of(source, config))
    if not of_texts:
        # only policies that learned preferences have what a reference gives the answers
        return "preference" if are_preferences(discover(data).sources) else "causal"
    if config.num_labels > 1:
        return "classification"
    if config.problem_type == "regression":
        raise InputError(
            "config.json says that the model gives a text a number (problem_type regression), "
            "which is no task here. If it was trained on pairs, as a reward model, say --task "
            "reward.")
    return "reward"


def class_names(config: Any, given: Iterable[str], task: Task) -> tuple[str, ...]:
    """The names of a classifier's classes: as given, or as its configuration has them.

    Raises InputError for names that aren't as many as the classes, or not all different.
    """
    if isinstance(given, str):
        raise InputError(f"labels={given!r}: expected a list of names.")
    given = tuple(given)
    if not all(name.strip() for name in given):
        raise InputError(f"--labels {','.join(given)}: a name is empty; expected a name for each "
                         "class, in the model's order.")
    if task.name != "classification":
        if given:
            raise InputError(f"--labels names a classifier's classes; the task is {task.name}. "
                             "Leave it out.")
        return ()
    # a configuration may call two alike; what is given takes the place of that
    count, own = config.num_labels, own_names(config)
    names = given or own
    if not given and len(set(names)) != count:
        raise InputError("the model's config.json calls two classes alike (id2label: "
                         f"{', '.join(names)[:200]}). Name them in its order with --labels.")
    if len(names) != count or len(set(names)) != count:
        raise InputError(f"--labels {','.join(names)}: the model has {count} classes; expected as "
                         "many names, each once, in its order.")
    return names


def own_names(config: Any) -> tuple[str, ...]:
    """What a classifier's configuration calls its classes, in order."""
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


def said_of_names(config: Any, names: tuple[str, ...]) -> str | None:
    """What to say of names that were given to classes which have the same in another order."""
    own = own_names(config) if names else ()
    if names == own or sorted(map(str.casefold, names)) != sorted(map(str.casefold, own)):
        return None
    return (f"warning: config.json calls the classes {','.join(own)}, and --labels calls them "
            f"{','.join(names)}: with a wrong order every label is taken for another")


def derived_fields(given: Iterable[str], keep_fields: Iterable[str], task: Task) -> tuple[str, ...]:
    """The fields to derive, each once. Raises InputError for one that can't be.

    >>> derived_fields(["longer-chosen", "longer-chosen"], ["annotator"], Task("reward"))
    ('longer-chosen',)
    """
    if isinstance(given, str):
        raise InputError(f"derive={given!r}: expected a list of names.")
    names = tuple(dict.fromkeys(given))
    for name in names:
        if name not in DERIVED:
            raise InputError(f"--derive {name}: expected one or more of {', '.join(DERIVED)}.")
        if not task.of_pairs:
            raise InputError(f"--derive {name} is for pairs of a chosen and a rejected answer; the "
                             f"task is {task.name}. Leave it out.")
        if name in keep_fields:
            raise InputError(f"--derive {name} and --keep-fields {name} would be two fields of one "
                             "name. Leave one out, or call the data's field something else.")
    return names
