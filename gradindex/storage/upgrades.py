"""Manifests of earlier formats turned into the newest one, and back: one function a version.

An index keeps the format that it was written in until a command commits to it. Its digest is that
of its own format's content, so what newer formats added has to be taken out again for it.
"""

from collections.abc import Callable
from typing import Any

FORMAT = 7
OLDEST = 1  # that is read

Content = dict[str, Any]  # of a manifest's JSON

# entries of a plan that format 4 added, as builds before it had them
NEW_IN_4: Content = {"truncate": False, "rows": None, "columns": [], "chat_template": None,
                     "adapter": None}
NEW_IN_5: Content = {"eigen_dtype": "float64"}  # on a host, as all were decomposed until then
NEW_IN_6: Content = {"task": "causal", "text_b_field": None, "label_field": None,
                     "chosen_field": None, "rejected_field": None, "margin_field": None,
                     "labels": [], "derive": [], "reference": None, "beta": 0.1}
NEW_IN_7: Content = {"also": []}
NEW_IN_MODULES_OF_7: Content = {"diagonal": False, "member": "last", "weight": 1.0}


def _to_2(content: Content) -> None:
    """Format 1 had no background queries."""
    # Refused, and not replaced: what its own format doesn't have, its writer never wrote.
    if "background" in content:
        raise ValueError("format 1 has no background queries")
    content["background"] = None


def _to_3(content: Content) -> None:
    """Formats 1 and 2 had no split covariances."""
    plan = content.get("plan")
    if isinstance(plan, dict):  # types are checked later, of the newest format
        if "covariance_blocks" in plan:
            raise ValueError("formats 1 and 2 have no split covariances")
        plan["covariance_blocks"] = 1


def _to_4(content: Content) -> None:
    """Formats 1 to 3 read records of their own form, in windows, by the tokenizer's template."""
    _add_to_plan(content, NEW_IN_4, "formats 1 to 3")
    code = content.get("code")
    if isinstance(code, dict) and "narrow_exact" in code:
        raise ValueError("formats 1 to 3 mix the narrow sides of modules as the wide ones")


def _to_5(content: Content) -> None:
    """Formats 1 to 4 decomposed on the host alone; each file of curvature had its own digest."""
    _add_to_plan(content, NEW_IN_5, "formats 1 to 4")


def _to_6(content: Content) -> None:
    """Formats 1 to 5 were of causal models, and called the kind of their records their task."""
    _add_to_plan(content, NEW_IN_6, "formats 1 to 5")
    if "kind" in content:
        raise ValueError("formats 1 to 5 have no kind")
    code = content.get("code")
    if isinstance(code, dict):
        if "recipe" in code:
            raise ValueError("formats 1 to 5 have no recipe of codes")
        # said of what is mixed so, and else nothing
        if code.get("narrow_exact", True) is not True:
            raise ValueError("formats 1 to 5 say nothing else of narrow_exact than true")
        code["recipe"] = 2 if code.pop("narrow_exact", False) else 1
    if "task" in content:
        content["kind"] = content.pop("task")


def _to_7(content: Content) -> None:
    """Formats 1 to 6 are of one model, and have no module of a vocabulary."""
    _add_to_plan(content, NEW_IN_7, "formats 1 to 6")
    if "also" in content:
        raise ValueError("formats 1 to 6 are of one model")
    content["also"] = {}
    for module in _modules_of(content):
        if there := sorted(NEW_IN_MODULES_OF_7.keys() & module.keys()):
            raise ValueError(f"formats 1 to 6 have no {there[0]} of modules")
        module.update(NEW_IN_MODULES_OF_7)


def _modules_of(content: Content) -> list[Content]:
    modules = content.get("modules")  # types are checked later, of the newest format
    return [one for one in modules if isinstance(one, dict)] if isinstance(modules, list) else []


def _add_to_plan(content: Content, new: Content, before: str) -> None:
    """Add entries to a plan of the formats `before`, which have none of them."""
    plan = content.get("plan")
    if isinstance(plan, dict):
        if there := sorted(new.keys() & plan.keys()):
            raise ValueError(f"{before} have no {there[0]} in their plan")
        plan.update(new)


def _from_2(content: Content) -> None:
    del content["background"]


def _from_3(content: Content) -> None:
    del content["plan"]["covariance_blocks"]


def _from_4(content: Content) -> None:
    for name in NEW_IN_4:
        del content["plan"][name]


def _from_5(content: Content) -> None:
    for name in NEW_IN_5:
        del content["plan"][name]


def _from_6(content: Content) -> None:
    for name in NEW_IN_6:
        del content["plan"][name]
    if "kind" in content:
        content["task"] = content.pop("kind")
    if content.get("code", {}).pop("recipe", 1) == 2:
        content["code"]["narrow_exact"] = True


def _from_7(content: Content) -> None:
    for name in NEW_IN_7:
        del content["plan"][name]
    content.pop("also", None)
    for module in _modules_of(content):
        for name in NEW_IN_MODULES_OF_7:
            del module[name]


# from this version
_UP: dict[int, Callable[[Content], None]] = {1: _to_2, 2: _to_3, 3: _to_4, 4: _to_5, 5: _to_6,
                                            6: _to_7}
_DOWN: dict[int, Callable[[Content], None]] = {
    7: _from_7, 6: _from_6, 5: _from_5, 4: _from_4, 3: _from_3, 2: _from_2}


def newest_plan(plan: Content) -> Content:
    """The plan of an unfinished build, begun in any format, as the newest one would have it.

    >>> newest_plan({"bits": 64})["truncate"]
    False
    """
    return {"covariance_blocks": 1, **NEW_IN_4, **NEW_IN_5, **NEW_IN_6, **NEW_IN_7, **plan}


def upgrade(content: Content) -> None:
    """Add to a manifest's content, in place, what formats newer than its own have. `format` stays.

    Raises ValueError for content that its own format doesn't have.

    >>> content = {"format": 1, "plan": {}}
    >>> upgrade(content)
    >>> content["background"], content["plan"]["covariance_blocks"], content["plan"]["truncate"]
    (None, 1, False)
    """
    for version in range(content["format"], FORMAT):
        _UP[version](content)


def downgrade(content: Content) -> None:
    """Take out of a manifest's content, in place, what its own `format` doesn't have.

    >>> plan = {"covariance_blocks": 1, **NEW_IN_4, **NEW_IN_5, **NEW_IN_6, **NEW_IN_7}
    >>> content = {"format": 2, "plan": plan, "background": None}
    >>> downgrade(content)
    >>> content
    {'format': 2, 'plan': {}, 'background': None}
    """
    for version in range(FORMAT, content["format"], -1):
        _DOWN[version](content)
