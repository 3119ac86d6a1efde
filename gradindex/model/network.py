"""The door to transformers: a causal language model, loaded.

Its identity is a digest of its weights, never its path (`identity.py`). Parameters never require a
gradient: `influence/gradients.py` differentiates with respect to module outputs only.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gradindex.errors import InputError
from gradindex.model import experts
from gradindex.model.adapters import WEIGHTS, adapter_facts, unwrapped
from gradindex.model.config import is_quantised
from gradindex.model.loading import dtype_of, readable_errors
from gradindex.model.quantised import as_dequantised
from gradindex.model.source import ModelSource
from gradindex.model.tracked import identity_of, maps_by_weight
from gradindex.objective import Batch, NextToken, Scored

EXPERTS = "gradindex"  # what our way of running fused experts is called in transformers


@dataclass
class LanguageModel:
    """A loaded causal language model, its tokenizer (or None), and where both came from."""

    network: Any
    tokenizer: Any | None
    source: ModelSource
    objective: NextToken = field(default_factory=NextToken)

    # Hooks sit on the network itself, which two of these may share: a second thread's pass would
    # be heard by the first one's.
    one_at_a_time: ClassVar[threading.Lock] = threading.Lock()

    def __post_init__(self) -> None:
        # ours among transformers' ways of running fused experts; registering it again is harmless
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts.forward)
        for fused in experts.open_experts(self.network):
            fused.config._experts_implementation = EXPERTS  # type: ignore[union-attr]

    @classmethod
    def load(cls, source: ModelSource, dtype: str = "auto") -> Self:
        """Load the weights (safetensors, unless `allow_pickle`) in evaluation mode, frozen.

        What transformers keeps in float32 stays so, such as rotary frequencies. A model object is
        put in that state itself, and moved or its parameters cast if device or dtype say so, as an
        adapter's are to its base's dtype. Raises InputError for a model, device or dtype that can't
        be had.
        """
        place, wanted = source.resolve(dtype)
        network = unwrapped(source.model if source.is_object else _read(source, place, wanted))
        if is_quantised(network.config):
            if network.device.type != place.type:
                network = network.to(place)
            as_dequantised(network)
        else:
            network = network.to(place)
            if adapter_facts(network) or dtype_of(network) != wanted:
                _cast(network, wanted)
        network = network.eval().requires_grad_(False)
        return cls(network, source.load_tokenizer(), source)

    def sharing(self, name: str) -> list[nn.Module]:
        """The module of this name, and the others that share its weight."""
        own = self.network.get_submodule(name)
        return self._maps.get(identity_of(own), [own])

    @cached_property
    def _maps(self) -> dict[tuple[int, int], list[nn.Module]]:
        return maps_by_weight(self.network)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.network.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; quantised weights are kept in integers."""
        return dtype_of(self.network)

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

    def batch(self, texts: Sequence[Scored]) -> Batch:
        """Texts (records, say) made ready for a pass of this model."""
        return self.objective.batch(texts, self.device)

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


def _read(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Any:
    """The network of a model that has a name, an adapter's with its base."""
    if source.adapter is not None:
        with source.adapter.explain_base():
            network = _read(source.base, device, dtype)
        place = {"revision": source.revision}
        with readable_errors(source.name, source.adapter):
            # by itself transformers may go on to a pickled file
            found = transformers.utils.cached_file(
                source.name, WEIGHTS, **place,
                _raise_exceptions_for_missing_entries=not source.allow_pickle,
            )
            loading = network.load_adapter(
                source.name, adapter_kwargs=place, use_safetensors=found is not None
            )
        missing = loading.missing_keys
    else:
        at = {"device_map": {"": device}} if is_quantised(source.load_config()) else {}
        with readable_errors(source.name):  # quantised weights can't be moved later on
            network, loading = transformers.AutoModelForCausalLM.from_pretrained(
                source.name, dtype=dtype, **at, **source.arguments, output_loading_info=True,
                use_safetensors=None if source.allow_pickle else True,
            )
        missing = loading["missing_keys"]
    if missing:  # transformers would fill them with random numbers
        raise InputError(
            f"the weights of {source.name} lack {len(missing)} tensors: "
            f"{', '.join(sorted(missing)[:5])}. Expected a complete "
            f"{'adapter' if source.adapter else 'causal language model'}, as save_pretrained "
            "writes it."
        )
    return network


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
