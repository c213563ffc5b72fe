"""Activation policies: what a layer leaves for its backward pass changes memory and time, never a bit."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from horizon_lm.config import ModelSettings
from horizon_lm.engine import layers
from horizon_lm.errors import ConfigError
from policy_models import LAYERS, Gradients, Stashing, batches, gradients, host, same, source
from sizes import SOAK, times

# attention, norms, experts and recurrences as transformers writes them; tied and untied tables
MODELS = [
    "llama",
    "llama-tied",
    "qwen3",
    "gemma3_text",
    "gpt2",
    "phi3",
    "mixtral-aux",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_next",
    "mamba2",
]
POLICIES: dict[str, dict[str, Any]] = {
    "recompute": {},
    "keep": {"activations": "keep"},
    "attention": {"activations": "attention"},
    "products": {"activations": "products", "boundaries": "host"},
    "all four": {"activations": ["products", "attention", "recompute", "keep"]},
    "mixed": {"activations": ["recompute*2", "keep*2"], "boundaries": ["host", "device*3"]},
    "host": {"boundaries": "host", "boundary_slots": 1},
    "blocks of 2": {"checkpoint_interval": 2},
    "blocks of 3, host": {"checkpoint_interval": 3, "boundaries": "host"},
    "tiny last": {"activations": ["keep", "recompute*3"], "checkpoint_interval": 2},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def autograd(model: Any, micro_batches: list[dict[str, torch.Tensor]]) -> Gradients:
    """Full autograd, micro-batches accumulated as PyTorch users do."""
    model.zero_grad()
    count = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches)
    for batch in micro_batches:
        model(**batch, use_cache=False, num_items_in_batch=torch.tensor(count)).loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


# The same bits.


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_policy_gives_the_gradients_of_autograd(name: str, micro_batches: int) -> None:
    """Bit for bit, in program order and in random orders with slots that are poisoned when they are free.

    A tied table is the exception for several micro-batches: autograd adds head and rows up for each,
    ours adds heads and rows each on their own; and the router's loss, which transformers does not divide.
    """
    data = batches(name, micro_batches)
    reference = host(name)
    loss = reference.forward_backward(data).loss
    expected = gradients(reference)
    assert any(g.abs().sum() > 0 for g in expected.values())
    if micro_batches == 1 or not (reference.skeleton.anatomy.tied or reference.skeleton.has_router_loss):
        assert same(autograd(source(name), data), expected)
    for policy, settings in POLICIES.items():
        # Lanes that keep program order and several micro-batches: tests/engine/test_lanes.py.
        for lanes in ("inline", "adversarial") if micro_batches == 1 or SOAK else ("adversarial",):
            model = host(name, lanes, **settings)
            assert model.forward_backward(data).loss == loss, (policy, lanes)
            assert same(gradients(model), expected), (policy, lanes)
            assert settings.get("activations") != "keep" or model.engine.ops.policies.kept == {1, 2, 3, 4}, (
                policy
            )


def test_many_steps_with_spilled_inputs_are_as_many_without() -> None:
    def run(**settings: Any) -> Gradients:
        model = host("llama", "adversarial", **settings)
        for step in range(times(25, 100)):
            model.train_step([zoo.batch("llama", batch_size=1, length=9, seed=step)], lr=1e-3)
        return dict(model.named_parameters())

    plain = run()
    assert same(run(boundaries="host"), plain)
    assert same(run(boundaries="host", checkpoint_interval=2), plain)
    assert not same(run(boundaries="host", seed=1, optim="lion"), plain)


@pytest.mark.parametrize("policy", POLICIES)
def test_dropout_is_replayed(policy: str) -> None:
    def dropped(name: str, **settings: Any) -> hz.HostModel:
        model = source(name)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        model.config.resid_pdrop = 0.3
        values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True}
        return from_pretrained(model, **(values | settings))

    data = batches("gpt2", 2)
    reference = dropped("gpt2")
    loss = reference.forward_backward(data).loss
    model = dropped("gpt2", lanes="adversarial", **POLICIES[policy])
    assert model.forward_backward(data).loss == loss
    assert same(gradients(model), gradients(reference))
    undropped = host("gpt2")
    assert abs(undropped.forward_backward(data).loss - loss) > 1e-3, "dropout is on"


# What is computed how often, and what is held.


class Counting(torch.nn.Module):
    """A layer's norm that counts how often it runs."""

    def __init__(self, inner: torch.nn.Module, runs: Counter, layer: int) -> None:
        super().__init__()
        self.inner, self.runs, self.layer = inner, runs, layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.runs[self.layer] += 1
        return self.inner(hidden)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"activations": "keep"}, [1, 1, 1, 1]),
        ({}, [2, 2, 2, 2]),
        ({"activations": ["recompute*3", "keep"]}, [2, 2, 2, 1]),
        ({"checkpoint_interval": 2}, [2, 2, 2, 2]),
        ({"checkpoint_interval": 4}, [2, 2, 2, 2]),
    ],
)
def test_forwards_of_each_layer(settings: dict[str, Any], expected: list[int], micro_batches: int) -> None:
    """What is kept runs once; what is recomputed runs once more, also in blocks; and nothing at the turn runs
    again, where one micro-batch is there at a time."""
    model, runs = source("llama"), Counter()
    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm = Counting(layer.input_layernorm, runs, i)
    values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True}
    streamed = from_pretrained(model, **(values | settings))
    runs.clear()
    streamed.forward_backward(batches("llama", micro_batches))
    turn = streamed.engine.spec(micro_batches).at_turnaround
    expected = [1 if i + 1 in turn else count for i, count in enumerate(expected)]
    assert turn  # the head has slots of its own, so the last block always has enough
    assert [runs[i] for i in range(LAYERS)] == [count * micro_batches for count in expected]


