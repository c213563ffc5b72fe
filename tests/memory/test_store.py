"""Where bytes live: layouts do not overlap, and the store has the predicted size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from horizon_lm.host_model import HostModel
from horizon_lm.memory import arena
from horizon_lm.memory.layout import ALIGN_ELEMENTS, UnitLayout, lay_out
from horizon_lm.memory.regions import StoreSpec, predict_bytes, regions
from horizon_lm.memory.store import HostStore
from stored_bits import is_moved

BF16, FP32 = torch.bfloat16, torch.float32

pytestmark = pytest.mark.usefixtures("one_thread")

# Layout.

SHAPES = st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple)
ROWS = st.lists(st.tuples(SHAPES, st.booleans(), st.sampled_from([BF16, FP32])), max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(ROWS, st.sampled_from([BF16, FP32]))
def test_layout(rows: list[tuple[tuple[int, ...], bool, torch.dtype]], dtype: torch.dtype) -> None:
    named = [(f"p{i}", shape, trainable, compute) for i, (shape, trainable, compute) in enumerate(rows)]
    if dtype == FP32:  # nothing is wider than the store
        named = [(name, shape, trainable, FP32) for name, shape, trainable, _ in named]
    unit = lay_out("unit", named, dtype)
    assert {(p.name, p.shape, p.trainable, p.compute_dtype) for p in unit.parameters} == set(named)
    end = 0
    for parameter in unit.parameters:
        assert parameter.offset % ALIGN_ELEMENTS == 0
        assert 0 <= parameter.offset - end < ALIGN_ELEMENTS, "overlap, or a gap that nothing asks for"
        end = parameter.offset + parameter.numel
        assert parameter.trainable == (parameter.offset >= unit.trainable_offset) or not parameter.numel
    assert 0 <= unit.numel - end < ALIGN_ELEMENTS
    order = [p.trainable for p in unit.parameters]
    assert order == sorted(order), "frozen parameters come first"
    for part in (True, False):  # the model's order is kept among those of one kind
        for wide in (True, False):
            names = [n for n, _, t, c in named if t == part and (c != dtype) == wide]
            placed = [
                p.name for p in unit.parameters if p.trainable == part and (p.compute_dtype != dtype) == wide
            ]
            assert names == placed

    # Views are disjoint, and with the gaps they are everything.
    run = torch.zeros(unit.numel, dtype=torch.int64)
    for parameter in unit.parameters:
        view = unit.view(run, parameter)
        assert view.shape == parameter.shape
        view += 1
    assert int(run.sum()) == sum(p.numel for p in unit.parameters)
    assert run.numel() == 0 or int(run.max()) <= 1
    trainable = run[unit.trainable_offset :]
    for start, length in unit.gaps():
        assert 0 < length < ALIGN_ELEMENTS
        trainable[start : start + length] += 1
    assert bool((trainable == 1).all())
    for parameter in unit.trainable:
        shifted = unit.trainable_view(torch.arange(unit.trainable_numel), parameter)
        assert torch.equal(shifted + unit.trainable_offset, unit.view(torch.arange(unit.numel), parameter))


def test_wide_parameters_stand_side_by_side() -> None:
    rows = [
        ("a", (ALIGN_ELEMENTS,), True, BF16),
        ("b", (ALIGN_ELEMENTS,), True, FP32),
        ("c", (ALIGN_ELEMENTS,), False, FP32),
        ("d", (ALIGN_ELEMENTS,), False, BF16),
    ]
    unit = lay_out("unit", rows, BF16)
    assert [p.name for p in unit.parameters] == ["d", "c", "b", "a"]
    parts = [n // ALIGN_ELEMENTS for n in (unit.wide_offset, unit.wide_numel, unit.trainable_offset)]
    assert parts == [1, 2, 2]
    assert (unit.residual_numel, unit.slot_numel) == (3 * ALIGN_ELEMENTS, 6 * ALIGN_ELEMENTS)


# The store.


def units_of(dtype: torch.dtype, sizes: tuple[int, ...] = (160, 0, 4096, 32)) -> list[UnitLayout]:
    return [
        lay_out(f"u{i}", [(f"w{i}", (size,), True, dtype)] if size else [], dtype)
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(("dtype", "per_parameter"), [(BF16, 2 + 2 + 4 + 4 + 2), (FP32, 4 + 4 + 4 + 4)])
def test_regions_have_the_predicted_size(dtype: torch.dtype, per_parameter: int) -> None:
    units = units_of(dtype)
    spec = StoreSpec(dtype)
    store = HostStore(units, spec)
    assert store.num_bytes == predict_bytes(units, spec)
    assert sum(store.num_bytes.values()) == per_parameter * sum(unit.numel for unit in units)
    for region in regions(spec):
        runs = [store.run(region.name, unit) for unit in range(len(units))]
        # One allocation, exactly as large as its units: the storage holds not one byte more.
        assert {run.untyped_storage().data_ptr() for run in runs} == {runs[0].untyped_storage().data_ptr()}
        assert runs[0].untyped_storage().nbytes() == predict_bytes(units, spec)[region.name]
        end = runs[0].data_ptr()
        for run in runs:
            assert run.data_ptr() in (end, 0) or not run.numel()
            end += run.nbytes
        assert all(not run.any() for run in runs), "regions start as zeros"


def even_llama() -> LlamaForCausalLM:
    """A model whose dimensions, like those of real ones, leave no gaps in the layout."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


