"""All documents in one call of torch's `varlen_attn`, over references of its CUDA kernels on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen as torch_varlen

import zoo
from fake_flash import Flash, flash_on_the_cpu
from horizon_lm.model import attention, varlen
from horizon_lm.model.attention import Bounds, IntervalMask, attend
from plain_gradients import plain, relative, stream

pytestmark = pytest.mark.usefixtures("one_thread")

CUDA = torch.device("cuda", 0)
ROWS: Bounds = [[(0, 7), (7, 8), (8, 24)], [(0, 24)], [(0, 9), (9, 20), (20, 24)]]
WINDOWS = [None, 1, 3, 7, 8, 16, 24]  # shorter and longer than documents, and as long


@pytest.fixture
def flash() -> Iterator[Flash]:
    with flash_on_the_cpu() as found:
        yield found


def masked(rows: Bounds, window: int | None, *, packed: bool) -> IntervalMask:
    starts = torch.tensor([[start for start, end in row for _ in range(start, end)] for row in rows])
    if window is not None:
        starts = torch.maximum(starts, torch.arange(24) - (window - 1))
    one_call = varlen.pack(rows, "cpu") if packed else None
    mask = attention._mask(starts.view(len(rows), 1, 1, 24), rows, window, one_call)
    assert isinstance(mask, IntervalMask)
    return mask


def inputs(
    dtype: torch.dtype, groups: int, size: int = 8, rows: int = 3
) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A module, and query, key, value that lie in memory as projections leave them."""
    module = torch.nn.Module()
    module.num_key_value_groups = groups  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(groups)
    shapes = [(rows, 24, heads, size) for heads in (4, 4 // groups, 4 // groups)]
    tensors = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]
    return module, [t.requires_grad_() for t in tensors]


def attended(
    module: torch.nn.Module, tensors: list[torch.Tensor], mask: Any, **options: Any
) -> list[torch.Tensor]:
    """Output and gradients."""
    out, _ = attend(module, *tensors, mask, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float32).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def furthest(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Largest relative error, beside the largest of all: a query that sees one key has a gradient of 0."""
    assert [t.shape for t in found] == [t.shape for t in wanted]
    least = 1e-2 * max(float(t.norm()) for t in wanted)
    apart = [float((a.double() - b.double()).norm()) for a, b in zip(found, wanted, strict=True)]
    return max(a / max(float(b.norm()), least) for a, b in zip(apart, wanted, strict=True))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
def test_one_call_is_the_pieces(
    window: int | None, dtype: torch.dtype, groups: int, flash: Flash, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise without a window, where the reference does the same products; else a mask in blocks differs
    from one of whole documents in rounding. Controls: a window off by one, another scale, and documents that
    see each other."""
    monkeypatch.setattr(attention, "_BLOCK", 4)
    module, tensors = inputs(dtype, groups)
    wanted = attended(module, tensors, masked(ROWS, window, packed=False), scaling=0.3)
    assert not flash.forwards
    found = attended(module, tensors, masked(ROWS, window, packed=True), scaling=0.3)
    assert len(flash.forwards) == len(flash.backwards) == 1
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert furthest(found, wanted) <= (0 if window is None and groups == 1 else limit)

    def goes_wrong(mask: IntervalMask, scaling: float = 0.3) -> bool:
        return furthest(attended(module, tensors, mask, scaling=scaling), wanted) > 5 * limit

    for wrong in [] if window is None else [w for w in (window - 1, window + 1) if 0 < w <= 16]:
        other = masked(ROWS, window, packed=True)
        other.window = wrong
        assert goes_wrong(other)
    if window != 1:
        leaking = masked(ROWS, window, packed=True)
        leaking.packed = varlen.pack([[(0, 24)]] * 3, "cpu")
        assert goes_wrong(leaking)
        assert goes_wrong(masked(ROWS, window, packed=True), scaling=0.2)


def test_the_reference_is_not_the_code_under_test(flash: Flash) -> None:
    """The stand-in's windows against torch's attention with a written-out mask."""
    module, tensors = inputs(torch.float32, 1)
    place = torch.arange(24)
    seen = (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - 5)
    wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=seen)
    found = attended(module, tensors, masked([[(0, 24)]] * 3, 5, packed=True))[0]
    assert flash.forwards == [(4, 0)] and relative(found, wanted.detach().transpose(1, 2)) < 1e-6


MODELS = [
    ("qwen3", "packed"),
    ("mistral", "plain"),
    ("mistral", "packed"),
    ("gemma3_text", "plain"),  # windows in some of its layers
    ("gemma3_text", "packed"),
    ("phi3", "packed"),  # queries, keys and values are views of one product
    ("mixtral", "packed"),
]


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_models_have_the_gradients_of_transformers(
    name: str, kind: str, flash: Flash, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32, 1e-5, against the mask of tokens times tokens; recomputed and kept. One call a layer and pass;
    bounds go to the device once per mask when a micro-batch's prologue runs (in either direction)."""
    packs = []
    monkeypatch.setattr(attention, "pack", lambda *args: packs.append(args) or varlen.pack(*args))
    model = zoo.build(name)
    batches = [zoo.batch(name, kind=kind, seed=seed) for seed in (1, 2)]
    loss, wanted = plain(model, batches[0])
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 4
    calls = [kind == "packed" or layer == "sliding_attention" for layer in kinds]
    masks = len(set(kinds)) if kind == "packed" else 1
    for policy in ("recompute", "keep"):
        host = stream(model, activations=policy)
        flash.forwards.clear(), flash.backwards.clear(), packs.clear()
        assert host.forward_backward(batches[:1]).loss == pytest.approx(loss, rel=1e-6)
        again = sum(calls[:-1]) if policy == "recompute" else 0  # the last layer is still there
        assert (len(flash.forwards), len(flash.backwards)) == (sum(calls) + again, sum(calls))
        assert len(packs) in (masks, 2 * masks)
        found = {n: g for n, g in host.named_gradients() if wanted[n].abs().max() > 1e-6}
        apart = {n: relative(g, wanted[n]) for n, g in found.items()}
        assert max(apart.values()) < 1e-5, max(apart, key=lambda n: apart[n])


def test_what_the_kernel_does_not_take_goes_piece_by_piece(
    flash: Flash, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each case alone keeps the call away; the result is that of transformers' own function."""
    bf16 = torch.bfloat16

    def calls(tensors: list[torch.Tensor], module: torch.nn.Module, **options: Any) -> int:
        flash.forwards.clear()
        out, _ = attend(module, *tensors, masked(ROWS, 5, packed=True), **options)
        expected, _ = attend(module, *tensors, masked(ROWS, 5, packed=False), **options)
        if not flash.forwards and not options.get("dropout"):
            assert torch.equal(out, expected)
        return len(flash.forwards)

    module, tensors = inputs(bf16, 2)
    assert calls(tensors, module) == 1
    plain_options = {
        "is_causal": True,
        "sliding_window": 5,
        "position_ids": torch.arange(24),
        "use_cache": False,
    }
    assert calls(tensors, module, dropout=0.0, softcap=None, output_attentions=False, **plain_options) == 1
    assert calls(tensors, module, dropout=0.1) == 0
    bias = torch.zeros(3, 4, 24, 24, dtype=bf16)
    assert calls(tensors, module, position_bias=bias) == 0
    assert calls(tensors, module, output_attentions=True) == 0
    if "cache" in varlen._unknown_options():  # of transformers' sdpa, in some versions
        assert calls(tensors, module, cache=object()) == 0
    try:
        assert calls(tensors, module, softcap=30.0) == 0  # some versions of transformers' sdpa ignore it
    except ValueError as error:  # others refuse it
        assert "softcap" in str(error) and not flash.forwards
    for size in (12, 200, 264):
        assert calls(inputs(bf16, 2, size)[1], module) == 0, size
    for size in (192, 256):
        assert calls(inputs(bf16, 2, size)[1], module) == 1, size
    other = [*tensors[:2], inputs(bf16, 2, 16)[1][2]]
    assert calls(other, module) == 0
    repeated = [tensors[0], *(t.repeat_interleave(2, 1) for t in tensors[1:])]
    assert calls(repeated, torch.nn.Module()) == 1
    wide = [t.double() for t in tensors]
    assert calls(wide, module) == 0
    with monkeypatch.context() as patch:
        patch.setattr(varlen, "_DTYPES", flash.dtypes - {torch.float32})
        assert calls([t.float() for t in tensors], module) == 0
    swapped = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    assert swapped[0].stride(-1) != 1 and calls(swapped, module) == 1
    too_many = inputs(bf16, 2, rows=4)[1]
    assert not varlen.fits(module, *too_many, varlen.pack(ROWS, "cpu"), {})  # type: ignore[arg-type]


def test_which_devices_have_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = {"is": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["is"])
    has_kernel = varlen.has_kernel.__wrapped__
    for found, wanted in [((7, 5), 0), ((8, 0), 1), ((8, 9), 1), ((9, 0), 1), ((12, 1), 1), ((13, 0), 0)]:
        capability["is"] = found
        assert has_kernel(CUDA) == bool(wanted), found
    assert not has_kernel(torch.device("cpu"))
    assert varlen.pack(ROWS, "cpu") is None


def in_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError("knows no window")


def in_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """Passes all on to today's function, whose kernel finds the groups in the key's shape."""
    return torch_varlen.varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
    )


def test_the_function_of_each_torch(flash: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    """2.10 has no windows, 2.11 no argument for groups of heads, later ones ask for it."""
    assert varlen.adapt(in_2_10) is None
    assert varlen.adapt(in_2_11) is in_2_11
    assert varlen.find_varlen() is not None
    module, tensors = inputs(torch.bfloat16, 2)
    wanted = attended(module, tensors, masked(ROWS, 3, packed=True))
    monkeypatch.setattr(varlen, "find_varlen", lambda: varlen.adapt(in_2_11))
    assert furthest(attended(module, tensors, masked(ROWS, 3, packed=True)), wanted) == 0
    monkeypatch.setattr(varlen, "find_varlen", lambda: None)
    assert varlen.pack(ROWS, "cpu") is None


def test_the_real_operator_takes_the_call_on_cuda() -> None:
    """Fake tensors: schema, shapes and devices of the operator, without a GPU. (Autograd's graph needs a CUDA
    build; the other tests have it on the CPU.)"""
    with FakeTensorMode(), torch.no_grad():
        query = torch.empty(2, 24, 4, 64, dtype=torch.bfloat16, device=CUDA).transpose(1, 2)
        key = torch.empty(2, 24, 2, 64, dtype=torch.bfloat16, device=CUDA).transpose(1, 2)
        function = varlen.find_varlen()
        assert function is not None
        offsets = torch.empty(4, dtype=torch.int32, device=CUDA)
        packed = varlen.Packed(offsets, 24, 48, function, varlen._unknown_options())
        module = torch.nn.Module()
        module.num_key_value_groups = 2  # type: ignore[assignment]
        assert varlen.fits(module, query, key, key, packed, {"scaling": 0.1})
        out = varlen.attend_packed(query, key, key, packed, 8, 0.1)
        assert out.shape == (2, 24, 4, 64) and out.device == CUDA and out.is_contiguous()


def test_plans_run_layers_without_the_call(flash: Flash) -> None:
    """Fake rows are one document, or blocks of a window, for which torch's own attention is measured."""
    given = {"batch_size": 2, "q_length": 24, "kv_length": 24, "mask_function": None}
    with FakeTensorMode():
        mask = attention.make_mask(**given, local_size=5, device="cpu")
        assert mask is not None and mask.packed is None  # type: ignore[attr-defined]
        query = torch.empty(2, 4, 24, 64, dtype=torch.bfloat16)
        out, _ = attend(torch.nn.Module(), query, query, query, mask)
        assert out.shape == (2, 24, 4, 64) and not flash.forwards


def test_cudnn_is_kept_from_pieces_and_from_nothing_else() -> None:
    """Its switch is restored; kernels that the user turned off stay off."""
    cuda = torch.backends.cuda
    assert cuda.cudnn_sdp_enabled() and cuda.flash_sdp_enabled()
    with attention._without_cudnn(torch.device("cpu")):
        assert cuda.cudnn_sdp_enabled()
    cuda.enable_flash_sdp(False)
    try:
        with attention._without_cudnn(CUDA):
            assert not cuda.cudnn_sdp_enabled() and not cuda.flash_sdp_enabled()
            assert cuda.mem_efficient_sdp_enabled() and cuda.math_sdp_enabled()
        assert cuda.cudnn_sdp_enabled() and not cuda.flash_sdp_enabled()
    finally:
        cuda.enable_flash_sdp(True)
