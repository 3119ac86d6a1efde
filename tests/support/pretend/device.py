"""A pretend CUDA device on a machine that has none: after `install()` there are cuda:0 and cuda:1.

A tensor on one is an `OnDevice`: to PyTorch one of that device, whose numbers lie in a tensor of
the host. What a GPU refuses is refused: tensors of the host or of the other device in one
operation, NumPy on a device's tensor, a generator of another device, products of integers. Backward
passes run in threads of their own, as on a GPU, and random numbers come from a generator of the
device's own. What a GPU does later is done later: a copy to the host that isn't waited for
(`non_blocking`) gives garbage until the device is waited for, and a pinned tensor that changes
while it is being copied is an error. `ledger.py` counts.

What it can't show: speed, a card's own rounding, kernels that it lacks, what its drivers do.
Import it before torch.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.pretend.ledger import DEVICES, LEDGER, place

assert "torch" not in sys.modules, "import the pretend device before torch"
HERE = Path(__file__).parent
COMPILER = "g++"



def load_guard() -> None:
    """Load guard.cpp, which is compiled for this torch once. Raises where there is no compiler."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch_folder = Path(found.origin).parent
    source = HERE / "guard.cpp"
    key = hashlib.sha256(source.read_bytes() + str(torch_folder).encode() +
                         importlib.metadata.version("torch").encode()).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"pretend-device-{os.getuid()}-{key}.so"
    if not made.exists():
        own = made.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [shutil.which(COMPILER) or COMPILER, "-O1", "-std=c++20", "-shared", "-fPIC", source,
             f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include",
             f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu",
             f"-Wl,-rpath,{torch_folder}/lib", "-o", own], check=True)
        own.replace(made)  # whole, also where several processes make it
    ctypes.CDLL(str(torch_folder / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)


load_guard()

import torch  # noqa: E402

COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_copy_from_and_resize"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
           "aten::_unsafe_index", "aten::_unsafe_index_put"}
TAKES_SCALARS = {"aten::masked_fill", "aten::index_fill", "aten::fill", "aten::where"}
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::mv",
            "aten::addmv", "aten::dot", "aten::addbmm"}
# what needs a number on the host before it can go on
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount",
         "aten::equal", "aten::_unique2", "aten::unique_dim", "aten::_linalg_eigh",
         "aten::_linalg_svd", "aten::linalg_qr", "aten::repeat_interleave", "aten::is_nonzero"}
VIEWS = {"aten::view", "aten::_unsafe_view", "aten::slice", "aten::select", "aten::t",
         "aten::transpose", "aten::permute", "aten::expand", "aten::unsqueeze", "aten::squeeze",
         "aten::detach", "aten::alias", "aten::as_strided", "aten::split", "aten::unbind",
         "aten::split_with_sizes", "aten::diagonal", "aten::_reshape_alias", "aten::lift_fresh",
         "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty",
         "aten::unfold"}


class OnDevice(torch.Tensor):
    """A tensor of a pretend device; `numbers` is the host's tensor that holds what it holds."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, device: int) -> "OnDevice":
        storage = numbers.untyped_storage()
        held = LEDGER.allocate(storage._cdata, storage.nbytes(), device, torch.OutOfMemoryError)
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=torch.device("cuda", device))
        made.numbers, made._held = numbers, held
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, *args, **(kwargs or {}))

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu()"
                        " to copy the tensor to host memory first.")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        other = value.detach()
        # torch.utils.swap_tensors would refuse where a view looks at this one
        torch._C._swap_tensor_impl(self, other)  # type: ignore[attr-defined]
        self.numbers, self._held = other.numbers, other._held  # type: ignore[attr-defined]

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.numbers!r}, {self.device})"

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        made = self.detach().clone()
        return torch.nn.Parameter(made, self.requires_grad) if getattr(
            self, "_is_param", False) else made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a tensor of the pretend device can't be pickled")


# ---- copies that aren't waited for

Check = Callable[[], None]
_under_way: list[Check] = []  # each ends one copy


def wait(_: Any = None) -> None:
    """Wait for the devices: what was to be copied is there now."""
    while _under_way:
        _under_way.pop(0)()


def copy_later(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy from a device to the host, without waiting: garbage is there until then."""
    numbers = source.numbers.clone()  # as they are now: what comes later comes after the copy
    target.fill_(torch.nan if target.is_floating_point() else 1)

    def arrive() -> None:
        target.copy_(numbers)

    _under_way.append(arrive)


def guard_source(source: torch.Tensor) -> None:
    """A pinned tensor that is copied to a device has to stay as it is until that is waited for."""
    before = source.clone()

    def check() -> None:
        assert torch.equal(before, source), "a pinned tensor was changed while it was being copied"

    _under_way.append(check)


# ---- operations

