"""Logits that a network makes c·tanh(x / c) last of all, as Gemma does."""

from typing import Any

import torch

from gradindex.model.probe import in_evaluation, some_tokens
from gradindex.objective.next_token import SOFT_CAP, bounded, uncapped


def soft_cap(network: Any) -> float | None:
    """The cap c of a network's logits, if it can be left to the objective; else None.

    It can where the network leaves it out if its configuration has none, and ends in no other step:
    a pass with it and one without tell.
    """
    cap = vars(network.config.get_text_config()).get(SOFT_CAP)
    if not cap or next(network.parameters()).device.type == "meta":
        return None
    tokens = some_tokens(network, 1, 4)
    with torch.no_grad(), in_evaluation(network):
        capped = network(input_ids=tokens, use_cache=False).logits
        with uncapped(network):
            logits = network(input_ids=tokens, use_cache=False).logits
    left_out = not torch.equal(logits, capped)
    return float(cap) if left_out and torch.equal(bounded(logits, cap) * cap, capped) else None
