"""A model, loaded: a causal language model, or one that says something of whole texts.

Its identity is a digest of its weights, never its path (`identity.py`). Parameters never require a
gradient: `influence/gradients.py` differentiates with respect to the outputs of modules only.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gradindex.errors import InputError, ResourceError
from gradindex.model import fused_experts
from gradindex.model.adapters import adapter_facts, quiet_dora, run_alone, told_of_head
from gradindex.model.checkpoint import check_class, check_loading
from gradindex.model.config import is_quantised, vocabulary_size
from gradindex.model.devices import check_room, dtype_of
from gradindex.model.linear_maps import identity_of, maps_by_weight
from gradindex.model.load_adapter import load_adapter, unwrapped
from gradindex.model.load_errors import readable_errors
from gradindex.model.load_tokenizer import load_tokenizer
from gradindex.model.model_source import ModelSource, auto_class
from gradindex.model.own_copy import own_copy
from gradindex.model.quantised import as_dequantised
from gradindex.model.soft_cap import soft_cap
from gradindex.modules import LAST, Module
from gradindex.objective.batch import Batch, Row
from gradindex.objective.objective import Objective, objective_of

EXPERTS = "gradindex"  # what our way of running fused experts is called in transformers


@dataclass
class LanguageModel:
    """A loaded model, its tokenizer (or None), and where both came from.

    `others` are the members that run beside it, by name (`members.py`). Making one changes the
    network: fused experts get submodules, and are run one by one.
    """

    network: Any
    tokenizer: Any | None
    source: ModelSource
    objective: Objective = field(init=False)
    others: dict[str, "LanguageModel"] = field(default_factory=dict)

    # Hooks sit on the network itself, which two of these may share: a second thread's pass would
    # be heard by the first one's.
    one_at_a_time: ClassVar[threading.Lock] = threading.Lock()

    def __post_init__(self) -> None:
        # ours among transformers' ways of running fused experts; registering it again is harmless
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, fused_experts.forward)
        for fused in fused_experts.open_experts(self.network):
            fused.config._experts_implementation = EXPERTS  # type: ignore[union-attr]
        task = self.source.task
        self.objective = objective_of(
            task, self.network, self.tokenizer,
            soft_cap(self.network) if task.is_causal else None)

    @classmethod
    def load(cls, source: ModelSource, dtype: str = "auto") -> Self:
        """Load a model in evaluation mode, frozen, on its device and in a dtype [see `resolve`].

        A model object stays as it is: what is loaded shares its weights, unless device or dtype
        say otherwise (`own_copy`). Raises InputError for a model, device or dtype that can't be
        had.
        """
        device, wanted = source.resolve(dtype)
        if source.is_object:
            check_class(source, source.load_config())
            _check_offloaded(source.model)
            network = own_copy(unwrapped(source.model, source.adapter_name))
            if source.adapter_name is not None:
                run_alone(network, source.adapter_name)
        else:
            network = unwrapped(_read(source, device, wanted))
        if source.device_map is None:
            check_room(device, sum(parameter.nbytes for parameter in network.parameters()
                                   if parameter.device.type != device.type))
        if is_quantised(network.config):
            if network.device.type != device.type:
                network = network.to(device)
            as_dequantised(network)
        else:
            if source.device_map is None and not _is_spread(network, source):
                network = network.to(device)
            # peft keeps the weights of adapters in float32 beside a base in bfloat16.
            if adapter_facts(network) or dtype_of(network) != wanted:
                _cast(network, wanted)
        quiet_dora(network)
        network, tokenizer = network.eval().requires_grad_(False), load_tokenizer(source)
        if not source.task.is_causal:
            # without, a decoder would take the last token of a batch's longest text
            network.config.get_text_config().pad_token_id = padding_token(
                source, network.config, tokenizer)
        return cls(network, tokenizer, source)

    def sharing(self, name: str) -> list[nn.Module]:
        """The modules that share the weight of the one of this name, itself among them.

        With the map to a vocabulary that are the embeddings that look its rows up.
        """
        module = self.network.get_submodule(name)
        return self._maps.get(identity_of(module), [module])

    @cached_property
    def _maps(self) -> dict[tuple[int, int], list[nn.Module]]:
        return maps_by_weight(self.network)

    @property
    def device(self) -> torch.device:
        """Where the network is, or begins, where it is spread over several devices."""
        device: torch.device = next(self.network.parameters()).device
        return device

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        """All devices that the network is on."""
        return frozenset(parameter.device for parameter in self.network.parameters())

    def device_of(self, module: Module) -> torch.device:
        """Where a tracked map is: a model may be spread over several devices."""
        # of a member that isn't there, where it would be
        submodule = self.others.get(module.member, self).sharing(module.path)[0]
        weight = submodule.parameters_of_all[0] if isinstance(
            submodule, fused_experts.ExpertMap) else next(submodule.parameters(), None)
        return self.device if weight is None else weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; quantised weights are kept in integers."""
        return dtype_of(self.network)

    @property
    def bytes(self) -> int:
        """Bytes of the weights and buffers in memory; shared ones count once."""
        by_address = {tensor.data_ptr(): tensor.nbytes for tensor in self.tensors()}
        return sum(by_address.values())

    def tensors(self) -> Iterator[Tensor]:
        """The weights and buffers, those of the other members among them."""
        for one in (self, *self.others.values()):
            yield from one.network.parameters()
            yield from one.network.buffers()

    def member(self, name: str) -> "LanguageModel":
        """A member, which the model itself is. Raises InputError for one that isn't there."""
        if name == LAST:
            return self
        if name not in self.others:
            raise InputError(
                f"the model {name} of this index isn't there. Say where it is with --model "
                f"{name}=PATH, or leave it out of a search with --members {LAST}.")
        return self.others[name]

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of sums, curvature and scores: float32, or float64 for a float64 model."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Rows as a batch on this model's device."""
        return self.objective.batch(rows, self.device)

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """How many padded tokens each row takes in a batch by itself."""
        return [self.objective.length(row) for row in rows]

    def continuation(self, tokens: list[int], length: int) -> list[int]:
        """The token ids with which the model itself goes on, greedily: at most `length` of them.

        Threads take turns, with those of `gradients.backward` too.
        """
        prompt = torch.tensor([tokens], device=self.device)
        end = self.network.generation_config.eos_token_id
        pad = end[0] if isinstance(end, list) else end
        # Settings of ours alone: a model's generation_config may sample, or forbid repetitions.
        settings = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=length, eos_token_id=end, pad_token_id=pad or 0
        )
        with self.one_at_a_time, torch.no_grad():
            output = self.network.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
        return [int(token) for token in output[0, len(tokens):]]


