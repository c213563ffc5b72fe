"""What the parts of the GPU check share: results, tables, comparisons, micro-batches."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from horizon_lm.machine.determinism import DeterministicKernels
from horizon_lm.model.attention import attention_by_intervals

Gradients = dict[str, torch.Tensor]

# Largest relative error where bits cannot be equal. Gradients far below the largest of the model are
# noise (a key bias has a gradient of 0 but for rounding), so errors are taken relative to the
# largest entry of the tensor, or to a thousandth of the largest of all where that is more.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_NOISE = 1e-3


@dataclass
class Row:
    """One comparison. passed is None where nothing could be compared, and `why` says the reason."""

    name: str
    passed: bool | None
    cells: dict[str, Any]
    why: str = ""


@dataclass
class Part:
    """The outcome of one part of the check."""

    name: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(row.passed is not False for row in self.rows)

    def add(self, name: str, passed: bool | None, why: str = "", **cells: Any) -> None:
        self.rows.append(Row(name, passed, cells, why))
        mark = {True: "ok  ", False: "FAIL", None: "--  "}[passed]
        shown = "  ".join(f"{key}={value}" for key, value in cells.items())
        print(f"  {mark} {name:<34} {shown}{f'  ({why})' if why else ''}", flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"       {text}", flush=True)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


@dataclass(frozen=True)
class Place:
    """Where the check runs. dry: on the CPU and small, to see that the script itself runs."""

    device: torch.device
    dry: bool

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def free() -> None:
    """Give back what models left behind (they hold reference cycles)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def deterministic() -> Iterator[None]:
    """TF32 off, and the kernels of `deterministic: true`, for transformers as well."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with DeterministicKernels():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits (a negative zero is not a zero)."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    flat = one.contiguous().view(-1).view(torch.uint8), two.contiguous().view(-1).view(torch.uint8)
    return torch.equal(*flat)


@dataclass(frozen=True)
class Difference:
    """How two sets of gradients differ. worst: largest relative error, in which parameter."""

    different: tuple[str, ...]
    total: int
    worst: float
    where: str

    def __str__(self) -> str:
        equal = f"{self.total - len(self.different)}/{self.total}"
        return equal if not self.different else f"{equal} worst {self.worst:.1e} {self.where}"


def compare(found: Gradients, wanted: Gradients) -> Difference:
    """Compare gradients by name. A name that only one side has counts as an infinite error."""
    largest = max((float(g.abs().max()) for g in wanted.values() if g.numel()), default=0.0)
    different, worst, where = [], 0.0, ""
    for name in sorted(found.keys() | wanted.keys()):
        if name in found and name in wanted and same(found[name], wanted[name]):
            continue
        different.append(name)
        error = float("inf")
        if name in found and name in wanted and found[name].shape == wanted[name].shape:
            one, two = found[name].double(), wanted[name].double()
            scale = max(float(two.abs().max()), _NOISE * largest)
            error = float((one - two).abs().max()) / scale if scale else float((one - two).abs().max())
            error = error if error == error else float("inf")  # NaN
        if error >= worst:
            worst, where = error, name
    return Difference(tuple(different), len(found.keys() | wanted.keys()), worst, where)


def run_plain(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, Gradients]:
    """Loss and gradients (on the CPU) of transformers itself; parameters without one have zeros. Packed
    rows and windows have the attention that streamed models have for them (model/attention.py)."""
    model.zero_grad(set_to_none=True)
    with attention_by_intervals():
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
    loss.backward()
    gradients = {
        name: torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.cpu()
        for name, p in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return loss.detach().cpu(), gradients


def random_batches(
    vocabulary: int, count: int, rows: int, tokens: int, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, vocabulary, (rows, tokens), generator=generator) for _ in range(count)]
    return [{"input_ids": i, "labels": i.clone()} for i in ids]


def llama(
    layers: int,
    hidden: int,
    intermediate: int,
    vocabulary: int,
    *,
    tied: bool = False,
    heads: int = 8,
    positions: int = 2048,
) -> dict[str, Any]:
    """Values of a Llama configuration, with a quarter as many heads for keys and values."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


def first_line(error: BaseException) -> str:
    """An exception as a short text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """A few of many names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
