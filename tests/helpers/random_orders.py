"""Models on lanes that run ready ops in random order, and what two of their steps compute."""

from __future__ import annotations

from typing import Any

import torch

import zoo
from adversarial import AdversarialLanes, fill_with_nan, from_pretrained
from horizon_lm.host_model import HostModel

MICRO_BATCHES = 2
# name of the architecture, dtype; llama has an untied table, gpt2 a tied one and a prologue with weights,
# mixtral a mixture of experts with the router's auxiliary loss
MODELS = {"llama": "float32", "gpt2": "bfloat16", "mixtral-aux": "float32"}

Bits = dict[str, torch.Tensor]


def host_model(name: str, lanes: str, frozen: tuple[str, ...] = (), **settings: Any) -> HostModel:
    """frozen: parts of the names of parameters that are not trained."""
    settings = {"dtype": MODELS[name], "skip_memory_check": True} | settings
    config = zoo.CASES[name].config()
    config.num_hidden_layers = 3  # the fewest at which both slots are used again in forward and in backward
    model = zoo._from_config(config, torch.float32, seed=0, attn="sdpa")
    zoo._perturb(model, torch.Generator().manual_seed(1))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in key for part in frozen))
    return from_pretrained(model, device="cpu", lanes=lanes, **settings)


def batches(name: str, step: int) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(name, batch_size=1, length=8, seed=10 * step + m + 1) for m in range(MICRO_BATCHES)]


def bits(value: torch.Tensor) -> torch.Tensor:
    """Comparable even where there are NaNs."""
    return value.detach().clone().contiguous().view(torch.uint8)


def gradient_bits(model: HostModel) -> Bits:
    return {name: bits(gradient) for name, gradient in model.named_gradients()}


def same(one: Bits, two: Bits) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def differences(one: list[Any], two: list[Any]) -> list[int]:
    return [
        i
        for i, (a, b) in enumerate(zip(one, two, strict=True))
        if not (same(a, b) if isinstance(a, dict) else a == b)
    ]


class Reset:
    """Puts a model back to where it was: cheaper than to build it again for each order."""

    def __init__(self, model: HostModel) -> None:
        self.model = model
        self.saved = {region: [run.clone() for run in runs] for region, runs in model.store._runs.items()}

    def __call__(self) -> None:
        for region, runs in self.saved.items():
            for run, saved in zip(self.model.store._runs[region], runs, strict=True):
                run.copy_(saved)
        # A run that failed half-way leaves values in slots; the next one must not find them there.
        ops = self.model.engine.ops
        for slots, count in (
            (ops.weight_slots, ops.policies.slots + 1),
            (ops.staging_slots, len(ops.staging_slots._buffers)),
            (ops.gradient_slots, len(ops.gradient_slots._buffers)),
            (ops.boundary_slots, ops.policies.settings.boundary_slots),
        ):
            for slot in range(count):
                fill_with_nan(slots.tensors(slot))
        self.model.state_was_replaced(0)


def adversarial(model: HostModel) -> AdversarialLanes:
    lanes = model.engine.lanes
    assert isinstance(lanes, AdversarialLanes)
    return lanes


# Each op kind occurs in one of these; the model has three layers.
VARIANTS: dict[str, dict[str, Any]] = {
    "deferred": {"update": "deferred"},
    "sync": {"update": "sync"},
    "eager": {"update": "eager", "max_grad_norm": None},
    "keep": {"activations": "keep"},
    "spilled": {"boundaries": "host"},
    "mixed": {"activations": ["recompute*2", "keep"], "boundaries": "host", "boundary_slots": 1},
    "blocks": {"checkpoint_interval": 2, "boundaries": ["host", "device*2"]},
    "resident": {"resident": 3},
    "resident-eager": {"resident": 3, "update": "eager", "max_grad_norm": None},
    "rounds": {"rounds": 2, "round_sums": "device"},
    "rounds-host": {"rounds": 2, "round_sums": "host", "boundaries": "host"},
    "rounds-add": {"rounds": 2, "round_sums": "add", "update": "sync"},
}


def outcome(model: HostModel, name: str) -> Any:
    """The loss and gradients of one step; or the error, when a buffer was not there at all."""
    try:
        loss = model.forward_backward(batches(name, 0)).loss
    except (KeyError, AssertionError, RuntimeError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return [loss, gradient_bits(model)]


def is_wrong(found: Any, expected: Any) -> bool:
    assert not isinstance(expected, str), expected
    return isinstance(found, str) or bool(differences(found, expected))
