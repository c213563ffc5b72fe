"""Steps of a model on several ranks, run in the processes of a `RankPool`, and what they compute as digests."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import horizon_lm as hz
import placements
import rank_pool
from placements import SOURCES, Numbers

STEPS = 8


@dataclass(frozen=True)
class Case:
    """source: of `placements.SOURCES`. counts: micro-batches of each step. lanes: `inline`, or the seed of
    adversarial ones, to which each rank adds its number."""

    source: str
    numbers: Numbers = Numbers()
    counts: tuple[int, ...] = (3,) * STEPS
    settings: dict[str, Any] = field(default_factory=dict)
    lanes: str | int = "inline"


@dataclass
class Found:
    """Losses, norms, router losses; digests of the state at the end and of gradients of one more step."""

    numbers: list[float]
    state: dict[str, str]
    gradients: dict[str, str]

    def differences(self, other: Found) -> list[str]:
        pairs = zip(self.numbers, other.numbers, strict=True)
        found = [f"number {i}: {one} {two}" for i, (one, two) in enumerate(pairs) if one != two]
        for one, two in ((self.state, other.state), (self.gradients, other.gradients)):
            if one and two:
                assert one.keys() == two.keys()
                found += [key for key, value in one.items() if value != two[key]]
        return found


def digest(value: torch.Tensor) -> str:
    return hashlib.blake2b(placements.bits(value).numpy().tobytes(), digest_size=12).hexdigest()


def model(case: Case) -> hz.HostModel:
    # One chunk of the loss per micro-batch: the sum of several is rounded before ranks add it.
    source = replace(SOURCES[case.source], loss_chunk_tokens=64)
    settings = dict(case.settings)
    lanes = case.lanes if isinstance(case.lanes, str) else "adversarial"
    host = placements.model(source, case.numbers, lanes=lanes, **settings)
    if not isinstance(case.lanes, str):
        host.engine.lanes.random.seed(case.lanes + host.ranks.rank)
    return host


def state(host: hz.HostModel) -> dict[str, str]:
    """Every region that outlives a step, whole."""
    host.flush()
    store = host.store
    found = {}
    for region in ("weights", "residual", "exp_avg", "exp_avg_sq"):
        for unit in range(len(store.units)) if store.has(region) else ():
            whole = store.whole(region, unit, host.ranks, everywhere=True)
            found[f"{region}.{store.units[unit].name}"] = digest(whole)
    return found


def trained(case: Case) -> Found:
    host, source = model(case), SOURCES[case.source]
    numbers: list[float] = []
    for step, count in enumerate(case.counts):
        out = host.train_step(
            placements.batches(source, step, count), lr=placements.LR, weight_decay=placements.WEIGHT_DECAY
        )
        numbers += [out.loss, out.grad_norm, *out.router_losses]
    end, gradients = state(host), {}
    if host.settings.update_mode != "eager":
        host.forward_backward(placements.batches(source, 50, case.counts[0]))
        gradients = {name: digest(value) for name, value in host.named_gradients()}
    return Found(numbers, end, gradients)


def on_ranks(cases: list[Case]) -> list[Found]:
    """Run in a pool: the outcomes of these cases on this rank."""
    rank_pool.ranks()
    torch.set_num_threads(1)
    return [trained(case) for case in cases]
