"""A layer receives the output of the one before it, with something added or not; all else is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

import horizon_lm as hz
import zoo
from horizon_lm.errors import UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")

TRIGGER = 7  # the token that stands for a picture: without it the model is a plain one
Between = Callable[[list[torch.Tensor], int], torch.Tensor]


class _Stack(LlamaModel):
    """A decoder whose forward does something more around its layers when the input holds TRIGGER."""

    between: Any = None
    order: Any = None
    late_mask = False
    always = False

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        seen = self.always or bool((input_ids == TRIGGER).any())
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.rotary_emb(hidden, positions)
        outputs = [hidden]
        order = self.order if seen and self.order is not None else range(len(self.layers))
        for i in order:
            hidden = self.layers[i](hidden, position_embeddings=rotary, position_ids=positions)
            outputs.append(hidden)
            if seen and self.late_mask:
                rotary[0].mul_(1.1)
            if seen and self.between is not None:
                hidden = self.between(outputs, i)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class Stacked(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = _Stack(config)
        self.post_init()


def build(**attributes: Any) -> Stacked:
    torch.manual_seed(0)
    model = Stacked(zoo.CASES["llama"].config())
    for name, value in attributes.items():
        setattr(model.model, name, value)
    return model.train()


def batch(trigger: bool) -> dict[str, torch.Tensor]:
    ids = zoo.batch("llama")["input_ids"].clone()
    ids[ids == TRIGGER] = TRIGGER + 1
    ids[0, 3] = TRIGGER if trigger else TRIGGER + 1
    return {"input_ids": ids, "labels": ids.clone()}


def after(layer: int, change: Callable[[list[torch.Tensor]], torch.Tensor]) -> Between:
    return lambda outputs, i: change(outputs) if i == layer else outputs[-1]


def in_place(outputs: list[torch.Tensor]) -> torch.Tensor:
    outputs[-1][:, 3] += 0.5
    return outputs[-1]


LAST = 3
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "scaled between": (
        {"between": after(0, lambda o: o[-1] * 1.5)},
        "layer 1 receives something else than the output of layer 0, and it is not that output with",
    ),
    "scaled a little": (
        {"between": after(1, lambda o: o[-1] * (1 + 2e-7) + 0.5)},
        "layer 2 receives something else than the output of layer 1, and it is not that output with",
    ),
    "an earlier layer added": (
        {"between": after(1, lambda o: o[-1] + o[1])},
        "layer 2 receives something else than the output of layer 1, and it is not that output with",
    ),
    "embeddings added": (
        {"between": after(1, lambda o: o[-1] + o[0])},
        "layer 2 receives something else than the output of layer 1",
    ),
    "something of another shape": (
        {"between": after(1, lambda o: o[-1].expand(2, *o[-1].shape)[0][:1])},
        "layer 2 receives something else than the output of layer 1",
    ),
    "written into": ({"between": after(0, in_place)}, "the output of layer 0 is written into before layer 1"),
    "scaled at the end": (
        {"between": after(LAST, lambda o: o[-1] * 1.5)},
        "the head receives something else than the output of layer 3",
    ),
    "written into at the end": (
        {"between": after(LAST, in_place)},
        "the output of layer 3 is written into before the head",
    ),
    "mean of all layers": (
        {"between": after(LAST, lambda o: torch.stack(o).mean(0))},
        "the head receives something else",
    ),
    "skipped": ({"order": [0, 2, 3]}, "layer 2 runs after layer 0"),
    "last one skipped": ({"order": [0, 1, 2]}, "3 of its 4 layers are run|after layer 2"),
    "run twice": ({"order": [0, 1, 1, 2, 3]}, "layer 1 runs after layer 1"),
    "all run twice": ({"order": [0, 1, 2, 3, 0, 1, 2, 3]}, "layer 0 runs after layer 3|after layer 3"),
    "arguments written into": ({"late_mask": True}, "layer 0 receives besides hidden states is written into"),
}


def host(model: Any, **settings: Any) -> hz.HostModel:
    return hz.HostModel.from_pretrained(
        copy.deepcopy(model), device="cpu", dtype="float32", skip_memory_check=True, **settings
    )


def differing(model: Any, data: dict[str, torch.Tensor], **settings: Any) -> set[str]:
    """Names of parameters whose streamed gradient differs from ordinary autograd's in any bit."""
    model.zero_grad()
    model(**data, use_cache=False).loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    streamed = host(model, **settings)
    streamed.forward_backward([data])
    found = dict(streamed.named_gradients())
    assert set(wanted) <= set(found)  # else nothing would be compared
    return {n for n, g in found.items() if not torch.equal(g, wanted.get(n, torch.zeros_like(g)))}


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(name: str) -> None:
    attributes, reason = CASES[name]
    model = build(**attributes)
    streamed = host(model)  # what triggers it is not in the three tokens of the analysis
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        streamed.forward_backward([batch(True)])
    assert "llama" in str(caught.value)
    assert "hint" in str(caught.value)
    streamed.forward_backward([batch(False)])  # and the model is as it was
    assert not differing(model, batch(False))


def test_what_is_always_done_is_refused_at_once() -> None:
    """In-place work between layers, where autograd would not object to it."""

    def quietly(outputs: list[torch.Tensor], i: int) -> torch.Tensor:
        with torch.no_grad():
            return outputs[-1].add_(0.5)

    model = build(between=quietly, always=True)
    with pytest.raises(UnsupportedModelError, match="something runs between decoder layers"):
        host(model)


def test_a_model_that_does_nothing_of_it_is_streamed() -> None:
    """Negative control: the same class without additions gives autograd's bits, with the trigger as well."""
    assert not differing(build(), batch(True))
    assert not differing(build(between=lambda outputs, i: outputs[-1]), batch(True))


def some_rows(outputs: list[torch.Tensor]) -> torch.Tensor:
    """As Qwen3-VL adds features of pictures."""
    places = torch.zeros(outputs[-1].shape[:2], dtype=torch.bool)
    places[0, 3:5] = True
    hidden = outputs[-1].clone()
    hidden[places] = hidden[places] + torch.linspace(-1, 1, hidden.shape[-1])
    return hidden


ADDITIONS = {
    "after the first": after(0, lambda o: o[-1] + 0.5),
    "after the second": after(1, some_rows),
    "after all but the last": lambda outputs, i: some_rows(outputs) if i < LAST else outputs[-1],
    "after the last": after(LAST, some_rows),
}


@pytest.mark.parametrize("where", ADDITIONS)
@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_additions_have_the_bits_of_autograd(where: str, activations: str) -> None:
    model = build(between=ADDITIONS[where])
    assert not differing(model, batch(True), activations=activations)
    assert not differing(model, batch(False), activations=activations)


def test_without_its_additions_a_model_trains_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: layers that run without what is added to their outputs give other gradients."""
    model = build(between=ADDITIONS["after all but the last"])
    monkeypatch.setattr("horizon_lm.model.prologue._find_added", lambda *args: {})
    assert len(differing(model, batch(True))) > 30
