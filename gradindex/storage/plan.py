"""What decides the bytes of an index besides its model: the build command, resolved."""

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
    """A source of documents, and what its content was when it was read."""

    name: str
    size: Count | None
    sha256: str


@dataclass(frozen=True)
class CorpusSettings:
    """How records are read and cut; lengths in tokens, `limit` in documents.

    An append reads by the settings of the build, so whatever decides what a sequence is belongs
    here.
    """

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


@dataclass(frozen=True, kw_only=True)
class Plan(CorpusSettings):
    """The settings of the corpus, and all else that was chosen. Saved as one flat object."""

    model: str
    revision: str | None
    data: list[DataFacts]
    modules: str
    fit_sequences: Count
    fit_labels: str
    covariance_blocks: Annotated[int, pydantic.Field(gt=0, le=MOST_BLOCKS)]
    damping: Positive
    bits: Count
    dtype: str
    device: str
    batch_tokens: Count
    segment_size: Rows
    seed: Count
    tokenizer: str | None

    @property
    def corpus(self) -> CorpusSettings:
        """How its data were read and cut, every setting of it."""
        return CorpusSettings(**{one.name: getattr(self, one.name)
                                 for one in fields(CorpusSettings)})

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {**asdict(self), "keep_fields": list(self.keep_fields)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Plan":
        """A plan that `to_dict` gave. Raises DamagedIndexError for anything else."""
        try:
            return _ADAPTER.validate_json(json.dumps(content))  # as it is on the disk
        except (pydantic.ValidationError, TypeError) as error:
            raise DamagedIndexError(
                f"the plan of the build can't be read ({str(error).splitlines()[0][:120]}). Run "
                "the build command again, or begin again in another folder."
            ) from None


_ADAPTER: pydantic.TypeAdapter[Plan] = pydantic.TypeAdapter(Plan)
