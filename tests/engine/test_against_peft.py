"""A model with an adapter trains as PEFT trains it: the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import zoo
from horizon_lm.engine import step as engine_step
from horizon_lm.host_model import HostModel
from peft_models import adapted, autograd, differing, host, shake, trained

pytestmark = pytest.mark.usefixtures("one_thread")

# Of each kind one: plain, tied, sliding windows, fused and transposed products, experts, recurrent layers.
NAMES = ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "mixtral", "qwen3_moe", "olmoe-aux", "lfm2"]
MOE = ("mixtral", "qwen3_moe", "olmoe-aux")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "module and rank by name": {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved norms": {"modules_to_save": ["norm"]},
    "bias of the adapter": {"lora_bias": True},
    "loha": {"type": "LoHaConfig", "r": 3},
    "lokr": {"type": "LoKrConfig", "r": 3},
    "ia3": {"type": "IA3Config", "feedforward_modules": ["down_proj"]},
}


def same_step(model: Any, data: list[dict[str, torch.Tensor]], **settings: Any) -> HostModel:
    """Check that loss and gradients have the bits of autograd; return the streamed model."""
    streamed = host(model, **settings)
    found = streamed.forward_backward(data).loss
    loss, wanted = autograd(model, data)
    assert found == pytest.approx(loss, rel=1e-6)
    assert wanted and all(gradient.any() for gradient in wanted.values())
    kept = {name: gradient.to(streamed.store.dtype) for name, gradient in wanted.items()}
    assert differing(dict(streamed.named_gradients()), kept) == []
    return streamed


@pytest.mark.parametrize("name", NAMES)
def test_gradients_have_the_bits_of_peft(name: str) -> None:
    """All linear layers, which in models with experts are their fused matrices and routers too."""
    model = adapted(name, bias="none")
    if name in MOE:
        assert any(".experts." in key for key in trained(model))
    same_step(model, [zoo.batch(name)])


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_adapters(kind: str) -> None:
    same_step(adapted("llama", **KINDS[kind]), [zoo.batch("llama", kind="padded")])


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_attention_alone(name: str, use_dora: bool) -> None:
    targets = ["c_attn"] if name == "gpt2" else ATTENTION
    same_step(adapted(name, target_modules=targets, use_dora=use_dora), [zoo.batch(name)])


POLICIES: dict[str, dict[str, Any]] = {
    "recompute": {},
    "keep": {"activations": "keep"},
    "attention": {"activations": "attention"},
    "products": {"activations": "products"},
    "another order": {"lanes": "adversarial", "boundaries": "host"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_two_micro_batches_under_every_policy(name: str, policy: str) -> None:
    model = adapted(name, modules_to_save=["norm"] if name == "llama" else None)
    data = [zoo.batch(name, seed=seed) for seed in (1, 2)]
    same_step(model, data, **POLICIES[policy])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_bf16(name: str) -> None:
    """Both the adapter in bf16, and PEFT's default of an fp32 adapter in a bf16 model."""
    model = adapted(name, dtype=torch.bfloat16)
    data = [zoo.batch(name)]
    streamed = same_step(model, data, dtype="bfloat16")
    assert streamed.kept_in_fp32 == []
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()
    wide = same_step(model, data, dtype="bfloat16")
    assert set(wide.kept_in_fp32) == set(trained(model))


