"""FLOPs of a step with an adapter: of the model, against torch's counter on a PeftModel, and as executed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

import horizon_lm as hz
import zoo
from horizon_lm.config import ModelSettings
from horizon_lm.memory.layout import Parameter
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.work import MATMUL
from horizon_lm.report.flops import ModelFlops, flops_of, model_flops

pytestmark = pytest.mark.usefixtures("one_thread")

RANK, TOKENS = 4, 48
LORA: dict[str, Any] = {"adapter": "lora", "lora_r": RANK}
QKV = ("q_proj", "k_proj", "v_proj")
# name: model, settings, products of attention that have no gradient in the lowest layer
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "all linear layers": ("llama", {}, 0),
    "two modules": ("llama", {"target_modules": ["q_proj", "v_proj"]}, 1),  # the keys are those of the base
    "with the output layer": ("llama", {"modules_to_save": ["lm_head"]}, 0),
    "attention beside experts": ("mixtral", {"target_modules": [*QKV, "o_proj"]}, 0),
}


def outline_of(name: str, **values: Any) -> Outline:
    settings = ModelSettings(device="cpu", dtype="float32", attn_implementation="eager", **values)
    return Outline(zoo.CASES[name].config(), settings)


def whole(outline: Outline) -> ModelFlops:
    found = outline.count()
    assert found is not None
    return model_flops(outline.units, found, embedding_trainable=outline.embedding_trainable)


def grouped(a: torch.Size, b: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Rows of `a` are shared out among the matrices of `b`."""
    return 2 * math.prod(a) * b[-1]


def by_torch(name: str, values: dict[str, Any]) -> int:
    """FLOPs of a forward and backward pass of the PeftModel, as torch counts them."""
    targets = values.get("target_modules", "all-linear")
    config = LoraConfig(r=RANK, target_modules=targets, modules_to_save=values.get("modules_to_save"))
    model = get_peft_model(zoo.build(name, attn_implementation="eager"), config)
    ids = torch.randint(3, zoo.VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    mapping = {torch.ops.aten._grouped_mm: grouped}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def matrices(outline: Outline) -> Iterator[tuple[int, Parameter, float]]:
    """(unit, parameter, how often it multiplies a token) of what torch counts, which are no vectors."""
    found = outline.count()
    assert found is not None
    for u, unit in enumerate(outline.units[: outline.head + 1]):
        layer = found.layers[found.kind_of[u - 1]] if 0 < u < outline.head else None
        for place, p in enumerate(unit.parameters):
            if len(p.shape) > 1 and p.name not in found.lookups:
                yield u, p, 1.0 if layer is None else layer.visits[place]


def is_at_entry(unit: int, parameter: Parameter) -> bool:
    """Whether it multiplies the lowest layer's input, which needs no gradient in the PeftModel."""
    return unit == 1 and any(word in parameter.name for word in QKV) and "lora_B" not in parameter.name


@pytest.mark.parametrize("case", CASES)
def test_flops_with_an_adapter_are_those_that_torch_counts(case: str) -> None:
    """Four for a frozen weight and a token, six for a trained one. The gradient of the lowest layer's input,
    which the engine computes, is in ours."""
    name, values, products = CASES[case]
    outline = outline_of(name, **LORA | values)
    found, flops = outline.count(), whole(outline)
    assert found is not None
    rows = list(matrices(outline))
    vectors = {p.name for unit in outline.units for p in unit.parameters} - {p.name for _, p, _ in rows}
    of_matrices = sum(p.numel * visits * (4 + 2 * p.trainable) for _, p, visits in rows)
    of_vectors = sum(
        4 * p.numel
        for unit in outline.units
        for p in unit.parameters
        if p.name in vectors - set(found.lookups)
    )
    assert flops.per_token == pytest.approx(of_matrices + of_vectors, rel=1e-12)
    attention = sum(3 * pair.flops for kind in found.kind_of for pair in found.layers[kind].pairs)
    assert flops.per_square == attention / 2  # of causal attention, which is half
    entry = 2 * sum(p.numel for u, p, _ in rows if is_at_entry(u, p)) * TOKENS
    entry += products * 2 * TOKENS**2 * 32  # heads of 4 x 8
    torchs = by_torch(name, values)
    assert of_matrices * TOKENS + attention * TOKENS**2 - entry == torchs
    full = sum(p.numel * visits * 6 for _, p, visits in rows)
    assert full * TOKENS + attention * TOKENS**2 > 1.2 * torchs  # the control: training all of it


def test_experts_with_an_adapter_are_visited_as_without() -> None:
    """It is added to the experts' weights before these multiply tokens, each of which visits two of four."""
    outline, plain = outline_of("mixtral", **LORA), outline_of("mixtral")
    visits = [
        {
            p.name.replace("base_layer.", ""): times
            for p, times in zip(one.units[1].parameters, one.count().layers[0].visits, strict=True)  # type: ignore[union-attr]
        }
        for one in (outline, plain)
    ]
    experts = {name: times for name, times in visits[1].items() if ".experts." in name}
    assert set(experts.values()) == {0.5}
    assert {name: visits[0][name] for name in experts} == experts
    assert outline.count().layers[0].states == plain.count().layers[0].states  # type: ignore[union-attr]


def test_a_frozen_weight_takes_four_flops_a_token_and_six_with_recomputation() -> None:
    """By the report, and as the planner executes it: forward, forward again, and the input's gradient."""
    llama = zoo.CASES["llama"].config()
    llama.hidden_size, llama.intermediate_size, llama.vocab_size = 512, 2048, 64
    values: dict[str, Any] = {"device": "cpu", "dtype": "float32", "attn_implementation": "eager"}
    outline = Outline(llama, ModelSettings(**values, adapter="lora", lora_r=1))
    layer = outline.units[1]
    frozen = sum(p.numel for p in layer.parameters if not p.trainable)
    assert layer.trainable_numel < 0.01 * frozen
    tokens = 64
    measured = outline.measures(1, tokens, 64).layers[0]

    def executed(policy: str) -> float:
        work = measured.under(policy).forward.work + measured.under(policy).backward.work
        return sum(k.flops * n for k, n in work.items() if k.kind == MATMUL) / tokens / frozen

    assert executed("recompute") == pytest.approx(6, rel=0.03)
    assert executed("keep") == pytest.approx(4, rel=0.03)
    per_token = whole(outline).per_token
    assert per_token / sum(u.numel for u in outline.units[1 : outline.head]) == pytest.approx(4, rel=0.03)
    full = Outline(llama, ModelSettings(**values))
    measured = full.measures(1, tokens, 64).layers[0]
    assert executed("keep") == pytest.approx(6, rel=0.03)  # the control, whose own gradients are computed too


def test_a_run_with_an_adapter_reports_the_flops_of_its_outline() -> None:
    settings = {"device": "cpu", "dtype": "float32", "attn_implementation": "eager"} | LORA
    model = hz.HostModel.from_pretrained(zoo.build("llama", attn_implementation="eager"), **settings)
    outline = outline_of("llama", **LORA)
    assert model.skeleton.units == outline.units
    assert flops_of(model) == whole(outline) != whole(outline_of("llama"))
