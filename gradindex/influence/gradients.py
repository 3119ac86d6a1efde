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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

from gradindex.errors import InputError
from gradindex.influence.split_batches import out_of_memory
from gradindex.influence.vocabulary import OutputGradients, OverVocabulary
from gradindex.model.devices import float32_products
from gradindex.model.fused_experts import ExpertMap, pack
from gradindex.model.linear_maps import lookup_gradient
from gradindex.model.network import LanguageModel
from gradindex.model.probe import is_in_order
from gradindex.modules import LAST, Module, by_member
from gradindex.objective.batch import Batch

Each = Callable[[Module, Tensor, OutputGradients], None]


def backward(
    model: LanguageModel, modules: Sequence[Module], batch: Batch, each: Each,
    numbers: Tensor | None = None,
) -> Tensor:
    """Run a batch and call `each(module, a [b, t, i], d [b, t, o])` for every tracked module.

    a are the module's inputs, without the bias's 1; d is the gradient of Σ log p of each sequence's
    targets with respect to its outputs. The modules of a member arrive from its last to its first,
    one member after the other. A map that runs several times has the inputs of its runs one behind
    the other, an expert only those that were routed to it, padded with zeros: [b, m, i], see
    `Batch.positions`. Where an embedding has a part in the weight of a vocabulary, d is that of
    `vocabulary.py`, and behind a are the gradients of what was looked up.
    With `numbers`, in [0, 1), gradients are the curvature's: of labels that these draw from the
    model in the places of the targets, [b, t] or [b]; or where the outcome has two values of the
    exact second moment, for which nothing is drawn and [0] will do (`objective/`). Returns log p in
    nats, that of the member "last", of drawn labels or, where none are, of the rows' own: of each
    position [b, t], or of each row [b, 1]. Where its output has no part in the logits, d is zero;
    runs under `torch.no_grad` don't count.
    Raises BatchTooLargeError where memory runs out, and InputError for a module that runs on
    anything but [b, t, i] or [b·t, i] (axes of size 1 beside), that returns anything but a tensor,
    or that doesn't run at all and is no fused expert. Threads take turns.
    """
    # What a pass in half precision gives has no more digits than TF32 keeps, and comes through it
    # exactly. The pass itself is the network's: it may compute the angles of positions in float32.
    rounded = model.dtype.itemsize < 4

    def multiply(module: Module, a: Tensor, d: OutputGradients) -> None:
        with float32_products(model.device, rounded):
            each(module, a, d)

    with model.one_at_a_time, out_of_memory(*batch.tokens.shape):
        passes = by_member(modules)
        if LAST not in passes:  # whose log p it is
            passes[LAST] = []
        log_p = {member: _backward(model.member(member), own, batch, multiply, numbers)
                 for member, own in passes.items()}
        return log_p[LAST]


@dataclass
class _Run:
    """One run of a module, d being there once the backward pass has reached it.

    Of an `embedding`, `looked_up` int64 [b, n] are the tokens, and a [b, n, i] is the gradient of
    their rows, which is there then, too.
    For an expert, a is [n, i], and `token_numbers` int64 [n], on the host, are those of its inputs
    among the batch's b·t tokens. Of what ran once a text, `at` int64 [b, n] is where in their rows
    the texts begin. `outputs` is the shape of what it gave.
    """

    a: Tensor
    token_numbers: np.ndarray | None
    outputs: torch.Size
    at: np.ndarray | None = None
    embedding: nn.Embedding | None = None
    looked_up: Tensor | None = None
    d: Tensor | None = None