# Layer 1 and 2 come back to other slots than they had in the forward pass: between them are blocks.
MOVED: dict[str, Any] = {"activations": ["keep*3", "recompute*5"], "checkpoint_interval": 2}


def moved(change: Any = None) -> hz.HostModel:
    model = source("llama", layers=8)
    if change is not None:
        change(model)
    values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True, "lanes": "adversarial"}
    return from_pretrained(model, **(values | MOVED))


def test_kept_weights_are_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer finds its weights in whatever slot holds them; the negative control, layers that keep views
    of the slot they had, reads the weights of another."""
    data = batches("llama", 1)
    expected = autograd(source("llama", layers=8), data)
    model = moved()
    slots: dict[int, set[int]] = {}
    for op in model.engine.schedule(model.engine.spec(1)).ops:
        if op.kind in "FB" and op.unit in (1, 2, 3):
            slots.setdefault(op.unit, set()).add(op.slot)
    assert len(slots[1]) == len(slots[2]) == 2
    model.forward_backward(data)
    assert same(gradients(model), expected)
    monkeypatch.setattr(layers._Weights, "pack", lambda self, tensor: tensor)
    monkeypatch.setattr(layers, "_sharing", lambda tensors: 0)
    wrong = moved()
    wrong.forward_backward(data)
    assert not same(gradients(wrong), expected)


def stash(model: Any) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.forward = lambda x: Stashing.apply(x, layer.weight)


def test_a_layer_that_cannot_be_rebound_is_recomputed(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, once, in the log; its gradients are right from the first step on."""
    data = batches("llama", 2)

    def is_right(model: hz.HostModel) -> bool:
        found = gradients(model)
        return all(torch.allclose(found[n], w, rtol=1e-5, atol=1e-7) for n, w in expected.items())

    expected = autograd(source("llama", layers=8), data)
    model = moved(stash)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model.forward_backward(data)
            assert is_right(model)
    warnings = [record.getMessage() for record in caplog.records if "recomputed" in record.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith("layer 1 ")
    assert model.engine.ops.policies.kept == {1, 3}
    # The negative control: without the check, the weights of another layer are read.
    monkeypatch.setattr(layers, "_sharing", lambda tensors: 0)
    wrong = moved(stash)
    wrong.forward_backward(data)
    assert wrong.engine.ops.policies.kept == {1, 2, 3} and not is_right(wrong)


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activations": ["keep*3"]}, "activations names 3 layers, the model has 4"),
        ({"boundaries": ["host*5"]}, "boundaries names 5 layers, the model has 4"),
    ],
)
def test_lists_name_every_layer(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        host("llama", **settings)
    assert "*4" in (caught.value.hint or "")


def test_repetitions_are_written_out() -> None:
    settings = ModelSettings.from_dict({"activations": ["recompute*3", "keep"]})
    model = host("llama", activations=settings.activations)
    assert model.engine.ops.policies.kept == {4} and model.engine.ops.policies.spilled == set()
