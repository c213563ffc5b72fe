"""CUDA's streams and events on the CPU, so that `CudaLanes` runs its threads without a GPU.

Work ends as it is issued, which is one of the orders that a GPU may choose. A `Watch` also follows
which op touches which slot in which stream, and reports accesses that no wait orders, with the
happens-before analysis of PyTorch's own CUDA sanitizer: what a GPU *might* do wrong shows up here.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.cuda import _sanitizer as sanitizer
from torch.utils._python_dispatch import TorchDispatchMode

_ids = itertools.count(1)
_here = threading.local()


class Stream:
    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        self.cuda_stream = next(_ids)
        self.priority = priority

    def wait_event(self, event: Event) -> None:
        if _watching:
            _watching[-1].tell("_handle_event_wait", event.number, self.cuda_stream)


_default = Stream()
_default.cuda_stream = sanitizer.DEFAULT_STREAM_ID
_watching: list[Watch] = []


class Event:
    made = 0

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        Event.made += 1
        self.number = next(_ids)
        self.enable_timing = enable_timing
        self.time: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()
        if _watching:
            number = (stream or current_stream()).cuda_stream
            _watching[-1].tell("_handle_event_record", self.number, number)

    def synchronize(self) -> None:
        assert self.time is not None, "a thread waits for an event that was never recorded"
        # What the thread that hands out all work waits for, all streams wait for. A lane's thread waits for
        # itself alone.
        if _watching and threading.current_thread() is threading.main_thread():
            _watching[-1].tell("_handle_event_synchronization", self.number)

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing and end.enable_timing and self.time is not None and end.time is not None
        return (end.time - self.time) * 1e3


def current_stream(device: torch.device | None = None) -> Stream:
    return getattr(_here, "stream", _default)


@contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    before = current_stream()
    _here.stream = chosen
    try:
        yield
    finally:
        _here.stream = before


def synchronize(device: torch.device | None = None) -> None:
    synchronized.append(threading.current_thread().name)
    if _watching:
        _watching[-1].tell("_handle_device_synchronization")


synchronized: list[str] = []


def replace_cuda(patch: pytest.MonkeyPatch) -> None:
    """Put these in the place of the names of `torch.cuda` that the lanes use."""
    replaced = {"Stream": Stream, "Event": Event, "stream": stream, "current_stream": current_stream}
    for name, value in (replaced | {"synchronize": synchronize, "set_device": lambda device: None}).items():
        patch.setattr(torch.cuda, name, value)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`torch.cuda` with the names that the lanes use replaced; yields the calls of `synchronize`."""
    replace_cuda(monkeypatch)
    synchronized.clear()
    return synchronized


class Watch:
    """Follows the accesses to slots while it is open.

    slots: the watched buffers. A tensor inside one counts as the whole slot.
    """

    def __init__(self, slots: list[torch.Tensor]) -> None:
        self.slots = slots
        self.errors: list[sanitizer.UnsynchronizedAccessError] = []
        self._handler = sanitizer.EventHandler()
        self._lock = threading.Lock()

    def tell(self, what: str, *args: int) -> None:
        with self._lock:
            getattr(self._handler, what)(*args)

    def slot_of(self, tensor: torch.Tensor) -> int | None:
        place = tensor.data_ptr()
        for k, slot in enumerate(self.slots):
            if slot.data_ptr() <= place < slot.data_ptr() + slot.nbytes:
                return k + 1
        return None

    def launched(self, arguments: _Arguments, schema: torch.FunctionSchema) -> None:
        if not arguments.dataptrs_read and not arguments.dataptrs_written:
            return
        with self._lock:
            self.errors += self._handler._handle_kernel_launch(
                current_stream().cuda_stream,
                arguments.dataptrs_read - arguments.dataptrs_written,
                arguments.dataptrs_written,
                arguments.outputs,
                str(schema),
                arguments.tensor_aliases,
            )

    @contextmanager
    def lane(self) -> Iterator[None]:
        """Around the work of one thread (dispatch modes belong to a thread)."""
        with _Mode(self):
            yield

    def __enter__(self) -> Watch:
        _watching.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _watching.remove(self)


class _Arguments(sanitizer.ArgumentHandler):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def _handle_argument(self, value, is_write, metadata_only, name=None, is_output=False):
        slot = self.watch.slot_of(value) if isinstance(value, torch.Tensor) else None
        if slot is None or (metadata_only and not is_write):
            return
        (self.dataptrs_written if is_write else self.dataptrs_read).add(slot)
        self.tensor_aliases.setdefault(slot, []).append(name or "output")


class _Mode(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = _Arguments(self.watch)
        factory = bool(sanitizer.FACTORY_FUNCTION_REGEX.match(func._schema.name))
        arguments.parse_inputs(func._schema, args, kwargs, is_factory=factory)
        outputs = func(*args, **kwargs)
        arguments.parse_outputs(func._schema, outputs, is_factory=factory)
        self.watch.launched(arguments, func._schema)
        return outputs
