"""Noise that no configuration names is drawn again as it was: whatever is kept, computed again, or tiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from horizon_lm.engine import step as engine_step

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
    return from_pretrained(copy.deepcopy(model), **values)


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


def without_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass draws from the caller's generator, as it comes."""
    monkeypatch.setattr(engine_step, "random_state", lambda *_: nullcontext())


def test_without_replay_the_gradients_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    without_replay(monkeypatch)
    model, data = adapted(Unnamed), [zoo.batch("llama")]
    one, two = host(model), host(model, activations="keep")
    torch.manual_seed(0)
    one.forward_backward(data)
    torch.manual_seed(0)
    two.forward_backward(data)
    assert not same(gradients(one), gradients(two))


def test_a_model_without_noise_has_the_same_bits_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [zoo.batch("llama", seed=seed) for seed in (1, 2)]
    one, two = host(zoo.build("llama")), host(zoo.build("llama"))
    loss = one.forward_backward(data).loss
    without_replay(monkeypatch)
    assert two.forward_backward(data).loss == loss and same(gradients(one), gradients(two))


def test_a_loss_functions_own_draws_come_from_the_caller() -> None:
    """Called again for the same step it draws on; a seed that the caller sets brings the same back."""
    model, batch = host(zoo.build("llama")), zoo.batch("llama")

    def weighted(log_probs: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return -(log_probs * torch.rand(log_probs.shape)).mean()

    losses = []
    for seed in (0, None, 0):
        if seed is not None:
            torch.manual_seed(seed)
        losses.append(model.forward_backward([batch], weighted).loss)
    assert losses[0] == losses[2] != losses[1]


# Noise in nested settings, in parts of a model only, for some inputs only.


class WithManyTokens(nn.Module):
    """Noise where more than one token is looked at: a trial on one token sees none."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.numel() // hidden.shape[-1]
        return hidden * (1 + 0.5 * torch.rand_like(hidden)) if self.training and rows > 1 else hidden


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * (1 + 0.5 * torch.rand_like(gradient))


class InBackward(nn.Module):
    """Noise in the backward pass alone, as stochastic rounding of gradients has it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return _RoundedGradient.apply(hidden)


class StochasticDepth(nn.Module):
    """A part that is left out at random: with another draw, other tensors are saved."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.training and torch.rand(()) < 0.5:
            return torch.zeros_like(hidden)
        return self.inner(hidden)


def nested(name: str, **changes: Any) -> Any:
    """The model with settings changed inside its configuration: `attn_config__attn_pdrop=0.1`."""
    settings = zoo.CASES[name].config()
    for path, value in changes.items():
        *outer, last = path.split("__")
        place = settings
        for part in outer:
            place = getattr(place, part)
        assert hasattr(place, last)
        setattr(place, last, value)
    return zoo._from_config(settings, torch.float32, 0, zoo.CASES[name].attn).train()


def with_layers(change: Callable[[Any], None]) -> Any:
    model = zoo.build("llama")
    for layer in model.model.layers[1:3]:
        change(layer)
    return model


def in_norm(noise_in_head: nn.Module) -> Any:
    model = zoo.build("llama")
    model.model.norm = nn.Sequential(model.model.norm, noise_in_head)
    return model


SOURCES: dict[str, tuple[str, Callable[[], Any]]] = {
    "dbrx, attention": ("dbrx", lambda: nested("dbrx", attn_config__attn_pdrop=0.1)),
    "dbrx, 8 experts": (
        "dbrx",
        lambda: nested("dbrx", attn_config__attn_pdrop=0.1, ffn_config__moe_num_experts=8),
    ),
    "dbrx, 8 experts, jitter": (
        "dbrx",
        lambda: nested("dbrx", ffn_config__moe_jitter_eps=0.3, ffn_config__moe_num_experts=8),
    ),
    "jetmoe, 8 experts": ("jetmoe", lambda: nested("jetmoe", attention_dropout=0.3, num_local_experts=8)),
    "mixtral, jitter": ("mixtral", lambda: nested("mixtral", router_jitter_noise=0.3, num_local_experts=8)),
    "stochastic depth": (
        "llama",
        lambda: with_layers(lambda layer: setattr(layer, "mlp", StochasticDepth(layer.mlp))),
    ),
    "two layers": (
        "llama",
        lambda: with_layers(
            lambda layer: setattr(layer, "input_layernorm", nn.Sequential(layer.input_layernorm, Unnamed()))
        ),
    ),
    "the head, by its tokens": ("llama", lambda: in_norm(WithManyTokens())),
    "the head's backward pass": ("llama", lambda: in_norm(InBackward())),
    "backward passes": (
        "llama",
        lambda: with_layers(lambda layer: setattr(layer, "mlp", nn.Sequential(layer.mlp, InBackward()))),
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_noise_of_any_kind_follows_the_seed_alone(source: str) -> None:
    """Not the caller's generator, nor what is kept; another seed and another step draw something else."""
    name, build = SOURCES[source]
    model, data = build(), [zoo.batch(name, seed=seed) for seed in (1, 2)]
    one, kept = host(model), host(model, activations="keep", lanes="adversarial")
    losses = []
    for seed, streamed in enumerate((one, kept)):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        losses.append(streamed.forward_backward(data).loss)
        assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    wanted = gradients(one)
    assert losses[0] == losses[1] and same(gradients(kept), wanted)
    other = host(model, seed=1)
    other.forward_backward(data)
    assert not same(gradients(other), wanted), "the seed has an effect"
    one.state_was_replaced(1)
    one.forward_backward(data)
    assert not same(gradients(one), wanted), "another step, other noise"


@pytest.mark.parametrize("source", ["dbrx, 8 experts", "stochastic depth"])
def test_without_replay_other_tensors_are_saved(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: tokens reach other experts and parts are left out elsewhere, which torch refuses."""
    without_replay(monkeypatch)
    name, build = SOURCES[source]
    torch.manual_seed(0)
    with pytest.raises(CheckpointError):
        host(build()).forward_backward([zoo.batch(name)])


@pytest.mark.parametrize("source", ["dbrx, attention", "the head, by its tokens"])
def test_a_model_that_goes_on_draws_as_if_it_had_not_stopped(source: str) -> None:
    """Weights are all the state that this optimizer has."""
    name, build = SOURCES[source]
    steps = [[zoo.batch(name, seed=seed)] for seed in (1, 2)]
    model = build()
    whole = host(model, optim="sgd", sgd_momentum=0.0)
    whole.train_step(steps[0], lr=0.1)
    stopped = dict(whole.named_parameters())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(stopped[key])
    resumed = host(model, optim="sgd", sgd_momentum=0.0)
    resumed.state_was_replaced(1)
    torch.manual_seed(7)
    assert resumed.train_step(steps[1], lr=0.1) == whole.train_step(steps[1], lr=0.1)
    assert same(dict(resumed.named_parameters()), dict(whole.named_parameters()))


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
