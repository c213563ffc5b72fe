"""Activation policies: what a layer leaves for its backward pass changes memory and time, never a bit."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import horizon_lm as hz
import zoo
from horizon_lm.config import ModelSettings
from horizon_lm.engine import activations
from horizon_lm.errors import ConfigError, DataError, UnsupportedModelError
from horizon_lm.memory.live import LiveBytes
from horizon_lm.model.tiling import find_mlps
from horizon_lm.plan.costs import DEVICE, HOST
from horizon_lm.plan.device import slot_bytes
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.predict import predict
from horizon_lm.plan.profile import load_profile
from horizon_lm.plan.working_set import Built, layer_working_set

LAYERS = 4
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
    "mixed": {"activations": ["recompute*2", "keep*2"], "boundaries": ["host", "device*3"]},
    "host": {"boundaries": "host", "boundary_slots": 1},
    "blocks of 2": {"checkpoint_interval": 2},
    "blocks of 3, host": {"checkpoint_interval": 3, "boundaries": "host"},
    "tiny last": {"activations": ["keep", "recompute*3"], "checkpoint_interval": 2},
}
Gradients = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def source(name: str, layers: int = LAYERS) -> Any:
    config = zoo.CASES[name].config()
    if config.num_hidden_layers != layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types * layers)[:layers]
    attn = "eager" if zoo.CASES[name].attn == "eager" else "sdpa"
    model = zoo._from_config(config, torch.float32, seed=0, attn=attn)
    zoo._perturb(model, torch.Generator().manual_seed(1))
    return model.train()


def host(name: str, lanes: str = "inline", **settings: Any) -> hz.HostModel:
    values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True, "lanes": lanes}
    return hz.HostModel.from_pretrained(source(name), **(values | settings))


def batches(name: str, count: int) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(name, batch_size=1, length=9, seed=m + 1) for m in range(count)]


def gradients(model: hz.HostModel) -> Gradients:
    return {name: gradient.clone() for name, gradient in model.named_gradients()}


def same(one: Gradients, two: Gradients) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


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
        for lanes in ("inline", "adversarial"):
            model = host(name, lanes, **settings)
            assert model.forward_backward(data).loss == loss, (policy, lanes)
            assert same(gradients(model), expected), (policy, lanes)
            assert settings.get("activations") != "keep" or model.engine.policies.kept == {1, 2, 3, 4}, policy


def test_a_hundred_steps_with_spilled_inputs_are_a_hundred_without() -> None:
    def run(**settings: Any) -> Gradients:
        model = host("llama", "adversarial", **settings)
        for step in range(100):
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
        return hz.HostModel.from_pretrained(model, **(values | settings))

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
    streamed = hz.HostModel.from_pretrained(model, **(values | settings))
    runs.clear()
    streamed.forward_backward(batches("llama", micro_batches))
    turn = streamed.engine.plan(micro_batches).at_turn
    expected = [1 if i + 1 in turn else count for i, count in enumerate(expected)]
    # A block of two and the head need three gradient slots, if not one micro-batch passes after another.
    assert bool(turn) == (micro_batches == 1 or "checkpoint_interval" not in settings)
    assert [runs[i] for i in range(LAYERS)] == [count * micro_batches for count in expected]


# Layer 1 and 2 come back to other slots than they had in the forward pass: between them are blocks.
MOVED: dict[str, Any] = {"activations": ["keep*3", "recompute*4"], "checkpoint_interval": 2}


def moved(change: Any = None) -> hz.HostModel:
    model = source("llama", layers=7)
    if change is not None:
        change(model)
    values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True, "lanes": "adversarial"}
    return hz.HostModel.from_pretrained(model, **(values | MOVED))


def test_kept_weights_are_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer finds its weights in whatever slot holds them; the negative control, layers that keep views
    of the slot they had, reads the weights of another."""
    data = batches("llama", 1)
    expected = autograd(source("llama", layers=7), data)
    model = moved()
    slots: dict[int, set[int]] = {}
    for op in model.engine.schedule(model.engine.plan(1)).ops:
        if op.kind in "FB" and op.unit in (1, 2, 3):
            slots.setdefault(op.unit, set()).add(op.slot)
    assert len(slots[1]) == len(slots[2]) == 2
    model.forward_backward(data)
    assert same(gradients(model), expected)
    monkeypatch.setattr(activations._Weights, "pack", lambda self, tensor: tensor)
    monkeypatch.setattr(activations, "_sharing", lambda tensors: 0)
    wrong = moved()
    wrong.forward_backward(data)
    assert not same(gradients(wrong), expected)


