"""A forward and a backward pass → activations and output gradients, module by module.

For a tracked module s = W a, the gradient of one sequence's log-likelihood is
G = Σ_t d_t a_tᵀ  [o, i],  d_t = ∂(Σ log p)/∂s_t  (Grosse et al. 2023, eq. 16; a sum over tokens).
G itself is seldom formed: `backward` hands each module's a [b, t, i] and d [b, t, o] to a function
as soon as they exist, and forgets them. Parameters require no gradient, so the backward pass
computes no weight gradients and ends at the first tracked module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradindex.errors import InputError
from gradindex.influence.batches import out_of_memory
from gradindex.model.experts import ExpertMap, pack
from gradindex.model.network import LanguageModel
from gradindex.modules import Module
from gradindex.objective import Batch

Each = Callable[[Module, Tensor, Tensor], None]


def backward(
    model: LanguageModel, modules: Sequence[Module], batch: Batch, each: Each,
    numbers: Tensor | None = None,
) -> Tensor:
    """Run a batch and call `each(module, a [b, t, i], d [b, t, o])` for every tracked module.

    a comes without the bias's 1; d is the gradient of Σ log p of each sequence's targets. A map
    that runs several times has its inputs side by side, an expert only those routed to it, padded
    with zeros (`Batch.positions`). With `numbers` [b, t], labels are sampled from the model in
    place of the targets (same positions). Returns log p per position [b, t], in nats. Modules
    arrive from the last to the first.
    Raises InputError for a module that runs on anything but [b, t, i] or [b·t, i], gives anything
    but a tensor, whose output doesn't matter, or that, being no fused expert, doesn't run at all:
    its weight may be used otherwise. BatchTooLargeError where memory runs out. Threads take turns.
    """
    with model.one_at_a_time, out_of_memory(*batch.tokens.shape):
        return _backward(model, modules, batch, each, numbers)


@dataclass
class _Run:
    """One run of a module: its inputs, for an expert their places in the batch, and in the end its
    output gradients."""

    a: Tensor
    places: Tensor | None
    d: Tensor | None = None


def _backward(
    model: LanguageModel, modules: Sequence[Module], batch: Batch, each: Each,
    numbers: Tensor | None,
) -> Tensor:
    runs: dict[str, list[_Run]] = {}
    ran: set[str] = set()
    handles = []

    def keep(module: Module) -> Callable[..., None]:
        def hook(submodule: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not isinstance(output, Tensor):
                raise InputError(
                    f"module {module.name} ({type(submodule).__name__}) gave a "
                    f"{type(output).__name__}; expected a linear map, which gives a tensor. Leave "
                    "it out with --modules REGEX."
                )
            if isinstance(submodule, ExpertMap):
                run = _Run(args[0].detach(), args[1])
            else:
                run = _Run(_by_sequence(module, args[0].detach(), batch), None)
            runs.setdefault(module.name, []).append(run)
            ran.add(module.name)
            if not output.requires_grad:  # the first tracked module: the graph begins here
                output.requires_grad_()
            output.register_hook(partial(arrived, module, run))
        return hook

    def arrived(module: Module, run: _Run, d: Tensor) -> None:
        run.d = d if run.places is not None else d.reshape(*batch.tokens.shape, -1)
        if all(one.d is not None for one in runs[module.name]):
            each(module, *_joined(module, runs.pop(module.name), batch))

    try:
        for module in modules:
            for submodule in model.sharing(module.name):
                handles.append(submodule.register_forward_hook(keep(module)))
        with torch.enable_grad():
            outputs = model.objective.outputs(model.network, batch)
    finally:
        for handle in handles:
            handle.remove()
    _check_all_ran(model, modules, ran)
    made = outputs._base if outputs._base is not None else outputs
    kept = any(hasattr(made.grad_fn, name) for name in ("_saved_result", "saved_tensors"))
    taken = outputs.detach().clone() if kept else outputs  # tanh goes backward by what it gave
    log_p, gradient = model.objective.log_p(taken, batch, numbers)
    outputs.backward(gradient)
    if runs:
        missing = ", ".join(sorted(runs)[:3])
        raise InputError(
            f"the output of {missing} doesn't influence the logits, so it has no gradient. Leave "
            "it out with --modules REGEX."
        )
    for module in modules:  # experts to which nothing was routed
        if module.name not in ran:
            batch.positions[module.name] = batch.tokens[:, :0]
            each(module, gradient.new_zeros(len(batch.tokens), 0, module.d_in),
                 gradient.new_zeros(len(batch.tokens), 0, module.d_out))
    return log_p


def _check_all_ran(model: LanguageModel, modules: Sequence[Module], ran: set[str]) -> None:
    """Raise InputError for a map that didn't run; an expert may have nothing routed to it."""
    for module in modules:
        if module.name not in ran and not isinstance(model.sharing(module.name)[0], ExpertMap):
            raise InputError(
                f"the model didn't call module {module.name} in a pass, so no gradient of it is "
                "known: its weight may be used without calling it. Leave it out with --modules "
                "REGEX."
            )


def _by_sequence(module: Module, a: Tensor, batch: Batch) -> Tensor:
    """Inputs [b, t, i] from such, or from [b·t, i], as a block of a mixture flattens them.

    Raises InputError for others.
    """
    if a.shape[:-1] not in (batch.tokens.shape, (batch.tokens.numel(),)):
        raise InputError(
            f"module {module.name} ran on something else than [batch, token, feature] (its input: "
            f"{tuple(a.shape)}, the batch: {tuple(batch.tokens.shape)}); its per-sequence gradient "
            "is undefined. Leave it out with --modules REGEX."
        )
    return a.reshape(*batch.tokens.shape, -1)


def _joined(module: Module, runs: list[_Run], batch: Batch) -> tuple[Tensor, Tensor]:
    """a [b, m, i] and d [b, m, o] of all runs of a module; their positions go to the batch."""
    if len(runs) == 1 and runs[0].places is None:
        assert runs[0].d is not None
        return runs[0].a, runs[0].d
    parts = []
    for run in runs:
        assert run.d is not None
        if run.places is None:
            every = torch.arange(batch.tokens.shape[1], device=run.a.device)
            parts.append((run.a, run.d, every.expand(batch.tokens.shape)))
            continue
        shape = (batch.tokens.shape[0], batch.tokens.shape[1])
        a = run.a
        if module.d_in > a.shape[-1]:  # a bias is a column of W here: it counts where a token came
            a = functional.pad(a, (0, 1), value=1.0)
        packed, positions = pack(a, run.places, shape)
        parts.append((packed, pack(run.d, run.places, shape)[0], positions))
    a, d, positions = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    batch.positions[module.name] = positions
    return a, d


def why_not_finite(
    model: LanguageModel, modules: Sequence[Module], batch: Batch, numbers: Tensor | None = None
) -> str | None:
    """Where the gradient of a batch of one sequence is first not finite, or None where it is."""
    found: list[str] = []

    def each(module: Module, a: Tensor, d: Tensor) -> None:
        for what, tensor in (("output gradients", d), ("inputs", a)):
            if not found and not torch.isfinite(tensor).all():
                found.append(f"{what} of {module.name} are not finite")

    with torch.no_grad():
        log_p = backward(model, modules, batch, each, numbers)
    if not torch.isfinite(log_p).all():
        return "log p is not finite"
    return found[0] if found else None


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
