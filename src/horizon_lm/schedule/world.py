"""Schedules of several ranks: whether all run the same one, and whether it can end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields

from horizon_lm.schedule.ops import Op

_DEFAULTS = {field.name: field.default for field in fields(Op)}


def digest(ops: Sequence[Op]) -> str:
    """Hash all fields of all ops, in order. Equal on two ranks whose schedules are equal."""
    found = hashlib.sha256()
    for op in ops:
        for name, default in _DEFAULTS.items():
            value = getattr(op, name)
            if value != default:
                text = ",".join(map(str, sorted(value))) if isinstance(value, frozenset) else str(value)
                found.update(f"{name}={text};".encode())
        found.update(b"\n")
    return found.hexdigest()
