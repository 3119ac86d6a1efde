"""Small passes through a network: what runs in it, and may its gradients be taken as we take them?

Taken for granted afterwards, and so tried here before any data are read: the network is causal (but
where it says something of whole texts) and computes each sequence of a batch by itself, or padding
and neighbours would have a part in every score; and a map's gradient is Σ d aᵀ of what a hook on it
sees, its inputs standing one for each token in the order of the tokens, or one for each whole text.
A map whose weight is used without calling it (Mamba's dt_proj), or in a pass of its own that hooks
don't hear (reversible layers), fails that, by autograd on its weight.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradindex.errors import InputError
from gradindex.memory import gpu_failed, ran_out
from gradindex.model.config import context_length, vocabulary_size
from gradindex.model.devices import dtype_of
from gradindex.model.fused_experts import ExpertMap
from gradindex.model.linear_maps import address, form, holder, lookup_gradient, stored
from gradindex.objective.batch import Text
from gradindex.objective.whole_texts import WholeTexts
from gradindex.task import CAUSAL, Task

SHAPES = ((2, 5), (3, 11))  # sequences and tokens of the passes: no two numbers are alike
LONG = (2, 300)  # of one more, where a map has no influence in the short ones
EARLIER = 3  # tokens of the first sequence whose prediction nothing else may have a part in
NOTHING = 1e-6  # of a gradient, relative to the largest: rounding of a convolution by other means

NO_INFLUENCE = "without influence on the logits"
UNSEEN = "whose weights work in ways that hooks don't see"
SCATTERED = "that see something else than one input a token"


@dataclass
class Probe:
    """What small passes tell of a network.

    `called` are the modules that run, in the order of their first runs. `left_out` are the linear
    maps that run and whose gradient can't be taken, with what is the matter with them.
    """

    called: list[nn.Module]
    left_out: dict[nn.Module, str] = field(default_factory=dict)


@dataclass
class _Heard:
    """One run of a map: inputs a [n, i], and which of the batch's b·t tokens they belong to.

    `token_numbers` is None where that can't be known; `d` [n, o] is None where the logits don't
    depend on the outputs.
    """

    a: Tensor
    token_numbers: Tensor | None
    output: Tensor
    d: Tensor | None = None

    def receive(self, d: Tensor) -> None:
        """Take over the gradient of the outputs."""
        self.d = d.detach().flatten(0, -2)


def probe(
    network: Any, maps: Sequence[Sequence[nn.Module]], task: Task = CAUSAL
) -> Probe:
    """Run small passes. `maps` are the network's linear maps, those that share a weight together.

    Raises InputError unless the network gives logits for tokens alone, is causal where its task is,
    and keeps the sequences of a batch apart, as gradients tell. Where the weights aren't in memory
    (on the device "meta"), every module counts as called, and nothing is left out.
    """
    if next(network.parameters()).device.type == "meta":
        return Probe(list(network.modules()))
    found = Probe([])
    with in_evaluation(network), _own_gradients(network, maps):
        passes = [_Pass(network, maps, task, *size) for size in SHAPES]
        silent = set.intersection(*(one.silent for one in passes))
        if silent:  # of some parts the influence begins far behind, as of compressed context
            most = context_length(network.config) or LONG[1]
            passes.append(_Pass(network, maps, task, LONG[0], min(LONG[1], most)))
            silent &= passes[-1].silent
    found.called = list(dict.fromkeys(module for one in passes for module in one.called))
    found.left_out = dict.fromkeys(silent, NO_INFLUENCE)
    for one in passes:
        found.left_out |= one.left_out
    return found


class _Pass:
    """One pass forward and backward over some tokens, and what it tells of the maps.

    `silent` are the maps that run without influence on the logits.
    """

    def __init__(
        self, network: Any, maps: Sequence[Sequence[nn.Module]], task: Task, b: int, t: int
    ):
        self.called: dict[nn.Module, None] = {}
        self.silent: set[nn.Module] = set()
        self.left_out: dict[nn.Module, str] = {}
        self._runs: dict[nn.Module, list[_Heard]] = {}
        self._shape, self._maps, self._task = (b, t), maps, task
        self._embedded: list[Tensor] = []
        tokens = some_tokens(network, b, t)
        handles = [module.register_forward_hook(self._call) for module in network.modules()]
        handles += [linear.register_forward_hook(self._keep)
                    for sharing in maps for linear in sharing]
        handles.append(network.get_input_embeddings().register_forward_hook(self._embed))
        try:
            with torch.enable_grad():
                logits = _logits(network, tokens, task).float()
        finally:
            for handle in handles:  # or they would hear what a backward pass computes again
                handle.remove()
        with torch.enable_grad(), _readable(
                network, "backward", "has a gradient in evaluation mode"):
            said = _some_of(logits, tokens, task)
            self._check_order(network, said[0, :EARLIER].sum())
            self._check_gradients(said.sum())
        self._runs.clear()

    def _call(self, module: nn.Module, _: Any, __: Any) -> None:
        self.called.setdefault(module)

    def _embed(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        self._embedded.append(
            output if output.requires_grad else output.detach().requires_grad_())
        return self._embedded[-1].clone()  # which some models scale in place

    def _keep(self, linear: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            self.left_out[linear] = UNSEEN
            return
        self._runs.setdefault(linear, [])
        if not output.requires_grad:  # under no_grad: by autograd too this run doesn't count
            return
        a = args[0].detach()
        if isinstance(linear, nn.Embedding):
            a = a[..., None]  # the tokens: one input each
        if isinstance(linear, ExpertMap):
            numbers: Tensor | None = args[1]
        else:
            b, t = self._shape
            numbers = None
            if is_in_order(a.shape[:-1], (b, t)):
                numbers = torch.arange(b * t, device=a.device)
            elif not self._task.is_causal and is_in_order(a.shape[:-1], (b, 1)):
                numbers = torch.arange(0, b * t, t, device=a.device)  # one a text
        run = _Heard(a.flatten(0, -2), numbers, output)
        output.register_hook(run.receive)
        self._runs[linear].append(run)

    def _check_order(self, network: Any, earlier: Tensor) -> None:
        """What `earlier` says of the first sequence may depend on its first tokens alone.

        Of a whole text it may depend on all of the text. Raises InputError where other tokens'
        embeddings have a part in it; a map whose outputs for others have one has its inputs in
        another order, and is left out.
        """
        runs = [(linear, run) for linear, runs in self._runs.items() for run in runs]
        wanted = [*self._embedded, *(run.output for _, run in runs)]
        gradients = torch.autograd.grad(earlier, wanted, retain_graph=True, allow_unused=True)
        b, t = self._shape
        for d in gradients[:len(self._embedded)]:
            if d is None or d.ndim != 3 or d.shape[0] != b or d.shape[1] < t:
                continue
            sizes = d.abs().amax(-1)[:, -t:]  # some have learned tokens before ours
            limit = NOTHING * sizes.max()
            if sizes[1:].max() > limit:
                raise _mixing(network)
            if self._task.is_causal and sizes[0, EARLIER:].max() > limit:
                raise _not_causal(network)
        for (linear, run), d in zip(runs, gradients[len(self._embedded):], strict=True):
            if run.token_numbers is None:
                self.left_out[linear] = SCATTERED
            elif d is not None and d.numel():
                sizes = d.flatten(0, -2).abs().amax(-1)
                own = EARLIER if self._task.is_causal else t
                later = torch.as_tensor(run.token_numbers >= own, device=sizes.device)
                if (sizes[later] > NOTHING * sizes.max()).any():
                    self.left_out[linear] = SCATTERED

    def _check_gradients(self, total: Tensor) -> None:
        """Σ d aᵀ of what the hooks saw against autograd on the weights; see who is silent."""
        sharing: dict[int, list[Sequence[nn.Module]]] = {}
        awaited: dict[int, list[nn.Parameter]] = {}
        for maps in self._maps:
            weight, _ = stored(maps[0])
            # those that share a weight in different forms, W and Wᵀ, are no linear map together
            if weight is not None and len({*map(form, maps)}) == 1:
                sharing.setdefault(address(weight), []).append(maps)
        for parameter in _weights(self._maps):
            if address(parameter) in sharing:
                awaited.setdefault(address(parameter), []).append(parameter)
        parts: dict[int, list[Tensor]] = {}

        def arrived(parameter: nn.Parameter) -> None:
            where = address(parameter)
            assert parameter.grad is not None
            parts.setdefault(where, []).append(parameter.grad)
            parameter.grad = None  # at once: memory holds few weights' gradients
            if len(parts[where]) == len(awaited[where]):
                compare(where, sum(parts.pop(where)))

        def compare(where: int, true: Any) -> None:
            for maps in sharing[where]:
                if any(linear in self._runs for linear in maps) and not self._agrees(maps, true):
                    self.left_out |= dict.fromkeys(maps, UNSEEN)

        handles = [parameter.register_post_accumulate_grad_hook(arrived)
                   for same in awaited.values() for parameter in same]
        try:
            total.backward()
        finally:
            for handle in handles:
                handle.remove()
        for where, some in parts.items():  # tied weights of which not all had a part
            compare(where, sum(some))
        for maps in self._maps:
            runs = [run for linear in maps for run in self._runs.get(linear, [])]
            if any(linear in self._runs for linear in maps) and all(run.d is None for run in runs):
                self.silent.update(maps)

    def _agrees(self, maps: Sequence[nn.Module], true: Tensor) -> bool:
        """Whether Σ d aᵀ over all runs of maps that share a weight is its gradient, as stored."""
        first: Any = maps[0]
        if isinstance(first, ExpertMap):
            true = true[first.number]
        seen, size = torch.zeros_like(true), 0.0
        for linear, run in [(one, run) for one in maps for run in self._runs.get(one, [])]:
            if run.d is None:
                continue
            if isinstance(linear, nn.Embedding):
                rows = lookup_gradient(linear, run.a[:, 0], run.d).to(true.dtype)
                seen.index_add_(0, run.a[:, 0], rows)
                size += float(rows.norm(dim=-1).sum())
                continue
            product = run.d.to(true.dtype).T @ run.a.to(true.dtype)
            seen += product if product.shape == true.shape and not _is_turned(first) else product.T
            size += float((run.d.norm(dim=-1) * run.a.norm(dim=-1)).sum())
        if not (torch.isfinite(true).all() and torch.isfinite(seen).all()):
            return True  # an overflow tells nothing
        return float((seen - true).norm()) <= _rounding(first) * max(size, float(true.norm()))


def is_in_order(prefix: Sequence[int], shape: tuple[int, int]) -> bool:
    """Whether inputs [*prefix, i] stand one for each of b·t tokens, as [b, t, i] or flattened.

    Axes of size 1 don't count.

    >>> is_in_order((2, 1, 5), (2, 5)), is_in_order((10,), (2, 5)), is_in_order((5, 2), (2, 5))
    (True, True, False)
    """
    own = [n for n in prefix if n != 1]
    b, t = shape
    return own == [n for n in shape if n != 1] or own == [n for n in [b * t] if n != 1]


def _is_turned(linear: Any) -> bool:
    """Whether a map's weight is stored as Wᵀ [i, o]."""
    if isinstance(linear, ExpertMap):
        return bool(holder(linear).is_transposed)
    return not isinstance(linear, (nn.Linear, nn.Embedding))  # Conv1D


