"""Loss and every gradient of a streamed model equal plain transformers + `loss.backward()`, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import horizon_lm as hz
import zoo
from horizon_lm.errors import UnsupportedModelError
from horizon_lm.model.attention import IntervalMask, attend, attention_by_intervals, make_mask
from plain_gradients import plain, relative, stream

# Architectures that are refused rather than trained wrongly, with a word of the reason given.
REFUSED = {
    "rwkv": "second activation",
    "bamba-z_loss": "loss of its own",
    "inkling_text": "parameters besides the table",
}
STREAMED = [name for name in zoo.CASES if name not in REFUSED]
WHOLE_FORWARD: set[str] = set()  # architectures whose head is not found: the whole forward runs per chunk
BF16 = ["llama", "gemma2", "mixtral", "gpt2", "qwen3_next", "ernie4_5_moe", "deepseek_v4", "flint"]


pytestmark = pytest.mark.usefixtures("one_thread")


def plain_as_streamed(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """`plain` with the attention that streamed models have for packed rows, which is compared with
    transformers' own in `test_documents_and_windows_without_a_mask`."""
    with attention_by_intervals():
        return plain(model, batch)


def assert_same_bits(
    host: hz.HostModel, loss: float, gradients: dict[str, torch.Tensor], found: float
) -> None:
    assert found == loss
    streamed = dict(host.named_gradients())
    assert streamed.keys() == gradients.keys()
    different = [n for n, g in gradients.items() if not torch.equal(g, streamed[n])]
    assert not different, f"{len(different)} of {len(gradients)} gradients differ, such as {different[:3]}"


def test_at_least_forty_architectures():
    assert len({zoo.CASES[name].config().model_type for name in STREAMED}) >= 100


@pytest.mark.parametrize("name", STREAMED)
def test_bitwise_equal_to_plain_transformers(name: str):
    model = zoo.build(name)
    host = stream(model)
    assert (host.skeleton.own_head is None) == (name in WHOLE_FORWARD)
    for kind in sorted(zoo.CASES[name].kinds):
        batch = zoo.batch(name, kind=kind)
        loss, gradients = plain_as_streamed(model, batch)
        assert any(g.abs().sum() > 0 for g in gradients.values())
        assert_same_bits(host, loss, gradients, host.forward_backward([batch]).loss)


UNPADDED = [(name, kind) for name in STREAMED for kind in sorted(zoo.CASES[name].kinds - {"padded"})]


@pytest.mark.parametrize(("name", "kind"), UNPADDED)
def test_documents_and_windows_without_a_mask(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by documents and windows against transformers' mask of tokens times tokens: fp32, 1e-5.

    Where a gradient is so ill-conditioned that transformers' own is further than that from fp64 (the
    time step of a gated delta rule), ours may be three times as far.
    """
    monkeypatch.setattr("horizon_lm.model.attention._BLOCK", 3)  # several blocks in these short rows
    model = zoo.build(name)
    batch = zoo.batch(name, kind=kind)
    host = stream(model)
    loss, gradients = plain(model, batch)
    assert host.forward_backward([batch]).loss == pytest.approx(loss, rel=1e-6)
    # The gradient of a parameter that only rounding reaches has no direction.
    found = {n: g for n, g in host.named_gradients() if gradients[n].abs().max() > 1e-6}
    apart = {n: relative(g, gradients[n]) for n, g in found.items() if relative(g, gradients[n]) > 1e-5}
    if apart:
        exact = plain(zoo.build(name).double(), batch)[1]
        for n in apart:
            assert relative(found[n], exact[n]) < 3 * relative(gradients[n], exact[n]) + 1e-5, n


def test_windows_in_blocks_are_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random documents, windows and blocks against a written-out mask; the last query of a window is the
    negative control."""
    monkeypatch.setattr("horizon_lm.model.attention._BLOCK", 4)
    from transformers.masking_utils import (
        and_masks,
        causal_mask_function,
        sliding_window_causal_mask_function,
    )

    generator = torch.Generator().manual_seed(0)
    module, wrong = torch.nn.Module(), 0
    for case in range(60):
        tokens, window = 24, int(torch.randint(2, 9, (), generator=generator)) if case % 3 else None
        document = torch.randint(0, 4, (2, tokens), generator=generator).eq(0).cumsum(-1)
        causal = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
        inside = and_masks(causal, lambda b, h, q, k, d=document: d[b, q] == d[b, k])
        given = {"batch_size": 2, "q_length": tokens, "kv_length": tokens, "mask_function": inside}
        mask = make_mask(**given, local_size=window, allow_is_causal_skip=False)
        place = torch.arange(tokens)
        wanted = (document[:, :, None] == document[:, None, :]) & (place[None, :] <= place[:, None])
        if window is not None:
            wanted &= place[None, :] > place[:, None] - window
        assert isinstance(mask, IntervalMask) and torch.equal(mask[:, 0], wanted)
        q = torch.randn(2, 2, tokens, 8, generator=generator)
        out, _ = attend(module, q, q, q, mask)
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=wanted[:, None])
        assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)
        if window is not None:
            mask.window = window + 1
            other, _ = attend(module, q, q, q, mask)
            wrong += not torch.allclose(other, expected.transpose(1, 2), atol=1e-3)
    assert wrong > 10  # where a document is longer than the window


