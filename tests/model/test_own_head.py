"""The head's own modules: found where they are all that runs after the layers, and the whole forward else.

That they give the same bits in every architecture is asserted in `engine/test_gradients.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

import zoo
from horizon_lm.model import head as head_module
from horizon_lm.model.anatomy import analyse
from horizon_lm.model.head import find_head
from plain_gradients import plain, stream

pytestmark = pytest.mark.usefixtures("one_thread")

Ending = Callable[[LlamaModel, BaseModelOutputWithPast], Any]


class _Base(LlamaModel):
    ending: Ending | None = None
    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        output = super().forward(*args, **kwargs)
        return output if self.ending is None else self.ending(self, output)


class _Model(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = _Base(config)
        self.post_init()


def _build(ending: Ending | None = None, norm: Callable[[nn.Module], nn.Module] | None = None) -> _Model:
    torch.manual_seed(0)
    model = _Model(zoo.CASES["llama"].config())
    model.model.ending = ending
    if norm is not None:
        model.model.norm = norm(model.model.norm)
    return model.train()


def _doubled(base: LlamaModel, output: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
    return BaseModelOutputWithPast(last_hidden_state=output.last_hidden_state * 2)


def _with_more(base: LlamaModel, output: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
    hidden = output.last_hidden_state
    return BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=(hidden,))


def _written(base: LlamaModel, output: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
    output.last_hidden_state.mul_(2)
    return output


def _viewed(base: LlamaModel, output: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
    hidden = output.last_hidden_state
    return BaseModelOutputWithPast(last_hidden_state=hidden.view(hidden.shape))


def _tuple(base: LlamaModel, output: BaseModelOutputWithPast) -> tuple:
    return BaseModelOutputWithPast(last_hidden_state=output.last_hidden_state, past_key_values=None)


class _Two(nn.Module):
    """Two modules in one, which counts as one."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, nn.Linear(32, 32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(hidden)) * 0.5


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "as it is": ({}, True),
    "a view at the end": ({"ending": _viewed}, True),
    "another output": ({"ending": _tuple}, True),
    "a module of modules": ({"norm": _Two}, True),
    "scaled at the end": ({"ending": _doubled}, False),
    "written into": ({"ending": _written}, False),
    "a second output": ({"ending": _with_more}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_found_or_not_the_gradients_are_the_same(case: str) -> None:
    changes, is_found = CASES[case]
    model, batch = _build(**changes), zoo.batch("llama")
    loss, gradients = plain(model, batch)
    host = stream(model, loss_chunk_tokens=8)  # 5 chunks
    assert (host.skeleton.own_head is not None) == is_found
    base = host.skeleton.model.model
    base.calls = 0
    out = host.forward_backward([batch])
    assert base.calls >= 5 if not is_found else base.calls <= 2  # at most the prologue, forward and backward
    assert out.loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in host.named_gradients():
        assert torch.allclose(gradient, gradients[name], rtol=1e-4, atol=1e-7), name


def test_a_head_that_draws_keeps_its_numbers() -> None:
    """Dropout after the norm would draw other numbers without the embeddings' dropout before it."""
    model = _build(norm=lambda norm: nn.Sequential(norm, nn.Dropout(0.5)))
    assert stream(model).skeleton.own_head is None
    assert stream(_build(norm=lambda norm: nn.Sequential(norm, nn.Dropout(0.0)))).skeleton.own_head


def test_another_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a chain that leaves out the norm is not taken for the head."""
    honest = head_module._gives

    def without_norm(found: Any, *args: Any) -> bool:
        return honest(replace(found, chain=()), *args)

    monkeypatch.setattr(head_module, "_gives", without_norm)
    assert stream(_build()).skeleton.own_head is None


def test_modules_are_left_as_they_were() -> None:
    model = _build()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    state = torch.get_rng_state()
    cut = analyse(model)
    assert torch.equal(state, torch.get_rng_state())
    found = find_head(model, cut)
    assert found is not None and [type(m).__name__ for m in found.chain] == ["LlamaRMSNorm"]
    assert torch.equal(state, torch.get_rng_state())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