def _rounding(linear: Any) -> float:
    """How far two ways to the same gradient may be from each other, relative to its terms."""
    return {torch.float64: 1e-9, torch.float32: 5e-3}.get(linear.weight.dtype, 0.1)


def some_tokens(network: Any, b: int, t: int, first: int = 0) -> Tensor:
    """Tokens [b, t] from the middle of the vocabulary on, whose ends a model may treat apart."""
    count = vocabulary_size(network.config)
    numbers = torch.arange(first, first + b * t, device=next(network.parameters()).device)
    return ((count // 2 + numbers) % count).view(b, t)


def _some_of(logits: Tensor, tokens: Tensor, task: Task) -> Tensor:
    """Numbers that logits say of the tokens of each text: log p [b, t − 1] of each next one; or of
    whole texts, the log of one class, or a value, [b, 1].
    """
    if task.is_causal:
        return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return logits.log_softmax(-1)[:, :1] if logits.shape[1] > 1 else logits


def _logits(network: Any, tokens: Tensor, task: Task) -> Tensor:
    """The logits of a pass: [b, t, v], or of whole texts [b, c].

    Raises InputError where the network has none, or fails.
    """
    with _readable(network, f"forward over {len(tokens)} × {tokens.shape[1]} tokens",
                   "gives logits for token ids alone, whatever their number"):
        told = {"use_cache": False} if task.is_causal else {}
        logits = getattr(network(input_ids=tokens, **told), "logits", None)
    prefix = tokens.shape if task.is_causal else tokens.shape[:1]
    if not isinstance(logits, Tensor) or logits.shape[:-1] != prefix:
        given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        expected = "[batch, token, vocabulary]" if task.is_causal else "[batch, output]"
        raise InputError(
            f"{type(network).__name__} gave {given} for tokens {list(tokens.shape)}; expected "
            f"logits {expected}. Give {task.model}{' of text' * task.is_causal}."
        )
    return logits


def check_logits(network: Any, task: Task = CAUSAL) -> None:
    """Raise InputError where logits depend on chance, on other sequences, or on later tokens.

    Of whole texts it is padding that they may not depend on.

    What makes them so may have no gradient: experts that take a number of a batch's tokens, say.
    Networks in half precision pass: where they round, a router of theirs may choose otherwise.
    """
    if next(network.parameters()).dtype not in (torch.float32, torch.float64) or \
            next(network.parameters()).device.type == "meta":
        return
    b, t = SHAPES[0]
    with torch.no_grad(), in_evaluation(network):
        # A rounding can turn what a router chooses, though not time and again.
        for first in (0, b * t, 2 * b * t):
            tokens = some_tokens(network, b, t, first)
            together = _logits(network, tokens, task)
            again = _same(together, _logits(network, tokens, task))
            apart = _same(together, torch.cat(
                [_logits(network, row[None], task) for row in tokens]))
            shorter = _same(together[:, :-1], _logits(network, tokens[:, :-1], task)) \
                if task.is_causal else _is_padded(network, tokens, task)
            if again and apart and shorter:
                return
    if not again:
        raise InputError(
            f"{type(network).__name__} draws random numbers in a pass: the same tokens gave other "
            "logits the second time, in evaluation mode. Expected a model whose logits depend on "
            "the tokens alone; turn off in its configuration what is random."
        )
    if apart and not task.is_causal:
        raise InputError(
            f"{type(network).__name__} says something else of a text where it is padded behind, in "
            "a batch with a longer one, though it is told which tokens are real. Expected a model "
            "that leaves padding out by its attention_mask and its pad_token_id.")
    raise _not_causal(network) if apart else _mixing(network)


def _is_padded(network: Any, tokens: Tensor, task: Task) -> bool:
    """Whether a shorter text comes out of a batch with padding as it does by itself."""
    rows = [Text(row, np.ones(len(row), dtype=bool))
            for row in (tokens[0].cpu().numpy(), tokens[1, :-2].cpu().numpy())]
    reader = WholeTexts.of(network)
    said = reader.outputs(network, reader.batch(rows, np.zeros(2), tokens.device))
    return _same(said[1:], _logits(network, tokens[1:, :-2], task))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether logits are the same but for rounding, measured by how far they are spread.

    A single output is measured by its size.
    """
    spread = (one - one.mean(-1, keepdim=True) if one.shape[-1] > 1 else one).abs().max()
    # of what isn't finite nothing can be told
    return not bool((one - other).abs().max() > 1e-3 * spread)


def _not_causal(network: Any) -> InputError:
    return InputError(
        f"{type(network).__name__} isn't causal: what it says of a token depends on later tokens. "
        "Expected a causal language model; one made for filling in words (BERT, RoBERTa, …) is "
        "none, unless its configuration makes it one (is_decoder)."
    )


def _mixing(network: Any) -> InputError:
    return InputError(
        f"{type(network).__name__} mixes the sequences of a batch: what it says of one depends on "
        "the others, so no sequence has a gradient of its own. Expected a model that computes each "
        "sequence by itself; turn off in its configuration what looks at the batch (a capacity of "
        "experts, batch norms)."
    )


@contextlib.contextmanager
def _readable(network: Any, where: str, expected: str) -> Iterator[None]:
    """Turn what a network raises in a pass into an InputError that says what to do."""
    try:
        yield
    except Exception as error:  # a model's code may raise anything
        if isinstance(error, InputError) or ran_out(error) or gpu_failed(error):
            raise
        dtype = str(dtype_of(network)).removeprefix("torch.")
        text = " ".join(str(error).split()).rstrip(".")
        others = " or ".join(sorted({"float32", "bfloat16"} - {dtype}))
        raise InputError(
            f"{type(network).__name__} fails in a small pass in {dtype}, {where}: "
            f"{type(error).__name__}: {text[:200]}. Expected a model that {expected}. If it is "
            f"the dtype, give another (--dtype {others}); else it can't be indexed as it is."
        ) from error


def _weights(maps: Sequence[Sequence[nn.Module]]) -> list[nn.Parameter]:
    """The parameters of all weights that can have a gradient, each once."""
    found = {id(weight): weight for sharing in maps for linear in sharing
             if isinstance(weight := stored(linear)[0], nn.Parameter)
             and weight.is_floating_point()}
    return list(found.values())


@contextlib.contextmanager
def _own_gradients(network: nn.Module, maps: Sequence[Sequence[nn.Module]]) -> Iterator[None]:
    """For a while the maps' weights alone require a gradient; the network's own come back."""
    before = [(one, one.requires_grad, one.grad) for one in network.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for weight in _weights(maps):
            weight.requires_grad_()
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


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
