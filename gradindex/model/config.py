"""What a model's configuration says: context, vocabulary, whether its weights are quantised."""

from typing import Any


def context_length(config: Any) -> int | None:
    """The longest sequence the model takes, in tokens, where its configuration says so.

    Rotary scaling "longrope" (Phi-3) switches to other frequencies where a batch holds more than
    the original length, for all its sequences: there this is the original length, up to which a
    sequence's gradient doesn't depend on its batch. "dynamic" does so beyond the length itself.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    lengths = [getattr(text, "max_position_embeddings", None)]
    for one in (rope, *rope.values()):  # some models have one for each type of layer
        if isinstance(one, dict) and one.get("rope_type") == "longrope":
            lengths.append(one.get("original_max_position_embeddings"))
    return min((int(length) for length in lengths if length), default=None)


def vocabulary_size(config: Any) -> int:
    """How many token ids there are; they lie below it."""
    return int(config.get_text_config().vocab_size)


def is_quantised(config: Any) -> bool:
    """Whether the weights are quantised, so that they can't be cast or moved."""
    return getattr(config, "quantization_config", None) is not None
