"""Evaluation gives the loss of transformers; a loss function of the user's gets the gradient of autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import zoo
from horizon_lm.errors import ConfigError, DataError
from policy_models import batches, gradients, host, source

pytestmark = pytest.mark.usefixtures("one_thread")


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
