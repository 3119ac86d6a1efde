"""Where a model and its tokenizer come from, before its weights are read.

A model is a hub id (`id@revision`), a folder, or a loaded object; the id or folder may be an
adapter's, which names its base.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from gradindex.errors import InputError
from gradindex.model.adapters import (
    CONFIG,
    Adapter,
    BroughtHead,
    adapter_file,
    read_adapter,
    told_of_head,
)
from gradindex.model.config import is_quantised
from gradindex.model.devices import DTYPES, check_dtype, device_called, dtype_called, dtype_of
from gradindex.model.load_errors import readable_errors
from gradindex.model.quantised import quantised_dtype
from gradindex.model.saved_files import SAFE, WEIGHTS, check_folder, check_path, weight_files
from gradindex.modules import LAST
from gradindex.task import CAUSAL, Task


def auto_class(task: Task) -> Any:
    """The class of transformers by which models of a task are loaded."""
    return transformers.AutoModelForCausalLM if task.is_causal else \
        transformers.AutoModelForSequenceClassification


@dataclass
class ModelSource:
    """Where a model and its tokenizer come from, and how they are to be loaded.

    Every command makes one of what the user said, and it travels whole from there; no weights are
    read for it. `model` is a hub id, `id@revision`, a folder (each of a model or an adapter), or a
    transformers model or PeftModel object; None means where an index's model was at the build.
    `tokenizer` is an object, id or folder [the one beside the model, or beside an adapter's base].
    The model is to run on `device` ("auto", "cpu", "cuda", "cuda:N"), or with the `device_map`
    "auto" on all GPUs together, and `max_memory` bytes may be used there at most [all there is].
    `adapter_name` is which of several adapters is meant: of a folder's or hub id's, or of a
    PeftModel's [the one in the folder itself, or those that run]. `task` is what it was trained
    for, which decides as what it is loaded. Of an adapter's base, `head` is the one that comes with
    the adapter. `also` are the other members, by name, each as `model` is given
    (`members.py`); `model` itself may be given with them, as a mapping in which it is "last".
    """

    model: Any = None
    tokenizer: Any = None
    device: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    max_memory: int | None = None
    adapter_name: str | None = None
    device_map: str | None = None
    task: Task = CAUSAL
    head: BroughtHead | None = None
    also: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InputError for an object that is no model of transformers or peft, and a device
        map that can't be.
        """
        if isinstance(self.model, Mapping):
            self.also = {**self.also, **self.model}
            self.model = self.also.pop(LAST, None)
        if self.device_map is not None:
            self._check_device_map()
        model = getattr(self.model, "_orig_mod", self.model)  # of torch.compile
        if self.is_object and not (isinstance(model, transformers.PreTrainedModel)
                                   or hasattr(model, "get_base_model")):
            raise InputError(
                f"the model is a {type(self.model).__name__}; expected a folder, a hub id, or a "
                "model object of transformers or peft. Of a wrapper around one (parallel, with a "
                "value head), give the model inside."
            )

    def _check_device_map(self) -> None:
        if self.device_map != "auto":
            raise InputError(f"--device-map {self.device_map}: expected auto.")
        if self.is_object:
            raise InputError("--device-map auto: the model is loaded already; it is used where it "
                             "is. Give its folder, or load it with device_map=\"auto\".")
        if self.device not in ("auto", "cuda"):
            raise InputError(f"--device-map auto spreads the model over all GPUs, and --device "
                             f"{self.device} names another place. Give one of the two.")
        if importlib.util.find_spec("accelerate") is None:
            raise InputError("--device-map needs accelerate: pip install accelerate.")

    @property
    def is_object(self) -> bool:
        """Whether the model was given loaded: an index can't find it again by name."""
        return self.model is not None and not isinstance(self.model, (str, Path))

    def at_build(
        self, name: str, revision: str | None, tokenizer: str | None, adapter: str | None,
        task: Task, also: Mapping[str, tuple[str, str | None]],
    ) -> "ModelSource":
        """This source for an index's task, with the models and the adapter of its build where it
        names none.

        `also` are the names and revisions of the other members. Raises InputError for a member that
        the build didn't have.
        """
        if strange := sorted(self.also.keys() - also.keys()):
            raise InputError(f"--model {strange[0]}=…: the index has no such model; it has "
                             f"{', '.join([LAST, *also])}.")
        source = replace(
            self, task=task, adapter_name=self.adapter_name or adapter,
            also={member: self.also.get(member, _with_revision(*there))
                  for member, there in also.items()})
        if source.model is None:
            source.model = _with_revision(name, revision)
            source.tokenizer = tokenizer if self.tokenizer is None else self.tokenizer
        return source

    @property
    def name(self) -> str:
        """The hub id or folder, without a revision; for an object, where it says it was loaded."""
        if not self.is_object:
            return self._split(self.model)[0]
        return str(getattr(self.model.config, "_name_or_path", "") or "an unnamed model object")

    @property
    def revision(self) -> str | None:
        """The revision of `id@revision`, or None."""
        return None if self.is_object else self._split(self.model)[1]

    @staticmethod
    def _split(model: str | Path) -> tuple[str, str | None]:
        text = str(model)
        if "@" in text and not Path(text).exists():  # folders may have an @ in their names
            name, _, revision = text.partition("@")
            return name, revision
        return text, None

    @property
    def arguments(self) -> dict[str, Any]:
        """What transformers' loaders take besides the name."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @cached_property
    def adapter(self) -> Adapter | None:
        """The saved adapter this names, or None. Raises InputError for an unusable one."""
        if self.is_object:
            return None
        if self.revision is None:
            check_path(Path(self.name))
            if Path(self.name).is_dir():
                file = adapter_file(Path(self.name), self.adapter_name)
                return read_adapter(file) if file else None
        with readable_errors(self.name):
            found = transformers.utils.find_adapter_config_file(
                self.name, revision=self.revision, subfolder=self.adapter_name or "")
        if found is None and self.adapter_name is not None:
            raise InputError(f"--adapter {self.adapter_name}: {self.name} has no such adapter "
                             f"(a folder of this name with {CONFIG}).")
        return read_adapter(Path(found)) if found else None

    @cached_property
    def base(self) -> "ModelSource":
        """The model under the adapter. Raises InputError where that is an adapter itself."""
        assert self.adapter is not None
        base = replace(self, model=self.adapter.base, tokenizer=None, adapter_name=None, also={},
                       head=None if self.task.is_causal else self.adapter.head)
        if base.adapter is not None:
            raise InputError(
                f"the base of the adapter {self.name}, {base.name}, is itself an adapter; expected "
                "a whole model. Merge it into its own base (merge_and_unload) and save that."
            )
        return base

    def load_config(self) -> Any:
        """The model's configuration, or that of an adapter's base. Raises InputError without one.
        """
        if self.is_object:
            return self.model.config
        if self.adapter is not None:
            with self.adapter.explain_base():
                return self.base.load_config()
        check_folder(Path(self.name))
        with readable_errors(self.name):
            return transformers.AutoConfig.from_pretrained(
                self.name, **self.arguments, **told_of_head(self.head))

    def resolve(self, dtype: str) -> tuple[torch.device, torch.dtype]:
        """The device and dtype to load the model with; `dtype` is a name of DTYPES, or "auto".

        The device "auto" is a GPU if there is one, or where a model object is. The dtype "auto" is
        float32 on a CPU, the checkpoint's own on a GPU, and that of a model object; a quantised
        model has its own. Raises InputError for what can't be had.
        """
        device, resolved = self._resolve(dtype)
        check_dtype(device, resolved)
        return device, resolved

    def _resolve(self, dtype: str) -> tuple[torch.device, torch.dtype]:
        config = self.load_config()
        own: torch.dtype
        if self.is_object:
            device, own = next(self.model.parameters()).device, dtype_of(self.model)
            device = device if self.device == "auto" else device_called(self.device)
        else:
            device = device_called(self.device if self.device_map is None else "cuda")
            name = getattr(config, "dtype", None)
            own = (DTYPES.get(name) if isinstance(name, str) else name) or torch.float32
        if is_quantised(config):
            return device, quantised_dtype(self.name, own, dtype)
        if dtype != "auto":
            return device, dtype_called(dtype)
        cast = device.type == "cpu" and not self.is_object
        return device, torch.float32 if cast else own

    def weight_files(self) -> list[Path]:
        """The files of a model's weights, there and whole; none of a hub id's still to be fetched.

        Raises InputError with what is wrong with them.
        """
        if not Path(self.name).is_dir() and not (self.folder / WEIGHTS).exists():
            return []  # transformers fetches what of it is missing
        return weight_files(self.folder, self.allow_pickle)

    @property
    def folder(self) -> Path:
        """The folder with the model's files. Raises InputError where there is none."""
        if Path(self.name).is_dir():
            return Path(self.name)
        with readable_errors(self.name):  # of a hub id: the hub's cache on this machine
            config = transformers.utils.cached_file(
                self.name, "config.json", revision=self.revision
            )
        return Path(str(config)).parent


def _with_revision(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"


def anywhere(name: str) -> str:
    """The absolute path of a folder; a hub id stays as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def fetch_weights(source: ModelSource) -> None:
    """See to it that a hub id's safetensors weights are on this machine, as a digest needs them.

    Raises InputError where they can't be fetched.
    """
    if source.adapter is not None:
        fetch_weights(source.base)
    if source.is_object or source.adapter is not None or Path(source.name).is_dir():
        return
    place: dict[str, Any] = {"revision": source.revision}
    hub = transformers.utils.hub
    with readable_errors(source.name):
        whole, shards = (hub.cached_file(
            source.name, name, **place, _raise_exceptions_for_missing_entries=False)
            for name in SAFE)
        if whole is None and shards is not None:
            hub.get_checkpoint_shard_files(source.name, shards, **place)
