"""A search as a request: the fields of a URL, of the page's form and of the API's JSON."""

import hashlib
import json
import re
import shlex
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import pydantic

from gradindex.terminal import visible_lines
from search.ask.controls import Controls
from search.ask.question import Question

LONGEST_TEXT = 65_536  # characters
MOST_HITS = 200
MOST_RESCORED = 100_000
MOST_NUMBERS = 100_000  # in the ranges of a field
# layers, kinds, or a regular expression that can't take for ever: no groups, few repetitions
MODULES = r"^[ \w.,|^$\\-]*([*+?][ \w.,|^$\\-]*){0,3}$"


def _few_numbers(text: str) -> str:
    """Raises ValueError where ranges such as 8-15 hold too many numbers."""
    ranges = re.findall(r"(\d{1,9})-(\d{1,9})", text)
    if sum(max(0, int(last) - int(first)) for first, last in ranges) > MOST_NUMBERS:
        raise ValueError(f"more than {MOST_NUMBERS:,} numbers")
    return text


FormText = Annotated[str, pydantic.Field(max_length=LONGEST_TEXT)]
Numbers = pydantic.AfterValidator(_few_numbers)


class Asked(pydantic.BaseModel):
    """A query and how to search for it. What is left out has the defaults of `gradindex search`."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: FormText = ""
    completion: Annotated[FormText, pydantic.Field(
        description="The text to explain, with its leading space; empty: the model's own greedy "
                    "continuation.")] = ""
    versus: Annotated[FormText, pydantic.Field(
        description="Another completion: explain log p(completion) − log p(versus).")] = ""
    compare: Annotated[FormText, pydantic.Field(
        description="Another completion, explained side by side with the first; score_on then "
                    "chooses of both, by number.")] = ""
    score_on: Annotated[str, Numbers, pydantic.Field(
        max_length=4096, description="Tokens of the completion to score, such as 0-2,5.")] = ""
    k: Annotated[int, pydantic.Field(ge=1, le=MOST_HITS)] | None = None
    shortlist: Annotated[int, pydantic.Field(ge=1, le=MOST_RESCORED)] | Literal["all"] | None = None
    recall: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    opponents: bool = False
    rescore: bool = True
    damping: Annotated[float, pydantic.Field(ge=1e-12, le=1e12)] | None = None
    modules: Annotated[str, Numbers, pydantic.Field(
        max_length=256, pattern=MODULES,
        description="Layers (8-15), kinds (mlp, attention), or a regular expression of letters, "
                    "digits and . , | ^ $ \\ - with at most three of * + ?.")] | None = None
    normalize: Literal["none", "cosine", "relatif"] = "none"
    candidates: Literal["code", "tfidf", "both"] = "code"
    group_by: Annotated[str, pydantic.Field(
        max_length=256, description="document, source or a kept field.")] | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are not their defaults, as JSON types."""
        return self.model_dump(exclude_defaults=True)

    def id(self, index: str) -> str:
        """What names this search of the index with that digest."""
        content = json.dumps([index, self.given()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def questions(self) -> list[Question]:
        """What is asked about; two for a comparison."""
        prompt, score_on = self.prompt, self.score_on or None
        first = Question(prompt, self.completion or None, versus=self.versus or None,
                         score_on=score_on)
        return [first, Question(prompt, self.compare, score_on=score_on)] if self.compare else \
            [first]

    def controls(self) -> Controls:
        return Controls(**{name: getattr(self, name) for name in (
            "k", "shortlist", "recall", "opponents", "rescore", "damping", "modules", "normalize",
            "candidates", "group_by")})

    def url(self) -> str:
        """The page of this search."""
        return "/search?" + urlencode(
            {name: str(value).lower() if isinstance(value, bool) else value
             for name, value in self.given().items()})

    def changed(self, **fields: Any) -> "Asked":
        return self.model_copy(update=fields)

    def command(self, index: str, train_sequences: int | None = None) -> str:
        """The same as a command line; of a comparison, its first side."""
        parts = ["gradindex", "search", _quoted(index), "-p", _text(self.prompt)]
        for flag, value in (("-c", self.completion), ("--versus", self.versus)):
            parts += [flag, _text(value)] * bool(value)
        parts += ["--score-on", self.score_on] * bool(self.score_on)
        parts += ["-k", str(self.k)] * (self.k is not None)
        parts += ["--opponents"] * self.opponents + ["--no-rescore"] * (not self.rescore)
        for name in ("shortlist", "recall", "damping", "modules", "normalize", "candidates",
                     "group_by"):
            if name in self.given():
                parts += [f"--{name.replace('_', '-')}", _quoted(str(getattr(self, name)))]
        parts += ["--train-sequences", str(train_sequences)] * (train_sequences is not None)
        return " ".join(parts)

    def python(self, index: str, train_sequences: int | None = None) -> str:
        """The same as Python."""
        own = self.given()
        if train_sequences is not None:
            own["train_sequences"] = train_sequences
        both = [own.pop("completion", ""), own.pop("compare", "")]
        if self.compare:
            first, verb = [f"completions={both!r}"], "compare"
        else:
            first, verb = [f"completion={both[0]!r}"] * bool(both[0]), "search"
        arguments = ", ".join(first + [f"{name}={value!r}" for name, value in own.items()])
        return f"import gradindex\nresult = gradindex.open({index!r}).{verb}({arguments})"


def _text(value: str) -> str:
    """A text for -p and the like: @ opens a file's name there, and a text's own is doubled."""
    return _quoted("@" + value if value.startswith("@") else value)


def _quoted(value: str) -> str:
    """For a shell; what can't be seen as an escape, in quotes that read it ($'…')."""
    if visible_lines(value) == value:
        return shlex.quote(value)
    return "$'" + visible_lines(value.replace("\\", "\\\\").replace("'", "\\'")) + "'"