def test_no_mask_of_tokens_times_tokens_is_made():
    """Causal, unpadded, packed or within a window: nothing, or intervals; padded rows need one."""
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(make_mask(*args, **kwargs))
        return seen[-1]

    def kinds(name: str, kind: str, **changes: Any) -> set[str]:
        seen.clear()
        model = zoo.build(name)
        for key, value in changes.items():
            setattr(model.config, key, value)
        host = stream(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("horizon_lm.model.attention.make_mask", spy)
            host.forward_backward([zoo.batch(name, kind=kind)])
        return {"none" if m is None else type(m).__name__ for m in seen}

    for name in ("llama", "qwen3", "mixtral"):
        assert kinds(name, "plain") == {"none"}
        assert kinds(name, "packed") == {"IntervalMask"}
        assert kinds(name, "padded") == {"Tensor"}
    assert kinds("gemma3_text", "plain", sliding_window=64) == {"none"}
    assert kinds("gemma3_text", "plain", sliding_window=3) == {"none", "IntervalMask"}
    assert kinds("gemma3_text", "packed", sliding_window=3) == {"IntervalMask"}


def test_an_interval_mask_is_the_mask_that_it_stands_for():
    """Whatever else a model does with its mask, it gets the boolean one."""
    starts = torch.tensor([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]], dtype=torch.int32).view(2, 1, 1, 5)
    mask = starts.as_subclass(IntervalMask)
    documents = starts.view(2, 5)
    place = torch.arange(5)
    wanted = (documents[:, :, None] == documents[:, None, :]) & (place[None, :] <= place[:, None])
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bool
    assert torch.equal(mask[:, 0], wanted)
    assert torch.equal(~mask & torch.ones(5, dtype=torch.bool), ~wanted[:, None])
    scores = torch.zeros(2, 1, 5, 5)
    assert torch.equal(scores.masked_fill(mask, 1.0), wanted[:, None].float())
    q = torch.randn(2, 1, 5, 8)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(sdpa(q, q, q, attn_mask=mask), sdpa(q, q, q, attn_mask=wanted[:, None]))


def test_a_wrong_gradient_is_noticed():
    """Negative control: one flipped mask position is enough to fail the comparison above."""
    model = zoo.build("gemma2")
    batch = zoo.batch("gemma2", kind="padded")
    loss, gradients = plain(model, batch)
    other = dict(batch, attention_mask=batch["attention_mask"].clone())
    other["attention_mask"][0, 0] = 0
    host = stream(model)
    found = host.forward_backward([other]).loss
    with pytest.raises(AssertionError):
        assert_same_bits(host, loss, gradients, found)


@pytest.mark.parametrize("name", BF16)
def test_bitwise_in_bf16(name: str):
    model = zoo.build(name, dtype=torch.bfloat16)
    host = stream(model, "bfloat16")
    for kind in sorted(zoo.CASES[name].kinds):
        batch = zoo.batch(name, kind=kind)
        loss, gradients = plain_as_streamed(model, batch)
        # A parameter that transformers keeps in fp32 has its gradient rounded to the store's bf16.
        gradients = {n: g.to(torch.bfloat16) for n, g in gradients.items()}
        assert_same_bits(host, loss, gradients, host.forward_backward([batch]).loss)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "olmoe", "granite", "gpt_bigcode"])
def test_four_micro_batches_equal_their_union(name: str):
    """fp32, 1e-5: the same sums in another order. Rows have different numbers of target tokens."""
    model = zoo.build(name)
    union = zoo.batch(name, batch_size=4, kind="padded")
    loss, gradients = plain(model, union)
    host = stream(model)
    parts = [{key: value[row : row + 1] for key, value in union.items()} for row in range(4)]
    out = host.forward_backward(parts)
    assert out.loss == pytest.approx(loss, rel=1e-5)
    assert out.num_tokens == int((union["labels"][:, 1:] != -100).sum())
    worst = {
        n: relative(g, gradients[n]) for n, g in host.named_gradients() if gradients[n].abs().max() > 1e-8
    }
    assert max(worst.values()) < 1e-5, max(worst, key=lambda n: worst[n])


def test_micro_batches_are_not_averaged_as_equals():
    """Negative control: the mean of per-micro-batch means is another number when lengths differ."""
    model = zoo.build("llama")
    union = zoo.batch("llama", batch_size=4, kind="padded")
    loss, _ = plain(model, union)
    rows = [{k: v[r : r + 1] for k, v in union.items()} for r in range(4)]
    assert sum(plain(model, row)[0] for row in rows) / 4 != pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_bigcode", "mixtral-aux", "deepseek_v4"])