class Stashing(torch.autograd.Function):
    """A linear map that keeps its weight in an attribute, where saved-tensor hooks do not reach."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad @ ctx.weight, grad.flatten(0, 1).T @ x.flatten(0, 1)


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

    expected = autograd(source("llama", layers=7), data)
    model = moved(stash)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model.forward_backward(data)
            assert is_right(model)
    warnings = [record.getMessage() for record in caplog.records if "recomputed" in record.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith("layer 1 ")
    assert model.engine.policies.kept == {1, 3}
    # The negative control: without the check, the weights of another layer are read.
    monkeypatch.setattr(activations, "_sharing", lambda tensors: 0)
    wrong = moved(stash)
    wrong.forward_backward(data)
    assert wrong.engine.policies.kept == {1, 2, 3} and not is_right(wrong)


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
    assert model.engine.policies.kept == {4} and model.engine.policies.spilled == set()


# Memory.


def small_llama(layers: int, hidden: int = 128) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
        )
    )


def peak_of_step(
    layers: int, tokens: int, micro_batches: int = 1, **settings: Any
) -> tuple[int, hz.HostModel]:
    """Most bytes of tensors during a step, above what there was before: torch's own allocations."""
    values = {"device": "cpu", "dtype": "bfloat16", "skip_memory_check": True, "lanes": "adversarial"}
    model = hz.HostModel.from_pretrained(small_llama(layers), **(values | settings))
    data = [zoo.batch(model.config, batch_size=1, length=tokens, seed=m) for m in range(micro_batches)]
    model.engine.lanes.random.choice = lambda ready: min(ready)  # type: ignore[attr-defined]
    model.train_step(data, lr=0.0)  # buffers that stay are made in the first step
    model.flush()
    with LiveBytes() as live:
        model.train_step(data, lr=0.0)
    return live.peak, model


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("policy", ["device", "host", "keep", "blocks"])
def test_bytes_of_boundaries_are_predicted(policy: str, micro_batches: int) -> None:
    """A layer more costs its input (device), nothing (host), or what it keeps; within 1 %. The planner's
    own simulation, for a device with memory of its own, as these lanes have."""
    settings: dict[str, dict[str, Any]] = {
        "device": {},
        "host": {"boundaries": "host"},
        "keep": {"activations": "keep"},
        "blocks": {"checkpoint_interval": 2},
    }
    tokens, few, many = 512, 4, 12
    peaks, predicted = [], []
    for layers in (few, many):
        peak, model = peak_of_step(layers, tokens, micro_batches, **settings[policy])
        peaks.append(peak)
        wanted = ModelSettings(dtype="bfloat16", skip_memory_check=True, **settings[policy])
        outline, profile = Outline(model.config, wanted), load_profile("gh200")
        found = predict(outline, wanted, profile, batch=1, tokens=tokens, micro_batches=micro_batches)
        parts = found.simulation.parts
        predicted.append(parts[DEVICE].get("input", 0) + parts[DEVICE].get("graph", 0))
        assert found.device.get("boundary_slots", 0) == model.memory_bytes()["boundary_slots"]
        # The engine's buffers stay; in the simulation one may come after the most embeddings have gone.
        spilled = parts[HOST].get("boundary", 0)
        assert 0 <= model.memory_bytes()["boundaries"] - spilled <= tokens * 128 * 2
    one = tokens * 128 * 2 * micro_batches
    grown, expected = peaks[1] - peaks[0], predicted[1] - predicted[0]
    assert abs(grown - expected) <= 0.01 * max(expected, one), (grown, expected)
    per_layer = {"device": one, "host": 0, "blocks": one / 2}
    if policy in per_layer:
        assert abs(expected - per_layer[policy] * (many - few)) <= one
    else:
        assert expected > 10 * one * (many - few)


def test_bytes_of_slots_are_predicted() -> None:
    for settings in ({}, {"slots": 4, "grad_slots": 1}, {"checkpoint_interval": 3}):
        values = {"device": "cpu", "dtype": "bfloat16", "skip_memory_check": True, "lanes": "adversarial"}
        with LiveBytes() as live:
            before = live.now
            model = hz.HostModel.from_pretrained(small_llama(4), **(values | settings))
        engine = model.engine
        parts = slot_bytes(model.store.units, engine.plan(1), torch.bfloat16)
        allocated = [b.nbytes for b in (*engine.weight_slots._buffers, *engine.gradient_slots._buffers)]
        assert sum(parts.values()) == sum(allocated) > before
        assert parts["weight_slots"] == model.memory_bytes()["weight_slots"]
        assert parts["gradient_slots"] == model.memory_bytes()["gradient_slots"]


