"""Layers that keep only attention or their matrix products: bitwise equal gradients, no product twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import Qwen2Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from horizon_lm.config import ModelSettings
from horizon_lm.engine import selective
from horizon_lm.engine.policies import Policies
from horizon_lm.errors import ConfigError, UnsupportedModelError
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.work import MATMUL
from horizon_lm.plan.working_set import Passes
from policy_models import Gradients, Stashing, batches, gradients, host, same, source

pytestmark = pytest.mark.usefixtures("one_thread")

SELECTIVE = ["attention", "products"]
aten = torch.ops.aten


def gradients_of(model: hz.HostModel, data: Any) -> Gradients:
    model.forward_backward(data)
    return gradients(model)


def changed(change: Callable[[Any], None], name: str = "llama", **settings: Any) -> hz.HostModel:
    """A streamed model under adversarial lanes, altered by `change` first."""
    model = source(name)
    change(model)
    values = {"device": "cpu", "dtype": "float32", "skip_memory_check": True, "lanes": "adversarial"}
    return from_pretrained(model, **(values | settings))


# The same bits. Architectures in fp32, random orders, poisoned slots: tests/engine/test_activations.py.


@pytest.mark.parametrize("policy", SELECTIVE)
@pytest.mark.parametrize("name", ["llama-tied", "mixtral-aux", "qwen3_next", "mamba2"])
def test_bf16_gives_the_bits_of_recomputation(name: str, policy: str) -> None:
    data = batches(name, 2)
    expected = gradients_of(host(name, dtype="bfloat16"), data)
    model = host(name, "adversarial", dtype="bfloat16", activations=policy)
    assert same(gradients_of(model, data), expected) and not model.engine.ops.reruns


@pytest.mark.parametrize("policy", SELECTIVE)
def test_frozen_parts(policy: str) -> None:
    """A layer without a gradient below, one whose projections alone are frozen, and packed rows."""

    def freeze(model: Any) -> None:
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[0].requires_grad_(False)
        model.model.layers[2].mlp.requires_grad_(False)

    data = [zoo.batch("llama", batch_size=2, length=20, seed=m, kind="packed") for m in range(2)]
    expected = gradients_of(changed(freeze), data)
    assert same(gradients_of(changed(freeze, activations=policy), data), expected)


def test_mlps_in_tiles_are_recomputed_in_tiles() -> None:
    data = [zoo.batch("llama", batch_size=2, length=30, seed=1)]
    expected = gradients_of(host("llama", mlp_tile_tokens=7), data)
    for policy in SELECTIVE:
        assert same(
            gradients_of(host("llama", "adversarial", mlp_tile_tokens=7, activations=policy), data), expected
        )


def test_nothing_is_kept_of_what_is_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile is recomputed by itself, with its products. The control: what is kept of whole MLPs."""
    finish, kept = selective.Selection.finish, list[int]()

    def finished(self: selective.Selection, output: torch.Tensor) -> None:
        finish(self, output)
        kept.append(len([each for each in self._kept if each.output is not None]))

    monkeypatch.setattr(selective.Selection, "finish", finished)
    data = [zoo.batch("llama", batch_size=2, length=30, seed=1)]
    found = {}
    for tokens in (7, None):
        kept.clear()
        gradients_of(host("llama", mlp_tile_tokens=tokens, activations="products"), data)
        found[tokens] = set(kept)
    projections = {5}  # query, key, value, attention and its projection
    assert found == {7: projections, None: {7}}  # gate and up


