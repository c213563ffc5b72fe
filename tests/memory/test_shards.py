"""Shares of units: every element on one rank, views and slots of several ranks as of one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.memory.layout import UnitLayout, lay_out
from horizon_lm.memory.regions import (
    GradientSlabs,
    StoreSpec,
    predict_bytes,
    predict_device_bytes,
    regions,
    state_bytes,
)
from horizon_lm.memory.shards import BLOCK, WHOLE, Shard, UnitShard
from horizon_lm.memory.slots import (
    GradientShards,
    GradientSlots,
    WeightSlots,
    gradient_slot_numels,
    shard_numels,
    slot_bytes,
    weight_slot_numels,
)
from horizon_lm.memory.store import HostStore
from horizon_lm.memory.whole import Whole
from horizon_lm.schedule import StepSpec
from sharded_stores import BF16, CPU, FP32, REGIONS, WORLDS, filled, layouts
from threaded_ranks import on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = st.sampled_from([(), (1,), (128,), (4096,), (4097,), (3, 4001), (129, 130), (40_000,), (0, 3)])
ROWS = st.lists(st.tuples(SHAPES, st.booleans(), st.sampled_from([BF16, FP32])), max_size=8)


def held(unit: UnitLayout, world: int) -> list[UnitShard]:
    return [UnitShard(unit, Shard(rank, world)) for rank in range(world)]


def check_pieces(unit: UnitLayout, shards: Sequence[UnitShard]) -> None:
    """Each element of each parameter is in one piece, at its place in the run of the rank that holds it."""
    runs = {
        "weights": (unit.view, unit.numel, lambda s: s.weights_numel),
        "residual": (unit.residual_view, unit.residual_numel, lambda s: s.residual_numel),
        "exp_avg": (unit.trainable_view, unit.trainable_numel, lambda s: s.trainable_share),
    }
    for region, (view, numel, local_numel) in runs.items():
        whole = torch.arange(1, numel + 1)
        own = [torch.zeros(local_numel(shard), dtype=torch.int64) for shard in shards]
        count = torch.zeros(numel, dtype=torch.int64)
        for shard, run in zip(shards, own, strict=True):
            for start, stop, offset in shard.pieces(region):
                run[offset : offset + stop - start] = whole[start:stop]
                count[start:stop] += 1
        assert bool((count == 1).all()), region
        for parameter in unit.parameters:
            has_none = region == "exp_avg" and not parameter.trainable
            has_none |= region == "residual" and parameter.offset < unit.wide_offset
            pieces = [shard.piece(region, parameter) for shard in shards]
            if has_none:
                assert pieces == [None] * len(shards)
                continue
            parts = [
                run[piece.offset : piece.offset + piece.numel]
                for run, piece in zip(own, pieces, strict=True)
                if piece is not None
            ]
            assert all(part.numel() for part in parts)
            found = torch.cat(parts) if parts else whole[:0]
            assert torch.equal(found, view(whole, parameter).reshape(-1)), (region, parameter)
            ends = [(p.start, p.stop) for p in pieces if p is not None]
            assert [stop for _, stop in ends[:-1]] == [start for start, _ in ends[1:]]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(ROWS, st.sampled_from([BF16, FP32]), st.sampled_from(WORLDS))
def test_every_element_is_on_one_rank(
    rows: list[tuple[tuple[int, ...], bool, torch.dtype]], dtype: torch.dtype, world: int
) -> None:
    named = [(f"p{i}", s, t, FP32 if dtype == FP32 else c) for i, (s, t, c) in enumerate(rows)]
    unit = lay_out("unit", named, dtype)
    shards = held(unit, world)
    check_pieces(unit, shards)
    for shard in shards:
        assert shard.trainable_range[0] == min(unit.trainable_numel, shard.shard.rank * shard.trainable_share)
        assert (shard.weights_numel, shard.residual_numel) == (
            shards[0].weights_numel,
            shards[0].residual_numel,
        )
        for share in (shard.frozen_share, shard.frozen_wide_share, shard.trainable_share):
            assert world == 1 or share % BLOCK == 0
    parts = (unit.trainable_offset, unit.trainable_offset - unit.wide_offset, unit.trainable_numel)
    shares = (shards[0].frozen_share, shards[0].frozen_wide_share, shards[0].trainable_share)
    for numel, share in zip(parts, shares, strict=True):
        assert numel <= world * share and (world == 1 or world * share < numel + world * BLOCK)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("world", WORLDS)
def test_units_of_all_kinds_are_cut(dtype: torch.dtype, world: int) -> None:
    for unit in layouts(dtype):
        check_pieces(unit, held(unit, world))


def test_one_rank_has_the_offsets_of_the_layout() -> None:
    for unit in layouts(BF16):
        shard = UnitShard(unit)
        numels = shard.weights_numel, shard.residual_numel, shard.trainable_share, shard.slot_numel
        assert numels == (unit.numel, unit.residual_numel, unit.trainable_numel, unit.slot_numel)
        assert (shard.wide_numel, shard.gathered_wide_numel) == (unit.wide_numel, unit.wide_numel)
        assert shard.gathered_weights_numel == unit.numel
        for parameter in filter(lambda p: p.numel, unit.parameters):
            assert shard.weights_piece(parameter) == (0, parameter.numel, parameter.offset)
            if parameter.trainable:
                offset = parameter.offset - unit.trainable_offset
                assert shard.trainable_piece(parameter) == (0, parameter.numel, offset)
            if parameter.offset >= unit.wide_offset:
                assert shard.residual_piece(parameter) == (
                    0,
                    parameter.numel,
                    parameter.offset - unit.wide_offset,
                )


def test_a_piece_in_a_wrong_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    unit = layouts(BF16)[1]
    real = UnitShard._piece

    def shifted(self: UnitShard, *args: object) -> object:
        found = real(self, *args)
        return found and found._replace(offset=found.offset + (found.start > 0))

    monkeypatch.setattr(UnitShard, "_piece", shifted)
    check_pieces(unit, held(unit, 1))
    with pytest.raises(AssertionError):
        check_pieces(unit, held(unit, 3))


# The store.


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("slabs", [None, GradientSlabs(2, frozenset({5, 6}))])
def test_a_rank_takes_its_part_of_the_bytes(
    world: int, dtype: torch.dtype, slabs: GradientSlabs | None
) -> None:
    units = layouts(dtype)
    spec = StoreSpec(dtype, slabs=slabs, sums=frozenset({1, 2}), sum_slabs=1, resident=frozenset({4}))
    found = []
    for rank in range(min(world, 5)):
        own = replace(spec, shard=Shard(rank, world))
        store = HostStore(units, own)
        assert store.num_bytes == predict_bytes(units, own)
        assert store.device_bytes == predict_device_bytes(units, own)
        found.append((store.num_bytes, store.device_bytes, state_bytes(units, own)))
        for region in regions(own):
            runs = [store.run(region.name, i).numel() for i in range(len(region.numels(units)))]
            assert runs == region.numels(units)
            numel_of = {"weights": "weights_numel", "residual": "residual_numel"}.get(
                region.name, "trainable_share"
            )
            if region.name in REGIONS:
                assert runs == [getattr(held, numel_of) for held in store.shards]
    assert all(sizes == found[0] for sizes in found)
    # All ranks together: what one takes, and the padding of each part of each unit.
    padding = {key: 0 for key in ("weights", "residual", "trainable")}
    for unit in units:
        parts = [unit.trainable_offset, unit.trainable_offset - unit.wide_offset, unit.trainable_numel]
        rest = [0 if world == 1 else -numel % (world * BLOCK) for numel in parts]
        padding["weights"] += rest[0] + rest[2]
        padding["residual"] += rest[1] + rest[2]
        padding["trainable"] += rest[2]
    whole = HostStore(units, spec)
    for region in (r for r in regions(spec) if r.name in REGIONS):
        key = f"resident_{region.name}"
        one, each = (a.get(region.name, 0) + b.get(key, 0) for a, b in (_bytes(whole), found[0][:2]))
        more = padding.get(region.name, padding["trainable"]) * region.dtype.itemsize
        assert world * each == one + more, region.name


def _bytes(store: HostStore) -> tuple[dict[str, int], dict[str, int]]:
    return store.num_bytes, store.device_bytes


@pytest.mark.parametrize("world", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_whole_values_are_those_of_one_rank(world: int, dtype: torch.dtype) -> None:
    spec = StoreSpec(dtype, resident=frozenset({2}))
    one = filled(spec)

    def read(ranks: Ranks) -> None:
        store = filled(spec, Shard(ranks.rank, world))
        for region in filter(store.has, REGIONS):
            for unit in range(len(store.units)):
                whole = store.whole(region, unit, ranks, everywhere=True)
                assert whole is not None and torch.equal(whole, one.run(region, unit)), (region, unit)
                on_first = store.whole(region, unit, ranks, everywhere=False)
                assert (on_first is None) == (ranks.rank > 0)
                assert on_first is None or torch.equal(on_first, whole)
        for everywhere in (True, False):
            reader = Whole(store, ranks, everywhere=everywhere)
            for name in store.names():
                expected = [one.weight(name), one.master(name)]
                found = [reader.weight(name), reader.master(name)]
                if one.locate(name)[1].trainable:
                    expected.append(one.gradient(name))
                    found.append(reader.gradient(name))
                for value, wanted in zip(found, expected, strict=True):
                    assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype)
                    assert value.is_meta == (not everywhere and ranks.rank > 0)
                    assert value.is_meta or torch.equal(value, wanted), name
            for unit in range(len(store.units)):
                residual = reader.wide_residual(unit)
                assert residual.is_meta or torch.equal(residual, one.wide_residual(unit))

    on_ranks(world, read)


def test_a_share_is_not_taken_for_a_whole_parameter() -> None:
    store = filled(StoreSpec(BF16), Shard(0, 2))
    for reader in (HostStore.weight, HostStore.master, HostStore.gradient):
        with pytest.raises(AssertionError, match="gather the parameter"):
            reader(store, "trained.t1")
    with pytest.raises(AssertionError, match="not those of the store"):
        store.whole("weights", 1, ALONE, everywhere=True)


def test_adopting_reads_what_the_rank_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is mapped, no other pages."""
    unit = lay_out("unit", [("w", (1 << 20,), True, BF16)], BF16)
    store = HostStore([unit], StoreSpec(BF16, shard=Shard(2, 4)))
    read: list[torch.Tensor] = []
    monkeypatch.setattr("horizon_lm.memory.store.split_master", lambda value, *others: read.append(value))
    value = torch.zeros(1 << 10, 1 << 10).view(1 << 20)
    store.adopt("w", value)
    (part,) = read
    assert part.numel() == 1 << 18 and part.data_ptr() == value.data_ptr() + 4 * (2 << 18)
    with pytest.raises(RuntimeError):
        store.adopt("w", torch.zeros(5))


