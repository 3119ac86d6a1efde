"""What weights and data are, whatever their path: digests of files and of tensors."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from gradindex.errors import ResourceError
from gradindex.model.adapters import adapter_facts
from gradindex.storage.files import atomic_write, sha256


def digest_of_files(files: Iterable[Path], also: Iterable[str] = ()) -> str:
    """SHA-256 over the files' names and own SHA-256s, and over the lines of `also`."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {_cached_sha256(file)}\n".encode())
    for line in also:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def tensors_digest(network: nn.Module) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, in order of name, and over what
    running adapters do with theirs."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    for line in adapter_facts(network):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _cached_sha256(file: Path) -> str:
    """A file's SHA-256, remembered by path, size, time and inode (a 14 GB model takes 10 s)."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "gradindex" / "digests.json"
    facts = file.stat()
    key = f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
    if key not in known:
        known[key] = sha256(file)
        with contextlib.suppress(OSError, ResourceError):  # a read-only home only costs time
            cache.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(cache, json.dumps(known, indent=0).encode())
    return known[key]
