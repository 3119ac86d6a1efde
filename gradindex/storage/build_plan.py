"""What decides the bytes of an index besides the model: what a build was asked for, resolved.

A build that is resumed must have the same plan; an append goes by the plan of the build.
"""

import json
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import pydantic
from typing_extensions import TypedDict

from gradindex.errors import DamagedIndexError

MOST_BLOCKS = 1024  # of A and of S

Count = Annotated[int, pydantic.Field(ge=0, le=1 << 60)]
Positive = Annotated[float, pydantic.Field(gt=0)]
Rows = Annotated[int, pydantic.Field(gt=0, le=1 << 24)]


class DataFacts(TypedDict):
    """A source of documents, and what its content was when it was read.

    `size` is in bytes, or in rows of what is no file; None where it can't be known beforehand.
    """

    name: str
    size: Count | None
    sha256: str


class ReferenceFacts(TypedDict):
    """The model that gave the answers of preference pairs the log p which training compared with.

    `own_base` says that it is the policy without its adapter, as which `name` is loaded. Else
    `files` is the digest of its weight files, or of an object `tensors` that of its tensors.
    """

    name: str
    revision: str | None
    own_base: bool
    files: str | None
    tensors: str | None


class MemberSource(TypedDict):
    """Another model that shares the score, by the name of the member."""

    name: str
    model: str
    revision: str | None


@dataclass(frozen=True)
class CorpusSettings:
    """How documents are read and cut; lengths in tokens, `limit` in documents.

    With `truncate` a document is cut at the sequence length, and what is behind is left out. `rows`
    is the known form of records that was named, `columns` are the names of a table without a
    header, `chat_template` the text of the template that takes the place of the tokenizer's own.
    `labels` are the names of a classifier's classes, in the model's order. `derive` are the fields
    that are made of a row and stand beside its kept ones, of `task.DERIVED`. `reference` is the
    model that is asked what it gives the answers of preference pairs, where the data don't say it.
    """

    # An append reads by the settings of the build. So whatever decides what a sequence is belongs
    # here, and not beside it: an append would cut its documents otherwise.
    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    sequence_length: Rows
    pack: bool = False
    text_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    messages_field: str | None = None
    id_field: str | None = None
    keep_fields: tuple[str, ...] = ()
    limit: Count | None = None
    truncate: bool = False
    rows: str | None = None
    columns: tuple[str, ...] = ()
    chat_template: str | None = None
    task: str = "causal"
    text_b_field: str | None = None
    label_field: str | None = None
    chosen_field: str | None = None
    rejected_field: str | None = None
    margin_field: str | None = None
    labels: tuple[str, ...] = ()
    derive: tuple[str, ...] = ()
    reference: ReferenceFacts | None = None

    @property
    def record_fields(self) -> tuple[str, ...]:
        """The names of the fields that every record carries, kept and derived."""
        return (*self.keep_fields, *self.derive)


@dataclass(frozen=True, kw_only=True)
class Plan(CorpusSettings):
    """The settings of the corpus, and everything else that was chosen for a build.

    `bits` and `batch_tokens` are None where the build is to choose them by what it measures. Of
    preference pairs, `beta` is β. `also` are the other members.
    """

    model: str
    revision: str | None
    adapter: str | None
    data: list[DataFacts]
    modules: str
    fit_sequences: Count
    fit_labels: str
    covariance_blocks: Annotated[int, pydantic.Field(gt=0, le=MOST_BLOCKS)]
    eigen_dtype: str
    damping: Positive
    bits: Count | None
    dtype: str
    device: str
    batch_tokens: Count | None
    segment_size: Rows
    seed: Count
    tokenizer: str | None
    beta: Positive
    also: tuple[MemberSource, ...] = ()

    @property
    def corpus(self) -> CorpusSettings:
        """How the build read and cut its data."""
        # from the class's own list of fields, so that a new setting can't be forgotten
        return CorpusSettings(**{setting.name: getattr(self, setting.name)
                                 for setting in fields(CorpusSettings)})

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types, in one flat object."""
        return {**asdict(self), "keep_fields": list(self.keep_fields),
                "columns": list(self.columns), "labels": list(self.labels),
                "derive": list(self.derive), "also": list(self.also)}

    def out_of_bounds(self) -> str | None:
        """What of the plan no manifest may hold, or None."""
        try:
            _ADAPTER.validate_json(json.dumps(self.to_dict()))
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Plan":
        """The plan that `to_dict` made a dictionary of. Raises DamagedIndexError for anything else.
        """
        try:
            # as JSON, in which a list is strictly what a tuple is saved as
            return _ADAPTER.validate_json(json.dumps(content))
        except (pydantic.ValidationError, TypeError) as error:
            raise DamagedIndexError(
                f"the plan of the build can't be read ({str(error).splitlines()[0][:120]}). Run "
                "the build command again, or begin again in another folder."
            ) from None


_ADAPTER: pydantic.TypeAdapter[Plan] = pydantic.TypeAdapter(Plan)
