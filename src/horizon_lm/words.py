"""Numbers for readers: counts with their noun, bytes, parameters."""

from __future__ import annotations

_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Format `1 step`, `1,204 steps`; plural: if it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def size(num_bytes: float) -> str:
    """Format bytes in the unit that leaves one to three digits before the point."""
    for unit, name in _BYTES:
        if abs(num_bytes) >= 0.9995 * unit:
            return f"{_three(num_bytes / unit)} {name}"
    return count(int(num_bytes), "byte")


def parameters(number: float) -> str:
    """Format `4.02 B parameters`, `18.9 M parameters`, `37,120 parameters`."""
    if number >= 999.5e6:
        return f"{_three(number / 1e9)} B parameters"
    if number >= 999_500:
        return f"{_three(number / 1e6)} M parameters"
    return count(int(number), "parameter")


def _three(value: float) -> str:
    """Format three significant digits, or all before the point if there are more."""
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f}"
