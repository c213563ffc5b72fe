"""Every architecture that trains can be planned from its configuration, or is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import zoo
from horizon_lm.config import ModelSettings
from horizon_lm.errors import UnsupportedModelError
from horizon_lm.optim.gradients import add_gradients
from horizon_lm.plan.fit import largest_that_fits
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.work import WorkMeter

# As in training (tests/engine/test_gradients.py).
NOT_STREAMED = {
    "rwkv": "second activation",
    "bamba-z_loss": "",
    "inkling_text": "parameters besides the table",
}


pytestmark = pytest.mark.usefixtures("one_thread")


def outline_of(name: str) -> Outline:
    case = zoo.CASES[name]
    chosen = {"dtype": "float32", "attn_implementation": case.attn}
    return Outline(case.config(), ModelSettings(device="cpu", **chosen))


@pytest.mark.parametrize("name", [n for n in zoo.CASES if n not in NOT_STREAMED])
def test_what_trains_is_planned(name: str) -> None:
    zoo.need(f"{name} planned")
    outline = outline_of(name)
    measures = outline.measures(1, zoo.WINDOW + 4, 128)  # longer than a window; xlstm cuts chunks of 4
    assert len(measures.layers) == len(set(outline.kind_of))
    for layer in measures.layers:
        assert layer.recomputed.forward.work and layer.recomputed.backward.work and layer.boundary > 0
    assert measures.ends.loss.work


def test_what_cannot_be_planned_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    outline = outline_of("llama")
    monkeypatch.setattr(type(outline.built.skeleton.layers[0]), "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(UnsupportedModelError, match="llama cannot be run without its weights") as caught:
        outline.measures(1, 20, 128)
    assert caught.value.hint is not None and "skip_memory_check" in caught.value.hint


def test_experts_that_ask_for_values_get_an_even_share() -> None:
    """A token goes to two of four experts, so twice as many tokens take about twice the arithmetic, and far
    less than if every expert took them all."""
    flops = {}
    for tokens in (64, 128):
        layer = outline_of("dbrx").measures(1, tokens, 128).layers[0]
        flops[tokens] = sum(
            k.flops * n for k, n in layer.recomputed.forward.work.items() if k.kind == "matmul"
        )
    assert 1.8 < flops[128] / flops[64] < 2.2
    mixtral = outline_of("mixtral").measures(1, 128, 128).layers[0]
    other = sum(k.flops * n for k, n in mixtral.recomputed.forward.work.items() if k.kind == "matmul")
    assert 0.3 < flops[128] / other < 3


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("limit", [0, 1, 3, 100, 5_000, 10**6])
def test_the_largest_is_found_in_few_looks(power: int, limit: int) -> None:
    """Memory that grows like n or n squared beside a part that does not; at most 16 looks up to 131072."""
    looks = []

    def room_bytes(n: int) -> int:
        looks.append(n)
        return 1000 * (limit**power - n**power) + (0 if limit else -1)

    found = largest_that_fits(room_bytes, 1, 1 << 17)
    wanted = min(limit, 1 << 17)
    assert found <= wanted <= found + max(1, found // 10)
    assert len(looks) <= 16


def test_a_gradient_that_is_added_is_one_pass_in_a_plan() -> None:
    """Reads it and the sum, writes the sum; in pieces it would be thousands of operations."""
    with FakeTensorMode(), WorkMeter() as meter:
        total, gradient = torch.empty(1 << 20), torch.empty(1 << 20, dtype=torch.bfloat16)
        add_gradients(total, gradient, gradient, begins=False)
    work = meter.take()
    assert sum(work.values()) == 2 and next(iter(work)).bytes == (1 << 20) * (4 + 4 + 2)
