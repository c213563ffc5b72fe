"""The head's weight gradient by products that add up in fp32: as near to fp64 as before, or nearer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import horizon_lm as hz
import zoo
from emulated_cuda import CUDA, STAND_INS, EmulatedCuda, watch_ops
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.engine import ends, head_gradient
from horizon_lm.engine.gradient import UnitGradient
from plain_gradients import relative

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK, BATCHES = 7, 2  # six chunks in each micro-batch


def _gradients(name: str, device: str, cuda: EmulatedCuda | None = None) -> dict[str, torch.Tensor]:
    model = hz.HostModel.from_pretrained(
        zoo.build(name), device=device, dtype="bfloat16", skip_memory_check=True, loss_chunk_tokens=CHUNK
    )
    if cuda is not None:
        watch_ops(model.engine, cuda)
    model.forward_backward([zoo.batch(name, seed=m) for m in range(BATCHES)])
    return {key: gradient.clone() for key, gradient in model.named_gradients()}


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_only_the_head_differs_and_by_rounding(
    name: str, emulated_cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other gradients have the same bits: what they receive is unchanged."""
    products = []
    honest = head_gradient._Sums.add

    def count(self: Any, *args: Any) -> None:
        products.append(args)
        honest(self, *args)

    plain = _gradients(name, "cpu")
    assert not products
    monkeypatch.setattr(head_gradient._Sums, "add", count)
    found = _gradients(name, "cuda", emulated_cuda)
    assert len(products) == BATCHES * -(-2 * zoo.LENGTH // CHUNK)
    assert found.keys() == plain.keys()
    different = {key for key in plain if not torch.equal(found[key], plain[key])}
    assert len(different) == 1
    for key in different:
        assert relative(found[key], plain[key]) < 4e-3, key

    if name != "llama":
        return

    def forget(self: Any, *args: Any) -> None:  # the negative control: only the last chunk stays
        self.gradient.written.discard(self.weight.name)
        honest(self, *args)

    monkeypatch.setattr(head_gradient._Sums, "add", forget)
    wrong = _gradients(name, "cuda", emulated_cuda)
    assert all(relative(wrong[key], plain[key]) > 0.1 for key in different)


def test_nearer_to_fp64(emulated_cuda: EmulatedCuda) -> None:
    """The sum over chunks of products of the same bf16 numbers, as autograd and as this makes it, bias
    included: fp32 throughout leaves 1e-5, rounding each chunk to bf16 more than 1e-4."""
    generator = torch.Generator().manual_seed(0)
    model = zoo.build("phi", dtype=torch.bfloat16)  # its projection has a bias
    host = hz.HostModel.from_pretrained(model, device="cuda", dtype="bfloat16", skip_memory_check=True)
    skeleton, unit = host.skeleton, host.skeleton.head
    layout, weights = skeleton.units[unit], host.engine.ops.weight_slots.unit(-1, unit)
    assert skeleton.model.get_output_embeddings().bias is not None
    names = [skeleton.name_of(skeleton.model.get_output_embeddings(), local) for local in ("weight", "bias")]
    chunks = []
    for _ in range(8):
        pair = (torch.randn(64, size, generator=generator).bfloat16() for size in (32, 96))
        chunks.append([tensor.pin_memory().to("cuda", non_blocking=True) for tensor in pair])
    exact = [
        sum(g.double().t() @ h.double() for h, g in chunks),
        sum(g.double().sum(0) for _, g in chunks),
    ]
    errors: dict[str, list[float]] = {}
    for way in ("products", "autograd"):
        run = torch.empty(layout.trainable_numel, dtype=torch.float32, device="cuda").fill_(torch.nan)
        gradient = UnitGradient(layout, run)
        with pytest.MonkeyPatch.context() as patch:
            if way == "autograd":
                patch.setattr(head_gradient, "_sums", lambda *args: None)
            with ends.bound_for_backward(skeleton, unit, weights, gradient):
                for hidden, wanted in chunks:
                    leaf = hidden.detach().requires_grad_()
                    skeleton.model.get_output_embeddings()(leaf).backward(wanted)
        parameters = {p.name: p for p in layout.trainable}
        views = [layout.trainable_view(run, parameters[name]) for name in names]
        errors[way] = [relative(view, value) for view, value in zip(views, exact, strict=True)]
    assert all(error < 1e-5 for error in errors["products"])
    assert all(error > 1e-4 for error in errors["autograd"])


def _halved(left: Any, right: Any, out_dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(left @ right)


def _overwritten(
    self: torch.Tensor, left: Any, right: Any, out_dtype: torch.dtype, *, out: torch.Tensor
) -> torch.Tensor:
    return torch.mm(left.float(), right.float(), out=out)


def _absent(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise NotImplementedError("no such product")


UNFIT = {
    "rounded": (torch.ops.aten.mm.dtype_out, _halved),
    "absent": (torch.ops.aten.mm.dtype_out, _absent),
    "not added": (torch.ops.aten.addmm.dtype_out, _overwritten),
    "cannot add": (torch.ops.aten.addmm.dtype_out, _absent),
}


@pytest.fixture
def tried_anew() -> Iterator[None]:
    """Answers are kept for the process."""
    head_gradient.adds_in_fp32.cache_clear()
    yield
    head_gradient.adds_in_fp32.cache_clear()


@pytest.mark.usefixtures("emulated_cuda", "tried_anew")
def test_unfit_products_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (overload, instead) in UNFIT.items():
        with monkeypatch.context() as patch:
            patch.setitem(STAND_INS, overload, instead)
            assert not head_gradient.adds_in_fp32(CUDA, torch.bfloat16), name
        head_gradient.adds_in_fp32.cache_clear()
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)  # does not matter
        assert head_gradient.adds_in_fp32(CUDA, torch.bfloat16)
    finally:
        torch.set_default_dtype(dtype)
    assert not head_gradient.adds_in_fp32(CUDA, torch.float32)


@pytest.mark.usefixtures("tried_anew")
def test_a_device_without_such_products_takes_autograd(
    emulated_cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then gradients have the bits of the ordinary path; with such products they have not (above)."""
    monkeypatch.setitem(STAND_INS, *UNFIT["absent"])
    plain, found = _gradients("llama", "cpu"), _gradients("llama", "cuda", emulated_cuda)
    assert all(torch.equal(found[key], plain[key]) for key in plain)
