"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from horizon_lm.memory.layout import UnitLayout
from horizon_lm.plan.fleet_plan import FleetPlan, break_even
from horizon_lm.plan.run_plan import RunPlan
from horizon_lm.schedule.draw import text_timeline
from horizon_lm.words import count, parameters, size


def describe(plan: RunPlan, *, largest: bool = True, timeline: bool = False) -> str:
    """Return the plan as text; largest: include the largest sizes that fit."""
    found, outline = plan.prediction, plan.planner.outline
    lines = [
        f"model      {outline.facts.model_type}, {parameters(outline.num_parameters)}, "
        f"{count(outline.num_layers, 'layer')}"
        + (f", experts by {outline.facts.experts}" if outline.facts.experts else ""),
        *_trained(plan),
        f"machine    {plan.machine}",
        f"step       {found.micro_batches} x {_shape(plan)} = {count(found.tokens, 'token')}"
        + (f", {found.plan.micro_batches} of each rank" if plan.of_fleet is not None else ""),
        "",
        *_bytes("host", found.host),
        *_bytes("device", found.device),
        "choices",
    ]
    lines[1:1] = _vision(outline.units)
    for choice in plan.choices:
        value = " ".join(choice.value) if isinstance(choice.value, list) else choice.value
        lines.append(f"  {choice.key + ' = ' + str(value):44} {choice.reason}")
    lines += ["", f"time       {_seconds(found.seconds)} a step, {found.tokens_per_second:,.0f} tokens/s"]
    for lane, seconds in found.lanes().items():
        if seconds:
            lines.append(f"  {lane:20} {_seconds(seconds):>10}  {seconds / found.seconds:6.1%}")
    lines.append(f"  limited by {found.limit()}")
    if busy := plan.busy_line():
        lines.append(f"  {busy}")
    lines += _forward_passes(plan)
    lines += _fleet(plan.of_fleet, largest)
    if timeline:
        lines += ["", text_timeline(found.simulation.spans)]
    if largest:
        lines += ["", "largest that fits, one at a time, recomputing all layers", *_largest(plan)]
    return "\n".join([*lines, *(f"note: {note}" for note in plan.all_notes())])


def _vision(units: Sequence[UnitLayout]) -> Iterable[str]:
    """What a vision-language model has besides its language model."""
    seeing = sum(p.numel for unit in units for p in unit.parameters if unit.name == "vision")
    if seeing:
        yield f"vision     {parameters(seeing)} of these, frozen; not part of a step or its FLOPs"


def _trained(plan: RunPlan) -> Iterable[str]:
    """Which parameters are trained, and how the others are stored, if not all are trained."""
    trained, total = plan.planner.outline.num_trained, plan.planner.outline.num_parameters
    if trained < total:
        packing = plan.prediction.costs.spec.packing
        packed = f", linear layers in {packing}" if packing else ""
        frozen = f"{parameters(total - trained)} frozen{packed}"
        yield f"trained    {parameters(trained)} ({trained / total:.2%}); {frozen}"


def _fleet(plan: FleetPlan | None, smallest: bool) -> Iterable[str]:
    """What only a plan for several ranks has; smallest: include the smallest fleets that would do."""
    if plan is None:
        return
    even, ranks = break_even(plan.prediction.costs), plan.fleet.gpus_per_node
    exact, fast = plan.seconds_by_reduction
    yield f"  {plan.rate_of_each:,.0f} tokens/s per GPU"
    yield ""
    yield f"fleet      {size(plan.node_bytes)} of host memory in each node ({count(ranks, 'rank')})"
    yield f"  gradients added exactly {_seconds(exact)} a step, fast {_seconds(fast)}"
    yield (
        f"  the forward pass hides the update from {count(even.update, 'token')} a step on, the network from "
        f"{even.network:,} a GPU, uploads from {even.upload:,}"
    )
    if not smallest:
        return
    if plan.smallest is not None:
        yield f"  smallest that trains this model: {plan.smallest}"
    held = plan.in_memory
    if held is not None:
        hint = ": in-memory training (FSDP2) may be as fast there" if held.world <= plan.fleet.world else ""
        yield f"  smallest that holds all of it in device memory: {held}{hint}"


def _shape(plan: RunPlan) -> str:
    """The micro-batch: rows and tokens of each."""
    found, config = plan.prediction, plan.config
    if config.data_kind == "pairs":
        if config.packing:
            rows = config.per_device_train_batch_size
            return f"[{rows}, {config.row_tokens}] of packed pairs"
        return f"[{found.batch}, {found.tokens_per_row}] of pairs, chosen and rejected"
    return f"[{found.batch}, {found.tokens_per_row}]"


def _forward_passes(plan: RunPlan) -> Iterable[str]:
    """The passes of a preference method besides training's own."""
    found = plan.prediction
    if found.kl_seconds:
        share = found.kl_seconds / found.seconds
        yield f"  including {_seconds(found.kl_seconds)} ({share:.1%}) of a forward pass for the KL term"
    if found.reference_seconds:
        yield (
            f"reference  {_seconds(found.reference_seconds)} for the data of a step, "
            f"{found.reference_tokens_per_second:,.0f} tokens/s: one pass over the data before the first step"
        )


def _largest(plan: RunPlan) -> Iterable[str]:
    """The largest sizes found, or where the search ended before memory did."""
    most, ends = plan.largest(), plan.search_ends()
    found = {key: f"{most[key]:,}" + (" or more" if most[key] >= end else "") for key, end in ends.items()}
    if plan.has_longest and most["max_length"] >= ends["max_length"]:
        found["max_length"] = f"{most['max_length']:,}, all positions of the model,"
    yield (
        f"  per_device_train_batch_size {found['per_device_train_batch_size']} "
        f"at max_length {plan.prediction.tokens_per_row:,}"
    )
    row = "pair" if plan.config.data_kind == "pairs" else "sequence"
    yield f"  max_length {found['max_length']} with one {row} in a micro-batch"
    yield f"  {found['layers']} layers of this kind, {parameters(most['parameters'])}"


def _bytes(name: str, parts: dict[str, int]) -> Iterable[str]:
    """The sum, and its parts of at least 1/2000."""
    if not parts:
        return
    total = sum(parts.values())
    yield f"{name:22} {size(total):>10}"
    rows = sorted(parts.items(), key=lambda row: -row[1])
    yield from (f"  {part:20} {size(bytes_):>10}" for part, bytes_ in rows if bytes_ >= total / 2000)
    yield ""


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
