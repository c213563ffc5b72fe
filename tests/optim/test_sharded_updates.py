"""Updates, sums and norms of several ranks: the bits of one."""

from __future__ import annotations

import pytest
import torch

from horizon_lm.engine.gradient import UnitGradient, _sums_of_squares
from horizon_lm.memory.regions import StoreSpec
from horizon_lm.memory.shards import BLOCK, Shard
from horizon_lm.memory.store import HostStore
from horizon_lm.optim import gradients, kernel, optimizer
from horizon_lm.optim.gradients import add_in_order, move_gradient, ordered_sum
from horizon_lm.optim.optimizer import Group, Optimizer, UpdateSettings, segments
from horizon_lm.optim.progress import Progress
from horizon_lm.optim.rules import ADAPTIVE_RULES, RULES
from sharded_stores import BF16, FP32, filled, gathered, layouts, padding
from threaded_ranks import ThreadedRanks, on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = ("weights", "residual", "exp_avg", "exp_avg_sq")
BITS = {FP32: torch.int32, BF16: torch.int16, torch.int16: torch.int16}


def spec_of(rule: str, dtype: torch.dtype, moments: torch.dtype) -> StoreSpec:
    return StoreSpec(dtype, moment_dtype=moments, second_moment=rule in ADAPTIVE_RULES)


def optimizer_of(rule: str) -> Optimizer:
    """Groups that change within and between the shares of ranks."""

    def group(parameter: object) -> Group:
        name = str(parameter.name)  # type: ignore[attr-defined]
        return Group(decays="t1" in name or name.endswith(".t"), lr_factor=0.5 if "tw" in name else 1.0)

    parts = tuple(segments(unit, group) for unit in layouts(BF16))
    return Optimizer(rule, beta2=0.95, momentum=0.9, seed=11, segments=parts)


def updated(rule: str, spec: StoreSpec, world: int, steps: int = 3) -> list[HostStore]:
    """The stores of all ranks after some updates with gradients that come with the store."""
    stores = [filled(spec, Shard(rank, world)) for rank in range(world)]
    for store in stores:
        for step in range(1, steps + 1):
            settings = UpdateSettings(step, 1e-2, None, 0.1)
            for unit, layout in enumerate(store.units):
                if layout.trainable_numel:
                    grads, progress = store.gradient_run(unit), Progress()
                    optimizer_of(rule).update_unit(store, unit, grads, settings, 0.7, progress)
                    assert progress.is_done and progress.has_begun
    return stores


def differences(stores: list[HostStore], one: HostStore) -> list[str]:
    regions = [region for region in STATE if one.has(region)]
    return [
        f"{region} of {unit.name}"
        for region in regions
        for number, unit in enumerate(one.units)
        if not torch.equal(_bits(gathered(stores, region, number)), _bits(one.run(region, number)))
    ]


def _bits(run: torch.Tensor) -> torch.Tensor:
    return run.view(BITS[run.dtype])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("moments", [BF16, FP32])
