"""What a model's configuration says: context, vocabulary, whether its weights are quantised."""

from typing import Any

# whose positions begin behind the number of the padding token: RoBERTa, and who took it over
OFFSET_POSITIONS = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mluke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"})


def context_length(config: Any) -> int | None:
    """The longest sequence that the model takes, in tokens; None where its configuration is silent.

    >>> from transformers import GPT2Config
    >>> context_length(GPT2Config(n_positions=1024))
    1024
    >>> from transformers import RobertaConfig
    >>> context_length(RobertaConfig(max_position_embeddings=514))
    512
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    positions = getattr(text, "max_position_embeddings", None)
    if positions and text.model_type in OFFSET_POSITIONS:
        positions -= (getattr(text, "pad_token_id", None) or 0) + 1
    lengths = [positions]
    # Rotary scaling "longrope" (Phi-3) switches to other frequencies where a batch holds more than
    # the original length, for all its sequences. Up to that length a sequence's gradient doesn't
    # depend on its batch. ("dynamic" does so beyond the length itself, which is never reached.)
    for settings in (rope, *rope.values()):  # some models have them for each type of layer
        if isinstance(settings, dict) and settings.get("rope_type") == "longrope":
            lengths.append(settings.get("original_max_position_embeddings"))
    return min((int(length) for length in lengths if length), default=None)


def vocabulary_size(config: Any) -> int:
    """How many token ids there are: all of them are below it.

    >>> from transformers import GPT2Config
    >>> vocabulary_size(GPT2Config(vocab_size=50257))
    50257
    """
    return int(config.get_text_config().vocab_size)


def is_quantised(config: Any) -> bool:
    """Whether the weights are quantised, so that they can't be cast or moved."""
    return getattr(config, "quantization_config", None) is not None