def allocated(function: Any) -> tuple[int, int]:
    """(most, at the end) bytes that torch's CPU allocator gave out during a call, by its own hooks."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    events = found.profiler.kineto_results.events()
    rows = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, size in rows:
        now += size
        most = max(most, now)
    return most, now


@pytest.mark.parametrize("policy", ["recompute", "keep"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", "float32"), ("gemma3_text", "float32"), ("gpt2", "float32"), ("mixtral", "bfloat16")],
)
def test_the_working_set_is_predicted(name: str, dtype: str, policy: str) -> None:
    """On tensors that take no memory, against torch's allocations in a real forward and backward."""
    model, tokens = host(name, dtype=dtype), 60
    skeleton, store = model.skeleton, model.store
    ids = torch.zeros(1, tokens, dtype=torch.long)
    embeds = torch.randn(1, tokens, skeleton.embedding.embedding_dim).to(store.dtype)
    prologue = model.engine.weight_slots.unit(0, 0) if store.units[0].numel else None
    hidden, call = activations_input(skeleton, prologue, embeds, ids)
    weights, slot = model.engine.weight_slots.unit(0, 1), torch.empty(store.units[1].trainable_numel)
    kept: list[Any] = []

    def forward() -> None:
        kept.append(activations.forward_layer(skeleton, 0, weights, call, hidden, policy=policy, grad=True))

    forward_most, held = allocated(forward)
    done = kept.pop()
    call.routers = [done.routers]
    graph, incoming, output = done.graph, torch.randn_like(done.output), done.output.nbytes
    held -= output
    del done

    def backward() -> None:
        gradient = activations.UnitGradient(store.units[1], slot)
        kept.append(activations.backward_layer(skeleton, 0, weights, call, graph, hidden, incoming, gradient))

    backward_most = allocated(backward)[0] + held
    expected = layer_working_set(lambda: Built(skeleton), 0, 1, tokens)
    if policy == "recompute":
        pairs = [(forward_most, expected.forward.bytes), (backward_most, expected.backward.bytes)]
    else:
        pairs = [(forward_most, expected.keep_forward.bytes), (backward_most, expected.keep_backward.bytes)]
        pairs.append((held, expected.kept))
    for measured, predicted in pairs:
        # Kernels also take room of their own, which the prediction does not see: the more, the shorter.
        assert 0.85 * measured <= predicted <= 1.01 * measured, (measured, predicted)


def activations_input(skeleton: Any, prologue: Any, embeds: torch.Tensor, ids: torch.Tensor) -> Any:
    from horizon_lm.engine.compute import forward_prologue

    return forward_prologue(skeleton, prologue, embeds, {"input_ids": ids})


# Tiles.


def test_an_mlp_in_tiles_gives_the_same_gradients_and_takes_less() -> None:
    """fp32, 1e-5: the weights' gradients are summed tile by tile."""
    data = [zoo.batch("llama", batch_size=2, length=30, seed=1)]
    plain, tiled = host("llama"), host("llama", mlp_tile_tokens=7)
    assert tiled.forward_backward(data).loss == pytest.approx(plain.forward_backward(data).loss, rel=1e-6)
    expected = gradients(plain)
    for name, gradient in gradients(tiled).items():
        assert (gradient - expected[name]).norm() < 1e-5 * expected[name].norm(), name
    for policy in ({"activations": "keep"}, {"checkpoint_interval": 2}):
        other = host("llama", "adversarial", mlp_tile_tokens=7, **policy)
        other.forward_backward(data)
        assert same(gradients(other), gradients(tiled)), policy


def test_tiles_take_less_memory() -> None:
    sets = []
    for tile in (None, 64):
        values = {"device": "cpu", "dtype": "bfloat16", "skip_memory_check": True, "mlp_tile_tokens": tile}
        model = hz.HostModel.from_pretrained(small_llama(2), **values)
        built = Built(model.skeleton)
        sets.append(layer_working_set(lambda built=built: built, 0, 1, 1024))
    assert sets[1].backward.bytes < 0.75 * sets[0].backward.bytes
    assert sets[1].kept < 0.75 * sets[0].kept


def test_only_what_treats_tokens_alone_is_tiled() -> None:
    for name in ("llama", "gemma3_text", "gpt2"):
        assert all(find_mlps(layer) for layer in host(name).skeleton.layers), name
    assert not any(find_mlps(layer) for layer in host("gpt_oss").skeleton.layers)
    with pytest.raises(UnsupportedModelError, match="no MLP that could be computed in tiles"):
        host("gpt_oss", mlp_tile_tokens=8)


# Evaluation.


