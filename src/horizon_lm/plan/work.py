"""The work of a computation, counted op by op, and traces from which the work of other sizes follows.

FLOPs come from torch's registry (`torch.utils.flop_counter`), extended by kernels that it lacks; bytes
are those of the tensors that an operation reads and writes.

A trace records a measurement on fake tensors event by event. A layer does the same operations on 2 and on
4095 sequences, and each tensor is as large as the number of sequences times a constant (or its square, or one
more or less). If both ends of a line of sizes agree on that, to the byte and for every event, the sizes
between need not be run: their events, peaks and work follow exactly (`Law`). If anything differs (another
branch, a padded or rounded size) nothing is concluded, and each size is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
MATMUL, ATTENTION, ATTENTION_BACKWARD = "matmul", "attention", "attention_backward"
ELEMENTWISE = "elementwise"
KINDS = MATMUL, ATTENTION, ATTENTION_BACKWARD, ELEMENTWISE


class Kernel(NamedTuple):
    """One operation. kind: of KINDS; flops: 0 for elementwise."""

    kind: str
    dtype: str
    flops: int
    bytes: int

    @property
    def amount(self) -> int:
        """The number that determines its time: FLOPs, or bytes if there is hardly any arithmetic."""
        return self.bytes if self.kind == ELEMENTWISE else self.flops


Work = Counter[Kernel]


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


def _grouped(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """The groups share the rows, or (two matrices) the inner dimension."""
    groups = a.shape[0] if a.dim() == 3 and b.dim() == 3 else 1
    return 2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _grouped_output(a: torch.Tensor, b: torch.Tensor, offs: Any = None, **kwargs: Any) -> torch.Tensor:
    """Output of a grouped product in fp32, for which torch has a kernel but no rule for fake tensors."""
    shape = [a.shape[-2], b.shape[-1]]
    if a.dim() == b.dim():
        shape.insert(0, a.shape[0] if a.dim() == 3 else offs.shape[0])
    return torch.empty(shape, dtype=a.dtype, device=a.device)


_ADDED: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._grouped_mm: _grouped,
}


_ANSWER = "_horizon_answer"  # attribute of a comparison's result


class WorkMeter(TorchDispatchMode):
    """While open, counts the operations of this thread.

    Questions about values, which fake tensors cannot answer, are answered as if work were shared evenly: a
    bool is true, a mask cut out of a larger one selects its even share (an expert its share of the tokens),
    an index is the first, and only the first equals 0.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never compiled, so torch need not wrap each call, nor import its compiler."""
        return False

    def __init__(self, note: Callable[..., None] | None = None) -> None:
        """note: called with ("kernel", kind, dtype), the FLOPs, and for each tensor its bytes and those of
        its storage."""
        super().__init__()
        self.work: Work = Counter()
        self._note = note

    def take(self) -> Work:
        """Return the work since the last call."""
        work, self.work = self.work, Counter()
        return work

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return getattr(args[0], _ANSWER, True)
        if func is aten._local_scalar_dense.default and not args[0].dtype.is_floating_point:
            return 0
        if func is aten.nonzero.default:
            return _even_share(args[0])
        if func is aten.split_with_sizes.default:
            args = _with_even_sizes(*args)
        if func._overloadpacket is aten._grouped_mm and args[0].dtype == torch.float32:
            out = _grouped_output(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if func is aten.eq.Scalar and not args[0].dim() and not args[0].dtype.is_floating_point:
            setattr(out, _ANSWER, args[1] == 0)
        self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Count a finished operation."""
        if not _is_free(func) and any(isinstance(t, torch.Tensor) for t in tree_leaves(out)):
            kind, dtype, flops, sizes = _kernel(func, args, kwargs, out)
            self.work[Kernel(kind, dtype, flops, bytes_of(sizes))] += 1
            if self._note is not None:
                self._note(("kernel", kind, dtype), flops, *sizes)