def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation with tensors of a device among its arguments, or that makes one there."""
    name = func._schema.name
    if name == "aten::_fused_sdp_choice":
        return 0  # the attention that is made of plain operations
    seen = _Arguments()
    inner_args = [seen.open(one) for one in args]
    inner_kwargs = {key: seen.open(one) for key, one in kwargs.items()}
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted = torch.device(wanted)
        inner_kwargs["device"] = torch.device("cpu")
    _check(func, name, args, kwargs, seen)
    target = seen.index if wanted is None else None if wanted.type != "cuda" else \
        torch.cuda.current_device() if wanted.index is None else wanted.index
    waited = _note(func, name, args, kwargs, seen, target)
    if name == "aten::copy_" and not waited and not isinstance(args[0], OnDevice):
        copy_later(args[0], args[1])
        return args[0]
    if waited:
        wait()
    with _drawing() if torch.Tag.nondeterministic_seeded in func.tags else contextlib.nullcontext():
        made = func(*inner_args, **inner_kwargs)
    if name == "aten::_to_copy" and target is None and not waited:
        copy_later(made, seen.device[0])
    if target is not None and name not in VIEWS:
        _note_wide(name, [made] if isinstance(made, torch.Tensor) else made)
    return seen.close(made, target)


def _note_wide(name: str, tensors: Any) -> None:
    """Count an operation's numbers in float64."""
    for one in tensors if isinstance(tensors, (list, tuple)) else ():
        if isinstance(one, torch.Tensor) and one.dtype == torch.float64:
            at = place(), name
            LEDGER.wide[at] = max(one.numel(), LEDGER.wide.get(at, 0))


class _Arguments:
    """The tensors among an operation's arguments: which are of a device, which of the host."""

    def __init__(self) -> None:
        self.device: list[OnDevice] = []
        self.host: list[torch.Tensor] = []
        self._known: dict[int, torch.Tensor] = {}

    @property
    def index(self) -> int:
        """The number of the device that the operation runs on."""
        index = self.device[0].device.index if self.device else torch.cuda.current_device()
        assert index is not None
        return index

    def open(self, one: Any) -> Any:
        """An argument with the host's tensors in place of the device's."""
        if isinstance(one, (list, tuple)):
            return type(one)([self.open(each) for each in one])
        if not isinstance(one, torch.Tensor):
            return one
        if isinstance(one, OnDevice):
            self.device.append(one)
            numbers = one.numbers
        else:
            self.host.append(one)
            numbers = one
        self._known[id(numbers)] = one
        return numbers

    def close(self, one: Any, target: int | None) -> Any:
        """A result on its device, unless it leaves it; an argument that was changed, as it is."""
        if isinstance(one, (list, tuple)):
            return type(one)([self.close(each, target) for each in one])
        if not isinstance(one, torch.Tensor):
            return one
        if id(one) in self._known:
            return self._known[id(one)]
        return one if target is None else OnDevice(one, target)


def _check(func: Any, name: str, args: Any, kwargs: Any, seen: _Arguments) -> None:
    """Raise what a GPU raises."""
    if LEDGER.lost_after is not None:
        LEDGER.lost_after -= 1
        if LEDGER.lost_after < 0:
            if name in PRODUCTS:  # which a library of CUDA's makes, with an error of its own
                raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublas")
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found "
                           f"'{generator.device.type}'")
    if name in PRODUCTS and not (seen.device[0].is_floating_point() or seen.device[0].is_complex()):
        raise RuntimeError(f'"{name[6:]}_cuda" not implemented for \'{seen.device[0].dtype}\'')
    if name in COPIES:
        return
    found = {f"cuda:{one.device.index}" for one in seen.device}
    if seen.host and seen.device and _wrong(func, name, args, seen.host):
        found.add("cpu")
    if len(found) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(found))}! ({func} at {place()})")


def _wrong(func: Any, name: str, args: Any, host: list[torch.Tensor]) -> list[torch.Tensor]:
    """Which of the host's tensors an operation of the device doesn't take."""
    if name in INDEXED:
        indices = args[1]
        return host if not isinstance(args[0], OnDevice) else [
            one for one in host if one.ndim and not any(one is index for index in indices)]
    if torch.Tag.pointwise in func.tags or name.rstrip("_") in TAKES_SCALARS:
        return [one for one in host if one.ndim or (name.endswith("_") and one is args[0])]
    return host


def _note(
    func: Any, name: str, args: Any, kwargs: Any, seen: _Arguments, target: int | None
) -> bool:
    """Count an operation; returns whether the host waits for it."""
    at = place()
    LEDGER.devices.add(seen.index if target is None else target)
    if name not in VIEWS:
        LEDGER.operations[at] += 1
    down = name in COPIES and bool(seen.device) and (
        target is None or (name == "aten::copy_" and not isinstance(args[0], OnDevice)))
    up = name in COPIES and bool(seen.host) and not down
    if down or up:
        moved = (seen.device if down else seen.host)[0]
        LEDGER.copied[at, "to host" if down else "to device"] += moved.nbytes
    later = bool(kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,)))
    if up and later and seen.host[0].is_pinned():
        guard_source(seen.host[0])
    elif down and later and (name != "aten::copy_" or seen.host[0].is_pinned()):
        pass
    elif up or down:
        LEDGER.waits[at, f"copy to {'host' if down else 'device'}"] += 1
        return True
    if name in INDEXED:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                LEDGER.waits[at, "boolean mask"] += 1
                return True
            if index is not None and not isinstance(index, OnDevice):
                LEDGER.waits[at, "index of the host"] += 1
                return True
    if name not in VIEWS:
        _note_wide(name, seen.device)
    if name in WAITS:
        LEDGER.waits[at, name] += 1
        return True
    return False