# Slots.


def plan(
    world: int, *, reduction: str = "exact", resident: frozenset[int] = frozenset(), **more: object
) -> StepSpec:
    """Of the units of `layouts`: prologue, four layers, head and an untied table."""
    trainable = frozenset(u for u, unit in enumerate(layouts(BF16)) if unit.trainable_numel)
    return StepSpec(
        layers=4,
        uploaded=frozenset(range(1, 7)) - resident,
        trainable=trainable,
        embedding_unit=6,
        resident=resident,
        world=world,
        reduction=reduction if world > 1 else "",
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("stages", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 64])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_joined_slots_hold_whole_units(world: int, dtype: torch.dtype, stages: bool) -> None:
    """In any order of units: what an earlier one leaves in a slot is overwritten."""
    resident = frozenset({1, 6})
    spec, steps = StoreSpec(dtype, resident=resident), plan(world, resident=resident)
    one = filled(spec)
    numels, shares = weight_slot_numels(one.units, steps), shard_numels(one.units, steps)

    def check(ranks: Ranks) -> None:
        store = filled(spec, Shard(ranks.rank, world))
        slots = WeightSlots(store, numels, CPU, not stages, shares)
        for slot in range(len(numels)):
            for buffer in slots.tensors(slot):
                buffer.fill_(torch.nan)
        rng = random.Random(1)  # one order on all ranks
        for _ in range(12):
            unit = rng.choice([1, 2, 3, 4, 5, 6])
            slot = rng.randrange(2) if unit < 5 else 2
            slots.upload(slot, unit)
            if world > 1:
                slots.join(slot, unit, ranks)
            found = slots.unit(slot, unit)
            assert torch.equal(found.weights, one.run("weights", unit)), unit
            assert torch.equal(found.wide_residual, one.wide_residual(unit)), unit
            is_copied = world > 1 or (stages and unit not in resident)
            assert (found.weights.data_ptr() != store.run("weights", unit).data_ptr()) == is_copied

    on_ranks(world, check)