def _read(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Any:
    """The network of a model that has a name; an adapter's is its base with the adapter in it."""
    if source.adapter is not None:
        with source.adapter.explain_base():
            network = _read(source.base, device, dtype)
        network = load_adapter(network, source)
    else:
        # Quantised weights can't be moved later on, so they are loaded where they are to be.
        config = source.load_config()
        check_class(source, config)
        options: dict[str, Any] = {"device_map": {"": device}} if is_quantised(config) else {}
        if source.device_map is not None:
            options = {"device_map": source.device_map}
        source.weight_files()  # for the reason where one is missing or damaged
        with readable_errors(source.name):
            network, loading = auto_class(source.task).from_pretrained(
                source.name, dtype=dtype, **options, **source.arguments,
                **told_of_head(source.head),
                output_loading_info=True,
                use_safetensors=None if source.allow_pickle else True,
                ignore_mismatched_sizes=True,  # which `check_loading` refuses
            )
        check_loading(source, network, loading)
        _check_spread(source, network)
    return network


def padding_token(source: ModelSource, config: Any, tokenizer: Any) -> int:
    """The token id that stands for padding in whole texts: the model's, or its tokenizer's.

    Raises InputError where neither names one that the model has.
    """
    named = config.get_text_config().pad_token_id
    if named is None or named < 0:  # −1 in configurations of the first Llama, for none
        named = getattr(tokenizer, "pad_token_id", None)
    if named is None:
        raise InputError(
            f"neither the configuration of {source.name} nor its tokenizer names a token for "
            "padding, and texts of a batch are padded. Set pad_token_id in config.json to the one "
            "of its training (often the end token).")
    if named >= (vocabulary := vocabulary_size(config)):
        raise InputError(
            f"the token for padding of {source.name} is {named}, and it has {vocabulary} tokens, "
            f"numbered to {vocabulary - 1}: the token was added to the tokenizer and not to the "
            "model. Set pad_token_id in config.json to the one of its training (often the end "
            "token).")
    return int(named)


def _is_spread(network: Any, source: ModelSource) -> bool:
    """Whether a model object is on several devices, where it is to stay."""
    return source.is_object and source.device == "auto" and \
        len({parameter.device for parameter in network.parameters()}) > 1


def _check_spread(source: ModelSource, network: Any) -> None:
    """Raise ResourceError where a device map left a part of a network off the GPUs."""
    left = sorted(name or "all of it" for name, place in getattr(
        network, "hf_device_map", {}).items() if str(place) in ("cpu", "disk"))
    if source.device_map is not None and left:
        raise ResourceError(
            f"--device-map auto: the GPUs together don't hold the model; {left[0]} and "
            f"{len(left) - 1} other parts of it would be elsewhere. Use more GPUs, fewer bytes a "
            "weight (--dtype bfloat16), or --device cpu.")


def _check_offloaded(network: Any) -> None:
    """Raise ResourceError for a model object of which a part is kept off the devices it runs on."""
    kinds = {parameter.device.type for parameter in network.parameters()}
    if len(kinds) > 1:
        raise ResourceError(
            f"the model object is in several kinds of memory ({', '.join(sorted(kinds))}): what is "
            "offloaded can't be indexed. Load it on as many GPUs as hold it, with fewer bytes a "
            "weight, or on the CPU.")


def _cast(network: Any, dtype: torch.dtype) -> None:
    """Cast the parameters, and those buffers that a model loaded in this dtype would have in it."""
    # Some buffers stay float32 whatever the model's dtype: rotary frequencies in bfloat16 would
    # turn far positions by wrong angles. Which they are, an empty model of that dtype tells.
    with torch.device("meta"):
        buffers = dict(type(network)._from_config(network.config, dtype=dtype).named_buffers())
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point() and name in buffers:
            buffer.data = buffer.data.to(buffers[name].dtype)
