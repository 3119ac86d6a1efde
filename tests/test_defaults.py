"""Every default stands in one place, and whatever shows it follows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click

from gradindex.cli import main_group

BUILDING = Path(__file__).parent.parent / "docs" / "building.md"

# Every number becomes another one; then the help, and the defaults of functions, are looked at.
CHANGED = """
import inspect, json
from indexer import defaults
changed = {}
for name, value in list(vars(defaults).items()):
    if name.isupper() and type(value) in (int, float):
        changed[name] = value + 7 if isinstance(value, int) else value + 0.07
        setattr(defaults, name, changed[name])
from gradindex.cli import main_group
import gradindex
build = main_group.get_command(None, "build")
shown = {one.opts[-1]: one.default for one in build.params if one.opts}
words = " ".join(one.help or "" for one in build.params if hasattr(one, "help"))
taken = {function.__name__: {name: one.default for name, one in
         inspect.signature(function).parameters.items() if one.default is not inspect._empty}
         for function in (gradindex.build, gradindex.estimate, gradindex.append)}
print(json.dumps([changed, shown, words, taken], default=str))
"""


def test_a_changed_default_is_changed_wherever_it_is_shown():
    done = subprocess.run([sys.executable, "-c", CHANGED], check=True, text=True,
                          stdout=subprocess.PIPE)
    changed, shown, words, taken = json.loads(done.stdout)
    assert len(changed) >= 6
    for name, value in changed.items():
        flag, argument = f"--{name.lower().replace('_', '-')}", name.lower()
        if name == "LONGEST":
            assert f"at most {value}" in words
            continue
        assert shown[flag] == value, name
        for function, arguments in taken.items():
            assert arguments.get(argument, value) == value, f"{function}: {name}"
        assert taken["build"][argument] == value


def rows() -> dict[str, str]:
    """The defaults that the page on building has, by flag."""
    return {flag: default.strip() for flag, default in re.findall(
        r"^\| `(--[\w-]+)[^`]*` \| ([^|]+) \|", BUILDING.read_text(encoding="utf-8"), re.MULTILINE)}


def test_the_page_has_the_defaults_of_the_flags():
    build = main_group.get_command(click.Context(main_group), "build")
    assert build is not None
    checked = 0
    for option in build.params:
        said = rows().get(option.opts[-1])
        if said is None or not isinstance(option.default, (int, float)) or \
                isinstance(option.default, bool):
            continue
        assert float(said.replace(",", "")) == option.default, option.opts[-1]
        checked += 1
    assert checked >= 4
