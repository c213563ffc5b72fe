"""A layer that receives more than the output of the one before it is refused, never trained wrongly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
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
    "added between": (
        {"between": after(0, lambda o: o[-1] + 0.5)},
        "layer 1 receives something else than the output of layer 0",
    ),
    "added later": (
        {"between": after(1, lambda o: o[-1] + 0.5)},
        "layer 2 receives something else than the output of layer 1",
    ),
    "written into": ({"between": after(0, in_place)}, "the output of layer 0 is written into before layer 1"),
    "added at the end": (
        {"between": after(LAST, lambda o: o[-1] + 0.5)},
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


def host(model: Any) -> hz.HostModel:
    return hz.HostModel.from_pretrained(
        copy.deepcopy(model), device="cpu", dtype="float32", skip_memory_check=True
    )


def differing(model: Any, data: dict[str, torch.Tensor]) -> set[str]:
    """Names of parameters whose streamed gradient differs from ordinary autograd's in any bit."""
    model.zero_grad()
    model(**data, use_cache=False).loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    streamed = host(model)
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


def picture_model() -> nn.Module:
    """A small Qwen3-VL that is given one picture's features, as transformers takes them."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 96}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=TRIGGER)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config)
    features = torch.randn(2, 1, 32)
    forward = model.forward

    def with_picture(
        input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        pictures: dict[str, Any] = {}
        if (input_ids == TRIGGER).any():
            pictures["image"] = BaseModelOutputWithDeepstackFeatures(
                pooler_output=[features[0]], deepstack_features=[[features[1]]]
            )
        return forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            mm_encoder_outputs=pictures,
            **kwargs,
        )

    model.forward = with_picture  # type: ignore[method-assign]
    return model.train()


def test_additions_of_qwen3_vl_are_refused() -> None:
    zoo.need("pictures given as features")
    model = picture_model()
    values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True}
    plain = model(**batch(True), use_cache=False).loss
    assert torch.isfinite(plain)
    streamed = hz.HostModel.from_pretrained(model, **values)
    streamed.forward_backward([batch(False)])
    with pytest.raises(UnsupportedModelError, match="layer 1 receives something else than the output of la"):
        streamed.forward_backward([batch(True)])
