"""A model's tokenizer: the one that was named, or the one beside the model."""

from pathlib import Path
from typing import Any

import transformers

from gradindex.errors import InputError
from gradindex.model.model_source import ModelSource


def load_tokenizer(source: ModelSource) -> Any | None:
    """The tokenizer of a source, or None where a model has none: token files need none.

    Raises InputError for one that can't be loaded.
    """
    named = source.tokenizer
    if named is None and source.is_object:
        return None
    if named is not None and not isinstance(named, (str, Path)):
        return named
    # The model's revision and permission to run code aren't those of another source.
    arguments = source.arguments if named is None else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(named or source.name, **arguments)
    except (OSError, ValueError, KeyError) as error:
        # A folder without a tokenizer is well; one with a damaged tokenizer.json is an error,
        # which would otherwise show as text that can't be read.
        broken = Path(source.name, "tokenizer.json").exists()
        if named is None and not broken:
            return load_tokenizer(source.base) if source.adapter else None
        raise InputError(
            f"no tokenizer could be loaded from {named or source.name} "
            f"({' '.join(str(error).split())[:120]}). Give --tokenizer a folder or hub id that "
            "has a sound tokenizer.json."
        ) from None
    # A model type whose default tokenizer class needs no file loads an empty one.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None
