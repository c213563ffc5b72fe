"""Steps of a model on several ranks, run in the processes of a `RankPool`; what they compute, as digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import horizon_lm as hz
import placements
import rank_pool
from horizon_lm.engine import sharded
from horizon_lm.engine import step as engine_step
from horizon_lm.engine.positions import Positions
from horizon_lm.engine.sharded import ShardedUpdates
from horizon_lm.optim.gradients import ordered_sum
from horizon_lm.schedule import Lane, Op
from placements import Numbers, Source

STEPS = 8
SOURCES = {
    **placements.SOURCES,
    "large, untied": Source("llama", is_large=True),
    "large, tied": Source("qwen2", is_large=True),
}
_known: dict[str, Found] = {}


@dataclass(frozen=True)
class Case:
    """source: of `placements.SOURCES`. counts: micro-batches of each step. lanes: `inline`, or the seed of
    adversarial ones, to which each rank adds its number. chunk: tokens of a loss chunk; by default one chunk
    per micro-batch."""

    source: str
    numbers: Numbers = Numbers()
    counts: tuple[int, ...] = (3,) * STEPS
    settings: dict[str, Any] = field(default_factory=dict)
    lanes: str | int = "inline"
    chunk: int = 64

    def __str__(self) -> str:
        return json.dumps({**vars(self), "numbers": vars(self.numbers)})


@dataclass
class Found:
    """What a run computes. numbers: losses, norms, router losses of each step. state: on rank 0, digests of
    weights, residuals and moments at the end. gradients: those of one more step, unless updates are eager."""

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
    source = replace(SOURCES[case.source], loss_chunk_tokens=case.chunk)
    lanes = case.lanes if isinstance(case.lanes, str) else "adversarial"
    host = placements.model(source, case.numbers, lanes=lanes, **case.settings)
    if not isinstance(case.lanes, str):
        host.engine.lanes.random.seed(case.lanes + host.ranks.rank)
    return host


def state(host: hz.HostModel) -> dict[str, str]:
    """Every region that outlives a step, whole; empty on other ranks than the first."""
    host.flush()
    store, found = host.store, {}
    for region in ("weights", "residual", "exp_avg", "exp_avg_sq"):
        for unit in range(len(store.units)) if store.has(region) else ():
            whole = store.whole(region, unit, host.ranks, everywhere=False)
            if whole is not None:
                found[f"{region}.{store.units[unit].name}"] = digest(whole)
    return found


def trained(case: Case) -> Found:
    """Train, and compute the gradients of one more step."""
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


def alone(case: Case) -> Found:
    """The outcome on one rank, in place and in program order, with what changes no bit at its default."""
    plain = replace(case, settings={"update": "deferred"}, lanes="inline")
    key = str(plain)
    if key not in _known:
        _known[key] = trained(plain)
    return _known[key]


def on_ranks(cases: list[Case], wrong: str = "") -> list[Found]:
    """In a pool: the outcomes of these cases. wrong: what is done wrongly on all ranks."""
    rank_pool.ranks()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if wrong:
            _WRONG[wrong](patch)
        return [trained(case) for case in cases]


# Negative controls


def _reversed(patch: pytest.MonkeyPatch) -> None:
    honest = sharded.add_in_order
    patch.setattr(
        sharded,
        "add_in_order",
        lambda total, parts, *, begins: honest(total, list(reversed(parts)), begins=begins),
    )


def _positions_as_seeds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Positions, "number", lambda self, position: position)
    patch.setattr(Positions, "is_empty", lambda self, m: m * self.world + self.rank >= self.total)


def _one_left_out(patch: pytest.MonkeyPatch) -> None:
    honest = Positions.present
    patch.setattr(Positions, "present", lambda self, position: max(1, honest(self, position) - 1))


def _squares_in_fp32(patch: pytest.MonkeyPatch) -> None:
    """In fp32."""

    def norm_of(self: ShardedUpdates, step: Any) -> float:
        own = sum(ordered_sum(found) for found in step.square_norms.values())
        return float(torch.tensor(self.ranks.exchange(own)).sum()) ** 0.5

    patch.setattr(ShardedUpdates, "norm_of", norm_of)


def _rows_unrounded(patch: pytest.MonkeyPatch) -> None:
    """A tied table's rows are added to the head's gradient in fp32."""
    honest = ShardedUpdates._add_rows

    def add_rows(self: ShardedUpdates, *args: Any) -> None:
        dtype, self.store.spec = self.store.spec, replace(self.store.spec, dtype=torch.float32)
        honest(self, *args)
        self.store.spec = dtype

    patch.setattr(ShardedUpdates, "_add_rows", add_rows)


def _no_waits_for_the_network(patch: pytest.MonkeyPatch) -> None:
    honest = engine_step.derive_waits

    def derive(ops: list[Op]) -> list[tuple[int, ...]]:
        found = honest(ops)
        return [tuple(j for j in waits if ops[j].lane is not Lane.NETWORK) for waits in found]

    patch.setattr(engine_step, "derive_waits", derive)


_WRONG: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "parts in reverse order": _reversed,
    "seeds by position": _positions_as_seeds,
    "the last of each position left out": _one_left_out,
    "squares of ranks added in fp32": _squares_in_fp32,
    "rows added without rounding": _rows_unrounded,
    "no waits for the network": _no_waits_for_the_network,
}
