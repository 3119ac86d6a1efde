"""Where a model and its tokenizer come from, before its weights are read.

A model is a hub id (`id@revision`), a folder, or a loaded object; the id or folder may be an
adapter's, which names its base.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from gradindex.errors import InputError
from gradindex.model.adapters import Adapter, read_adapter
from gradindex.model.config import is_quantised
from gradindex.model.loading import (
    DTYPES,
    device_called,
    dtype_called,
    dtype_of,
    readable_errors,
)
from gradindex.model.quantised import quantised_dtype


@dataclass
class ModelSource:
    """Where a model and its tokenizer come from and how they are to be loaded; nothing heavy.

    It is made at the front door and travels whole. `model` is a hub id, `id@revision`, a folder
    (each a model or an adapter), or a transformers model or PeftModel object; None: where an
    index's was at the build. `tokenizer` (an object, id or folder) defaults to the one beside the
    model, or beside an adapter's base. `device` is where it is to run ("auto", "cpu", "cuda",
    "cuda:N"), and `max_memory` bytes may be used there at most [all there is].
    """

    model: Any = None
    tokenizer: Any = None
    device: str = "auto"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    max_memory: int | None = None

    @property
    def is_object(self) -> bool:
        """Whether the model was given loaded: an index can't find it again by name."""
        return self.model is not None and not isinstance(self.model, (str, Path))

    def at_build(self, name: str, revision: str | None, tokenizer: str | None) -> "ModelSource":
        """This source, or where no model is given the one that an index was built with."""
        if self.model is not None:
            return self
        return replace(self, model=name if revision is None else f"{name}@{revision}",
                       tokenizer=tokenizer if self.tokenizer is None else self.tokenizer)

    @property
    def name(self) -> str:
        if not self.is_object:
            return self._split(self.model)[0]
        return str(getattr(self.model.config, "_name_or_path", "") or "an unnamed model object")

    @property
    def revision(self) -> str | None:
        return None if self.is_object else self._split(self.model)[1]

    @staticmethod
    def _split(model: str | Path) -> tuple[str, str | None]:
        text = str(model)
        if "@" in text and not Path(text).exists():
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
        with readable_errors(self.name):
            file = transformers.utils.find_adapter_config_file(self.name, revision=self.revision)
        return read_adapter(Path(file)) if file else None

    @cached_property
    def base(self) -> "ModelSource":
        """The model under the adapter. Raises InputError where that is an adapter itself."""
        assert self.adapter is not None
        base = replace(self, model=self.adapter.base, tokenizer=None)
        if base.adapter is not None:
            raise InputError(
                f"the base of the adapter {self.name}, {base.name}, is itself an adapter; expected "
                "a whole model. Merge it into its own base (merge_and_unload) and save that."
            )
        return base

    def load_config(self) -> Any:
        """The model's configuration (an adapter's base's). Raises InputError when not found."""
        if self.is_object:
            return self.model.config
        if self.adapter is not None:
            with self.adapter.explain_base():
                return self.base.load_config()
        with readable_errors(self.name):
            return transformers.AutoConfig.from_pretrained(self.name, **self.arguments)

    def load_tokenizer(self) -> Any | None:
        """The tokenizer, or None where a model has none (enough for token files)."""
        given = self.tokenizer
        if given is None and self.is_object:
            return None
        if given is not None and not isinstance(given, (str, Path)):
            return given
        arguments = self.arguments if given is None else {}
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

    def resolve(self, dtype: str) -> tuple[torch.device, torch.dtype]:
        """What "auto" means: a GPU if there is one; float32 on a CPU, the checkpoint's own there.

        A loaded model is used where and as what it is, a quantised one as what it is. Raises
        InputError for what can't be had.
        """
        config = self.load_config()
        own: torch.dtype
        if self.is_object:
            place, own = next(self.model.parameters()).device, dtype_of(self.model)
            place = place if self.device == "auto" else device_called(self.device)
        else:
            place, said = device_called(self.device), getattr(config, "dtype", None)
            own = (DTYPES.get(said) if isinstance(said, str) else said) or torch.float32
        if is_quantised(config):
            return place, quantised_dtype(self.name, own, dtype)
        if dtype != "auto":
            return place, dtype_called(dtype)
        cast = place.type == "cpu" and not self.is_object
        return place, torch.float32 if cast else own

    @property
    def folder(self) -> Path:
        """The folder with the files of a model that has a name, the hub's cache of it among them.

        Raises InputError where there is none.
        """
        if Path(self.name).is_dir():
            return Path(self.name)
        with readable_errors(self.name):
            config = transformers.utils.cached_file(
                self.name, "config.json", revision=self.revision
            )
        return Path(str(config)).parent
