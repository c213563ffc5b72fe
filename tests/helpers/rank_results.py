"""Calls of a model on several ranks, run in the processes of a `RankPool`: results, failures, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import horizon_lm as hz
import placements
import rank_pool
from horizon_lm.engine.policies import slots_of, store_spec
from horizon_lm.errors import HorizonError
from horizon_lm.memory.regions import predict_bytes, predict_device_bytes
from horizon_lm.memory.shards import Shard
from rank_cases import SOURCES, Case, digest, model, state

VALUES = ("entropy", "mean_logits", "is_top1")


def data(case: Case, step: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of different lengths."""
    found = placements.batches(SOURCES[case.source], step, count)
    return [{name: ids[:, : 4 + m % 4] for name, ids in batch.items()} for m, batch in enumerate(found)]


def scored(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> Any:
    return -(log_probs * batch["weights"]).sum(), {
        "weight": batch["weights"].sum(),
        "tokens": log_probs.numel(),
    }


def results(case: Case) -> list[Any]:
    """Everything that calls return: evaluations with values, log-probabilities and router losses, losses of a
    function of one's own with metrics, gradients, a step with targets on one of two ranks, parameters."""
    host, found = model(case), []
    out = host.evaluate(
        data(case, 1, 5), values=VALUES, temperature=0.7, return_log_probs=True, return_router_losses=True
    )
    found += [out.loss, out.num_tokens, out.router_losses, [digest(one) for one in out.log_probs or ()]]
    found += [[digest(getattr(one, name)) for one in out.values or ()] for name in VALUES]
    for loss_fn in (scored, hz.TokenLoss(_entropies, values=("entropy",), router_weight=0.25)):
        batches = data(case, 2, 3)
        for m, batch in enumerate(batches):
            batch["weights"] = torch.full((1, batch["labels"].shape[1] - 1), m + 0.5)
        step = host.forward_backward(batches, loss_fn)
        found += [step.loss, step.num_tokens, step.metrics, step.router_losses]
        found.append({name: digest(value) for name, value in host.named_gradients()})
        found.append(host.step(lr=1e-2).grad_norm)
    batches = data(case, 3, 4)
    batches[1]["labels"].fill_(-100)  # of rank 1, which has no target then
    batches[3]["labels"].fill_(-100)
    step = host.forward_backward(batches)
    found += [step.loss, step.num_tokens, step.router_losses, host.step(lr=1e-2).grad_norm]
    found.append({name: digest(value) for name, value in host.named_parameters()})
    found.append(host.steps_done)
    return found


def _entropies(values: hz.TokenValues, batch: dict[str, torch.Tensor]) -> Any:
    assert values.entropy is not None
    return -(values.log_probs * (1 + values.entropy)).sum(), {"entropy": values.entropy.mean()}


def results_on_ranks(case: Case) -> list[Any]:
    rank_pool.ranks()
    return results(case)


# Failures


def _nan_loss(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = -log_probs.sum()
    return loss * torch.nan if bool(batch["spoilt"]) else loss


def _nan_gradient(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A finite loss whose gradient is NaN."""
    loss = -log_probs.sum()
    return loss + (log_probs.sum() * 0).sqrt() if bool(batch["spoilt"]) else loss


SPOILT: dict[str, Callable[..., torch.Tensor]] = {"loss": _nan_loss, "gradient": _nan_gradient}


def spoilt(case: Case, kind: str, micro_batch: int) -> list[Any]:
    """A step with NaN in one micro-batch's loss or gradient, and the state after it."""
    host = model(case)
    host.train_step(data(case, 0, 3), lr=1e-2)
    batches = data(case, 1, 3)
    for m, batch in enumerate(batches):
        batch["spoilt"] = torch.tensor(m == micro_batch)
    found: list[Any] = []
    try:
        host.train_step(batches, lr=1e-2, loss_fn=SPOILT[kind])
    except HorizonError as error:
        found += [type(error).__name__, error.message, getattr(error, "state_intact", None)]
        found.append(repr(getattr(error, "grad_norm", None)))
    found += [host.steps_done, state(host)]
    found.append(host.train_step(data(case, 2, 3), lr=1e-2, force=True).loss)
    return found


def spoilt_on_ranks(case: Case, kind: str, micro_batch: int) -> list[Any]:
    rank_pool.ranks()
    return spoilt(case, kind, micro_batch)


def checked_on_ranks(case: Case, failing: int) -> list[Any]:
    """A step whose check raises on one rank, and a step after it."""
    ranks, host = rank_pool.ranks(), model(case)

    def check(loss: float, tokens: int) -> None:
        assert math.isfinite(loss) and tokens > 0
        if ranks.rank == failing:
            raise ValueError("enough")

    found: list[Any] = []
    try:
        host.train_step(data(case, 0, 3), lr=1e-2, check=check)
    except (ValueError, HorizonError) as error:
        found.append(f"{type(error).__name__}: {error}")
    found.append(host.steps_done)
    return [*found, host.train_step(data(case, 0, 3), lr=1e-2).loss]


def differing_on_ranks(case: Case, what: str) -> str:
    """The error of a step in which rank 1 gives other arguments than the others."""
    rank = rank_pool.ranks().rank
    settings = {"adam_beta1": 0.8} if what == "settings" and rank == 1 else {}
    host = model(replace(case, settings={**case.settings, **settings}))
    batches = data(case, 0, 3)
    if rank == 1 and what == "data":
        batches[2]["input_ids"][0, 0] += 1
    if rank == 1 and what == "number":
        batches.pop()
    lr = 2e-2 if rank == 1 and what == "rate" else 1e-2
    try:
        if rank == 1 and what == "call":
            host.evaluate(batches)
        host.train_step(batches, lr=lr)
    except HorizonError as error:
        return f"{type(error).__name__}: {error.message}"
    return ""


# Memory


def memory_on_ranks(case: Case) -> dict[str, tuple[int, int]]:
    rank_pool.ranks()
    return memory(case)


def memory(case: Case) -> dict[str, tuple[int, int]]:
    """(predicted, allocated) bytes of this rank's store and slots, after a step."""
    host = model(case)
    ranks = host.ranks
    host.train_step(data(case, 0, 3), lr=1e-2)
    units, spec = host.store.units, store_spec(host.settings, host.skeleton, Shard(ranks.rank, ranks.world))
    allocated = host.memory_bytes()
    slots = slots_of(host.settings, host.skeleton, host.device, ranks.world)
    named = ("weight_slots", "weight_shards", "gradient_slots", "gradient_shards")
    return {
        "host": (sum(predict_bytes(units, spec).values()), sum(host.store.num_bytes.values())),
        "residents": (
            sum(predict_device_bytes(units, spec).values()),
            sum(host.store.device_bytes.values()),
        ),
        "slots": (sum(slots.values()), sum(allocated.get(name, 0) for name in named)),
        "whole": (sum(predict_bytes(units, store_spec(host.settings, host.skeleton)).values()), 0),
    }
