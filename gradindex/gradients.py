"""A forward and a backward pass → activations and output gradients, module by module.

For a tracked module s = W a, the gradient of one sequence's log-likelihood is
G = Σ_t d_t a_tᵀ  [o, i],  d_t = ∂(Σ log p)/∂s_t  (Grosse et al. 2023, eq. 16; a sum over tokens).
G itself is seldom formed: `backward` hands each module's a [b, t, i] and d [b, t, o] to a function
as soon as they exist, and forgets them. Parameters require no gradient, so the backward pass
computes no weight gradients and ends at the first tracked module.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gradindex.errors import InputError, ResourceError
from gradindex.model import UNSCORED, LanguageModel, log_probability, sample_targets
from gradindex.modules import Module

Each = Callable[[Module, Tensor, Tensor], None]

# Hooks sit on the network itself: a second thread's pass would be heard by the first one's.
_ONE_AT_A_TIME = threading.Lock()


@dataclass
class Batch:
    """Right-padded sequences: tokens [b, t], targets [b, t] (next token or −100), real [b, t]."""

    tokens: Tensor
    targets: Tensor
    real: Tensor


def make_batch(
    sequences: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device
) -> Batch:
    """Pad (ids [n], scored [n]) pairs on the right.

    Any token id serves as padding: causal attention keeps real positions from seeing it, and its
    output gradients are zero.
    """
    longest = max(len(ids) for ids, _ in sequences)
    tokens = np.zeros((len(sequences), longest), dtype=np.int64)
    targets = np.full((len(sequences), longest), UNSCORED, dtype=np.int64)
    real = np.zeros((len(sequences), longest), dtype=bool)
    for row, (ids, scored) in enumerate(sequences):
        tokens[row, : len(ids)] = ids
        targets[row, : len(ids) - 1] = np.where(scored[1:], ids[1:], UNSCORED)
        real[row, : len(ids)] = True
    return Batch(*(torch.from_numpy(array).to(device) for array in (tokens, targets, real)))


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group sequences of like length, longest first, at most `batch_tokens` padded tokens each.

    A function of the lengths alone. One sequence longer than that has a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def backward(
    model: LanguageModel, modules: Sequence[Module], batch: Batch, each: Each,
    uniforms: Tensor | None = None,
) -> Tensor:
    """Run a batch and call `each(module, a [b, t, i], d [b, t, o])` for every tracked module.

    a comes without the bias's 1; d is the gradient of Σ log p of each sequence's targets. With
    `uniforms` [b, t], labels are sampled from the model in place of the targets (same positions).
    Returns log p per position [b, t], in nats. Modules arrive from the last to the first.
    Raises InputError for a module that isn't run exactly once per pass on [b, t, i], ResourceError
    where memory runs out. Threads take turns.
    """
    with _ONE_AT_A_TIME, _out_of_memory(batch):
        return _backward(model, modules, batch, each, uniforms)


@contextlib.contextmanager
def _out_of_memory(batch: Batch) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and \
                "allocate memory" not in text:
            raise
        rows, length = batch.tokens.shape
        raise ResourceError(
            f"memory ran out on a batch of {rows} × {length} tokens "
            f"({text.partition(chr(10))[0][:120]}). Use smaller --batch-tokens "
            "(one sequence is the least), fewer --modules, or --dtype bfloat16."
        ) from error


def _backward(
    model: LanguageModel, modules: Sequence[Module], batch: Batch, each: Each,
    uniforms: Tensor | None,
) -> Tensor:
    inputs: dict[str, Tensor] = {}
    handles = []

    def keep(module: Module) -> Callable[..., None]:
        def hook(_: object, args: tuple[Tensor, ...], output: Tensor) -> None:
            if module.name in inputs or args[0].dim() != 3:
                raise InputError(
                    f"module {module.name} ran more than once, or on something else than "
                    f"[batch, token, feature] (last input: {tuple(args[0].shape)}); its "
                    "per-sequence gradient is undefined. Leave it out with --modules REGEX."
                )
            inputs[module.name] = args[0].detach()
            if not output.requires_grad:  # the first tracked module: the graph begins here
                output.requires_grad_()
            output.register_hook(lambda d: each(module, inputs.pop(module.name), d))
        return hook

    try:
        for module in modules:
            submodule = model.network.get_submodule(module.name)
            handles.append(submodule.register_forward_hook(keep(module)))
        with torch.enable_grad():
            logits = model.logits(batch.tokens)
    finally:
        for handle in handles:
            handle.remove()
    targets = batch.targets
    if uniforms is not None:
        targets = sample_targets(logits, uniforms, targets != UNSCORED)
    log_p, gradient = log_probability(logits, targets)
    logits.backward(gradient)
    if inputs:
        missing = ", ".join(sorted(inputs)[:3])
        raise InputError(
            f"the output of {missing} doesn't influence the logits, so it has no gradient. Leave "
            "it out with --modules REGEX."
        )
    return log_p


def apply_inputs(a: Tensor, matrix: Tensor, bias: bool) -> Tensor:
    """matrix [n, i] times the inputs, without appending the bias's 1: [b, t, i] → [b, t, n]."""
    if bias:
        return functional.linear(a, matrix[:, :-1], matrix[:, -1])
    return functional.linear(a, matrix)


def gradient(module: Module, a: Tensor, d: Tensor) -> Tensor:
    """G = Σ_t d_t a_tᵀ, one per sequence: [b, o, i]; the bias is the last column."""
    if module.bias:
        a = functional.pad(a, (0, 1), value=1.0)
    return torch.einsum("bto,bti->boi", d, a)
