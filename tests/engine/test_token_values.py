"""Token values and gradients of losses made from them are TRL's; the head runs no more often than needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trl.trainer.utils import add_fused_lm_head

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from horizon_lm.engine import engine, loss
from horizon_lm.engine.loss import VALUES
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.memory.live import LiveBytes
from policy_models import gradients, host, same, source

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURES = [1.0, 0.7]
MODELS = ["llama", "qwen3", "gemma2", "mixtral-aux"]  # gemma2: soft-capped logits


def entropy_weighted(values: Any, batch: dict[str, torch.Tensor]) -> Any:
    """A loss in which every value takes part. values: ours, or TRL's output."""
    weight = values.entropy.detach() + values.mean_logits + values.log_sum_sq_probs - values.is_top1.float()
    return -(weight * values.log_probs).mean(), {"entropy": values.entropy.mean()}


# As TRL computes them.


class Theirs:
    """TRL's fused head on the plain model, and its way to divide by the micro-batches of a step."""

    def __init__(self, name: str, temperature: float) -> None:
        self.model = source(name)
        add_fused_lm_head(self.model, temperature, outputs=VALUES)

    def values(self, batch: dict[str, torch.Tensor]) -> Any:
        return self.model(**batch, fused_lm_head=True)

    def gradients(self, data: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        for batch in data:
            out = self.values(batch)
            total = entropy_weighted(out, batch)[0]
            if out.aux_loss is not None:
                total = total + self.model.config.router_aux_loss_coef * out.aux_loss
            (total / len(data)).backward()
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def ours(model: hz.HostModel, data: list[Any], temperature: float) -> dict[str, torch.Tensor]:
    def function(values: Any, batch: dict[str, torch.Tensor]) -> Any:
        total, metrics = entropy_weighted(values, batch)
        return total / len(data), metrics

    weight = 1 / len(data)
    loss_fn = hz.TokenLoss(function, VALUES, temperature, router_weight=weight)
    model.forward_backward(data, loss_fn)
    return gradients(model)


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a gradient."""
    assert found.keys() == wanted.keys()
    kept = {name for name, value in wanted.items() if value.norm() > 1e-6}
    assert len(kept) > len(wanted) / 2
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in kept)


def two(name: str) -> list[dict[str, torch.Tensor]]:
    """Micro-batches with different numbers of targets, every third one of which is the likeliest token."""
    data = [zoo.batch(name, kind="padded", seed=1), zoo.batch(name, batch_size=1, seed=2)]
    model = source(name)
    for batch in data:
        given = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            likeliest = model(**given, use_cache=False).logits[:, :-1].argmax(-1)
        targets = batch["labels"][:, 1:]
        targets[:, ::3] = torch.where(targets == -100, -100, likeliest)[:, ::3]
    return data


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_trl(name: str, temperature: float) -> None:
    data = two(name)
    model = host(name, "adversarial", loss_chunk_tokens=7)
    out = model.evaluate(data, values=VALUES, temperature=temperature, return_log_probs=True)
    theirs = Theirs(name, temperature)
    assert out.values is not None and out.log_probs is not None
    for batch, found, log_probs in zip(data, out.values, out.log_probs, strict=True):
        with torch.no_grad():
            wanted = theirs.values(batch)
        ignored = batch["labels"][:, 1:] == -100
        assert torch.equal(found.log_probs, log_probs) and found.is_top1.any() and not found.is_top1.all()
        assert torch.equal(found.is_top1, wanted.is_top1) and found.is_top1.dtype == torch.bool
        for key in VALUES:
            value, other = getattr(found, key), getattr(wanted, key)
            assert value.shape == ignored.shape and value.device.type == "cpu"
            assert not value[ignored].any()
            assert torch.allclose(value.float(), other.float(), rtol=1e-5, atol=1e-5), key
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data)
    assert out.loss == pytest.approx(-sum(float(p.sum()) for p in out.log_probs) / targets, rel=1e-6)
    assert worst(ours(model, data, temperature), theirs.gradients(data)) < 1e-4


@pytest.mark.parametrize("name", ["llama", "mixtral-aux"])
def test_a_wrong_temperature_or_weight_is_seen(name: str) -> None:
    """Negative controls of the comparison."""
    data, theirs = two(name), Theirs(name, 0.7)
    wanted = theirs.gradients(data)
    model = host(name)
    assert worst(ours(model, data, 0.77), wanted) > 1e-2
    found = model.evaluate(data[:1], values=VALUES, temperature=0.77).values
    with torch.no_grad():
        other = theirs.values(data[0])
    assert found is not None
    for key in set(VALUES) - {"is_top1"}:
        assert not torch.allclose(getattr(found[0], key), getattr(other, key), rtol=1e-2, atol=1e-2), key
    if name == "mixtral-aux":  # by the shares of the targets, the default
        loss_fn = hz.TokenLoss(lambda v, b: entropy_weighted(v, b)[0] / 2, VALUES, 0.7)
        model.forward_backward(data, loss_fn)
        assert worst(gradients(model), wanted) > 1e-3


def test_the_routers_loss_is_reported() -> None:
    data = two("mixtral-aux")
    theirs, model = Theirs("mixtral-aux", 1.0), host("mixtral-aux")
    with torch.no_grad():
        wanted = [float(theirs.values(batch).aux_loss) for batch in data]
    one = model.forward_backward(data, hz.TokenLoss(lambda v, b: 0 * v.log_probs.sum(), router_weight=0.5))
    coefficient = model.config.router_aux_loss_coef
    assert [value / coefficient for value in one.router_losses] == pytest.approx(wanted, rel=1e-5)
    assert one.loss == pytest.approx(sum(one.router_losses) / 2, rel=1e-5)
    assert model.train_step(data, lr=0.0).router_losses == pytest.approx(one.router_losses, rel=1e-6)
    plain, out = model.evaluate(data), model.evaluate(data, return_router_losses=True)
    assert out.router_losses == pytest.approx(one.router_losses, rel=1e-6)
    assert plain.router_losses == [] and plain.loss == out.loss
    assert host("llama").forward_backward([zoo.batch("llama")]).router_losses == []


# What is asked for.


def test_only_what_is_asked_for() -> None:
    model, batch, seen = host("llama"), zoo.batch("llama"), []

    def function(values: hz.TokenValues, given: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(values)
        return -values.log_probs.sum()

    model.forward_backward([batch], hz.TokenLoss(function, values=["is_top1"]))
    names = [name for name in VALUES if getattr(seen[0], name) is not None]
    assert names == ["log_probs", "is_top1"] and not seen[0].is_top1.requires_grad
    plain = model.evaluate([batch])
    assert plain.values is None and plain.log_probs is None
    some = model.evaluate([batch], values=("log_probs",))
    assert some.values is not None and some.values[0].entropy is None and some.log_probs is None
    assert some.loss == plain.loss


def test_a_token_loss_of_log_probs_is_the_plain_one() -> None:
    model, data = host("llama", loss_chunk_tokens=7), two("llama")
    out = model.forward_backward(data, lambda p, b: (-p.mean(), {"sum": p.sum()}))
    wanted = gradients(model)
    own = model.forward_backward(
        data, hz.TokenLoss(lambda v, b: (-v.log_probs.mean(), {"sum": v.log_probs.sum()}))
    )
    assert own == out and same(gradients(model), wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: m.evaluate(d, values="entropy"), r"evaluate\(\): values: 'entropy'"),
        (lambda m, d: m.evaluate(d, values=["entropi"]), r"evaluate\(\): values: 'entropi'"),
        (lambda m, d: m.evaluate(d, temperature=0.0), r"evaluate\(\): temperature=0"),
        (lambda m, d: hz.TokenLoss(print, temperature=float("nan")), "TokenLoss: temperature=nan"),
        (lambda m, d: hz.TokenLoss(print, ("logits",)), "TokenLoss: values: 'logits'"),
        (lambda m, d: hz.TokenLoss("mse"), "TokenLoss: function is a str"),  # type: ignore[arg-type]
        (
            lambda m, d: m.forward_backward(d, hz.TokenLoss(lambda v, b: v.entropy.sum(), ("entropy",))),
            "depend",
        ),
    ],
)
def test_what_cannot_be_asked_for(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(host("llama"), [zoo.batch("llama")])


def test_evaluation_can_leave_the_tensors_of_a_loss_aside() -> None:
    model, batch = host("llama"), zoo.batch("llama")
    extra = batch | {"documents": torch.zeros(3, 3), "rows": ["text", "more"], "absent": None}
    assert model.evaluate([extra], ignore_extra=True) == model.evaluate([batch])
    with pytest.raises(DataError, match="unknown keys"):
        model.evaluate([extra])


# One forward of the head less.


def two_passes(
    loss_fn: Any, batch: dict[str, torch.Tensor], chunk: int, metrics: dict[str, Any]
) -> loss.HeadLoss:
    """The plain formula: all chunks forward, the user's loss, all chunks again with their gradients."""

    def head_loss(skeleton: Any, hidden: torch.Tensor, targets: torch.Tensor, draws: Any) -> Any:
        flat, wanted = hidden.flatten(0, 1), targets.flatten()
        places = [slice(start, start + chunk) for start in range(0, len(flat), chunk)]

        def log_probs(piece: torch.Tensor, place: slice) -> torch.Tensor:
            return -F.cross_entropy(
                loss.run_head(skeleton, piece).float(), wanted[place], ignore_index=-100, reduction="none"
            )

        with draws(), torch.no_grad():
            found = torch.cat([log_probs(flat[place].detach(), place) for place in places])
        leaf = found.view(targets.shape)[:, :-1].requires_grad_()
        total, more = loss_fn(leaf, batch)
        metrics.update(more)
        total.backward()
        outer, gradient = F.pad(leaf.grad, (0, 1)).flatten(), torch.zeros_like(flat)
        with draws():
            for place in places:
                piece = flat[place].detach().requires_grad_()
                log_probs(piece, place).backward(outer[place])
                gradient[place] = piece.grad
        return total.detach(), gradient.view_as(hidden)

    return head_loss


class Noise(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + 0.5 * torch.rand_like(hidden)) if self.training else hidden


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each run of the head."""
    runs: list[int] = []
    run_head = loss.run_head

    def count(skeleton: Any, hidden: torch.Tensor) -> torch.Tensor:
        runs.append(len(hidden))
        return run_head(skeleton, hidden)

    monkeypatch.setattr(loss, "run_head", count)
    return runs


def weighted(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> Any:
    return -(log_probs.exp() * log_probs).mean(), {"sum": log_probs.detach().sum()}


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_one_kept_graph_changes_no_bit(
    chunks: int, dtype: str, noisy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that draws random numbers keeps none: its chunks must draw in order."""
    data = [zoo.batch("llama", batch_size=2, length=20, seed=m) for m in range(2)]
    runs = counted(monkeypatch)

    def run() -> tuple[Any, dict[str, torch.Tensor], int]:
        model = source("llama")
        if noisy:
            model.model.norm = nn.Sequential(model.model.norm, Noise())
        host = from_pretrained(
            model, device="cpu", dtype=dtype, skip_memory_check=True, loss_chunk_tokens=40 // chunks
        )
        runs.clear()
        return host.forward_backward(data, weighted), gradients(host), len(runs)

    out, found, count = run()
    monkeypatch.setattr(engine, "custom", two_passes)
    plain, wanted, twice = run()
    assert (out, twice) == (plain, 2 * 2 * chunks) and same(found, wanted)
    assert count == (twice if noisy else twice - 2)


def test_a_kept_graph_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are most of the step's memory; those of all tokens are 8 times a chunk's."""
    config = zoo.CASES["llama"].config()
    config.vocab_size, config.num_hidden_layers = 4096, 1
    data = [zoo.batch("llama", batch_size=4, length=32)]

    def peak(chunk: int, loss_fn: Any) -> int:
        model = hz.HostModel.from_config(config, None, "cpu", "float32", loss_chunk_tokens=chunk)
        model.forward_backward(data, loss_fn)  # makes buffers that stay
        with LiveBytes() as live:
            model.forward_backward(data, loss_fn)
        return live.peak

    all_values = hz.TokenLoss(lambda v, b: weighted(v.log_probs, b), VALUES, temperature=0.7)
    kept, with_values, one_chunk = peak(16, weighted), peak(16, all_values), peak(128, weighted)
    monkeypatch.setattr(engine, "custom", two_passes)
    logits = 4 * 16 * 4096
    assert max(kept, with_values) < peak(16, weighted) + 0.05 * logits
    assert one_chunk > kept + 10 * logits