# ---- random numbers of the device's own

_random = torch.Generator().manual_seed(987654321)


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    mine, theirs = _random.get_state(), torch.default_generator.get_state()
    torch.default_generator.set_state(mine)
    try:
        yield
    finally:
        _random.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(theirs)


# ---- torch.cuda

class Event:
    """torch.cuda.Event: who waits for it waits for the copies that were asked for before it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._before: list[Check] = []

    def record(self, stream: Any = None) -> None:
        self._before = list(_under_way)

    def query(self) -> bool:
        return not any(copy in _under_way for copy in self._before)

    def synchronize(self) -> None:
        LEDGER.waits[place(), "event"] += 1
        for copy in self._before:
            if copy in _under_way:
                _under_way.remove(copy)
                copy()


def synchronize(device: Any = None) -> None:
    """torch.cuda.synchronize"""
    LEDGER.waits[place(), "synchronize"] += 1
    wait()


def _exchange(device: int) -> int:
    """torch.cuda's own way of switching to a device for a while; negative ones are no device."""
    before: int = torch._C._accelerator_getDeviceIndex()
    if device >= 0:
        torch._C._accelerator_setDeviceIndex(device)
    return before


def _index(device: Any) -> int:
    """The number of a device as torch.cuda's functions take it."""
    if device is None or isinstance(device, int):
        return torch.cuda.current_device() if device is None else device
    found = torch.device(device).index
    return torch.cuda.current_device() if found is None else found


def _apply(
    module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True,
    moved: dict[int, torch.Tensor] | None = None,
) -> torch.nn.Module:
    """nn.Module._apply, which moves parameters; a wrapper can't take another's place in memory.

    So a module gets new parameters, and a tied one the same at all its places.
    """
    moved = {} if moved is None else moved
    if recurse:
        for child in module.children():
            _apply(child, fn, True, moved)
    for kind in (module._parameters, module._buffers):
        for key, tensor in kind.items():
            if tensor is None:
                continue
            if id(tensor) not in moved:
                with torch.no_grad():
                    made = fn(tensor)
                if made is not tensor and isinstance(tensor, torch.nn.Parameter):
                    made = torch.nn.Parameter(made, tensor.requires_grad)
                moved[id(tensor)] = made
                moved.setdefault(-id(tensor), tensor)  # kept: another would get its address
            kind[key] = moved[id(tensor)]  # type: ignore[assignment]
    return module


_libraries: list[Any] = []


def install() -> None:
    """Make cuda:0 and cuda:1 available in this process, for good."""
    if _libraries:
        return
    torch.nn.Module._apply = _apply  # type: ignore[assignment]
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(run, "CUDA")
    own = torch.library.Library("aten", "IMPL")
    # torch.tensor() goes past `__torch_dispatch__`; the others are written into a tensor of size 0
    # that grows, which a wrapper can't
    for name in ("copy_", "eye", "eye.m", "arange", "arange.start", "arange.start_step",
                 "linspace", "randperm", "tril_indices", "triu_indices"):
        operation, _, overload = name.partition(".")
        own.impl(name, partial(run, getattr(getattr(torch.ops.aten, operation),
                                            overload or "default")), "CUDA")
    _libraries.extend((everything, own))
    properties = SimpleNamespace(
        name="pretend", total_memory=LEDGER.capacity, major=9, minor=0, multi_processor_count=132,
        gcnArchName="")

    def forget_peak(device: Any = None) -> None:
        LEDGER.peak[_index(device)] = LEDGER.used[_index(device)]

    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    for name, stub in {
        "_lazy_init": lambda: None, "is_available": lambda: True, "is_initialized": lambda: True,
        "device_count": lambda: DEVICES, "synchronize": synchronize, "Event": Event,
        "current_stream": lambda device=None: None,
        "current_device": torch._C._accelerator_getDeviceIndex,
        "_exchange_device": _exchange, "_maybe_exchange_device": _exchange,
        "set_device": lambda device: torch._C._accelerator_setDeviceIndex(_index(device)),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "is_bf16_supported": lambda *_, **__: True, "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda device=None: (
            LEDGER.capacity - LEDGER.used[_index(device)], LEDGER.capacity),
        "memory_allocated": lambda device=None: LEDGER.used[_index(device)],
        "memory_reserved": lambda device=None: LEDGER.used[_index(device)],
        "max_memory_allocated": lambda device=None: LEDGER.peak[_index(device)],
        "reset_peak_memory_stats": forget_peak,
        "get_rng_state": lambda device=None: _random.get_state(),
        "set_rng_state": lambda state, device=None: _random.set_state(state),
        "manual_seed": _random.manual_seed, "manual_seed_all": _random.manual_seed,
    }.items():
        setattr(torch.cuda, name, stub)
