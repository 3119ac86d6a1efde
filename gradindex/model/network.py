"""The door to transformers: load a causal language model, choose its modules, logits → log p.

A model is a hub id (`id@revision`), a folder, or a loaded object; the id or folder may be an
adapter's, which names its base. Its identity is a digest of its weights, never its path.
Parameters never require a gradient: `gradients.py` differentiates with respect to module outputs
only.
"""

import hashlib
import json
import logging
import re
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from gradindex.errors import IndexMismatchError, InputError
from gradindex.model import experts
from gradindex.model.adapters import (
    WEIGHTS,
    Adapter,
    Parts,
    adapter_facts,
    adapter_parts,
    no_adapter,
    read_adapter,
    unwrapped,
)
from gradindex.model.identity import digest_of_files, tensors_digest
from gradindex.model.loading import DTYPES, device_called, dtype_called, readable_errors
from gradindex.model.probe import called_in_a_pass
from gradindex.model.quantised import as_dequantised, is_bitsandbytes, quantised_dtype
from gradindex.modules import Module, choose_modules

EXPERTS = "gradindex"  # what our way of running fused experts is called in transformers
ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts.forward)

UNSCORED = -100  # a position whose next token is not scored, as in transformers
CACHED_LOGITS = 1 << 20  # logits turned into probabilities at a time: they stay in a CPU's cache
RUN = 64  # labels that are summed up before one of them is drawn


