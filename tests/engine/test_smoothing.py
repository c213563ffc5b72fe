"""label_smoothing_factor: gradients of transformers' LabelSmoother, exactly normalised over a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

import horizon_lm as hz
import zoo
from horizon_lm.errors import ConfigError
from horizon_lm.plan.outline import Outline
from plain_gradients import plain, relative, stream

pytestmark = pytest.mark.usefixtures("one_thread")

# Plain; tied to the table; soft-capped logits; scaled logits.
MODELS = ["llama", "gpt2", "gemma2", "cohere"]


def smoothed(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]], epsilon: float) -> Any:
    """Loss and gradients by transformers on full logits, normalised over all batches as its Trainer does."""
    model.zero_grad()
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits.float()
        loss = LabelSmoother(epsilon)({"logits": logits}, batch["labels"], True, count)
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def batches_of(name: str) -> list[dict[str, torch.Tensor]]:
    """Two micro-batches with different numbers of targets."""
    first, second = zoo.batch(name), zoo.batch(name)
    second["labels"] = second["labels"].clone()
    second["labels"][:, : second["labels"].shape[1] // 2] = -100
    second["input_ids"] = second["input_ids"].flip(1).contiguous()
    return [first, second]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [3, 128])
def test_gradients_are_those_of_transformers(name: str, chunk: int) -> None:
    model, batches = zoo.build(name), batches_of(name)
    host = stream(model, label_smoothing_factor=0.1, loss_chunk_tokens=chunk)
    found = host.forward_backward(batches)
    loss, gradients = smoothed(model, batches, 0.1)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    streamed = dict(host.named_gradients())
    norm = sum(float(g.double().norm() ** 2) for g in gradients.values()) ** 0.5
    for parameter, gradient in gradients.items():  # fp32 in another order of summation: 1e-5
        apart = float((streamed[parameter].double() - gradient.double()).norm())
        assert apart < 1e-5 * float(gradient.double().norm()) + 1e-7 * norm, parameter
    # The control: without smoothing the gradients are others.
    other = smoothed(model, batches, 0.0)[1]
    assert max(relative(other[n], g) for n, g in gradients.items()) > 0.01


def test_gradients_in_bf16() -> None:
    """As far from transformers' smoothing of fp32 logits as bf16 gradients round: 3e-3 with one chunk."""
    model = zoo.build("llama", dtype=torch.bfloat16)
    batch = [zoo.batch("llama")]
    host = stream(model, "bfloat16", label_smoothing_factor=0.1)
    found = host.forward_backward(batch)
    loss, gradients = smoothed(model, batch, 0.1)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    streamed = dict(host.named_gradients())
    assert max(relative(streamed[n], g) for n, g in gradients.items()) < 3e-3
    other = smoothed(model, batch, 0.0)[1]
    assert max(relative(other[n], g) for n, g in gradients.items()) > 0.01


def test_without_it_the_bits_are_those_of_plain_training() -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama")
    loss, gradients = plain(model, batch)
    host = stream(model, label_smoothing_factor=0.0)
    assert host.forward_backward([batch]).loss == loss
    assert all(torch.equal(gradients[n], g) for n, g in host.named_gradients())


def test_evaluation_is_not_smoothed_and_a_loss_of_ones_own_is_refused() -> None:
    batch = zoo.batch("llama")
    host = stream(zoo.build("llama"), label_smoothing_factor=0.3)
    assert host.evaluate([batch]).loss == stream(zoo.build("llama")).evaluate([batch]).loss
    assert host.forward_backward([batch]).loss != pytest.approx(host.evaluate([batch]).loss, rel=1e-5)
    with pytest.raises(ConfigError, match=r"label_smoothing_factor=0\.3 has no effect on a loss_fn"):
        host.forward_backward([batch], loss_fn=lambda log_probs, batch: -log_probs.mean())


@pytest.mark.parametrize("value", [-0.1, 1.0, "0.1", True])
def test_a_factor_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", label_smoothing_factor=value)


def test_the_plan_counts_its_memory() -> None:
    from horizon_lm.config import ModelSettings

    outline = Outline(zoo.build("llama").config, ModelSettings.from_dict({"device": "cpu"}))
    plainly, smoothly = (outline.measures(1, 16, 128, epsilon).ends.loss.bytes for epsilon in (0.0, 0.1))
    assert plainly <= smoothly < 2 * plainly