def test_staged_shares_are_joined_as_they_were_uploaded() -> None:
    """A copy: what an update writes to the store meanwhile does not reach the slot. On the CPU it would."""
    steps, changed = plan(2), {}
    for stages in (True, False):

        def check(ranks: Ranks, stages: bool = stages) -> bool:
            store = filled(StoreSpec(BF16), Shard(ranks.rank, 2))
            sizes = weight_slot_numels(store.units, steps), shard_numels(store.units, steps)
            slots = WeightSlots(store, sizes[0], CPU, not stages, sizes[1])
            expected = store.whole("weights", 2, ranks, everywhere=True)
            slots.upload(0, 2)
            store.run("weights", 2).zero_()
            slots.join(0, 2, ranks)
            return not torch.equal(slots.unit(0, 2).weights, expected)

        changed[stages] = on_ranks(2, check)
    assert changed == {True: [False, False], False: [True, True]}


@pytest.mark.parametrize("world", [1, 2, 3, 64])
@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize("sums", ["", "host", "device"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_slots_take_the_predicted_bytes(world: int, reduction: str, sums: str, dtype: torch.dtype) -> None:
    rounds = {"rounds": 2, "micro_batches": 2, "sums": sums} if sums else {}
    steps = plan(world, reduction=reduction, resident=frozenset({1}), **rounds)
    store = HostStore(layouts(dtype), StoreSpec(dtype, resident=frozenset({1}), shard=Shard(0, world)))
    for stages in (True, False) if world > 1 else (True,):
        numels, shares = weight_slot_numels(store.units, steps), shard_numels(store.units, steps)
        weights = WeightSlots(store, numels, CPU, not stages, shares)
        gradients = GradientSlots(store, gradient_slot_numels(store.units, steps), CPU, alias=False)
        shards = GradientShards(store, steps, CPU)
        predicted = slot_bytes(store.units, steps, dtype, stages=stages)
        assert predicted["weight_slots"] == weights.num_bytes > 0
        assert predicted.get("weight_shards", 0) == weights.shard_bytes
        assert sum(predicted.values()) == (
            weights.num_bytes + weights.shard_bytes + gradients.num_bytes + shards.num_bytes
        )
        assert ("weight_shards" in predicted) == (world > 1 and stages)
        assert ({"gradient_shards", "exchange"} <= predicted.keys()) == (world > 1)
        assert ("gradient_sums" in predicted) == (sums == "device")
        for unit in steps.trainable if world > 1 else ():  # each buffer has room for its units
            place = steps.outer_grad_slot if unit >= steps.head else 0
            if unit <= steps.head:
                sent = FP32 if unit in (1, 2, 4, 5) or reduction == "fast" else dtype
                room = gradients.gathered(place, unit, sent)
                assert room.numel() == store.shards[unit].gathered_trainable_numel
                if reduction == "exact":
                    assert shards.received(unit, sent).numel() == room.numel()
            if unit in steps.own_grad_shards:
                place = steps.outer_grad_slot + 1 + steps.own_grad_shards.index(unit)
            assert shards.run(place, unit).numel() == store.shards[unit].trainable_share
            if reduction == "fast" and rounds and unit < steps.head:
                assert shards.received(unit, FP32).numel() == store.shards[unit].trainable_share


def test_gradients_of_one_micro_batch_take_half_a_slot() -> None:
    """In bf16, unless a parameter of the unit is wide; the head's may be a sum."""
    units = [lay_out(f"u{i}", [(f"w{i}", (BLOCK * 8,), True, BF16)], BF16) for i in range(4)]
    specs = [
        StepSpec(2, frozenset(range(4)), frozenset(range(4)), 3, world=2, reduction=reduction)
        for reduction in ("exact", "fast")
    ]
    found = [gradient_slot_numels(units, spec) for spec in specs]
    assert found == [[BLOCK * 4, BLOCK * 4, BLOCK * 8], [BLOCK * 8] * 3]


def test_nothing_is_added_for_one_rank() -> None:
    units = layouts(BF16)
    assert set(slot_bytes(units, plan(1), BF16)) == {"weight_slots", "gradient_slots"}
    ring = max(unit.slot_numel for unit in units[1:5])
    assert weight_slot_numels(units, plan(1)) == [ring] * 2 + [units[5].slot_numel]
    assert shard_numels(units, plan(1)) == []
    assert Shard(0, 1) == WHOLE
