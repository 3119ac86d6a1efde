"""One small pass through a network: is it causal, and which of its linear maps does it call?

Both are taken for granted afterwards. In a network that isn't causal, padding would have a part in
every score, and a token would help to predict itself. And a hook on a map whose weight is used
without calling the map (Mamba's dt_proj) never sees a gradient.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradindex.errors import InputError
from gradindex.model.config import vocabulary_size

LENGTH = 4  # tokens
NOTHING = 1e-6  # of a gradient, relative to the largest: rounding of a convolution by other means


def called_in_a_pass(network: Any, modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Those of the modules that a pass calls. Raises InputError unless the network is causal.

    All of them where the weights aren't in memory (on the device "meta"), as in a dry run.
    """
    candidates, called, embedded = set(modules), set[nn.Module](), list[Tensor]()
    device = next(network.parameters()).device
    if device.type == "meta":
        return candidates
    # From the middle of the vocabulary: a model may treat the special tokens at its ends apart.
    vocabulary = vocabulary_size(network.config)
    tokens = (vocabulary // 2 + torch.arange(LENGTH, device=device)) % vocabulary

    def call(module: nn.Module, _: Any, __: Any) -> None:
        called.add(module)

    def embed(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which some models scale in place

    handles = [module.register_forward_hook(call) for module in candidates]
    handles.append(network.get_input_embeddings().register_forward_hook(embed))
    try:
        with in_evaluation(network), torch.enable_grad():
            logits = network(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            earlier = logits.float().log_softmax(-1).gather(-1, tokens[1:, None]).sum()
    finally:
        for handle in handles:
            handle.remove()
    # In a causal network, what was said before the last token has no gradient by its embedding.
    [d] = torch.autograd.grad(earlier, embedded[:1])
    sizes = d.abs().amax((0, 2))
    if sizes[-1] > NOTHING * sizes.max():
        raise InputError(
            f"{type(network).__name__} isn't causal: what it says of a token depends on later "
            "tokens. Expected a causal language model; one made for filling in words (BERT, "
            "RoBERTa, …) is none, unless its configuration makes it one (is_decoder)."
        )
    return called


@contextlib.contextmanager
def in_evaluation(network: nn.Module) -> Iterator[None]:
    """Put a network in evaluation mode for a while; each module's own mode comes back."""
    training = [module for module in network.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
