"""Noise that no configuration names is drawn again as it was: whatever is kept, computed again, or tiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import horizon_lm as hz
import zoo
from horizon_lm.engine import noise

pytestmark = pytest.mark.usefixtures("one_thread")

SEED = 42  # the setting's default


class Adapted(nn.Module):
    """A linear map with a low-rank branch beside it, as PEFT's LoRA has it: its dropout is its own."""

    def __init__(self, base: nn.Linear, dropout: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.lora_dropout = base, dropout
        generator = torch.Generator().manual_seed(1)
        self.lora_A = nn.Linear(base.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base.out_features, bias=False)
        for module in (self.lora_A, self.lora_B):
            module.weight = nn.Parameter(torch.randn(module.weight.shape, generator=generator) * 0.2)
        base.requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base_layer(hidden) + self.lora_B(self.lora_A(self.lora_dropout(hidden)))


class Unnamed(nn.Module):
    """Noise that neither a name nor a module class tells."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + 0.5 * torch.rand_like(hidden)) if self.training else hidden


DROPOUTS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "rrelu": nn.RReLU,
    "unnamed": Unnamed,
}


def adapted(dropout: Callable[[], nn.Module] | None = None, name: str = "llama", **places: bool) -> Any:
    """Adapters in the layers; noise in the prologue (`embedding`) and after the final norm (`head`)."""
    model = zoo.build(name)
    if dropout is not None:
        for layer in model.model.layers:
            layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj, dropout())
            layer.mlp.up_proj = Adapted(layer.mlp.up_proj, dropout())
    if places.get("embedding"):
        rotary = model.model.rotary_emb.forward
        noisy = Unnamed()

        def shaken(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden.mul_(noisy(torch.ones_like(hidden)))  # as a model that scales its embeddings in place
            return rotary(hidden, *args, **kwargs)

        model.model.shaken = noisy
        model.model.rotary_emb.forward = shaken
    if places.get("head"):
        model.model.norm = nn.Sequential(model.model.norm, Unnamed())
    return model


def host(model: Any, **settings: Any) -> hz.HostModel:
    values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True, **settings}
    return hz.HostModel.from_pretrained(copy.deepcopy(model), **values)


def gradients(model: hz.HostModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_gradients()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def plain(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Ordinary autograd, with the generator set before prologue, layers and head as the engine sets it."""

    def seeding(unit: int) -> Callable[..., None]:
        def seed(*_: Any) -> None:
            torch.manual_seed(hash((SEED * 1_000_003, unit, 0)) & 0x7FFF_FFFF_FFFF_FFFF)

        return seed

    layers = model.model.layers
    hooks = [layer.register_forward_pre_hook(seeding(i + 1)) for i, layer in enumerate(layers)]
    hooks.append(model.register_forward_pre_hook(seeding(0)))
    hooks.append(model.model.norm.register_forward_pre_hook(seeding(len(layers) + 1)))
    try:
        with torch.random.fork_rng():
            loss = model(**batch, use_cache=False).loss
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


POLICIES: dict[str, dict[str, Any]] = {
    "keep": {"activations": "keep"},
    "blocks": {"checkpoint_interval": 2},
    "spilled, in another order": {"boundaries": "host", "lanes": "adversarial"},
    "kept, in another order": {"activations": "keep", "lanes": "adversarial"},
}


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_an_adapters_noise_is_replayed(dropout: str) -> None:
    model = adapted(DROPOUTS[dropout])
    data = [zoo.batch("llama", seed=seed) for seed in (1, 2)]
    reference = host(model)
    state = torch.get_rng_state()
    loss = reference.forward_backward(data).loss
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    wanted = gradients(reference)
    for policy, settings in POLICIES.items():
        other = host(model, **settings)
        assert other.forward_backward(data).loss == loss, policy
        assert same(gradients(other), wanted), policy
    eager = host(model, update="eager", max_grad_norm=None)
    deferred = host(model, max_grad_norm=None)
    for streamed in (eager, deferred):
        streamed.train_step(data, lr=1e-2)
    assert same(dict(eager.named_parameters()), dict(deferred.named_parameters()))
    assert abs(host(adapted(nn.Identity)).forward_backward(data).loss - loss) > 1e-4, "the noise is on"


@pytest.mark.parametrize("dropout", ["dropout", "unnamed"])
def test_tiles_draw_their_noise_once(dropout: str) -> None:
    model, data = adapted(DROPOUTS[dropout]), [zoo.batch("llama")]
    one, two = (host(model, mlp_tile_tokens=6, activations=how) for how in ("recompute", "keep"))
    assert one.forward_backward(data).loss == two.forward_backward(data).loss
    assert same(gradients(one), gradients(two))


@pytest.mark.parametrize(
    ("dropout", "places"),
    [("dropout", {}), ("unnamed", {}), (None, {"embedding": True}), (None, {"head": True})],
    ids=["dropout", "unnamed", "embedding", "head"],
)
def test_noise_equals_plain_pytorch_with_the_same_states(dropout: str | None, places: dict) -> None:
    model = adapted(DROPOUTS[dropout] if dropout else None, **places)
    batch = zoo.batch("llama")
    streamed = host(model)
    found = streamed.forward_backward([batch]).loss
    loss, wanted = plain(model, batch)
    assert found == loss
    assert same(gradients(streamed), wanted)
    undone = model.eval()(**batch, use_cache=False).loss.item()
    assert abs(undone - loss) > 1e-4, "the noise is on"


def test_a_custom_loss_sees_the_heads_noise_as_its_gradient_does() -> None:
    """The head runs twice for it: once for the log-probabilities, once for their gradient."""
    model, batch = adapted(head=True), zoo.batch("llama")
    count = int((batch["labels"][:, 1:] != -100).sum())

    def mean(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        torch.rand(7)  # a loss that draws, too
        return -log_probs.sum() / count

    one, two = host(model), host(model)
    one.forward_backward([batch])
    two.forward_backward([batch], mean)
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradients(two)[name], gradient, rtol=1e-4, atol=1e-7)


def test_without_replay_the_gradients_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with a watch that sees nothing, keep and recompute disagree."""
    monkeypatch.setattr(noise, "has_moved", lambda device, state: False)
    model, data = adapted(Unnamed), [zoo.batch("llama")]
    one, two = host(model), host(model, activations="keep")
    torch.manual_seed(0)
    one.forward_backward(data)
    torch.manual_seed(0)
    two.forward_backward(data)
    assert not same(gradients(one), gradients(two))


def test_a_model_without_noise_has_none() -> None:
    streamed = host(zoo.build("llama"))
    streamed.forward_backward([zoo.batch("llama")])
    assert not streamed.skeleton.has_noise


# Noise on the embeddings (NEFTune).


def hooked(name: str, alpha: float) -> Any:
    """The model with transformers' own NEFTune hook."""
    from transformers.integrations.neftune import activate_neftune

    model = zoo.build(name)
    activate_neftune(model, alpha)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "llama-tied"])