def _backward(
    model: LanguageModel, modules: Sequence[Module], batch: Batch, each: Each,
    numbers: Tensor | None,
) -> Tensor:
    runs: dict[str, list[_Run]] = {}
    ran, handed = set[str](), set[str]()
    handles = []

    def keep(module: Module) -> Callable[..., Tensor | None]:
        def hook(submodule: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not isinstance(output, Tensor):
                raise InputError(
                    f"module {module.name} ({type(submodule).__name__}) gave a "
                    f"{type(output).__name__}; expected a linear map, which gives a tensor. Leave "
                    "it out with --modules REGEX."
                )
            ran.add(module.name)
            if not torch.is_grad_enabled():  # the network wants this run to have no gradient
                return None
            a = args[0].detach()
            if isinstance(submodule, nn.Embedding):
                run = _run_of(module, output.detach(), output.shape, batch)
                run.embedding, run.looked_up = submodule, a.reshape(run.a.shape[:2])
            elif isinstance(submodule, ExpertMap):
                token_numbers: Any = args[1]
                run = _Run(a, token_numbers, output.shape)
            else:
                run = _run_of(module, a, output.shape, batch)
            runs.setdefault(module.name, []).append(run)
            first = not output.requires_grad  # of the tracked modules: the graph begins here
            if first:
                output.requires_grad_()
            output.register_hook(partial(receive, module, run))
            return output.clone() if first else None  # which may be changed in place
        return hook

    def receive(module: Module, run: _Run, d: Tensor) -> None:
        run.d = d if run.token_numbers is not None else d.reshape(*run.a.shape[:2], -1)
        if run.looked_up is not None:
            run.a = lookup_gradient(run.embedding, run.looked_up, run.d)
        # A shared map's gradient is the sum over its runs, and its square is not the sum of theirs:
        # it is handed over when all have arrived. Popped, so that memory holds few modules at once.
        if all(earlier.d is not None for earlier in runs[module.name]):
            handed.add(module.name)
            each(module, *_joined(module, runs.pop(module.name), batch))

    try:
        for module in modules:
            for submodule in model.sharing(module.path):
                handles.append(submodule.register_forward_hook(keep(module)))
        with torch.enable_grad():
            outputs = model.objective.outputs(model.network, batch)
    finally:
        # The network is the user's: it must not keep our hooks when a pass fails.
        for handle in handles:
            handle.remove()
    _check_all_ran(model, modules, ran)
    # The logits are the largest tensor of a pass, so their gradient takes their memory; but not
    # where the backward pass still reads them, as tanh does, which goes backward by its result
    # (a soft cap that can't be left to the objective).
    base = outputs._base if outputs._base is not None else outputs
    needed = any(hasattr(base.grad_fn, name) for name in ("_saved_result", "saved_tensors"))
    logits = outputs.detach().clone() if needed else outputs
    # Found before that: changed, a view of the head's output would be given a new place in the
    # graph, past the hook on the head.
    place = get_gradient_edge(outputs) if outputs.requires_grad else None
    log_p, gradient = model.objective.log_p(logits, batch, numbers)
    if place is not None:  # or no module has a part in the logits of so short a batch
        torch.autograd.backward([place], [gradient])
    # What has no part in the logits has the gradient zero, as what compresses a context that is
    # short: whether it has one in no text at all was tried when the modules were chosen.
    for module in reversed(modules):
        for run in runs.get(module.name, []):
            if run.d is None:
                receive(module, run, run.a.new_zeros(run.outputs))
    # Experts to which nothing was routed, and maps that ran without a gradient alone, are handed
    # over all the same, with no inputs: what adds up modules would otherwise miss one, and a stack
    # of them would have other sizes.
    for module in modules:
        if module.name not in handed:
            batch.set_positions(module.name, np.zeros((len(batch.tokens), 0), dtype=np.int64))
            # of the model's type: some make float32 logits of anything
            each(module, *(gradient.new_zeros(len(batch.tokens), 0, side, dtype=model.dtype)
                           for side in (module.d_in, module.d_out)))
    return log_p


def _check_all_ran(model: LanguageModel, modules: Sequence[Module], ran: set[str]) -> None:
    """Raise InputError for a map that didn't run, unless it is an expert with nothing to do."""
    for module in modules:
        if module.name not in ran and not isinstance(model.sharing(module.path)[0], ExpertMap):
            raise InputError(
                f"the model didn't call module {module.name} in a pass, so no gradient of it is "
                "known: its weight may be used without calling it. Leave it out with --modules "
                "REGEX."
            )


def _run_of(module: Module, a: Tensor, outputs: torch.Size, batch: Batch) -> _Run:
    """A run with the module's inputs by row, [b, n, i]: one a token, or one a text.

    They are given as the network has them, [b, t, i], or flattened, [b·t, i]; or [b, i] of whole
    texts. Raises InputError for any other shape.
    """
    # Blocks of a mixture of experts flatten the batch, some attentions see an axis of one head.
    # Anything else mixes sequences or positions in an order that can't be known, and a wrong guess
    # would give wrong scores without a word.
    rows, m = batch.real.shape
    shape = rows * batch.texts, m // batch.texts
    if is_in_order(a.shape[:-1], shape):
        return _Run(a.reshape(rows, m, -1), None, outputs)
    if is_in_order(a.shape[:-1], (shape[0], 1)):
        return _Run(a.reshape(rows, batch.texts, -1), None, outputs, batch.starts())
    raise InputError(
        f"module {module.name} ran on something else than [batch, token, feature] (its input: "
        f"{tuple(a.shape)}, the batch: {shape}); its per-sequence gradient is undefined. Leave it "
        "out with --modules REGEX."
    )


def _over_vocabulary(
    module: Module, runs: list[_Run], batch: Batch
) -> tuple[Tensor, OverVocabulary]:
    """a [b, t + u, i] and d of all runs of a weight that embeddings use, those of maps first."""
    maps = [run for run in runs if run.looked_up is None]
    lookups = [run for run in runs if run.looked_up is not None]
    rows, t = batch.real.shape
    logits = [run.d for run in maps if run.d is not None] or [
        lookups[0].a.new_zeros(rows, 0, module.d_out)]
    inputs = [run.a for run in (*maps, *lookups)]
    if len(inputs) > 1:
        batch.set_positions(module.name, np.tile(np.arange(t), (rows, len(inputs))))
    return torch.cat(inputs, 1), OverVocabulary(
        logits[0] if len(logits) == 1 else torch.cat(logits, 1),
        torch.cat([run.looked_up for run in lookups if run.looked_up is not None], 1))


def _joined(
    module: Module, runs: list[_Run], batch: Batch
) -> tuple[Tensor, OutputGradients]:
    """a [b, m, i] and d [b, m, o] of all runs of a module, one behind the other.

    Where m isn't t, or the inputs aren't in the order of tokens, `batch.positions` says which token
    each belongs to; what runs once a text belongs to its first.
    """
    shape = (batch.real.shape[0], batch.real.shape[1])
    if any(run.looked_up is not None for run in runs):
        return _over_vocabulary(module, runs, batch)
    if len(runs) == 1 and runs[0].token_numbers is None and runs[0].at is None:
        assert runs[0].d is not None
        return runs[0].a, runs[0].d
    a_parts, d_parts, positions = [], [], []
    for run in runs:
        assert run.d is not None
        if run.token_numbers is None:
            a, d, at = run.a, run.d, np.broadcast_to(np.arange(shape[1]), shape) \
                if run.at is None else run.at
        else:
            a = run.a
            if module.d_in > a.shape[-1]:  # a bias is a column of W here: it counts where a token
                a = functional.pad(a, (0, 1), value=1.0)  # came
            (a, d), at = pack([a, run.d], run.token_numbers, shape)
        a_parts.append(a)
        d_parts.append(d)
        positions.append(at)
    batch.set_positions(module.name, np.concatenate(positions, axis=1))
    return torch.cat(a_parts, dim=1), torch.cat(d_parts, dim=1)


def why_not_finite(
    model: LanguageModel, modules: Sequence[Module], batch: Batch, numbers: Tensor | None = None
) -> str | None:
    """What of a sequence's gradient is not finite, in words, or None where all of it is finite.

    `batch` holds that one sequence. log p is named first, then the module that is reached first in
    the backward pass.
    """
    reasons: list[str] = []

    def each(module: Module, a: Tensor, d: OutputGradients) -> None:
        outputs = d.logits if isinstance(d, OverVocabulary) else d
        for what, tensor in (("output gradients", outputs), ("inputs", a)):
            if not reasons and not torch.isfinite(tensor).all():
                reasons.append(f"{what} of {module.name} are not finite")

    with torch.no_grad():
        log_p = backward(model, modules, batch, each, numbers)
    if not torch.isfinite(log_p).all():
        return "log p is not finite"
    return reasons[0] if reasons else None


def apply_inputs(a: Tensor, matrix: Tensor, bias: bool) -> Tensor:
    """`matrix` times every input a_t: [b, t, i] → [b, t, n], without appending the bias's 1 to a.

    `matrix` is [n, i], or with a bias [n, i + 1].

    >>> apply_inputs(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[3.0, 4.0, 5.0]]), bias=True)
    tensor([[[16.]]])
    """
    if bias:
        # a with a 1 appended would be a copy of the largest tensors of a pass
        return functional.linear(a, matrix[:, :-1], matrix[:, -1])
    return functional.linear(a, matrix)


def gradient(module: Module, a: Tensor, d: OutputGradients) -> Tensor:
    """G = Σ_t d_t a_tᵀ of every sequence, [b, o, i], from a [b, t, i] and d [b, t, o].

    With a bias, G is [b, o, i + 1], the last column being the bias's gradient.

    >>> m = Module("m", 0, "mlp", d_out=1, d_in=2, bias=True)
    >>> a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # two tokens of one sequence
    >>> gradient(m, a, d=torch.tensor([[[1.0], [10.0]]]))
    tensor([[[31., 42., 11.]]])
    """
    if isinstance(d, OverVocabulary):
        return d.gradient(a, slice(None), slice(None))
    if module.bias:
        a = functional.pad(a, (0, 1), value=1.0)
    return torch.einsum("bto,bti->boi", d, a)
