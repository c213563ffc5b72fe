"""Gradients in host memory: the C++ passes against their torch reference and against fp64."""

from __future__ import annotations

import pytest
import torch

from horizon_lm.engine.gradient import UnitGradient
from horizon_lm.memory.layout import lay_out
from horizon_lm.optim import gradients, kernel

SIZES = (1, 15, 16, 63, 64, 65, 4095, 4096, 4097, 70_001, 300_000)
FLOAT, HALF = torch.float32, torch.bfloat16
ISAS = kernel.available_isas() or ("auto",)


def values(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Of many magnitudes, with ties and values that do not stay finite in bf16."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(n, generator=generator) * torch.exp(4 * torch.randn(n, generator=generator))
    found[::7] = (torch.randint(1, 1 << 8, (len(found[::7]),), generator=generator) * 2 + 1) / 512  # ties
    return found.to(dtype)


def moved(source: torch.Tensor, target: torch.Tensor, isa: str = "auto") -> float:
    """Move a gradient and return its squared norm."""
    return gradients.ordered_sum(gradients.move_gradient(source, target, isa=isa))


def reference(source: torch.Tensor, target: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> float:
    with monkeypatch.context() as patch:
        patch.setattr(gradients, "library", lambda: None)
        return moved(source, target)


@pytest.mark.skipif(not kernel.available_isas(), reason="the C++ library is not built")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("source", [FLOAT, HALF])
@pytest.mark.parametrize("target", [FLOAT, HALF])
def test_moving_gives_the_bits_of_the_reference(
    source: torch.dtype, target: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in SIZES:
        given = values(n, source)
        ours, theirs = torch.full((n,), 9.0, dtype=target), torch.full((n,), 7.0, dtype=target)
        expected = reference(given, theirs, monkeypatch)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert moved(given, ours, isa=isa) == expected
            assert torch.equal(ours, theirs) and torch.equal(ours, given.to(target))
        torch.set_num_threads(1)
        assert moved(ours, ours, isa=isa) == expected  # measured where it is
        wide = float(ours.double().square().sum())
        assert expected == pytest.approx(wide, rel=1e-6)  # fp32 sums of 64 elements


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("source", [FLOAT, HALF])
def test_adding_gives_the_bits_of_torch(
    source: torch.dtype, begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as a device does it."""
    for n in SIZES:
        total, first, second = values(n, FLOAT, 1), values(n, source, 2), values(n, source, 3)
        expected = first.float() if begins else total + first.float()
        expected = expected + second.float()
        for isa in ISAS:
            ours = total.clone()
            gradients.add_gradients(ours, first, second, begins=begins, isa=isa)
            assert torch.equal(ours, expected)
        with monkeypatch.context() as patch:
            patch.setattr(gradients, "library", lambda: None)
            ours = total.clone()
            gradients.add_gradients(ours, first, second, begins=begins)
            assert torch.equal(ours, expected)


def test_a_sum_in_bf16_is_that_of_torch() -> None:
    """Where a parameter is used twice by what writes its gradient once."""
    total, first, second = (values(5000, HALF, seed) for seed in (1, 2, 3))
    expected = (total + first) + second
    guard = torch.full((10_000,), 3.0, dtype=HALF)  # what lies behind stays as it is
    guard[:5000] = total
    gradients.add_gradients(guard[:5000], first, second, begins=False)
    assert torch.equal(guard[:5000], expected) and bool((guard[5000:] == 3).all())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_any_number_of_gradients_is_added(count: int) -> None:
    """In pairs where several are to come; with the bits of one after the other."""
    rows = [(name, shape, True, HALF) for name, shape in (("a", (40, 3)), ("b", (7,)), ("none", (5,)))]
    layout = lay_out("unit", rows, HALF)
    found = {}
    for in_pairs in (False, True):
        gradient = UnitGradient(layout, torch.full((layout.trainable_numel,), torch.nan), in_pairs=in_pairs)
        for k in range(count):
            for parameter in layout.trainable[:2]:
                gradient.add(parameter, values(parameter.numel, HALF, k).view(parameter.shape))
        found[in_pairs] = torch.empty(layout.trainable_numel, dtype=HALF)
        gradient.download(found[in_pairs], measure=True)
    assert torch.equal(found[False], found[True]) and not found[True].isnan().any()
    assert not layout.trainable_view(found[True], layout.trainable[2]).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 63, 4096, 4999])
def test_what_is_not_finite_shows_in_the_norm(bad: float, place: int) -> None:
    given = values(5000, FLOAT)
    given[place] = bad
    target = torch.empty(5000, dtype=HALF)
    assert not torch.isfinite(torch.tensor(moved(given, target)))
    assert torch.equal(target.isnan(), given.isnan()) and torch.equal(target.isinf(), given.isinf())


def test_one_element_more_is_noticed() -> None:
    """The control: the sum is of all elements, the last included, and each once."""
    given = torch.ones(4097)
    assert moved(given, given) == 4097
    given[-1] = 2
    assert moved(given, given) == 4100


def test_tensors_it_does_not_know_are_left_to_torch() -> None:
    total, given = torch.zeros(4, 6), torch.arange(24.0).view(6, 4).t()  # not contiguous
    gradients.add_gradients(total, given, given, begins=True)
    assert torch.equal(total, 2 * given)
