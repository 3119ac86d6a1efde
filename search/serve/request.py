"""A search as a request: the fields of a URL, of the page's form and of the API's JSON."""

import hashlib
import json
import re
import shlex
from dataclasses import replace
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import pydantic

from gradindex.errors import InputError
from gradindex.model.class_labels import read_label
from gradindex.terminal import visible, visible_lines
from search.ask.controls import (
    CONTROLS,
    DEFAULTS,
    Candidates,
    Controls,
    Normalization,
    flag_of,
)
from search.ask.question import Question

LONGEST_TEXT = 65_536  # characters
MOST_NUMBERS = 100_000  # in the ranges of a field
TOKEN_FIELDS = ("score", "scored_of")  # of the form: which tokens are ticked, of which completion
# fields that say what is asked, with the flags of `gradindex search`; labels are no texts, which
# could be a file's name (@FILE)
TEXTS = {"prompt": "-p", "completion": "-c", "versus": "--versus", "text": "--text",
         "text_b": "--text-b", "chosen": "--chosen", "rejected": "--rejected",
         "response": "--response"}
NAMES = {"score_on": "--score-on", "label": "--label", "versus_label": "--versus-label"}
ASKING = {*TEXTS, *NAMES, "compare"}


def _few_numbers(text: str) -> str:
    """Raises ValueError where ranges such as 8-15 hold too many numbers."""
    ranges = re.findall(r"(\d{1,9})-(\d{1,9})", text)
    if sum(max(0, int(last) - int(first)) for first, last in ranges) > MOST_NUMBERS:
        raise ValueError(f"more than {MOST_NUMBERS:,} numbers")
    return text


def _of_page(name: str) -> Any:
    """What pydantic is to hold a control to: the page's bounds of it."""
    control = CONTROLS[name]
    bounds = control.page
    return pydantic.Field(gt=bounds.above, ge=bounds.least, le=bounds.most,
                          max_length=bounds.letters, pattern=bounds.pattern,
                          description=control.api)


def _label(value: Any) -> Any:
    """A label as text or a whole number, as data have it. Raises ValueError."""
    if value is None:
        return ""
    found = read_label(value)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if not isinstance(found, (str, int)):
        raise ValueError(f"expected a class by name or number, found {value!r:.80}")
    return value if isinstance(value, str) else found


FormText = Annotated[str, pydantic.Field(max_length=LONGEST_TEXT)]
Label = Annotated[FormText | int, pydantic.BeforeValidator(_label)]
Numbers = pydantic.AfterValidator(_few_numbers)


