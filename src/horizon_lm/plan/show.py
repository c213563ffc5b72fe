"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterable

from ..schedule.draw import text_timeline
from .run_plan import RunPlan


def describe(plan: RunPlan, *, largest: bool = True, timeline: bool = False) -> str:
    """The plan in lines of text; largest: with what would still fit."""
    found, outline = plan.prediction, plan.planner.outline
    lines = [
        f"model      {outline.skeleton.model_type}, {outline.num_parameters / 1e9:.3f} B parameters, "
        f"{outline.num_layers} layers",
        f"machine    {plan.profile.title} ({plan.profile.kind})",
        f"step       {found.plan.micro_batches} x [{found.batch}, {found.tokens_per_row}] = "
        f"{found.tokens:,} tokens",
        "",
        *_bytes("host", found.host),
        *_bytes("device", found.device),
        "choices",
    ]
    for choice in plan.choices:
        value = " ".join(choice.value) if isinstance(choice.value, list) else choice.value
        lines.append(f"  {choice.key + ' = ' + str(value):44} {choice.reason}")
    lines += ["", f"time       {_seconds(found.seconds)} a step, {found.tokens_per_second:,.0f} tokens/s"]
    for lane, seconds in found.lanes().items():
        lines.append(f"  {lane:10}{_seconds(seconds):>12}  {seconds / found.seconds:6.1%}")
    lines.append(f"  limited by {found.limit()}")
    if timeline:
        lines += ["", text_timeline(found.simulation.spans)]
    if largest:
        most = plan.largest()
        lines += ["", "largest that fits, one at a time, recomputing all layers"]
        lines.append(
            f"  per_device_train_batch_size {most['per_device_train_batch_size']:,} "
            f"at max_length {found.tokens_per_row:,}"
        )
        lines.append(f"  max_length {most['max_length']:,} with one sequence in a micro-batch")
        lines.append(f"  {most['layers']:,} layers of this kind, {most['parameters'] / 1e9:.2f} B parameters")
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def _bytes(name: str, parts: dict[str, int]) -> Iterable[str]:
    if not parts:
        return
    yield f"{name:10} {sum(parts.values()) / 1e9:10.3f} GB"
    for part, size in sorted(parts.items(), key=lambda row: -row[1]):
        yield f"  {part:18}{size / 1e9:10.3f}"
    yield ""


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
