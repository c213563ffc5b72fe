"""The bytes of a planned run as SVG: one bar per memory, as long as the memory is large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from horizon_lm.report import svg
from horizon_lm.report.svg import MARGIN, WIDTH, Canvas, Caption
from horizon_lm.words import size

_BAR = 40.0
# (name, colour class, parts of a plan). The order is that of the bars.
GROUPS = (
    ("weights", "F", ("weights", "frozen", "packed")),
    ("residuals of fp32 masters", "C", ("residual",)),
    ("optimizer moments", "O", ("exp_avg", "exp_avg_sq")),
    ("gradients", "D", ("grads", "grad_slabs", "sums", "sum_slabs", "waiting_gradients")),
    ("resident units", "A", ("resident_",)),
    ("weight and gradient slots", "U", ("weight_slots", "gradient_slots", "staging_slots", "gradient_sums")),
    ("buffers of collectives", "J", ("weight_shards", "gradient_shards", "exchange")),
    ("activations", "L", ("graph", "input", "boundary", "boundary_slots", "rows", "call")),
    ("working set", "V", ("working_set", "input_grad", "row_grads", "heap")),
    ("process", "W", ("process",)),
    ("CUDA context", "W", ("context",)),
)
OTHER = ("other", "X")


@dataclass(frozen=True)
class Memory:
    """A memory. parts: bytes by part of a plan; capacity: bytes that there are."""

    name: str
    parts: Mapping[str, int]
    capacity: int

    @property
    def used(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Segment:
    """A part of a bar, in bytes and units of the drawing."""

    name: str
    kind: str
    bytes: int
    x: float
    width: float


def draw_memory(memories: Sequence[Memory], caption: Caption, *, theme: str = "auto") -> str:
    """Return a drawing of what a run takes of each memory. Raises ValueError for another theme."""
    canvas = Canvas()
    y = svg.draw_caption(canvas, caption) + 8
    for memory in memories:
        y = _draw_bar(canvas, memory, y) + 14
    return svg.document(canvas, y - 6, caption, describe(memories), theme)


def group_of(part: str) -> tuple[str, str]:
    """Return (name, colour class) of the group of a part."""
    for name, kind, parts in GROUPS:
        if part in parts or any(p.endswith("_") and part.startswith(p) for p in parts):
            return name, kind
    return OTHER


def segments(memory: Memory) -> list[Segment]:
    """Divide the bar of a memory; free memory, if any, is its last segment."""
    found: dict[tuple[str, str], int] = {}
    order = [(name, kind) for name, kind, _ in GROUPS] + [OTHER]
    for part, num_bytes in memory.parts.items():
        group = group_of(part)
        found[group] = found.get(group, 0) + num_bytes
    scale = (WIDTH - 2 * MARGIN) / max(memory.capacity, memory.used, 1)
    x, rows = MARGIN, []
    for group in order:
        if num_bytes := found.get(group, 0):
            rows.append(Segment(*group, num_bytes, x, num_bytes * scale))
            x += num_bytes * scale
    free = memory.capacity - memory.used
    return [*rows, Segment("free", "free", free, x, free * scale)] if free > 0 else rows


def describe(memories: Sequence[Memory]) -> str:
    """Describe the bars for readers who do not see them."""
    sentences = []
    for memory in memories:
        parts = ", ".join(f"{s.name} {size(s.bytes)}" for s in segments(memory) if s.kind != "free")
        sentences.append(f"{memory.name}: {size(memory.used)} of {size(memory.capacity)} ({parts}).")
    return " ".join(sentences)


def _draw_bar(canvas: Canvas, memory: Memory, y: float) -> float:
    """Draw a memory from `y` down; return the y below it."""
    found = segments(memory)
    canvas.text(MARGIN, y + 12, memory.name, "big")
    used = f"{size(memory.used)} of {size(memory.capacity)}"
    canvas.text(WIDTH - MARGIN, y + 12, used, "line", anchor="end", more="soft")
    y += 24
    canvas.rect(MARGIN, y, WIDTH - 2 * MARGIN, _BAR, "track", 4)
    for part in found:
        if part.kind == "free":
            canvas.rect(part.x, y, part.width, _BAR, "free", 4)
        else:
            canvas.rect(part.x, y, max(part.width - 1, 0.5), _BAR, part.kind, 2 if part.width >= 6 else 0)
        _draw_words(canvas, part, y)
    legend = [(s.kind, f"{s.name} {size(s.bytes)}") for s in found if s.bytes >= memory.used / 2000]
    return svg.draw_legend(canvas, y + _BAR + 14, legend)


def _draw_words(canvas: Canvas, part: Segment, y: float) -> None:
    """Write name and size into a segment, if they fit."""
    lines = [words for words in (part.name, size(part.bytes)) if svg.text_width(words, 12) + 10 <= part.width]
    more = "soft wide" if part.kind == "free" else f"on-{part.kind} wide"
    x, y = part.x + part.width / 2, y + _BAR / 2 + 12 - 8 * len(lines)
    for number, words in enumerate(lines):
        canvas.text(x, y + 16 * number, words, "in", anchor="middle", more=more)
