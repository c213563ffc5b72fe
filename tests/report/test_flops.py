"""FLOPs of a step: of every type of the zoo against torch's counter, and what it cannot see by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import horizon_lm as hz
import zoo
from horizon_lm.config import ModelSettings
from horizon_lm.data.collate import StepSize
from horizon_lm.plan.model_flops import Counted
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.outline_cache import OutlineCache
from horizon_lm.report.flops import UNKNOWN, ModelFlops, Span, flops_of, model_flops
from sizes import SOAK

pytestmark = pytest.mark.usefixtures("one_thread")

# As in training (tests/engine/test_gradients.py).
NOT_STREAMED = {"rwkv", "bamba-z_loss", "inkling_text"}
# Another loss of a type that is there, which a forward pass through the layers does not have.
TWINS = {name for name in zoo.CASES if name.endswith("-aux")}
# Computes all experts for all tokens, and multiplies by zero what the router did not choose.
ALL_EXPERTS = {"llama4_text"}
# 80 choices of random tokens go to experts without arithmetic as it happens, 0.2 of them on average, which is
# 16 with a deviation of 4; 20 tokens do not fill blocks of 8 keys.
NEAR = {"longcat_flash": 0.05, "deepseek_v4": 0.01}
# Theirs hold a pass over all pairs of blocks, which states do not need and ours leaves out.
NEAR |= dict.fromkeys(["mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h"], 0.1)
NEAR |= {"minimax": 0.2}  # 128 tokens are half a block, of which ours are full
# Loop over sequences, or over more blocks of 4 tokens than can be counted in seconds.
NOT_COUNTED = {"qwen4_exp_text", "xlstm"}
BLOCKS = 128


def outline_of(name: str, **changes: Any) -> Outline:
    case = zoo.CASES[name]
    config = case.config()
    for key, value in changes.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    return Outline(config, ModelSettings(device="cpu", dtype="float32", attn_implementation=case.attn))


def counted(outline: Outline) -> Counted:
    found = outline.count()
    assert found is not None
    return found


def whole(outline: Outline) -> ModelFlops:
    return model_flops(outline.units, counted(outline), embedding_trainable=True)


def grouped(a: torch.Size, b: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Rows of `a` are shared out among the matrices of `b`."""
    return 2 * math.prod(a) * b[-1]