def test_clipping_and_three_steps_of_adamw() -> None:
    """fp32 on both sides: the parameters of torch.optim.AdamW on PEFT's model; what is frozen stays."""
    model = adapted("llama", modules_to_save=["lm_head"])
    streamed = host(model, max_grad_norm=0.05)
    start = {name: value.clone() for name, value in streamed.named_parameters()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        data = [zoo.batch("llama", seed=10 * step + m) for m in range(2)]
        autograd(model, data)
        norm = float(torch.nn.utils.clip_grad_norm_(trained(model).values(), 0.05))
        optimizer.step()
        found = streamed.train_step(data, lr=1e-2, weight_decay=0.1).grad_norm
        assert found == pytest.approx(norm, rel=1e-4) and norm > 0.1, "it clips"
    moved = {name: p.detach() for name, p in trained(model).items()}
    ended = dict(streamed.named_parameters())
    apart = sum(float((ended[n] - moved[n]).double().square().sum()) for n in moved)
    came = sum(float((moved[n] - start[n]).double().square().sum()) for n in moved)
    assert (apart / came) ** 0.5 < 1e-3
    frozen = {name: value for name, value in ended.items() if name not in moved}
    assert frozen and differing(frozen, {name: start[name] for name in frozen}) == []


# Dropout.


def replayed(model: Any, seed: int = 42) -> Callable[[], None]:
    """Have each part of the model draw from the state that the engine gives it. Returns what ends that."""

    def seeding(unit: int) -> Callable[..., None]:
        def set_seed(*_: Any) -> None:
            torch.manual_seed(hash((seed * 1_000_003, unit, 0)) & 0x7FFF_FFFF_FFFF_FFFF)

        return set_seed

    inner = model.get_base_model()
    layers = inner.model.layers
    hooks = [layer.register_forward_pre_hook(seeding(i + 1)) for i, layer in enumerate(layers)]
    hooks.append(inner.register_forward_pre_hook(seeding(0)))
    hooks.append(inner.model.norm.register_forward_pre_hook(seeding(len(layers) + 1)))

    def end() -> None:
        for hook in hooks:
            hook.remove()

    return end


DROPPED: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved": {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", DROPPED)
def test_dropout_is_that_of_peft_with_its_draws_replayed(kind: str) -> None:
    model, batch = adapted("llama", dropout=0.5, **DROPPED[kind]), zoo.batch("llama")
    end = replayed(model)
    with torch.random.fork_rng():
        loss, wanted = autograd(model, [batch])
    end()
    state = torch.get_rng_state()
    for policy, settings in POLICIES.items():
        streamed = host(model, **settings)
        assert streamed.forward_backward([batch]).loss == loss, policy
        assert differing(dict(streamed.named_gradients()), wanted) == [], policy
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    with torch.no_grad():
        undone = model.eval()(**batch, use_cache=False).loss.item()
    assert abs(undone - loss) > 1e-4, "the noise is on"


def test_without_replay_dropout_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: recomputed layers draw other masks than the forward pass did."""
    from contextlib import nullcontext

    monkeypatch.setattr(engine_step, "random_state", lambda *_: nullcontext())
    model, batch = adapted("llama", dropout=0.5), zoo.batch("llama")
    one, two = host(model), host(model, activations="keep")
    for streamed in (one, two):
        torch.manual_seed(0)
        streamed.forward_backward([batch])
    assert differing(dict(one.named_gradients()), dict(two.named_gradients())) != []


# What is frozen.


def test_gradients_of_another_adapter_differ() -> None:
    """Negative control of the comparison itself."""
    model, batch = adapted("llama"), zoo.batch("llama")
    streamed = host(model)
    streamed.forward_backward([batch])
    shake(model, seed=8)
    _, other = autograd(model, [batch])
    found = dict(streamed.named_gradients())
    assert found.keys() == other.keys() and len(differing(found, other)) == len(found)


def test_what_is_frozen_takes_its_weights_alone() -> None:
    whole, part = host(zoo.build("llama"), "bfloat16"), host(zoo.build("llama"), "bfloat16", adapter="lora")
    trainable = sum(unit.trainable_numel for unit in part.store.units)
    memory = part.memory_bytes()
    assert 0 < trainable < part.num_parameters / 2
    assert memory["weights"] == whole.memory_bytes()["weights"] + 2 * trainable
    for region, size in {"residual": 2, "exp_avg": 4, "exp_avg_sq": 4, "grads": 2}.items():
        assert memory[region] == size * trainable, region


def backward_units(streamed: HostModel, name: str = "llama") -> set[int]:
    streamed.train_step([zoo.batch(name)], lr=1e-3, record=True)
    ops = [str(op) for op, *_ in streamed.timeline]
    return {int(found[1]) for op in ops if (found := re.fullmatch(r"B(\d+)(\.\d+)?", op))}


def test_the_backward_pass_ends_at_the_lowest_adapter() -> None:
    layers = range(1, 1 + len(zoo.build("llama").model.layers))
    upper = adapted("llama", target_modules=r".*layers\.[23]\..*q_proj")
    assert backward_units(host(upper)) & set(layers) == {3, 4}
    assert backward_units(host(adapted("llama"))) & set(layers) == set(layers)
    assert backward_units(host(upper, train=[r"layers\.3\."])) & set(layers) == {4}