@pytest.mark.parametrize(("dtype", "per_parameter"), [("bfloat16", 14), ("float32", 16)])
def test_a_model_takes_14_or_16_bytes_a_parameter(dtype: str, per_parameter: int) -> None:
    model = HostModel.from_pretrained(even_llama(), device="cpu", dtype=dtype)
    assert sum(model.store.num_bytes.values()) == per_parameter * model.num_parameters
    assert sum(predict_bytes(model.store.units, model.store.spec).values()) == sum(
        model.store.num_bytes.values()
    )


def test_frozen_parameters_take_their_weights_alone() -> None:
    source = even_llama()
    frozen = [p for name, p in source.named_parameters() if "mlp" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model = HostModel.from_pretrained(source, device="cpu", dtype="bfloat16")
    saved = sum(p.numel() for p in frozen)
    assert sum(model.store.num_bytes.values()) == 14 * model.num_parameters - 12 * saved


@pytest.mark.parametrize("num_bytes", [0, 1, 4095, 4096, 4097, (4 << 20) + 1, 10_000_003])
def test_an_allocation_is_exact(num_bytes: int) -> None:
    block = arena.allocate(num_bytes)
    assert block.numel() == num_bytes == block.untyped_storage().nbytes()
    assert not block.any()
    assert block.data_ptr() % 4096 == 0
    block.fill_(7)


def test_an_allocation_is_given_back() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    before = mapped()
    block = arena.allocate(1 << 30)  # never touched: takes address space, no memory
    assert mapped() - before >= 1 << 30
    view = block[5:9].clone()
    del block
    assert mapped() - before < 1 << 29
    assert not view.any()


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_masters_keep_the_precision_of_the_source(source: torch.dtype) -> None:
    value = (torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 30).to(source)
    value[is_moved(value.float())] = 0
    units = [lay_out("unit", [("w", (32, 32), True, BF16)], BF16)]
    store = HostStore(units, StoreSpec(BF16))
    store.adopt("w", value)
    assert torch.equal(store.master("w"), value.float())
    assert torch.equal(store.weight("w"), value.float().bfloat16())


def test_adopting_again_leaves_nothing_of_the_first() -> None:
    store = HostStore([lay_out("unit", [("w", (16,), True, BF16)], BF16)], StoreSpec(BF16))
    store.adopt("w", torch.full((16,), 1.001))
    second = torch.full((16,), 0.5, dtype=BF16)
    store.adopt("w", second)
    assert torch.equal(store.master("w"), second.float())


def test_wide_parameters_keep_their_precision_when_frozen() -> None:
    value = torch.randn(16, generator=torch.Generator().manual_seed(0))
    store = HostStore([lay_out("unit", [("w", (16,), False, FP32)], BF16)], StoreSpec(BF16))
    store.adopt("w", value)
    assert torch.equal(store.master("w"), value)