def by_torch(name: str, length: int) -> int:
    """FLOPs of a forward pass of the true model on random tokens, as torch counts them."""
    model = zoo.build(name, attn_implementation="eager").requires_grad_(False)
    ids = torch.randint(3, zoo.VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    mapping = {torch.ops.aten._grouped_mm: grouped}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops()


def as_torch_counts(outline: Outline, length: int) -> float:
    """Ours of the same: all pairs of tokens, and no products with vectors."""
    found, total = counted(outline), 0.0
    for u, unit in enumerate(outline.units[: outline.head + 1]):
        layer = found.layers[found.kind_of[u - 1]] if 0 < u < outline.head else None
        for place, p in enumerate(unit.parameters):
            vector = len(p.shape) < 2 or p.name.endswith(("bias", "A_log"))
            vector |= outline.built.skeleton.is_norm(p.name)
            if not vector and p.name not in found.lookups:
                total += 2 * length * p.numel * (1 if layer is None else layer.visits[place])
        if layer is not None:
            total += layer.states * length + sum(pairs.flops * length**2 for pairs in layer.pairs)
    return total


# One of each way to compute; all in `make soak`.
SOME = [
    "llama",
    "gemma2",
    "gpt_neo",
    "mixtral",
    "deepseek_v3",
    "jetmoe",
    "longcat_flash",
    "mamba",
    "qwen3_next",
]
ALL = [n for n in zoo.CASES if n not in NOT_STREAMED | TWINS | ALL_EXPERTS | NOT_COUNTED]


@pytest.mark.parametrize("name", ALL if SOAK else SOME)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    tags = zoo.CASES[name].tags
    length = 20 if "dense" in tags or "hybrid" not in tags and "moe" in tags else BLOCKS
    outline = outline_of(name)
    ours, theirs = as_torch_counts(outline, length), by_torch(name, length)
    padded = "hybrid" in tags or "mamba" in name  # convolutions, of which theirs count the padding
    assert ours == pytest.approx(theirs, rel=NEAR.get(name, 1e-3 if padded else 1e-6))


# By hand, from the zoo's sizes: 4 layers (longcat_flash: 2 of two attentions each), 4 heads of 8; with latent
# attention 12 for queries and keys and 8 for values, so that d is 4 x (12 + 8) / 2 = 40.
# name: (L d of each kind of attention by (most keys, in chunks), share of an expert that a token visits)
BY_HAND: dict[str, tuple[dict[tuple[int | None, bool], int], float]] = {
    "llama": ({(None, False): 4 * 32}, 1),
    "mistral": ({(8, False): 4 * 32}, 1),
    "gemma3_text": ({(8, False): 2 * 32, (None, False): 2 * 32}, 1),
    "gpt_neo": ({(8, False): 2 * 32, (None, False): 2 * 32}, 1),
    "llama4_text": ({(8, True): 3 * 32, (None, False): 32}, 2 / 4),
    "mixtral": ({(None, False): 4 * 32}, 2 / 4),
    "dbrx": ({(None, False): 4 * 32}, 2 / 4),
    "aria_text": ({(None, False): 4 * 32}, 2 / 8),
    "jetmoe": ({(None, False): 4 * 32}, 2 / 4),
    "gemma4_text-moe": ({(8, False): 2 * 32, (None, False): 2 * 32}, 2 / 4),
    "deepseek_v3": ({(None, False): 4 * 40}, 2 / 4),
    "minicpm3": ({(None, False): 4 * 40}, 1),
    "kimi_linear": ({(None, False): 2 * 40}, 2 / 4),
    "qwen3_next": ({(None, False): 32}, 2 / 4),
    "mamba": ({}, 1),
}


@pytest.mark.parametrize("name", [name for name in BY_HAND if SOAK or name != "kimi_linear"])  # 16 s
def test_attention_and_experts_are_those_counted_by_hand(name: str) -> None:
    outline = outline_of(name)
    widths, share = BY_HAND[name]
    found = whole(outline)
    assert {(s.most, s.in_chunks): s.per_square for s in found.spans} == {k: 6 * v for k, v in widths.items()}
    layers = counted(outline)
    for u, kind in enumerate(layers.kind_of):
        for p, visits in zip(outline.units[u + 1].parameters, layers.layers[kind].visits, strict=True):
            is_expert = len(p.shape) == 3 and "conv" not in p.name or ".experts.mlp." in p.name
            if len(p.shape) > 1:  # a router's scales are looked up
                assert visits == pytest.approx(share if is_expert else 1), p.name


def test_experts_without_arithmetic_take_their_share_of_tokens() -> None:
    """longcat_flash: 2 of 5 experts for a token, 1 of them without; `gate_up_proj` has a place for all."""
    outline = outline_of("longcat_flash")
    layers = counted(outline)
    parameters = outline.units[1].parameters
    found = {p.name: v for p, v in zip(parameters, layers.layers[layers.kind_of[0]].visits, strict=True)}
    experts = {name: visits for name, visits in found.items() if visits < 1}
    assert experts and {name.rpartition(".")[2]: v for name, v in experts.items()} == pytest.approx(
        {"gate_up_proj": 2 * 0.8 / 5, "down_proj": 2 * 0.8 / 4}
    )
    assert {s.per_square for s in whole(outline).spans} == {6 * 2 * 2 * 40}


def test_dense_models_are_counted_by_the_formula() -> None:
    """6 N tokens + 6 L d sum(l²), to the last digit; an output layer that shares the table counts it."""
    for name in ("llama", "llama-tied"):
        outline = outline_of(name)
        numel = outline.num_parameters - (0 if outline.facts.tied else zoo.VOCAB * 32)
        assert whole(outline).of(StepSize(50, 60, (20, 30))) == 6 * numel * 50 + 6 * 4 * 32 * (400 + 900)


def test_selected_keys_limit_attention_and_not_what_selects() -> None:
    outline = outline_of("dots3_note_text", index_topk=5)
    spans = {s.most: s.per_square for s in whole(outline).spans}
    # The indexer: 2 heads of 8 and their weighted sum over all keys, forward alone, in 2 of 4 layers.
    assert spans == {8: 6 * 2 * 40, 5: 6 * 2 * 40, None: 2 * (2 * 2 * 8 + 2 * 2) / 2}
    names = {p.name for u in (2, 4) for p in outline.units[u].parameters if "indexer" in p.name}
    layers = counted(outline)
    unlearned = {
        outline.units[u].parameters[place].name
        for u in (2, 4)
        for place in layers.layers[layers.kind_of[u - 1]].unlearned
    }
    assert unlearned and unlearned < names


@pytest.mark.parametrize("limit", [(None, False), (1, False), (8, False), (8, True), (64, True)])
def test_squares_are_twice_the_pairs(limit: tuple[int | None, bool]) -> None:
    """Of query and key, the query's own key as half a pair, within windows in the full ones alone."""
    most, in_chunks = limit
    for length in (1, 7, 8, 9, 50):
        sees = [q % most + 1 if in_chunks and most else min(q + 1, most or length) for q in range(length)]
        own = length if in_chunks or most is None else min(length, most)
        assert Span(1.0, most, in_chunks).squares(np.array([length])) == 2 * sum(sees) - own


def by_names(outline: Outline) -> tuple[float, float]:
    """(6 N, 6 L d) as they were counted before, from the names of settings and parameters."""
    config = outline.config.get_text_config()
    share = 1.0
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if experts := getattr(config, name, None):
            share = config.num_experts_per_tok / experts
            break
    total = sum(
        p.numel * (share if ".experts." in p.name else 1)
        for unit in outline.units
        for p in unit.parameters
        if outline.facts.tied or p.name not in counted(outline).lookups
    )
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", 0) or 0) * heads or config.hidden_size
    return 6 * total, 6.0 * config.num_hidden_layers * width


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "dbrx", "qwen3_next", "mistral"])
def test_settings_by_name_do_not_tell(name: str) -> None:
    outline = outline_of(name)
    found, before = whole(outline), by_names(outline)
    size = StepSize(2048, 2048, (2048,))
    then = before[0] * 2048 + before[1] * 2048**2
    assert (found.of(size) == then) == (name == "llama")


def test_what_was_counted_is_kept() -> None:
    case = zoo.CASES["llama4_text"]
    cache = OutlineCache()
    outline = Outline(case.config(), ModelSettings(device="cpu", dtype="float32"), cache)
    known = cache.known
    found = outline.count()
    assert cache.known != known and OutlineCache.from_bytes(cache.to_bytes()).counted == found


def test_a_trained_model_is_counted_as_its_outline() -> None:
    """dots3, whose settings are none of the usual ones."""
    model = hz.HostModel.from_pretrained(zoo.build("dots3_note_text"), device="cpu", dtype="float32")
    outline = outline_of("dots3_note_text")
    assert flops_of(model) == whole(outline) == flops_of(model, counted(outline))
    assert math.isfinite(flops_of(model).of(StepSize(64, 64, (64,))))


def test_a_model_that_cannot_be_run_without_weights_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", dtype="float32")
    monkeypatch.setattr(type(model.skeleton.layers[0]), "forward", lambda *args, **kwargs: 1 / 0)
    assert flops_of(model) == UNKNOWN and math.isnan(flops_of(model).of(StepSize(64, 64, (64,))))
