"""A CUDA device with values, on the CPU: what looks like a device tensor is one in host memory, and marked.

Torch functions are intercepted twice. By name (`_Names`): a CUDA device in an argument becomes the CPU,
`tensor.device` tells of the mark, and `to`, `tolist`, `pin_memory` do what they do with a device. As an
operation (`_Operations`), below autograd: results of marked tensors are marked, and every operation that
would make the host wait for a real device is counted, with the op of the step that it is part of.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

import fake_cuda
from fake_flash import flash_on_the_cpu
from horizon_lm.engine import layers
from horizon_lm.memory import arena, packed, store
from horizon_lm.model import twins, varlen
from horizon_lm.optim import kernel
from horizon_lm.optim.progress import Progress
from horizon_lm.optim.rules import Numbers, Tensors
from horizon_lm.schedule import Lane, Op

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_aten = torch.ops.aten
_here = threading.local()  # target: where the torch function at hand puts its result; op: of the step


class EmulatedCuda:
    """Which memory is the device's, which is pinned, and the waits of the host: (op of the step, reason).

    mixed: operations on tensors of the device and of the host, which a real device refuses.
    """

    def __init__(self) -> None:
        self._device: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self._registered: list[tuple[int, int, StorageWeakRef]] = []
        self.waits: list[tuple[Op | None, str]] = []
        self.mixed: list[str] = []

    def is_on_device(self, tensor: torch.Tensor) -> bool:
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside of vmap
            tensor = torch._C._functorch.get_unwrapped(tensor)
        return tensor.untyped_storage()._cdata in self._device

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        place = tensor.data_ptr()
        registered = any(start <= place < end and not by.expired() for start, end, by in self._registered)
        return registered or tensor.untyped_storage()._cdata in self._pinned

    def put_on_device(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._device.setdefault(storage._cdata, StorageWeakRef(storage))

    def pin(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._pinned.setdefault(storage._cdata, StorageWeakRef(storage))

    def register(self, tensors: Sequence[torch.Tensor], device: torch.device) -> None:
        for tensor in tensors:
            place, storage = tensor.data_ptr(), StorageWeakRef(tensor.untyped_storage())
            self._registered.append((place, place + tensor.nbytes, storage))

    def wait(self, what: str) -> None:
        self.waits.append((getattr(_here, "op", None), what))

    def on_compute_lane(self) -> Counter[str]:
        """How often each thing made the compute lane's thread wait."""
        return Counter(what for op, what in self.waits if op is not None and op.lane is Lane.COMPUTE)

    @contextmanager
    def modes(self, op: Op | None = None) -> Iterator[None]:
        """Around what one thread does (modes belong to a thread). op: of the step that it does."""
        before, _here.op = getattr(_here, "op", None), op
        try:
            with _Operations(self), _Names(self):
                yield
        finally:
            _here.op = before


def _is_cuda(value: Any) -> bool:
    """Whether an argument names the device."""
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


def _is_cpu(value: Any) -> bool:
    return value == "cpu" or (isinstance(value, torch.device) and value.type == "cpu")


class _Names(TorchFunctionMode):
    def __init__(self, cuda: EmulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self.cuda, func, args, kwargs)
        target = kwargs.get("device")
        if _is_cuda(target):
            if func in (torch.tensor, torch.as_tensor):
                self.cuda.wait(f"{func.__name__}(device='cuda')")
            kwargs["device"] = CPU
        pins = kwargs.pop("pin_memory", False)
        with _putting("cuda" if _is_cuda(target) else "cpu" if target is not None else None):
            found = func(*args, **kwargs)
        if pins:
            self.cuda.pin(found)
        return found


@contextmanager
def _putting(target: str | None) -> Iterator[None]:
    before = getattr(_here, "target", None)
    _here.target = target
    try:
        yield
    finally:
        _here.target = before


def _device_of(cuda: EmulatedCuda, func: Any, args: tuple, kwargs: dict) -> torch.device:
    found: torch.device = func(*args)
    return CUDA if found.type == "cpu" and cuda.is_on_device(args[0]) else found