@pytest.mark.parametrize("lanes", ["inline", "adversarial"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral-aux", "gemma3_text"])
def test_evaluation_is_that_of_transformers(name: str, lanes: str) -> None:
    data = [zoo.batch(name, kind="padded", seed=m) for m in range(3)]
    plain, model = source(name).eval(), host(name, lanes)
    out = model.evaluate(data, return_log_probs=True)
    total = count = 0.0
    assert out.log_probs is not None
    with torch.no_grad():
        for batch, found in zip(data, out.log_probs, strict=True):
            given = {k: v for k, v in batch.items() if k != "labels"}
            logits = plain(**given, use_cache=False).logits[:, :-1].float()
            targets = batch["labels"][:, 1:]
            wanted = torch.log_softmax(logits, -1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
            wanted = wanted.masked_fill(targets == -100, 0.0)
            assert found.shape == targets.shape and found.dtype == torch.float32
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
            total, count = total - float(wanted.sum()), count + int((targets != -100).sum())
    assert out.num_tokens == count
    assert out.loss == pytest.approx(total / count, rel=1e-5)
    assert out.perplexity == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    assert model.evaluate(data).log_probs is None


def test_evaluation_has_no_dropout_and_leaves_training_as_it_was() -> None:
    model = host("gpt2")
    for module in model.skeleton.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.config.resid_pdrop = 0.5
    data = batches("gpt2", 1)
    one = model.evaluate(data).loss
    assert one == model.evaluate(data).loss == host("gpt2").evaluate(data).loss
    assert model.skeleton.model.training
    assert abs(model.forward_backward(data).loss - one) > 1e-3, "dropout is on in training"


def test_nothing_to_evaluate() -> None:
    batch = zoo.batch("llama")
    with pytest.raises(DataError, match="every label is -100"):
        host("llama").evaluate([batch | {"labels": torch.full_like(batch["labels"], -100)}])


# A loss of one's own.


def mean_cross_entropy(count: int) -> Any:
    def loss(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> Any:
        kept = batch["labels"][:, 1:] != -100
        return -(log_probs * kept).sum() / count, {"least": log_probs.min()}

    return loss


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral-aux", "gemma3_text"])
def test_cross_entropy_as_a_loss_of_ones_own(name: str) -> None:
    data = [zoo.batch(name, kind="padded", seed=m) for m in range(2)]
    plain, model = host(name), host(name, "adversarial", loss_chunk_tokens=5)
    out = plain.forward_backward(data)
    own = model.forward_backward(data, mean_cross_entropy(out.num_tokens))
    assert own.loss == pytest.approx(out.loss, rel=1e-5)
    assert len(own.metrics) == 2 and all(m["least"] < 0 for m in own.metrics)
    expected = gradients(plain)
    for key, gradient in gradients(model).items():
        if expected[key].abs().max() > 1e-7:
            assert (gradient - expected[key]).norm() < 1e-5 * expected[key].norm(), key


def preference(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> Any:
    """Rows 0 and 1 are chosen and rejected; `reference` comes with the batch."""
    margin = log_probs.sum(-1) - batch["reference"]
    return -F.logsigmoid(0.5 * (margin[0] - margin[1])), {"margin": margin[0] - margin[1]}


def test_a_preference_loss_has_the_gradient_of_autograd() -> None:
    batch = zoo.batch("llama", batch_size=2, seed=3) | {"reference": torch.tensor([-20.0, -30.0])}
    model, plain = host("llama"), source("llama")
    out = model.train_step([batch], lr=0.0, loss_fn=preference)
    logits = plain(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    chosen = torch.log_softmax(logits, -1).gather(-1, batch["labels"][:, 1:, None])[..., 0]
    loss, _ = preference(chosen, batch)
    loss.backward()
    assert out.loss == pytest.approx(float(loss), rel=1e-5)
    for name, gradient in model.named_gradients():
        wanted = dict(plain.named_parameters())[name].grad
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm(), name


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda p, b: p.sum(-1), r"returned a tensor of shape \(2,\)"),
        (lambda p, b: 3.0, "returned 3.0"),
        (lambda p, b: torch.tensor(1.0), "does not depend on the log-probabilities"),
        (lambda p, b: (p.sum(), [1]), "returned a tensor"),
    ],
)
def test_a_loss_that_cannot_be_used(loss_fn: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"the loss function {message}"):
        host("llama").forward_backward([zoo.batch("llama")], loss_fn)


def test_extra_tensors_need_a_loss_that_wants_them() -> None:
    batch = zoo.batch("llama") | {"reference": torch.zeros(2)}
    with pytest.raises(DataError, match="unknown keys"):
        host("llama").forward_backward([batch])
