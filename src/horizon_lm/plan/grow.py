"""The largest number that fits, found in few looks: each look may measure a model anew."""

from __future__ import annotations

import math
from collections.abc import Callable

_MOST_LOOKS = 24


def largest_that_fits(room_bytes: Callable[[int], int], start: int, most: int) -> int:
    """The largest number up to `most` that leaves room, to about 10 %; 0 when not even 1 does.

    room_bytes: what a number leaves free in bytes; negative where it does not fit. It falls with the
    number, nearly on a line, so that the next number to look at is where the line of the last two meets 0;
    where that gains little, the middle.
    """
    low, room = min(start, most), -1
    while low >= 1 and (room := room_bytes(low)) < 0:
        low //= 2
    if low < 1:
        return 0
    fits = [(low, room)]
    high: tuple[int, int] | None = None
    for look in range(_MOST_LOOKS):
        low = fits[-1][0]
        if low >= most or high is not None and high[0] - low <= max(1, low // 10):
            break
        number = min(most, _above(fits)) if high is None else _between(fits[-1], high, look)
        room = room_bytes(number)
        if room < 0:
            high = number, room
        else:
            fits.append((number, room))
    return fits[-1][0]


def _above(fits: list[tuple[int, int]]) -> int:
    """A little beyond where the line of the last two meets 0; twice the last while there is no line."""
    last, room = fits[-1]
    if len(fits) == 1:
        return 2 * last
    before, more = fits[-2]
    each = (more - room) / (last - before)
    met = int((last + room / each) * 1.04) if each > 0 else 4 * last
    return max(last + 1, min(met, 16 * last))


def _between(low: tuple[int, int], high: tuple[int, int], look: int) -> int:
    """A little below where the line meets 0, and the middle (of the logarithms) every other time."""
    met = 0.98 * (low[0] + low[1] / (low[1] - high[1]) * (high[0] - low[0]))
    number = math.sqrt(low[0] * high[0]) if look % 2 else met
    return min(high[0] - 1, max(low[0] + 1, int(number)))
