"""What a measurement on fake tensors did, event by event, and the same for a size between two measured ones.

A layer that is run on 2 and on 4095 sequences does the same operations, and every tensor of it is as large
as the number of sequences times a constant (or its square, or one more or less). Where both ends of a line
of sizes agree on that, to the byte and for every single event, the sizes between need not be run: their
events follow, and with them peaks and work, exactly. Where anything differs (another branch, a padded or
rounded size) nothing is concluded, and each size is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from horizon_lm.plan.work import Kernel, Work, bytes_of

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
    """events: what happened, without figures. numbers: bytes and FLOPs, of all events one after another.
    readings: what was asked in between: bytes, or the work counted since the last such question."""

    events: list[tuple] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    readings: list[Any] = field(default_factory=list)

    def note(self, event: tuple, *numbers: int) -> None:
        self.events.append((*event, len(numbers)))
        self.numbers.extend(numbers)

    def read(self, question: str, answer: Any, *numbers: int) -> Any:
        """Note a question and its answer, and return that."""
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
        """Where on the line a shape lies, which may end one further; None outside."""
        number, fixed = (batch, tokens) if self.varies == "batch" else (tokens, batch)
        return number if fixed == self.fixed and self.low <= number <= self.high + 1 else None

    def shape(self, number: int) -> tuple[int, int]:
        return (number, self.fixed) if self.varies == "batch" else (self.fixed, number)


@dataclass(frozen=True)
class Law:
    """The traces of a line. factors, forms: of every number, which is a factor times a form of the size."""

    events: Sequence[tuple]
    factors: Sequence[int]
    forms: Sequence[int]

    @classmethod
    def of(cls, line: Line, low: Trace, high: Trace) -> Law | None:
        """None where the ends do not tell."""
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
        """The readings that a measurement of this size would have."""
        scale = [form(number) for form in _FORMS]
        return replay(
            self.events, [n * scale[form] for n, form in zip(self.factors, self.forms, strict=True)]
        )


def replay(events: Sequence[tuple], numbers: Sequence[int]) -> list[Any]:
    """The readings of a trace, from its events alone."""
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