def test_ranks_update_as_one_does(rule: str, dtype: torch.dtype, moments: torch.dtype) -> None:
    spec = spec_of(rule, dtype, moments)
    (one,), (start,) = updated(rule, spec, 1), updated(rule, spec, 1, steps=0)
    moved = differences([start], one)
    assert {f"weights of {name}" for name in ("all", "trained", "wide", "head", "table")} <= set(moved)
    assert "weights of frozen" not in moved
    for world in (2, 3, 64):
        stores = updated(rule, spec, world)
        assert differences(stores, one) == []
        for store in stores:
            for region in filter(store.has, STATE):
                assert not any(padding(store, region, unit).any() for unit in range(len(store.units)))


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_the_torch_reference_updates_shares_in_pieces(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(rule, BF16, BF16)
    (one,) = updated(rule, spec, 1)
    monkeypatch.setattr(kernel, "library", lambda: None)
    monkeypatch.setattr(kernel, "_REFERENCE_PIECE", 1000)
    assert differences(updated(rule, spec, 3), one) == []


def _unnumbered(parts: list, first: int, stop: int) -> list:
    """A mistake: every rank updates the first elements' groups."""
    return [(a, min(b, stop - first), lr, wd) for a, b, lr, wd in parts if a < stop - first] or [(0, 0, 0, 0)]


def test_mistakes_of_ranks_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls: groups of other elements, and random numbers of other elements."""
    spec = spec_of("adamw", BF16, BF16)
    (one,) = updated("adamw", spec, 1)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "_within", _unnumbered)
        assert "weights of all" in differences(updated("adamw", spec, 2), one)
    real = optimizer.update_run

    def from_zero(tensors: object, numbers: object, **more: object) -> None:
        real(tensors, numbers.__class__(**{**vars(numbers), "element_offset": 0}), **more)

    monkeypatch.setattr(optimizer, "update_run", from_zero)
    assert "exp_avg of head" in differences(updated("adamw", spec, 2), one)


def test_parts_of_a_share() -> None:
    parts = [(0, 10, 1.0, 0.1), (10, 30, 2.0, 0.2), (30, 31, 3.0, 0.3)]
    assert optimizer._within(parts, 0, 31) == parts
    assert optimizer._within(parts, 5, 30) == [(0, 5, 1.0, 0.1), (5, 25, 2.0, 0.2)]
    assert optimizer._within(parts, 30, 31) == [(0, 1, 3.0, 0.3)]
    assert optimizer._within(parts, 31, 31) == [(0, 0, 1.0, 0.1)]


# Sums over ranks.


def spread(numel: int, draw: torch.Generator) -> torch.Tensor:
    """Values of many magnitudes, whose sums depend on the order."""
    return torch.randn(numel, generator=draw) * torch.exp(4 * torch.randn(numel, generator=draw))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_micro_batches_are_added_as_one_rank_adds_them(dtype: torch.dtype, count: int) -> None:
    """In pairs or one by one, over any positions; parts of one buffer, as ranks send them."""
    layout, draw = layouts(dtype)[2], torch.Generator().manual_seed(count)
    layout = type(layout)(**{**vars(layout), "parameters": layout.trainable})
    numel = layout.trainable_numel
    given = torch.zeros(count, numel, dtype=dtype)
    one = UnitGradient(layout, torch.empty(numel), in_pairs=True)
    for row in given:
        for parameter in layout.trainable:
            layout.trainable_view(row, parameter).copy_(spread(parameter.numel, draw).view(parameter.shape))
            one.add(parameter, layout.trainable_view(row, parameter).clone())
    one.complete()
    for world in (1, 2, 3, 4):
        total = torch.full((numel,), torch.nan)
        for position in range(0, count, world):
            add_in_order(total, given[position : position + world].unbind(), begins=position == 0)
        assert torch.equal(total, one.run)
    if count > 2:  # the control: the order matters
        add_in_order(total, given.flip(0).unbind(), begins=True)
        assert not torch.equal(total, one.run)


@pytest.mark.parametrize("target", [BF16, FP32])
@pytest.mark.parametrize("numel", [0, 1, BLOCK, 7 * BLOCK - 3, 40 * BLOCK + 5])
@pytest.mark.parametrize("library", [True, False])
def test_a_norm_passed_from_rank_to_rank_is_that_of_one(
    target: torch.dtype, numel: int, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding included, which is zero."""
    if not library:
        monkeypatch.setattr(gradients, "library", lambda: None)
    draw = torch.Generator().manual_seed(0)
    whole = spread(numel, draw)
    expected = ordered_sum(move_gradient(whole, torch.empty(numel, dtype=target)))
    for world in (2, 3, 64):
        share = Shard(0, world).share(numel)
        padded = torch.zeros(world * share)
        padded[:numel] = whole

        def take(ranks: ThreadedRanks, share: int = share, padded: torch.Tensor = padded) -> float:
            own = padded[ranks.rank * share : (ranks.rank + 1) * share]
            squares = move_gradient(own, torch.empty(share, dtype=target))
            return ranks.pass_on([0.0], lambda sums: [ordered_sum(squares, sums[0])])[0]

        assert on_ranks(world, take) == [expected] * world


def test_norms_of_ranks_added_in_another_order_are_others() -> None:
    """The control: sums of ranks that are added up afterwards."""
    draw = torch.Generator().manual_seed(0)
    squares = torch.rand(4096, dtype=torch.float64, generator=draw)
    first, second = squares.split(2048)
    assert ordered_sum(second, ordered_sum(first)) == ordered_sum(squares)
    assert ordered_sum(first) + ordered_sum(second) != ordered_sum(squares)


def test_sums_of_squares_on_a_device_do_not_depend_on_the_number_of_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    rows = spread(37 * BLOCK, draw).view(37, BLOCK)
    whole = _sums_of_squares(rows.clone())
    exact = rows.double().square().sum(1)
    assert ((whole - exact).abs() <= 1e-6 * exact).all()
    for first, stop in ((0, 1), (5, 9), (20, 37)):
        assert torch.equal(_sums_of_squares(rows[first:stop].clone()), whole[first:stop])
    rows[3, 17] = torch.inf
    assert _sums_of_squares(rows.clone()).isfinite().sum() == 36