class SearchRequest(pydantic.BaseModel):
    """A query and how to search for it. What is left out has the defaults of `gradindex search`."""

    # "Asked" is what the API's description has called it since its first version
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False,
                                       title="Asked")

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
    text: Annotated[FormText, pydantic.Field(
        description="The text whose label is explained, of a classifier.")] = ""
    text_b: Annotated[FormText, pydantic.Field(description="The second of two texts.")] = ""
    label: Annotated[Label, pydantic.Field(
        description="Its label, by name or number; empty: the model's own.")] = ""
    versus_label: Annotated[Label, pydantic.Field(
        description="Another label: explain log p(label) − log p(versus_label).")] = ""
    chosen: Annotated[FormText, pydantic.Field(
        description="The answer to the prompt that is preferred, of a model of pairs.")] = ""
    rejected: Annotated[FormText, pydantic.Field(
        description="The answer that it is preferred to.")] = ""
    response: Annotated[FormText, pydantic.Field(
        description="One answer to the prompt, whose reward is explained.")] = ""
    k: Annotated[int, _of_page("k")] | None = DEFAULTS.k
    shortlist: Annotated[int, _of_page("shortlist")] | Literal["all"] | None = None
    recall: Annotated[float, _of_page("recall")] | None = DEFAULTS.recall
    opponents: bool = DEFAULTS.opponents
    rescore: bool = DEFAULTS.rescore
    damping: Annotated[float, _of_page("damping")] | None = DEFAULTS.damping
    modules: Annotated[str, Numbers, _of_page("modules")] | None = DEFAULTS.modules
    members: Annotated[str, _of_page("members")] | None = DEFAULTS.members
    normalize: Normalization = DEFAULTS.normalize
    candidates: Candidates = DEFAULTS.candidates
    group_by: Annotated[str, _of_page("group_by")] | None = DEFAULTS.group_by

    def given(self) -> dict[str, Any]:
        """The fields that are not their defaults, as JSON types."""
        return self.model_dump(exclude_defaults=True)

    def id(self, digest: str) -> str:
        """What names this search of the index with that digest."""
        # of the index as it was opened: after an append the same question is another search
        content = json.dumps([digest, self.given()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def asks(self) -> bool:
        """Whether anything is asked, be it a part of a question only."""
        return not ASKING.isdisjoint(self.given())

    @property
    def title(self) -> str:
        """What is asked about, in a line's room."""
        label = f" → {self.label}" if self.text and self.label != "" else ""
        answer = f" {self.chosen or self.response}".rstrip()
        return f"{self.prompt or self.text}{self.completion}{label or answer}"[:60]

    def questions(self) -> list[Question]:
        """What is asked about, whichever task it is a question of; two for a comparison."""
        said = {name: value for name in (*TEXTS, *NAMES)
                if (value := getattr(self, name)) != ""}
        # a completion may stand alone, and then the prompt is an empty one
        alone = {"prompt": ""} if self.completion or self.compare else {}
        first = Question(**alone | said)
        return [first, replace(first, completion=self.compare)] if self.compare else [first]

    def controls(self) -> Controls:
        """How to search. What isn't a field here is the server's to say, or can't be asked."""
        return Controls(**{name: getattr(self, name) for name in CONTROLS
                           if name in type(self).model_fields})

    def url(self) -> str:
        """The page of this search."""
        return "/search?" + urlencode(
            {name: str(value).lower() if isinstance(value, bool) else value
             for name, value in self.given().items()})

    def changed(self, **fields: Any) -> "SearchRequest":
        """The same search but for some fields."""
        return self.model_copy(update=fields)

    def command(self, path: str, train_sequences: int | None = None) -> str:
        """The same as a command line; of a comparison, its first side."""
        # what is a flag's default is left out, so that the command says what was meant
        parts = ["gradindex", "search", _quoted(path)]
        question = self.questions()[0].given()
        for name, flag in TEXTS.items():
            parts += [flag, _text(question[name])] if name in question else []
        for name, flag in NAMES.items():
            parts += [flag, _quoted(str(question[name]))] if name in question else []
        parts += [flag_of("k"), str(self.k)] * (self.k is not None)
        parts += [flag_of("opponents")] * self.opponents + [flag_of("rescore")] * (not self.rescore)
        for name in ("shortlist", "recall", "damping", "modules", "members", "normalize",
                     "candidates", "group_by"):
            if name in self.given():
                parts += [flag_of(name), _quoted(str(getattr(self, name)))]
        parts += ["--train-sequences", str(train_sequences)] * (train_sequences is not None)
        return " ".join(parts)

    def python(self, path: str, train_sequences: int | None = None) -> str:
        """The same as Python."""
        named = self.given()
        if train_sequences is not None:
            named["train_sequences"] = train_sequences
        both = [named.pop("completion", ""), named.pop("compare", "")]
        if self.compare:
            first, verb = [f"completions={both!r}"], "compare"
        else:
            first, verb = [f"completion={both[0]!r}"] * bool(both[0]), "search"
        arguments = ", ".join(first + [f"{name}={value!r}" for name, value in named.items()])
        return f"import gradindex\nresult = gradindex.open({path!r}).{verb}({arguments})"


def _text(value: str) -> str:
    """A text for -p and the like: @ opens a file's name there, and a text's own is doubled."""
    return _quoted("@" + value if value.startswith("@") else value)


def _quoted(value: str) -> str:
    """For a shell; what can't be seen as an escape, in quotes that read it ($'…')."""
    if visible_lines(value) == value:
        return shlex.quote(value)
    return "$'" + visible_lines(value.replace("\\", "\\\\").replace("'", "\\'")) + "'"


def from_form(fields: list[tuple[str, str]]) -> SearchRequest:
    """A search from a URL's fields. Raises InputError.

    Each ticked token comes as a field `score`; they count while the completion is still the one
    whose tokens the page showed (`scored_of`).
    """
    content: dict[str, Any] = {}
    ticked = [value for name, value in fields if name == "score"]
    ticked_of = next((value for name, value in fields if name == "scored_of"), None)
    for name, value in fields:
        # browsers send a text area's lines with \r\n
        value = value.replace("\r\n", "\n")
        if value and name not in (*TOKEN_FIELDS, "job"):
            number = whole_number(value) if name == "shortlist" else None
            content[name] = value if number is None else number
    if ticked_of is not None and ticked_of.replace("\r\n", "\n") == content.get("completion"):
        content["score_on"] = ",".join(ticked)
    # not strictly: a form sends numbers as text
    try:
        request = SearchRequest.model_validate(content)
    except pydantic.ValidationError as error:
        raise InputError(first_problem(error)) from None
    # to the request, no token chosen is the same as nothing said of tokens: all
    if ticked_of is not None and content.get("score_on") == "" and "completion" in content:
        raise InputError("no token is chosen to score; choose at least one.")
    return request


def whole_number(text: str) -> int | None:
    """A whole number of 64 bits, or None."""
    # other scripts' digits are decimal to Python too, and a long text takes it quadratic time
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


def first_problem(error: pydantic.ValidationError) -> str:
    """What is wrong with a request, in a line: the first of it."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(map(str, problem["loc"])) or "the request"
    return visible(f"{where}: {problem['msg']}"[:300])
