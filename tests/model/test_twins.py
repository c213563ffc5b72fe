"""Twins: whatever a forward does with small tensors, it reads what is on the device without waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from emulated_cuda import CUDA, EmulatedCuda
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.model import twins
from horizon_lm.model.twins import host_twins

IDS = torch.tensor([[5, 0, 3, 3, 0, 7], [1, 1, 4, 0, 2, 2]])


def _masks(ids: torch.Tensor) -> list[Any]:
    mask = ids.ne(0)
    rows = torch.arange(ids.shape[1], device=ids.device)
    causal = rows[None, :] <= rows[:, None]
    return [mask.all().item(), bool(causal[2].any()), mask.sum(-1).tolist(), (mask & causal[1]).tolist()]


def _positions(ids: torch.Tensor) -> list[Any]:
    positions = ids.ne(0).cumsum(-1) - 1
    positions.masked_fill_(ids == 0, 1)
    positions[0, 2:4] += 10
    view = positions.view(-1)[3:]
    view.mul_(2)
    return [
        int(positions.max()) + 1,
        positions.tolist(),
        view.cpu().numpy().tolist(),
        view.to("cpu").sum().item(),
    ]


def _sizes(ids: torch.Tensor) -> list[Any]:
    places = torch.nonzero(ids == 0)
    chosen, lengths = ids[ids > 2], torch.unique_consecutive(ids[1], return_counts=True)[1]
    again = torch.repeat_interleave(torch.arange(lengths.shape[0], device=ids.device), lengths)
    listed = ids[:, [-1, 0]]
    return [
        places.tolist(),
        chosen.tolist(),
        lengths.tolist(),
        again.tolist(),
        7 in listed,
        torch.equal(ids, ids),
    ]


def _made(ids: torch.Tensor) -> list[Any]:
    one = torch.tensor([1, 2, 3], device=ids.device)
    split = torch.split(torch.full((6,), 2, device=ids.device), [2, 4])
    ones = torch.ones_like(ids).bool()
    return [
        one.tolist(),
        split[1].sum().item(),
        ones.all().item(),
        torch.where(ids > 1, ids, one[0]).tolist(),
    ]


@pytest.mark.parametrize("function", [_masks, _positions, _sizes, _made])
def test_reads_do_not_wait(
    function: Callable[[torch.Tensor], list[Any]], emulated_cuda: EmulatedCuda
) -> None:
    before = IDS.clone()
    with host_twins(CUDA), torch.enable_grad():
        ids = IDS.pin_memory().to(CUDA, non_blocking=True)
        assert function(ids) == function(IDS.clone())
        assert not emulated_cuda.waits
    assert function(ids.clone()) == function(IDS.clone())
    assert emulated_cuda.waits and torch.equal(IDS, before)  # without them, each read waits


def test_what_has_no_twin_is_read_from_the_device(emulated_cuda: EmulatedCuda) -> None:
    """Values that follow from floats, and tensors that are overwritten by them, in whole or in part."""
    values = torch.rand(2, 6).pin_memory()
    with host_twins(CUDA):
        ids, floats = (t.to(CUDA, non_blocking=True) for t in (IDS.pin_memory(), values))
        other = ids + 0
        view = other[0]
        assert view.tolist() == IDS[0].tolist() and not emulated_cuda.waits
        other[0, 2:5] = (floats * 100).long()[0, 2:5]
        assert view.tolist() == [5, 0, *(values * 100).long()[0, 2:5].tolist(), 7]
        assert len(emulated_cuda.waits) == 1
        assert int(other.sum()) == int(other.cpu().sum()) and len(emulated_cuda.waits) == 3
        assert int(ids.sum()) == int(IDS.sum()) and len(emulated_cuda.waits) == 3
        drawn = torch.randint(0, 100, (8,), device=CUDA)
        assert drawn.tolist() == drawn.clone().tolist() and len(emulated_cuda.waits) == 5


def test_a_mask_of_tokens_times_tokens_has_none(
    emulated_cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins, "_FEWEST", 16)
    with host_twins(CUDA):
        ids = torch.zeros(1, 16, dtype=torch.long).pin_memory().to(CUDA, non_blocking=True)
        place = torch.arange(16, device=CUDA)
        square = (place[None, :] <= place[:, None]) & ids.eq(0)
        assert not square.all() and len(emulated_cuda.waits) == 1
        assert bool(ids.eq(0).all()) and len(emulated_cuda.waits) == 1


def test_on_the_cpu_nothing_is_intercepted() -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    with host_twins(torch.device("cpu")):
        assert not _get_current_dispatch_mode_stack()