def _even_share(mask: torch.Tensor) -> torch.Tensor:
    """Indices [n, dimensions] of a mask's true elements: all, or one in N if the mask is one of N parts."""
    whole = mask.untyped_storage().nbytes() // mask.itemsize
    parts = max(1, whole // max(1, mask.numel()))
    return torch.empty(-(-mask.numel() // parts), mask.dim(), dtype=torch.long, device=mask.device)


def _with_even_sizes(whole: torch.Tensor, sizes: Sequence[int], dim: int = 0) -> tuple:
    """The arguments of a split whose sizes, read from a fake tensor, do not add up."""
    length, parts = whole.shape[dim], len(sizes)
    if sum(sizes) != length and parts:
        sizes = [length // parts + (i < length % parts) for i in range(parts)]
    return whole, sizes, dim


_NO_WORK = {aten.empty, aten.empty_like, aten.empty_strided, aten.detach, aten._unsafe_view}


def _is_free(func: Any) -> bool:
    """Whether an operation computes nothing: it returns new memory, or a view of its input."""
    returned = [r.alias_info for r in func._schema.returns]
    views = bool(returned) and all(r is not None and not r.is_write for r in returned)
    return views or func._overloadpacket in _NO_WORK


def bytes_of(sizes: Sequence[int]) -> int:
    """Bytes of an operation's tensors, given as pairs (its bytes, its storage's): the smaller of each pair,
    since an expanded tensor is read once."""
    return sum(map(min, sizes[::2], sizes[1::2]))


def flops_of_call(func: Any, args: tuple, kwargs: dict, out: Any) -> tuple[str, int]:
    """(kind, FLOPs) of an operation."""
    packet = func._overloadpacket
    if packet in _ADDED:
        return _kind(packet), int(_ADDED[packet](*args, **kwargs))
    if packet in flop_registry:
        return _kind(packet), int(flop_registry[packet](*args, **kwargs, out_val=out))
    return ELEMENTWISE, 0


def _kernel(func: Any, args: tuple, kwargs: dict, out: Any) -> tuple[str, str, int, list[int]]:
    """(kind, dtype, FLOPs, sizes for `bytes_of`)."""
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
    sizes = [n for t in tensors for n in (t.numel() * t.itemsize, t.untyped_storage().nbytes())]
    floating = [t.dtype for t in tensors if t.dtype.is_floating_point]
    dtype = str(min(floating, key=lambda d: d.itemsize, default=torch.float32)).removeprefix("torch.")
    kind, flops = flops_of_call(func, args, kwargs, out)
    return kind, dtype, flops, sizes


def _kind(packet: Any) -> str:
    name = str(packet)
    if "attention" not in name:
        return MATMUL
    return ATTENTION_BACKWARD if "backward" in name else ATTENTION


# How a size may depend on the number that varies. Attention without a fused kernel is quadratic in tokens;
# arange(n + 1) and x[1:] are what they are.
_FORMS: tuple[Callable[[int], int], ...] = (
    lambda n: 1,
    lambda n: n,
    lambda n: n * n,
    lambda n: n + 1,
    lambda n: n - 1,
)


@dataclass
class Trace:
    """events: what happened, without figures. numbers: bytes and FLOPs of all events, in order. readings:
    answers to questions in between: bytes, or the work since the last such question."""

    events: list[tuple] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    readings: list[Any] = field(default_factory=list)

    def note(self, event: tuple, *numbers: int) -> None:
        self.events.append((*event, len(numbers)))
        self.numbers.extend(numbers)

    def read(self, question: str, answer: Any, *numbers: int) -> Any:
        """Record a question and its answer, and return the answer."""
        self.note((question,), *numbers)
        self.readings.append(answer)
        return answer


class Line(NamedTuple):
    """Shapes [batch, tokens] of which one number varies from `low` to `high`. fixed: the other number."""

    varies: str
    fixed: int
    low: int
    high: int

    def number(self, batch: int, tokens: int) -> int | None:
        """The position of a shape on the line, which may end one further; None outside."""
        number, fixed = (batch, tokens) if self.varies == "batch" else (tokens, batch)
        return number if fixed == self.fixed and self.low <= number <= self.high + 1 else None

    def shape(self, number: int) -> tuple[int, int]:
        return (number, self.fixed) if self.varies == "batch" else (self.fixed, number)


@dataclass(frozen=True)
class Law:
    """The traces of a line. factors, forms: every number is a factor times a form of the size."""

    events: Sequence[tuple]
    factors: Sequence[int]
    forms: Sequence[int]

    @classmethod
    def of(cls, line: Line, low: Trace, high: Trace) -> Law | None:
        """None if the ends do not agree."""
        if low.events != high.events or len(low.numbers) != len(high.numbers):
            return None
        scales = [(form(line.low), form(line.high)) for form in _FORMS]
        factors, forms = [], []
        for first, last in zip(low.numbers, high.numbers, strict=True):
            for form, (small, large) in enumerate(scales):
                if small and first % small == 0 and last == first // small * large:
                    factors.append(first // small)
                    forms.append(form)
                    break
            else:
                return None
        return cls(low.events, factors, forms)

    def at(self, number: int) -> list[Any]:
        """The readings of a measurement of this size."""
        scale = [form(number) for form in _FORMS]
        return replay(
            self.events, [n * scale[form] for n, form in zip(self.factors, self.forms, strict=True)]
        )


def replay(events: Sequence[tuple], numbers: Sequence[int]) -> list[Any]:
    """Compute the readings of a trace from its events."""
    now = peak = place = 0
    alive: dict[int, int] = {}
    work: Work = Work()
    readings: list[Any] = []
    for event in events:
        name, count = event[0], event[-1]
        if name == "alloc":
            alive[event[1]] = numbers[place]
            now += numbers[place]
            peak = max(peak, now)
        elif name == "free":
            now -= alive.pop(event[1])
        elif name == "kernel":
            sizes = numbers[place : place + count]
            work[Kernel(event[1], event[2], sizes[0], bytes_of(sizes[1:]))] += 1
        elif name == "restart":
            peak = now
            readings.append(now)
        elif name == "take":
            readings.append(work)
            work = Work()
        else:
            readings.append({"now": now, "peak": peak}[name] if name != "size" else numbers[place])
        place += count
    return readings
