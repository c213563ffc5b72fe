"""Host twins of small device tensors, so that a model's forward can branch on them without waiting.

transformers reads values before the layers run: whether a mask has zeros, where documents begin, how far
positions reach. All of them are computed from the micro-batch, which the host has. While the prologue runs,
each small integer or boolean tensor computed from tensors copied from the host has a twin on the host, made
by the same operations, and reads of the tensor return the twin's value. Device values are never changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from horizon_lm.memory.pinned import pinned

# A twin has at most _TIMES the elements of the largest copied tensor (several kinds of positions), so none is
# as large as a tokens x tokens mask; twins of up to _FEWEST elements are always made.
_TIMES, _FEWEST = 8, 1 << 12
_COPY, _COPY_INTO = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default
_HOST = torch.device("cpu")
_MASKS = torch.bool, torch.uint8
_MISSING = object()

Place = tuple[Any, ...]


@contextmanager
def host_twins(device: torch.device) -> Iterator[None]:
    """While open, reads of small tensors on a CUDA device do not wait for it, if the tensors are computed
    from others that are copied from the host meanwhile."""
    if device.type != "cuda":
        yield
        return
    with HostTwins(), _Lists():
        yield


def is_on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"


def upload(twin: torch.Tensor, device: torch.device) -> torch.Tensor:
    return pinned(twin).to(device, non_blocking=True)


class HostTwins(TorchDispatchMode):
    """Mode that repeats operations on twins, and runs reads on twins only.

    Twins are found by a tensor's memory, since autograd makes new tensors for the same memory. The twin of a
    view is a view, so a write reaches both; a write that cannot be repeated drops the twins.
    """

    def __init__(self) -> None:
        super().__init__()
        self._twins: dict[int, dict[Place, torch.Tensor]] = {}  # by storage
        # A weak reference keeps the identity of a freed storage from being reused.
        self._known: dict[int, StorageWeakRef] = {}
        self._most = _FEWEST

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        flat, spec = tree_flatten((args, kwargs or {}))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        on_device = [value for value in tensors if is_on_device(value)]
        stand_ins = [self._stand_in(value) for value in flat]
        given = None if any(s is _MISSING for s in stand_ins) else tree_unflatten(stand_ins, spec)
        if on_device and given is not None:
            if _reads(func, args, kwargs or {}):
                return _evaluate(func, given)
            if _is_made_on_the_host(func, args):
                return self._from_host(func, given, on_device[0].device)
        output = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            self._write(func, args, kwargs or {}, given if on_device else None)
        elif given is not None and _repeats(func):
            copied = 0 if on_device else max((t.numel() for t in tensors), default=0)
            self._follow(func, given, output, copied)
        return output

    def _stand_in(self, value: Any) -> Any:
        """Return the host's counterpart of an argument; `_MISSING` for a tensor without a twin."""
        if isinstance(value, torch.device):
            return _HOST
        if not isinstance(value, torch.Tensor) or not is_on_device(value):
            return value
        return self._twins.get(_storage(value), {}).get(_place(value), _MISSING)

    def _write(self, func: Any, args: tuple, kwargs: dict[str, Any], given: Any) -> None:
        """Repeat a write on the twins; if it cannot be repeated, drop the twins of the tensors written."""
        if given is not None and _repeats(func):
            with suppress(RuntimeError):
                _evaluate(func, given)
                return
        for tensor in _written(func, args, kwargs):
            self._twins.pop(_storage(tensor), None)

    def _follow(self, func: Any, given: Any, output: Any, copied: int) -> None:
        """Make the twins of an operation's outputs if they are small and of integers or booleans."""
        outputs = _tensors(output)
        self._most = max(self._most, _TIMES * copied)
        if any(_is_inexact(t) or t.numel() > self._most or not is_on_device(t) for t in outputs):
            return
        if outputs:
            with suppress(RuntimeError):
                self._keep(outputs, _tensors(_evaluate(func, given)))

    def _from_host(self, func: Any, given: Any, device: torch.device) -> Any:
        """Run an operation on the twins, and upload its output."""
        found, spec = tree_flatten(_evaluate(func, given))
        with _disable_current_modes():
            outputs = [upload(twin, device) for twin in found]
        self._keep(outputs, found)
        return tree_unflatten(outputs, spec)

    def _keep(self, outputs: list[torch.Tensor], twins: list[torch.Tensor]) -> None:
        for tensor, twin in zip(outputs, twins, strict=True):
            storage = _storage(tensor)
            self._known.setdefault(storage, StorageWeakRef(tensor.untyped_storage()))
            self._twins.setdefault(storage, {})[_place(tensor)] = twin


def _evaluate(func: Any, given: Any) -> Any:
    with _disable_current_modes():
        return func(*given[0], **given[1])


def _reads(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an operation on device tensors returns its result to the host."""
    if func is _COPY:
        return kwargs.get("device") == _HOST
    if func is _COPY_INTO:
        return not is_on_device(args[0])
    return torch.Tag.data_dependent_output in func.tags


def _is_made_on_the_host(func: Any, args: tuple) -> bool:
    """Whether the output's size depends on values (as when indexing by booleans), or an index is on the
    host."""
    if func is torch.ops.aten.index.Tensor:
        return any(i.dtype in _MASKS or not is_on_device(i) for i in args[1] if i is not None)
    return torch.Tag.dynamic_output_shape in func.tags


def _repeats(func: Any) -> bool:
    """Whether the same arguments give the same values: neither random nor uninitialised."""
    return torch.Tag.nondeterministic_seeded not in func.tags and "empty" not in func._schema.name


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return _tensors(found)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _is_inexact(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: torch.Tensor) -> Place:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class _Lists(TorchFunctionMode):
    """Mode that keeps torch from copying lists of numbers to the device and waiting for it: a list as an
    index becomes a host tensor, which `HostTwins` evaluates; a list as a tensor becomes a pinned copy."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__:
            return func(args[0], _with_tensors(args[1]))
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) != _HOST:
            made = func(*args, **{**kwargs, "device": _HOST})
            return upload(made, torch.device(device))
        return func(*args, **kwargs)


def _with_tensors(index: Any) -> Any:
    """The index with its lists as tensors."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(_with_tensors(part) for part in index) if isinstance(index, tuple) else index
