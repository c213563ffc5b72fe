"""Results of a step's micro-batches, from the ranks that computed them to all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from horizon_lm.distributed.ranks import Ranks
from horizon_lm.engine.loss import TokenValues, as_numbers
from horizon_lm.engine.step import Step


def gather_results(step: Step, ranks: Ranks, fallbacks: Mapping[int, str]) -> dict[int, str]:
    """Read losses, router losses and metrics, and give each rank those of all, in the order of micro-batches.

    fallbacks: units whose layers fell back to recomputation on this rank, and why. Returns those of all.
    """
    step.metrics = [as_numbers(metrics) for metrics in step.device_metrics]
    if ranks.world == 1:
        return {}
    rows = [
        [
            g,
            float(step.losses[m]),
            float(step.router_losses[m]) if m in step.router_losses else None,
            step.metrics[m] if step.metrics else None,
        ]
        for m, g in enumerate(step.positions.numbers)
    ]
    found = ranks.exchange([rows, list(fallbacks.items())])
    every = sorted((row for rank, _ in found for row in rank), key=lambda row: row[0])
    step.losses = {g: torch.tensor(loss, dtype=torch.float64) for g, loss, _, _ in every}
    step.router_losses = {
        g: torch.tensor(loss, dtype=torch.float64) for g, _, loss, _ in every if loss is not None
    }
    step.metrics = [metrics for _, _, _, metrics in every if metrics is not None]
    return {unit: reason for _, rank in found for unit, reason in rank}


def gather_values(
    step: Step, ranks: Ranks, shapes: Sequence[torch.Size], names: Sequence[str]
) -> list[TokenValues]:
    """Copy the values of the targets to the host; return those of all ranks' micro-batches. Collective.

    shapes: [batch, tokens] of each. names: of the values asked for, log_probs included.
    """
    own = {g: step.values[m].cpu() for m, g in enumerate(step.positions.numbers)}
    if ranks.world == 1:
        return list(own.values())
    sizes = [batch * (tokens - 1) for batch, tokens in shapes]
    found: list[dict[str, torch.Tensor]] = [{} for _ in shapes]
    for first in range(0, len(shapes), ranks.world):
        here = range(first, min(first + ranks.world, len(shapes)))
        for name in names:
            dtype = torch.bool if name == "is_top1" else torch.float32
            sent = torch.zeros(max(sizes[g] for g in here), dtype=dtype)
            g = first + ranks.rank
            if g in own:
                sent[: sizes[g]] = getattr(own[g], name).flatten()
            for g, value in zip(here, ranks.gather_all(sent), strict=False):
                batch, tokens = shapes[g]
                found[g][name] = value[: sizes[g]].view(batch, tokens - 1)
    return [TokenValues(**values) for values in found]
