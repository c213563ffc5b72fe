"""Where a step's time goes: what each lane did, what was hidden under compute, what was moved."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from horizon_lm.host_model import HostModel
from horizon_lm.schedule import Lane
from horizon_lm.schedule.draw import Span, utilisation

Interval = tuple[float, float]


def hidden_share(spans: Iterable[Span]) -> float:
    """Share of the time of all other lanes that passes while the compute lane works: 1.0 when all of it
    is hidden, 0.0 when nothing overlaps (as on the CPU, where lanes take turns)."""
    compute: list[Interval] = []
    others: list[Interval] = []
    for op, start, end in spans:
        (compute if op.lane is Lane.COMPUTE else others).append((start, end))
    total = sum(end - start for start, end in others)
    merged = _union(compute)
    hidden = sum(_common(other, merged) for other in others)
    return hidden / total if total else 0.0


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _common(one: Interval, merged: Iterable[Interval]) -> float:
    return sum(max(0.0, min(one[1], end) - max(one[0], start)) for start, end in merged)


def moved_bytes(model: HostModel, spans: Iterable[Span]) -> dict[str, int]:
    """Bytes a step by way: `to_device` (weights, inputs of layers), `from_device` (gradients, inputs), and
    `update`, which the optimizer reads and writes in host memory. On the CPU nothing goes to a device."""
    store, engine = model.store, model.engine
    size, moments = store.dtype.itemsize, sum(store.num_bytes.get(n, 0) for n in ("exp_avg", "exp_avg_sq"))
    trainable = sum(unit.trainable_numel for unit in store.units)
    per_parameter = 3 * size + 2 * moments / max(1, trainable)
    per_parameter += 2 * 2 if store.num_bytes.get("residual") else 0
    streamed = model.device.type != "cpu"
    found = {"to_device": 0, "from_device": 0, "update": 0}
    for op, _, _ in spans:
        if op.kind == "O":
            found["update"] += int(store.units[op.unit].trainable_numel * per_parameter)
        elif not streamed:
            continue
        elif op.kind == "U":
            found["to_device"] += store.units[op.unit].slot_numel * size
        elif op.kind == "D":
            found["from_device"] += store.units[op.unit].trainable_numel * size
        elif op.kind in "RX":
            home = engine.boundary_slots.home_bytes(op.unit, op.micro_batch)
            found["to_device" if op.kind == "R" else "from_device"] += home
    return found


def breakdown(model: HostModel) -> dict[str, Any]:
    """Of the step last recorded (record=True). lanes: busy seconds and share of the step, overlapping ops
    of a lane counted once. hidden: see `hidden_share`. moved: see `moved_bytes`."""
    spans = model.timeline
    return {
        "lanes": utilisation(spans),
        "hidden": hidden_share(spans),
        "moved": moved_bytes(model, spans),
        "seconds": max((end for _, _, end in spans), default=0.0),
    }