def test_neftune_is_that_of_transformers(name: str) -> None:
    """Gemma's embedding module scales its rows; the noise comes after it."""
    batch = zoo.batch(name)
    streamed = host(zoo.build(name), neftune_noise_alpha=5.0)
    found = streamed.forward_backward([batch]).loss
    loss, wanted = plain(hooked(name, 5.0), batch)
    assert found == loss
    assert same(gradients(streamed), wanted)
    assert streamed.evaluate([batch]).loss == host(zoo.build(name)).evaluate([batch]).loss, (
        "in training alone"
    )
    assert abs(host(zoo.build(name)).forward_backward([batch]).loss - loss) > 1e-4
    assert not same(gradients(host_with_loss(name, 6.0, batch)), wanted), "negative control: another alpha"


def host_with_loss(name: str, alpha: float, batch: dict[str, torch.Tensor]) -> hz.HostModel:
    streamed = host(zoo.build(name), neftune_noise_alpha=alpha)
    streamed.forward_backward([batch])
    return streamed


def test_neftune_does_not_depend_on_how_layers_are_computed() -> None:
    data = [zoo.batch("gpt2", seed=seed) for seed in (1, 2)]
    reference = host(zoo.build("gpt2"), neftune_noise_alpha=5.0)
    loss = reference.forward_backward(data).loss
    for policy, settings in POLICIES.items():
        other = host(zoo.build("gpt2"), neftune_noise_alpha=5.0, **settings)
        assert other.forward_backward(data).loss == loss, policy
        assert same(gradients(other), gradients(reference)), policy
    seeds = host(zoo.build("gpt2"), neftune_noise_alpha=5.0, seed=1)
    assert seeds.forward_backward(data).loss != loss
    reference.state_was_replaced(1)
    assert reference.forward_backward(data).loss != loss, "another step, other noise"