@pytest.mark.parametrize("policy", SELECTIVE)
def test_torchs_own_contexts_give_the_same_gradients(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`create_selective_checkpoint_contexts` with the same ops, as the authority."""
    data = batches("llama", 2)
    found = gradients_of(host("llama", activations=policy), data)

    def contexts(self: selective.Selection) -> Any:
        chosen = selective.is_product if policy == "products" else selective.is_attention
        return create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: chosen(op._schema.name))

    monkeypatch.setattr(selective.Selection, "contexts", contexts)
    assert same(gradients_of(host("llama", activations=policy), data), found)


# Random numbers.


def with_dropout(model: Any) -> None:
    """After attention's softmax, after a projection, and as noise drawn in place."""
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
        projection = layer.mlp.up_proj

        def noisy(x: torch.Tensor, plain: Any = projection.forward) -> torch.Tensor:
            x = x * torch.empty_like(x).uniform_(0.5, 1.5)  # as a router's jitter
            return F.dropout(plain(x), 0.3)

        projection.forward = noisy


@pytest.mark.parametrize("policy", SELECTIVE)
def test_random_numbers_are_drawn_again(policy: str) -> None:
    data = batches("llama", 2)
    expected = gradients_of(changed(with_dropout), data)
    assert same(gradients_of(changed(with_dropout, activations=policy), data), expected)
    assert not same(gradients_of(host("llama"), data), expected), "dropout is on"


def test_a_skipped_random_op_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a kept op that draws leaves other numbers to those after it."""
    monkeypatch.setattr(selective, "is_product", lambda name: name in ("aten::mm", "aten::native_dropout"))

    def layers_with(model: Any) -> None:
        for layer in model.model.layers:
            projection = layer.mlp.up_proj

            def noisy(x: torch.Tensor, plain: Any = projection.forward) -> torch.Tensor:
                dropped = torch.native_dropout(plain(x), 0.3, True)[0]
                return dropped * torch.empty_like(dropped).uniform_(0.5, 1.5)

            projection.forward = noisy

    selective._rule.cache_clear()
    data = batches("llama", 1)
    expected = gradients_of(changed(layers_with), data)
    assert same(gradients_of(changed(layers_with, activations="products"), data), expected)
    monkeypatch.setattr(selective, "_random_state", lambda *given: None)
    assert not same(gradients_of(changed(layers_with, activations="products"), data), expected)
    selective._rule.cache_clear()


# Writes in place, and memory that outputs share.


def scaled_in_place(model: Any, how: Callable[[torch.Tensor], Any]) -> None:
    for layer in model.model.layers:
        projection = layer.self_attn.q_proj

        def scale(x: torch.Tensor, plain: Any = projection.forward) -> torch.Tensor:
            query = plain(x)
            how(query)
            return query

        projection.forward = scale


@pytest.mark.parametrize(
    "how",
    [
        lambda query: query.mul_(1.5),
        lambda query: query.view(-1)[::2].add_(0.25),
        lambda query: query.data.mul_(1.5),
        lambda query: torch.mul(query.detach(), 1.5, out=query.detach()),
    ],
    ids=["in place", "through a view", "data", "out"],
)
def test_an_output_that_is_written_into_is_computed_again(
    how: Callable[[torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: kept nevertheless, it is written into twice."""
    change, data = partial(scaled_in_place, how=how), batches("llama", 1)
    expected = gradients_of(changed(change), data)
    assert same(gradients_of(changed(change, activations="products"), data), expected)
    monkeypatch.setattr(selective.Selection, "forget", lambda self, tensors: None)
    assert not same(gradients_of(changed(change, activations="products"), data), expected)


def test_a_product_that_a_layer_returns_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the next layer's input, whose memory is released once it is spilled. The negative control: kept,
    its memory is held until the backward pass."""

    class Bare(LlamaDecoderLayer):
        def forward(self, hidden: torch.Tensor, **rest: Any) -> torch.Tensor:  # type: ignore[override]
            output = self.mlp.down_proj(self.mlp.up_proj(hidden))
            self.self_attn.q_proj(hidden).exp()  # saves a tensor, so recomputation passes the output
            return output

    def without_residual(model: Any) -> None:
        for layer in model.model.layers:
            layer.__class__ = Bare

    data = batches("llama", 2)
    expected = gradients_of(changed(without_residual, boundaries="host"), data)
    finish, shared = selective.Selection.finish, list[bool]()

    def finished(self: selective.Selection, output: torch.Tensor) -> None:
        finish(self, output)
        kept = [t for each in self._kept for t in selective._tensors(each.output)]
        assert len(self._kept) == 3  # up, down and query
        shared.append(any(t.data_ptr() == output.data_ptr() for t in kept))

    monkeypatch.setattr(selective.Selection, "finish", finished)
    settings: dict[str, Any] = {"boundaries": "host", "activations": "products"}
    assert same(gradients_of(changed(without_residual, **settings), data), expected)
    assert shared and not any(shared)
    monkeypatch.setattr(selective.Selection, "forget", lambda self, tensors: None)
    shared.clear()
    gradients_of(changed(without_residual, **settings), data)
    assert shared and all(shared)


def test_a_layer_that_puts_weights_aside_is_recomputed() -> None:
    def stash(model: Any) -> None:
        layer = model.model.layers[1].mlp.down_proj
        layer.forward = lambda x: Stashing.apply(x, layer.weight)

    model = changed(stash, activations="products")
    model.forward_backward(batches("llama", 1))
    assert model.engine.ops.policies.products == {1, 3, 4} and set(model.engine.ops.reruns) == {2}
    (note,) = model.engine.ops.notes
    assert note.startswith("layer 1 is recomputed from now on")


def test_a_layer_that_computes_something_else_is_refused() -> None:
    """One product more in the forward pass, of the same shape: it would be returned for another."""

    def lazily(model: Any) -> None:
        projection = model.model.layers[1].mlp.up_proj
        seen: list[int] = []

        def forward(x: torch.Tensor, plain: Any = projection.forward) -> torch.Tensor:
            seen.append(1)
            return plain(x + plain(x).sum() * 0) if len(seen) == 1 else plain(x)

        projection.forward = forward

    with pytest.raises(UnsupportedModelError, match="layer 1 computes something else") as caught:
        changed(lazily, activations="products").forward_backward(batches("llama", 1))
    assert "keep or recompute" in (caught.value.hint or "")


# Work.


class CountingOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if selective.is_product(name):
            self.products["attention" if selective.is_attention(name) else "products"] += 1
        return func(*args, **(kwargs or {}))


def executed(name: str, policy: str) -> Counter[str]:
    model = host(name, activations=policy)
    data = batches(name, 1)
    model.forward_backward(data)
    with CountingOps() as counting:
        model.forward_backward(data)
    return counting.products


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_next", "mamba2"])
def test_no_product_is_executed_twice(name: str) -> None:
    """As many products and attention kernels as with `keep`. The negative control: recomputation has more.
    `attention` runs only attention once."""
    counts = {policy: executed(name, policy) for policy in ("recompute", *SELECTIVE, "keep")}
    assert counts["products"] == counts["keep"]
    assert counts["recompute"]["products"] > counts["keep"]["products"] > 0
    assert counts["attention"]["attention"] == counts["keep"]["attention"]
    if name in ("llama", "gpt2", "mixtral"):  # the one attention layer of others is not recomputed anyway
        assert counts["recompute"]["attention"] > counts["attention"]["attention"] > 0


def measured(attention: str = "sdpa") -> dict[str, Passes]:
    """A layer of the shape of Qwen2.5-7B on one sequence of 1,024 tokens."""
    config = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=32768,
    )
    outline = Outline(config, ModelSettings(dtype="bfloat16", attn_implementation=attention))
    layer = outline.measures(1, 1024, 1024).layers[0]
    return {policy: layer.under(policy) for policy in ("recompute", "attention", "products", "keep")}


def test_a_layer_of_7_b_executes_at_most_6_3_flops_per_parameter_and_token() -> None:
    """On fake tensors: 7.70 with recomputation, 7.64, 6.22 and 6.22 with what is kept; attention included."""
    parameters, tokens = 233_057_792, 1024
    found = measured()
    flops = {
        policy: sum(k.flops * n for each in passes[1:] for k, n in each.work.items()) / parameters / tokens
        for policy, passes in found.items()
    }
    assert flops["recompute"] > 7.6 and flops["products"] == flops["keep"] < 6.3
    assert flops["products"] < flops["attention"] < flops["recompute"]
    saved = sum(k.flops * n for k, n in found["recompute"].forward.work.items() if k.kind == MATMUL)
    # Recomputation stops before the last product of the layer, whose output nothing saves.
    last = 2 * 3584 * 18944 * tokens
    attention = flops["recompute"] - flops["attention"]
    expected = (saved - last) / parameters / tokens + attention
    assert flops["recompute"] - flops["products"] == pytest.approx(expected, rel=1e-6)


def test_bytes_per_token_of_each_policy() -> None:
    """docs/memory-and-overlap.md states them. The output of the last product is not kept."""
    held = {policy: passes.held / 1024 for policy, passes in measured().items()}
    assert held["recompute"] < 1
    heads, width, middle, keys = 28, 3584, 18944, 512
    attention = 2 * width + 4 * heads  # its output, and a logarithm per head
    assert round(held["attention"]) == attention == 7280
    assert round(held["products"]) == attention + 2 * (width + 2 * keys + width + 2 * middle) == 99440
    assert round(held["keep"]) == 225400


# Settings.


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"compile": True}, "compile=true"), ({"attn_implementation": "flex_attention"}, "flex")],
)
@pytest.mark.parametrize("policy", SELECTIVE)
def test_what_no_dispatch_mode_sees_is_refused(settings: dict[str, Any], what: str, policy: str) -> None:
    outline = Outline(zoo.CASES["llama"].config(), ModelSettings())
    wanted = ModelSettings(activations=["recompute", policy, "keep*2"], **settings)
    with pytest.raises(ConfigError, match=f"activations={policy} is not supported with .*{what}") as caught:
        Policies.of(wanted, outline)
    assert "keep or recompute" in (caught.value.hint or "")
    Policies.of(wanted.model_copy(update={"activations": ["keep*4"]}), outline)


def test_kernels_of_attention_are_known_by_name() -> None:
    for name in (
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
    ):
        assert selective.is_attention(name) and selective.is_product(name)
    for name in ("aten::_scaled_dot_product_flash_attention_backward", "torch_attn::_varlen_attn_backward"):
        assert not selective.is_product(name)
    assert selective.is_product("aten::mm") and not selective.is_attention("aten::mm")
    assert not selective.is_product("aten::convolution")