@dataclass
class ModelSource:
    """Where a model and its tokenizer come from, before anything heavy is read.

    Arguments: `model` is a hub id, `id@revision`, a folder (each a model or an adapter), or a
    transformers model or PeftModel object; `tokenizer` (an object, id or folder) defaults to the
    one beside the model, or beside an adapter's base.
    """

    model: Any
    tokenizer: Any = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def name(self) -> str:
        if isinstance(self.model, (str, Path)):
            return self._split(self.model)[0]
        return str(getattr(self.model.config, "_name_or_path", "") or "an unnamed model object")

    @property
    def revision(self) -> str | None:
        return self._split(self.model)[1] if isinstance(self.model, (str, Path)) else None

    @staticmethod
    def _split(model: str | Path) -> tuple[str, str | None]:
        text = str(model)
        if "@" in text and not Path(text).exists():
            name, _, revision = text.partition("@")
            return name, revision
        return text, None

    def _arguments(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @cached_property
    def adapter(self) -> Adapter | None:
        """The saved adapter this names, or None. Raises InputError for an unusable one."""
        if not isinstance(self.model, (str, Path)):
            return None
        with readable_errors(self.name):
            file = transformers.utils.find_adapter_config_file(self.name, revision=self.revision)
        return read_adapter(Path(file)) if file else None

    @cached_property
    def base(self) -> "ModelSource":
        """The model under the adapter. Raises InputError where that is an adapter itself."""
        assert self.adapter is not None
        base = ModelSource(self.adapter.base, None, self.trust_remote_code, self.allow_pickle)
        if base.adapter is not None:
            raise InputError(
                f"the base of the adapter {self.name}, {base.name}, is itself an adapter; expected "
                "a whole model. Merge it into its own base (merge_and_unload) and save that."
            )
        return base

    def load_config(self) -> Any:
        """The model's configuration (an adapter's base's). Raises InputError when not found."""
        if not isinstance(self.model, (str, Path)):
            return self.model.config
        if self.adapter is not None:
            with self.adapter.explain_base():
                return self.base.load_config()
        with readable_errors(self.name):
            return transformers.AutoConfig.from_pretrained(self.name, **self._arguments())

    def load_tokenizer(self) -> Any | None:
        """The tokenizer, or None where a model has none (enough for token files)."""
        given = self.tokenizer
        if given is None and not isinstance(self.model, (str, Path)):
            return None
        if given is not None and not isinstance(given, (str, Path)):
            return given
        arguments = self._arguments() if given is None else {}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(given or self.name, **arguments)
        except (OSError, ValueError, KeyError) as error:
            broken = Path(self.name, "tokenizer.json").exists()
            if given is None and not broken:
                return self.base.load_tokenizer() if self.adapter else None
            raise InputError(
                f"no tokenizer could be loaded from {given or self.name} "
                f"({' '.join(str(error).split())[:120]}). Give --tokenizer a folder or hub id that "
                "has a sound tokenizer.json."
            ) from None
        # A model type whose default tokenizer class needs no file loads an empty one.
        return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None

    def resolve(self, device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
        """What "auto" means: a GPU if there is one; float32 on a CPU, the checkpoint's own there.

        A loaded model is used where and as what it is, a quantised one as what it is. Raises
        InputError for what can't be had.
        """
        config = self.load_config()
        if isinstance(self.model, (str, Path)):
            place, own = device_called(device), getattr(config, "dtype", None)
            own = (DTYPES.get(own) if isinstance(own, str) else own) or torch.float32
        else:
            place, own = next(self.model.parameters()).device, _dtype_of(self.model)
            place = place if device == "auto" else device_called(device)
        if _quantised(config):
            return place, quantised_dtype(self.name, own, dtype)
        if dtype != "auto":
            return place, dtype_called(dtype)
        cast = isinstance(self.model, (str, Path)) and place.type == "cpu"
        return place, torch.float32 if cast else own

    def load(self, device: str = "auto", dtype: str = "auto") -> "LanguageModel":
        """Load the weights (safetensors, unless `allow_pickle`) in evaluation mode, frozen.

        What transformers keeps in float32 stays so, such as rotary frequencies. A model object is
        put in that state itself, and moved or its parameters cast if device or dtype say so, as an
        adapter's are to its base's dtype. Raises InputError for a model, device or dtype that can't
        be had.
        """
        place, wanted = self.resolve(device, dtype)
        network = self.model
        if isinstance(network, (str, Path)):
            network = self._read(place, wanted)
        network = unwrapped(network)
        if not _quantised(network.config):
            network = network.to(place)
            if adapter_facts(network) or _dtype_of(network) != wanted:
                _cast(network, wanted)
        else:
            if network.device.type != place.type:
                network = network.to(place)
            as_dequantised(network)
        network = network.eval().requires_grad_(False)
        return LanguageModel(network, self.load_tokenizer(), self)

    def _read(self, device: torch.device, dtype: torch.dtype) -> Any:
        if self.adapter is not None:
            with self.adapter.explain_base():
                network = self.base._read(device, dtype)
            place = {"revision": self.revision}
            with readable_errors(self.name, self.adapter):
                # by itself transformers may go on to a pickled file
                found = transformers.utils.cached_file(
                    self.name, WEIGHTS, **place,
                    _raise_exceptions_for_missing_entries=not self.allow_pickle,
                )
                loading = network.load_adapter(
                    self.name, adapter_kwargs=place, use_safetensors=found is not None
                )
            missing = loading.missing_keys
        else:
            at = {"device_map": {"": device}} if _quantised(self.load_config()) else {}
            with readable_errors(self.name):  # quantised weights can't be moved later on
                network, loading = transformers.AutoModelForCausalLM.from_pretrained(
                    self.name, dtype=dtype, **at, **self._arguments(), output_loading_info=True,
                    use_safetensors=None if self.allow_pickle else True,
                )
            missing = loading["missing_keys"]
        if missing:  # transformers would fill them with random numbers
            raise InputError(
                f"the weights of {self.name} lack {len(missing)} tensors: "
                f"{', '.join(sorted(missing)[:5])}. Expected a complete "
                f"{'adapter' if self.adapter else 'causal language model'}, as save_pretrained "
                "writes it."
            )
        return network


@dataclass
class LanguageModel:
    """A loaded causal language model, its tokenizer (or None), and where both came from."""

    network: Any
    tokenizer: Any | None
    source: ModelSource

    # Hooks sit on the network itself, which two of these may share: a second thread's pass would
    # be heard by the first one's.
    one_at_a_time: ClassVar[threading.Lock] = threading.Lock()

    def __post_init__(self) -> None:
        for fused in experts.open_experts(self.network):
            fused.config._experts_implementation = EXPERTS  # type: ignore[union-attr]

    def sharing(self, name: str) -> list[nn.Module]:
        """The module of this name, and the others that share its weight."""
        own = self.network.get_submodule(name)
        return self._maps.get(_identity(own), [own])

    @cached_property
    def _maps(self) -> dict[tuple[int, int], list[nn.Module]]:
        return _maps_by_weight(self.network)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; quantised weights are kept in integers."""
        return _dtype_of(self.network)

    @property
    def bytes(self) -> int:
        """Bytes of the weights and buffers in memory; shared ones count once."""
        kept = {one.data_ptr(): one.nbytes
                for one in (*self.network.parameters(), *self.network.buffers())}
        return sum(kept.values())

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of sums, curvature and scores: float32, or float64 for a float64 model."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [b, t, v] of right-padded tokens [b, t].

        No attention mask is needed: the model is causal (`tracked_modules` sees to it), and no
        longer than `context_length`, so no real position depends on the padding.
        """
        return self.network(input_ids=tokens, use_cache=False).logits

    def continuation(self, tokens: list[int], length: int) -> list[int]:
        """The model's own greedy continuation of `tokens`, at most `length` tokens.

        Threads take turns, with `gradients.backward` too.
        """
        prompt = torch.tensor([tokens], device=self.device)
        end = self.network.generation_config.eos_token_id
        pad = end[0] if isinstance(end, list) else end
        settings = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=length, eos_token_id=end, pad_token_id=pad or 0
        )
        with self.one_at_a_time, torch.no_grad():
            output = self.network.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
        return [int(token) for token in output[0, len(tokens):]]


def _dtype_of(network: Any) -> torch.dtype:
    return next(one.dtype for one in network.parameters() if one.is_floating_point())


def _cast(network: Any, dtype: torch.dtype) -> None:
    """Cast the parameters, and those buffers that a model made in this dtype has in it."""
    with torch.device("meta"):
        made = dict(type(network)._from_config(network.config, dtype=dtype).named_buffers())
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point() and name in made:
            buffer.data = buffer.data.to(made[name].dtype)


def _quantised(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _stored(linear: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The parameters that a linear map's weight and bias are, or, an expert's, are parts of; None
    for what is computed from others."""
    if isinstance(linear, experts.ExpertMap):
        return linear.parameters_of_all
    return linear._parameters.get("weight"), linear._parameters.get("bias")


def _identity(linear: nn.Module) -> tuple[int, int]:
    """Which weight a linear map has: its place, and for an expert its number there."""
    weight, _ = _stored(linear)
    place = id(linear) if weight is None else _place(weight)
    return place, linear.number if isinstance(linear, experts.ExpertMap) else 0


def _maps_by_weight(network: nn.Module) -> dict[tuple[int, int], list[nn.Module]]:
    """The linear maps that have the same weight, in model order, by its identity."""
    found: dict[tuple[int, int], list[nn.Module]] = {}
    for module in network.modules():
        if is_linear(module):
            found.setdefault(_identity(module), []).append(module)
    return found


def _place(parameter: Tensor) -> int:
    """Where a parameter lies in memory: equal for tied ones, be they one object or several."""
    try:
        return parameter.data_ptr() or id(parameter)  # 0: its content isn't loaded
    except RuntimeError:  # a wrapper of other tensors
        return id(parameter)


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


def quiet_transformers() -> None:
    """Silence other libraries' log lines and bars; the command line shows its own."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# ---- modules ------------------------------------------------------------------------------------

_ATTENTION = re.compile(r"(^|[._])(self_?)?att(ention|n)?([._]|$)", re.IGNORECASE)


def tracked_modules(network: nn.Module, choice: str = "mlp") -> list[Module]:
    """The linear maps of the transformer blocks to take gradients of, in model order.

    `choice` is one of `choose_modules`; "mlp" as in Grosse et al. 2023, §5. Embeddings and the LM
    head lie outside the blocks and are never tracked. Fused experts count one map each,
    "….experts.down_proj_5". Maps that share a weight are one module, with a bias if they and no
    others share that too. Raises InputError when nothing matches, no adapter runs, or one that
    isn't plain LoRA matches, or the network isn't causal (a small pass tells, and which maps are
    called at all).
    """
    parts = adapter_parts(network)
    found = _linear_maps(network, parts)
    if not found:
        odd = ", ".join(list(untracked(network, []))[:5])
        raise InputError(
            f"{type(network).__name__} has no linear map that can be tracked: its weights are in "
            f"{odd}. Expected nn.Linear, Conv1D or transformers' fused experts in its blocks; give "
            "the model in its whole form (not quantised by GPTQ, AWQ and the like)."
        )
    if "adapter" in map(str.strip, choice.split(",")) and not parts.own:
        raise InputError(f"--modules {choice}: {no_adapter(network)}.")
    _, blocks = _blocks(network)
    chosen = choose_modules(found, choice, f"the linear modules of the {len(blocks)} blocks")
    for module in chosen:
        if network.get_submodule(module.name) in parts.odd:
            raise InputError(
                f"--modules {choice!r}: {module.name} is part of an adapter that isn't plain LoRA "
                "(DoRA, AdaLoRA, another kind, or LoRA on a bare parameter), so its gradient can't "
                "be read from its inputs and outputs. Leave it out with --modules REGEX."
            )
    return chosen


def _linear_maps(network: nn.Module, parts: Parts) -> list[Module]:
    """All that can be tracked."""
    prefix, blocks = _blocks(network)
    owners, maps, inside = _owners(network), _maps_by_weight(network), set(blocks.modules())
    called = called_in_a_pass(network, [one for sharing in maps.values() for one in sharing])
    found: list[Module] = []
    seen: set[tuple[int, int]] = set()
    for layer, block in enumerate(blocks):
        for name, linear in block.named_modules():
            if not is_linear(linear) or linear in parts.idle or _identity(linear) in seen:
                continue
            if not (linear in called or isinstance(linear, experts.ExpertMap)):
                continue  # if its weight is used, then not by running it
            seen.add(_identity(linear))
            sharing = maps[_identity(linear)]
            own = {_owner(one) for one in sharing}
            if not own.issuperset(owners.get(_identity(linear)[0], own)) or \
                    any(one not in inside or _form(one) != _form(linear) for one in sharing):
                continue  # a hook on linear maps would miss a part of the gradient
            kind = "adapter" if linear in parts.own else \
                "attention" if _ATTENTION.search(name) else "mlp"
            d_out, d_in = _shape(linear)
            bias = linear.bias is not None
            if bias and (stored := _stored(linear)[1]) is not None:
                bias = own == set(owners[_place(stored)])
            if bias and isinstance(linear, experts.ExpertMap):  # then a column of W
                d_in, bias = d_in + 1, False
            found.append(Module(f"{prefix}.{layer}.{name}", layer, kind, d_out, d_in, bias))
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes W a + b and nothing else, so that its gradient is Σ d aᵀ.

    A subclass of nn.Linear with a `forward` of its own may as well round, rescale or route.
    """
    if isinstance(module, experts.ExpertMap):
        return True
    return isinstance(module, (nn.Linear, Conv1D)) and (
        type(module).forward in (nn.Linear.forward, Conv1D.forward)
        or f"{type(module).__module__}.{type(module).__name__}" in _LINEAR_AS_WELL
        or is_bitsandbytes(module))


_LINEAR_AS_WELL = ("transformers.models.falcon.modeling_falcon.FalconLinear",)


def _owners(network: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that have a parameter as their own, by its place."""
    found: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(_place(parameter), []).append(module)
    return found


def _owner(linear: nn.Module) -> nn.Module:
    """The module that has a linear map's weight as its own parameter."""
    return linear.experts if isinstance(linear, experts.ExpertMap) else linear


def _form(linear: Any) -> tuple[Any, ...]:
    """What maps that share a weight must have in common to be one linear map."""
    return type(linear), _shape(linear), getattr(_owner(linear), "is_transposed", None)


def _shape(linear: Any) -> tuple[int, int]:
    """[o, i] of a linear map, whatever its weight is stored as."""
    if isinstance(linear, nn.Linear):
        return int(linear.out_features), int(linear.in_features)
    o, i = linear.weight.shape
    return (int(i), int(o)) if isinstance(linear, Conv1D) else (int(o), int(i))


def _blocks(network: Any) -> tuple[str, nn.ModuleList]:
    """The list of blocks and its name; a shorter one where each runs several times (ALBERT)."""
    layers = getattr(network.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in network.named_modules()
             if isinstance(module, nn.ModuleList) and len(module)]
    for name, module in lists:
        if len(module) == layers:
            return name, module
    shared = [one for one in lists if layers and layers % len(one[1]) == 0]
    if shared:  # the outermost of them comes first
        return shared[0]
    raise InputError(
        f"{type(network).__name__}: found no list of {layers} transformer blocks "
        "(config.num_hidden_layers); expected a causal language model made of blocks."
    )


def parameter_share(network: nn.Module, modules: list[Module]) -> float:
    """Tracked weights and biases as a share of all parameters of the model; shared ones count
    once, quantised ones as what they stand for."""
    tracked = sum(module.shape[0] * module.shape[1] for module in modules)
    return tracked / sum(_own_parameters(network).values())


def untracked(network: nn.Module, modules: list[Module]) -> dict[str, float]:
    """What isn't tracked: shares of all parameters, largest first.

    By what it is (attention, linear maps, experts, embeddings, LM head, norms), or by the class of
    the module for what can't be tracked.
    """
    every = _own_parameters(network)
    tracked: dict[nn.Module, int] = {}
    for module in modules:
        own = network.get_submodule(module.name)
        if isinstance(own, experts.ExpertMap):
            own = own.experts
        tracked[own] = tracked.get(own, 0) + module.shape[0] * module.shape[1]
    total, left = sum(every.values()), dict[str, float]()
    prefix, _ = _blocks(network)
    found = _linear_maps(network, adapter_parts(network))
    maps = {network.get_submodule(one.name) for one in found}
    for name, own in network.named_modules():
        if rest := every.get(own, 0) - tracked.get(own, 0):
            what = _what(own, name.removeprefix(prefix), name.startswith(f"{prefix}."))
            if what in TRACKABLE and own not in maps and not experts.is_fused(own):
                what = f"{what} that aren't called, or share a weight with something else"
            left[what] = left.get(what, 0.0) + rest / total
    return dict(sorted(left.items(), key=lambda one: (-one[1], one[0])))


TRACKABLE = ("attention", "linear maps", "experts")  # of a choice of modules
SMALL_PARTS = ("embeddings", "LM head", "norms")  # never tracked, as in Grosse et al. 2023


def _what(module: nn.Module, name: str, in_block: bool) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in kind.lower():
        return "norms"
    if experts.is_fused(module):
        return "experts"
    if isinstance(module, (nn.Linear, Conv1D)) and not in_block:
        return "LM head"
    if is_linear(module):
        return "attention" if _ATTENTION.search(name) else "linear maps"
    return kind


def _own_parameters(network: nn.Module) -> dict[nn.Module, int]:
    """How many parameters each module has besides its children's; shared ones count once, packed
    ones as what they stand for."""
    seen: set[int] = set()
    found: dict[nn.Module, int] = {}
    for module in network.modules():
        packed = _is_packed(module)
        count = module.in_features * module.out_features if packed else 0  # type: ignore[operator]
        for parameter in module.parameters(recurse=False):
            known = _place(parameter) in seen
            seen.add(_place(parameter))
            if packed and parameter.ndim > 1:
                count = 0 if known else count
            elif not known:
                count += parameter.numel()
        if count:
            found[module] = count  # type: ignore[assignment]
    return found


def _is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weight is quantised, be it a parameter or a buffer."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return isinstance(getattr(module, "in_features", None), int) and \
        isinstance(getattr(module, "out_features", None), int) and \
        any(not tensor.is_floating_point() for tensor in own)


# ---- logits → log p ----------------------------------------------------------------------------


def log_probability(
    logits: Tensor, targets: Tensor, uniforms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p of the targets and its gradient with respect to the logits, whose memory it takes.

    logits [b, t, v]; targets [b, t], the token to predict at each position or UNSCORED. With
    `uniforms` [b, t] in [0, 1), a label drawn from the model takes the place of each target.
    Returns log p per position [b, t] in nats (0 where unscored; float32 or better) and
    ∂(Σ log p)/∂logits = onehot(target) − softmax(logits), zero where unscored, [b, t, v].
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat, flat_targets = logits.detach().flatten(0, 1), targets.flatten()
    token_log_p = torch.zeros(flat_targets.shape, dtype=wide, device=flat.device)
    rows = max(1, CACHED_LOGITS // flat.shape[1])
    for here in map(slice, range(0, len(flat), rows), range(rows, len(flat) + rows, rows)):
        some = flat[here]
        log_p = torch.log_softmax(some.to(wide), dim=-1)
        p = torch.exp(log_p, out=some if some.dtype == wide else torch.empty_like(log_p))
        labels = (flat_targets[here].clamp(min=0) if uniforms is None else
                  sample_labels(p, uniforms.flatten()[here])).unsqueeze(-1)
        token_log_p[here] = log_p.gather(-1, labels).squeeze(-1)
        p.neg_().scatter_add_(-1, labels, torch.ones_like(labels, dtype=wide))
        if p is not some:
            some.copy_(p)
    [unscored] = torch.nonzero(flat_targets == UNSCORED, as_tuple=True)
    token_log_p.index_fill_(0, unscored, 0)
    flat.index_fill_(0, unscored, 0)
    return token_log_p.view(targets.shape), flat.view(logits.shape)


def sample_labels(p: Tensor, uniforms: Tensor) -> Tensor:
    """One label per row drawn from p [n, v], by inverting its cumulative distribution: int64 [n].

    Depends on nothing but the row and its uniform number in [0, 1). First comes the run of labels
    it falls into, then the label within: the sum of all is read once, and only a run is summed up
    step by step.
    """
    v = p.shape[1]
    whole = v // RUN * RUN
    sums = p[:, :whole].unflatten(1, (-1, RUN)).sum(-1)
    if whole < v:
        sums = torch.cat([sums, p[:, whole:].sum(-1, keepdim=True)], dim=1)
    ends = sums.cumsum(-1)
    below_one = 1 - torch.finfo(p.dtype).eps / 2  # or rounding could draw a label of probability 0
    threshold = uniforms.to(p.dtype).clamp(max=below_one).unsqueeze(-1) * ends[:, -1:]
    run = torch.searchsorted(ends, threshold, right=True).clamp_(max=ends.shape[1] - 1)
    threshold -= (ends - sums).gather(-1, run)
    members = run * RUN + torch.arange(RUN, device=p.device)
    inside = p.gather(-1, members.clamp(max=v - 1)).masked_fill_(members >= v, 0).cumsum(-1)
    place = torch.searchsorted(inside, threshold, right=True)
    # Rounding can put the threshold at the end of its run: the run's last possible label is meant.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    return (run * RUN + torch.minimum(place, last)).squeeze(-1).clamp_(max=v - 1)  # NaN: beyond


# ---- identity -----------------------------------------------------------------------------------


def identify(model: LanguageModel) -> dict[str, Any]:
    """What the index remembers a model by: digests of its weight files and of its tensors, and its
    configuration."""
    return {"files": files_digest(model.source), "tensors": tensors_digest(model.network),
            "config": config_facts(model.network.config)}


# Of a configuration, what says where it came from or how fast it runs, not what it computes.
_INCIDENTAL = {"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures",
               "auto_map", "name_or_path"}


def config_facts(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types, without what doesn't matter to the gradient."""
    facts = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in facts.items()
            if name not in _INCIDENTAL and not name.startswith("_")}


def _different(before: Any, now: Any, name: str) -> str | None:
    """Where two configurations differ; entries that only one has are another library version's."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = (_different(before[key], now[key], f"{name}.{key}" if name else key)
                 for key in sorted({*before} & {*now}))
        return next((one for one in found if one), None)
    return None if before == now else f"{name} is {now!r}, was {before!r}"


def check_identity(model: LanguageModel, expected: dict[str, Any]) -> None:
    """Raise IndexMismatchError unless this is the model the index was built with.

    Equal weight files are enough; files that differ (saved again, sharded otherwise) are forgiven
    when every tensor is the same. The configuration must say the same.
    """
    if changed := _different(expected["config"], config_facts(model.network.config), ""):
        raise IndexMismatchError(
            f"the model {model.source.name} is not as it was when the index was built: in its "
            f"configuration {changed}. Pass --model with the right folder or id@revision, or build "
            "a new index for this model."
        )
    files = files_digest(model.source)
    if files is not None and files == expected["files"]:
        return
    tensors = tensors_digest(model.network)
    if tensors == expected["tensors"]:
        return
    raise IndexMismatchError(
        f"the model {model.source.name} is not the one the index was built with: its weights have "
        f"digest {tensors[:12]}, the index expects {str(expected['tensors'])[:12]}. Pass --model "
        "with the right folder or id@revision, or build a new index for this model."
    )


def files_digest(source: ModelSource) -> str | None:
    """SHA-256 over the weight files' own SHA-256s, or None for a model given as an object.

    An adapter's covers its own weights and settings and its base's weights.
    """
    if not isinstance(source.model, (str, Path)):
        return None
    if source.adapter is not None:
        folder = source.adapter.folder
        weights = sorted(folder.glob(WEIGHTS)) or sorted(folder.glob("adapter_model.bin"))
        settings = json.dumps(source.adapter.settings, sort_keys=True)
        return digest_of_files(weights, (settings, f"base {files_digest(source.base)}"))
    folder = Path(source.name)
    if not folder.is_dir():
        with readable_errors(source.name):
            config = transformers.utils.cached_file(
                source.name, "config.json", revision=source.revision
            )
        folder = Path(str(config)).parent
    return digest_of_files(
        sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    )


def tokenizer_digest(tokenizer: Any | None) -> str | None:
    """SHA-256 of what decides text → tokens: vocabulary, merges, special tokens, chat template."""
    if tokenizer is None:
        return None
    if getattr(tokenizer, "is_fast", False):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Leftovers of whoever last called the tokenizer; every call of ours sets its own.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:  # can't read text for us, but may stand beside a model that is used with token files
        content = {"vocabulary": tokenizer.get_vocab()}
    content["chat_template"] = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