def test_loss_in_chunks(name: str):
    """Chunks of 7 tokens against all at once: fp32, 1e-5, as the head's gradient is summed in parts."""
    model = zoo.build(name)
    batch = zoo.batch(name, kind="padded")
    loss, gradients = plain(model, batch)
    host = stream(model, loss_chunk_tokens=7)
    assert host.forward_backward([batch]).loss == pytest.approx(loss, rel=1e-6)
    for n, gradient in host.named_gradients():
        # The gradient of a parameter that only rounding reaches (phimoe's router) has no direction.
        if gradients[n].abs().max() > 1e-7:
            assert relative(gradient, gradients[n]) < 1e-5, n


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(name: str):
    zoo.need(f"{name} refused")
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]) as caught:
        stream(zoo.build(name))
    assert zoo.CASES[name].config().model_type in str(caught.value)


@pytest.mark.parametrize("name", sorted(zoo.SHARED_STATE))
def test_layers_that_share_state_are_refused_or_right(name: str):
    """Never trained wrongly: refused by name, at the latest in the first step, before any update."""
    model = zoo.build(name)
    batch = zoo.batch(name)
    loss, gradients = plain(model, batch)
    try:
        host = stream(model)
        found = host.forward_backward([batch]).loss
    except UnsupportedModelError as error:
        assert model.config.model_type in str(error)  # noqa: PT017
        return
    assert_same_bits(host, loss, gradients, found)


def test_experts_without_tokens_have_zeros_in_their_own_place():
    """Per-expert modules that no token reached give no gradient; their neighbours must not move."""
    model = zoo.build("mixtral")
    batch = {k: v[:1, :3] for k, v in zoo.batch("mixtral").items()}  # 3 tokens, top 2 of 4 experts
    loss, gradients = plain(model, batch)
    host = stream(model)
    host.forward_backward([zoo.batch("mixtral")])  # leaves other gradients in the store
    assert_same_bits(host, loss, gradients, host.forward_backward([batch]).loss)
    experts = [g for n, g in gradients.items() if "experts" in n]
    assert any((g.flatten(1).abs().sum(1) == 0).any() for g in experts), "every expert got a token"


def test_frozen_parameters_have_no_gradient_and_the_others_the_same():
    model = zoo.build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" not in name and "v_proj" not in name)
    batch = zoo.batch("llama")
    loss, gradients = plain(model, batch)
    host = stream(model)
    assert_same_bits(host, loss, gradients, host.forward_backward([batch]).loss)


def test_backward_stops_at_the_lowest_trainable_layer():
    model = zoo.build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3" in name or "lm_head" in name)
    batch = zoo.batch("llama")
    loss, gradients = plain(model, batch)
    host = stream(model)
    assert_same_bits(host, loss, gradients, host.forward_backward([batch], record=True).loss)
    assert not [op for op, *_ in host.timeline if op.kind == "B" and op.unit < 4]


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_dropout_is_replayed_in_the_recompute(name: str):
    """With dropout the loss is linear along the gradient: a recompute with other masks is far off."""
    model = zoo.build(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
        for attribute in ("dropout", "attention_dropout", "resid_pdrop"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.3)
    for key in vars(model.config):
        if key in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout"):
            setattr(model.config, key, 0.3)
    model = model.double().float()
    batch = zoo.batch(name)
    host = stream(model)
    first = host.forward_backward([batch]).loss
    gradients = {n: g.clone() for n, g in host.named_gradients()}
    square = sum(float(g.double().square().sum()) for g in gradients.values())
    assert host.forward_backward([batch]).loss == first, "the same step draws the same masks"
    undropped, _ = plain(model.eval(), batch)
    assert abs(undropped - first) > 1e-3, "dropout is off"
    for sign in (1, -1):  # central difference along the gradient: d loss / d t = |g|^2
        for n, g in gradients.items():
            host.store.weight(n).add_(g, alpha=sign * 1e-2 / square**0.5 * (1 if sign > 0 else 2))
        losses = locals().setdefault("losses", [])
        losses.append(host.forward_backward([batch]).loss)
    slope = (losses[0] - losses[1]) / 2e-2
    assert slope == pytest.approx(square**0.5, rel=2e-2)


def test_the_callers_random_state_is_left_alone():
    host = stream(zoo.build("gpt2"))
    host.skeleton.config.resid_pdrop = 0.1
    state = torch.random.get_rng_state()
    host.forward_backward([zoo.batch("gpt2")])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_list_of_architectures_is_current():
    """docs/architectures.md names what is compared above, and what is refused."""
    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    streamed, refused = text.split("## Refused")
    kinds = {zoo.CASES[name].config().model_type for name in STREAMED}
    listed = set(re.findall(r"`([\w-]+)`", streamed.split("where the model takes them")[1]))
    assert listed == kinds and f"these {len(kinds)} model types" in text
    for name in REFUSED:
        assert f"`{zoo.CASES[name].config().model_type}`" in refused