def _to(cuda: EmulatedCuda, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    tensor, *rest = args
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    non_blocking = kwargs.get("non_blocking", False)
    for value in rest:
        if isinstance(value, torch.Tensor):
            device, dtype = (CUDA if cuda.is_on_device(value) else value.device), value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            device = value
        elif isinstance(value, bool):
            non_blocking = value
    if (_is_cuda(device) and not cuda.is_on_device(tensor) and not tensor.is_meta) or (
        _is_cpu(device) and cuda.is_on_device(tensor)
    ):
        with _putting("cuda" if _is_cuda(device) else "cpu"):
            moved: torch.Tensor = _aten._to_copy.default(
                tensor, dtype=dtype, device=CPU, non_blocking=non_blocking
            )
        return moved
    if dtype is None or dtype == tensor.dtype:
        return tensor.clone() if kwargs.get("copy", False) else tensor
    return func(tensor, dtype)


def _cpu(cuda: EmulatedCuda, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    return _to(cuda, torch.Tensor.to, args, {"device": CPU})


def _out_of_tensor(cuda: EmulatedCuda, func: Any, args: tuple, kwargs: dict) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(_cpu(cuda, func, args[:1], {}), *args[1:], **kwargs)


def _numpy(cuda: EmulatedCuda, func: Any, args: tuple, kwargs: dict) -> Any:
    if cuda.is_on_device(args[0]):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return func(*args, **kwargs)


def _pin_memory(cuda: EmulatedCuda, func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    assert not cuda.is_on_device(args[0])
    found = args[0].clone()
    cuda.pin(found)
    return found


_SPECIAL: dict[Any, Callable[[EmulatedCuda, Any, tuple, dict], Any]] = {
    torch.Tensor.device.__get__: _device_of,
    torch.Tensor.is_cuda.__get__: lambda cuda, func, args, kwargs: cuda.is_on_device(args[0]),
    torch.Tensor.to: _to,
    torch.Tensor.cpu: _cpu,
    torch.Tensor.tolist: _out_of_tensor,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.pin_memory: _pin_memory,
    torch.Tensor.is_pinned: lambda cuda, func, args, kwargs: cuda.is_pinned(args[0]),
}


class _Operations(TorchDispatchMode):
    def __init__(self, cuda: EmulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cuda, target = self.cuda, getattr(_here, "target", None)
        tensors = _tensors((args, kwargs))
        marked = [t for t in tensors if cuda.is_on_device(t)]
        if marked or target == "cuda":
            why = self._waits(func, args, kwargs, target)
            if why:
                cuda.wait(why)
            if _mixes(func, tensors, marked):
                cuda.mixed.append(func._schema.name)
        output = STAND_INS.get(func, func)(*args, **kwargs)
        goes_home = func is _aten._to_copy.default and target == "cpu"
        if (marked and not goes_home and func is not _aten.copy_.default) or target == "cuda":
            tree_map_only(torch.Tensor, cuda.put_on_device, output)
        return output

    def _waits(self, func: Any, args: tuple, kwargs: dict, target: str | None) -> str | None:
        """What makes the host wait for the device in this operation; None if nothing does."""
        cuda, name = self.cuda, func._schema.name
        if torch.Tag.data_dependent_output in func.tags:
            return f"{name}: a value is read"
        if func is _aten._to_copy.default and target == "cpu":
            return "a copy to pageable memory"
        if func is _aten._to_copy.default and target == "cuda" and not cuda.is_on_device(args[0]):
            return _why_blocking(kwargs.get("non_blocking", False), cuda.is_pinned(args[0]))
        if func is _aten.copy_.default:
            into, source = (cuda.is_on_device(t) for t in args[:2])
            if into != source:
                non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
                return _why_blocking(non_blocking, cuda.is_pinned(args[1 if into else 0]))
        if "index" in name and len(args) > 1 and isinstance(args[1], (list, tuple)):
            indices = _tensors(args[1])
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                return f"{name}: by booleans"
            if any(not cuda.is_on_device(i) for i in indices):
                return f"{name}: by indices of the host"
            return None
        if name == "aten::_grouped_mm" and any(t.dtype != torch.bfloat16 for t in args[:2]):
            return f"{name}: groups' sizes are read, but for bf16"
        if torch.Tag.dynamic_output_shape in func.tags and func is not _aten.index.Tensor:
            if name == "aten::repeat_interleave" and kwargs.get("output_size") is not None:
                return None
            return f"{name}: a size depends on values"
        return None


def _mixes(func: Any, tensors: list[torch.Tensor], marked: list[torch.Tensor]) -> bool:
    """Scalars of the host may be mixed in, indices too; copies are between both."""
    name = func._schema.name
    others = [t for t in tensors if t.dim() and not t.is_meta and all(t is not one for one in marked)]
    return bool(marked and others) and "copy" not in name and "index" not in name


def _why_blocking(non_blocking: bool, is_pinned: bool) -> str | None:
    if not is_pinned:
        return "a copy from or to pageable memory"
    return None if non_blocking else "a copy that blocks"


def _histc_of_integers(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _aten.histc.default(values.float(), *args, **kwargs).to(values.dtype)


def _mm_in_fp32(left: Any, right: Any, out_dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
    assert out.dtype == out_dtype == torch.float32 and left.dtype == right.dtype == torch.bfloat16
    return torch.mm(left.float(), right.float(), out=out)


def _addmm_in_fp32(
    self: torch.Tensor, left: Any, right: Any, out_dtype: torch.dtype, *, out: torch.Tensor
) -> torch.Tensor:
    assert self.data_ptr() == out.data_ptr() and self.dtype == out.dtype == out_dtype == torch.float32
    return out.addmm_(left.float(), right.float())


def _update_by_host(tensors: Tensors, numbers: Numbers, *, progress: Progress | None = None) -> None:
    """Triton's kernel has the bits of the host's (tests/optim/test_device_kernel.py)."""
    with torch._C.DisableTorchFunction():  # the memory is the host's
        kernel.update_run(tensors, numbers, threads=1, progress=progress)


def _without_out(operation: Any) -> Callable[..., Any]:
    """A kernel of bitsandbytes that writes to `out`, on the CPU."""

    def run(*args: Any, **kwargs: Any) -> None:
        *given, out = [*args, *kwargs.values()]
        out.copy_(operation(*given).view(out.shape))

    return run


# Operations that the CPU has not.
STAND_INS: dict[Any, Callable[..., Any]] = {
    _aten.histc.default: _histc_of_integers,
    _aten.mm.dtype_out: _mm_in_fp32,
    _aten.addmm.dtype_out: _addmm_in_fp32,
}


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch, fake_cuda: list[str]) -> Iterator[EmulatedCuda]:
    """`device="cuda"` works while this is in use, in the calling thread and in the lanes' threads.

    Needs the fixture `fake_cuda`, whose streams and events it uses.
    """
    with suppress(ImportError):  # what imports it later would look for a real device
        import bitsandbytes  # noqa: F401

        for name in ("dequantize_4bit", "dequantize_blockwise"):
            operation = getattr(torch.ops.bitsandbytes, name)
            monkeypatch.setitem(STAND_INS, operation.out, _without_out(operation.default))
    packed._code.cache_clear()  # of another emulated device
    cuda = EmulatedCuda()
    generator = torch.Generator()
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "default_generators": (generator,),
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (1 << 40, 1 << 40),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    for module in (arena, store):
        monkeypatch.setattr(module, "pin", cuda.register)
    monkeypatch.setattr(twins, "is_on_device", cuda.is_on_device)
    monkeypatch.setattr(kernel, "update_on_device", _update_by_host)
    monkeypatch.setattr(kernel, "check_available", lambda device, rule, spec: None)

    def upload(twin: torch.Tensor, device: torch.device) -> torch.Tensor:
        pinned = twin.clone()
        cuda.pin(pinned)
        with _putting("cuda"), torch._C.DisableTorchFunction():
            found: torch.Tensor = _aten._to_copy.default(pinned, device=CPU, non_blocking=True)
        cuda.put_on_device(found)  # also where no mode sees the copy
        return found

    monkeypatch.setattr(twins, "upload", upload)
    real = layers._private

    def private(run: torch.Tensor) -> torch.Tensor:  # the same memory as another storage
        found = real(run)
        if cuda.is_on_device(run):
            cuda.put_on_device(found)
        return found

    monkeypatch.setattr(layers, "_private", private)
    # Hooks of autograd run inside of an intercepted function, where `device` is not intercepted.
    kinds = checkpoint._allowed_determinism_checks_to_fns
    monkeypatch.setitem(kinds, "default", lambda tensor: (tensor.shape, tensor.dtype))
    _count_event_waits(monkeypatch, cuda)
    kernels = varlen._DTYPES
    with flash_on_the_cpu(), cuda.modes():
        monkeypatch.setattr(varlen, "_DTYPES", kernels)
        yield cuda


def _count_event_waits(monkeypatch: pytest.MonkeyPatch, cuda: EmulatedCuda) -> None:
    event_wait, device_wait = fake_cuda.Event.synchronize, torch.cuda.synchronize

    def synchronize_event(event: fake_cuda.Event) -> None:
        cuda.wait("Event.synchronize")
        event_wait(event)

    def synchronize(device: torch.device | None = None) -> None:
        cuda.wait("torch.cuda.synchronize")
        device_wait(device)

    monkeypatch.setattr(fake_cuda.Event, "synchronize", synchronize_event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


def watch_ops(engine: Any, cuda: EmulatedCuda) -> None:
    """Run the ops of this engine under emulation, whatever the thread, and tell waits by op."""

    def watched(function: Callable[[Any, Op], None]) -> Callable[[Any, Op], None]:
        def run(step: Any, op: Op) -> None:
            with cuda.modes(op):
                function(step, op)

        return run

    engine.ops.functions = {kind: watched(f) for kind, f in engine.ops.functions.items()}
    for slots in (engine.ops.weight_slots, engine.ops.gradient_slots):
        for buffer in slots._buffers:
            assert cuda.is_on_device(buffer)


__all__ = ["CUDA", "STAND_INS", "EmulatedCuda", "emulated_cuda", "watch_ops"]
