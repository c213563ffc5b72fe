"""Where bytes live: the split master is exact, layouts do not overlap, host memory is what was predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import zoo
from horizon_lm.memory import arena
from horizon_lm.memory.layout import ALIGN_ELEMENTS, UnitLayout, lay_out
from horizon_lm.memory.master import join_master, split_master
from horizon_lm.memory.store import HostStore, StoreSpec, predict_bytes, regions
from horizon_lm.run.host_model import HostModel

BF16, FP32 = torch.bfloat16, torch.float32
LOWER_HALVES = torch.arange(1 << 16, dtype=torch.int64)


pytestmark = pytest.mark.usefixtures("one_thread")


# The split master.


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    """fp32 values of unsigned 32-bit patterns in int64."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(FP32)


def to_bits(value: torch.Tensor) -> torch.Tensor:
    """int32 patterns: comparable where values are zeros of two signs."""
    return value.contiguous().view(torch.int32)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight, residual = torch.empty_like(master, dtype=BF16), torch.empty_like(master, dtype=torch.int16)
    split_master(master, weight, residual)
    return weight, residual


def is_upper_tie(master: torch.Tensor) -> torch.Tensor:
    """Half-way between a bf16 value with an even last bit and its neighbour further from zero."""
    return (to_bits(master).to(torch.int64) & 0x1FFFF) == 0x8000


def is_moved(master: torch.Tensor) -> torch.Tensor:
    """The one master in 131,072 that has no room: an fp32 ulp below an upper tie."""
    return (to_bits(master).to(torch.int64) & 0x1FFFF) == 0x7FFF


def check_split(master: torch.Tensor) -> None:
    weight, residual = split(master)
    stored = join_master(weight, residual)
    moved = is_moved(master)
    # Only that one is moved, by one fp32 ulp toward zero; all else comes back bit by bit.
    assert torch.equal(to_bits(stored), to_bits(master) - moved.to(torch.int32))
    # The weight is what torch rounds the master to, the one given and the one stored alike.
    assert torch.equal(weight.view(torch.int16), master.to(BF16).view(torch.int16))
    assert torch.equal(weight.view(torch.int16), stored.to(BF16).view(torch.int16))
    # What is stored stays what it is, however often it is split and joined.
    again = join_master(*split(stored))
    assert torch.equal(to_bits(again), to_bits(stored))


UPPER_HALVES = {
    "zero": 0x0000,
    "negative zero": 0x8000,
    "smallest denormal": 0x0001,
    "denormal": 0x0042,
    "largest denormal": 0x007F,
    "negative denormal": 0x8035,
    "smallest normal": 0x0080,
    "one": 0x3F80,
    "minus one": 0xBF80,
    "odd": 0x3DCD,
    "negative odd": 0xC0A1,
    "mantissa of ones": 0x40FF,
    "largest": 0x7F7F,
    "most negative": 0xFF7F,
    "below the largest": 0x7F7E,
}


@pytest.mark.parametrize("upper", UPPER_HALVES.values(), ids=UPPER_HALVES.keys())
def test_split_and_join_over_all_lower_halves(upper: int) -> None:
    master = from_bits((upper << 16) + LOWER_HALVES)
    assert int(is_moved(master).sum()) == (1 if upper % 2 == 0 else 0)
    check_split(master)


def test_split_and_join_over_all_upper_halves() -> None:
    """Every finite sign, exponent and bf16 mantissa, at the lower halves where rounding changes."""
    uppers = torch.arange(1 << 16, dtype=torch.int64)
    uppers = uppers[(uppers & 0x7F80) != 0x7F80]
    for lower in (0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        check_split(from_bits((uppers << 16) + lower))


def half_precision(dtype: torch.dtype) -> torch.Tensor:
    """Every number of a 16-bit format but NaNs, in fp32: denormals, zeros of both signs, infinities."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float()
    return values[~values.isnan()]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_every_number_of_fp16_and_bf16_is_an_exact_master(dtype: torch.dtype) -> None:
    """The control is what was done before: the upper tie, 1 in 16 numbers of fp16, moved by one ulp."""
    master = half_precision(dtype)
    weight, residual = split(master)
    assert torch.equal(to_bits(join_master(weight, residual)), to_bits(master))
    assert torch.equal(weight.view(torch.int16), master.to(BF16).view(torch.int16))
    before = to_bits(master) - is_upper_tie(master).to(torch.int32)
    wrong = (before != to_bits(master)).double().mean().item()
    assert wrong == (0 if dtype == BF16 else pytest.approx(1 / 16, rel=0.05))


def test_nan_masters_stay_nan() -> None:
    payloads = torch.cat([LOWER_HALVES[1:], LOWER_HALVES])
    uppers = torch.cat([torch.full((65535,), 0x7F80), torch.full((65536,), 0xFFC0)])
    assert join_master(*split(from_bits((uppers << 16) + payloads))).isnan().all()


def test_infinity_is_kept() -> None:
    master = torch.tensor([torch.inf, -torch.inf])
    weight, residual = split(master)
    assert torch.equal(weight.float(), master)
    assert torch.equal(join_master(weight, residual), master)


def test_rounding_to_infinity_comes_back() -> None:
    """The largest fp32 values round to an infinite bf16; the master is still exact."""
    master = torch.tensor([3.4028234663852886e38, -3.4028234663852886e38, 3.4e38])
    weight, residual = split(master)
    assert weight.isinf().tolist() == [True, True, True]
    assert torch.equal(join_master(weight, residual), master)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64))
def test_split_and_join_of_any_finite_values(values: list[float]) -> None:
    check_split(torch.tensor(values, dtype=FP32))


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(7,), (3, 5), (1, 1, 4), (0,), (70_000,)]))
def test_split_and_join_of_random_patterns(seed: int, shape: tuple[int, ...]) -> None:
    bits = torch.randint(0, 1 << 32, shape, generator=torch.Generator().manual_seed(seed))
    master = from_bits(bits)
    check_split(torch.where(master.isfinite(), master, torch.zeros(())))


def test_split_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    master = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = split(master)
    monkeypatch.setattr("horizon_lm.memory.master._CHUNK", 64)
    pieces = split(master)
    assert torch.equal(whole[0].view(torch.int16), pieces[0].view(torch.int16))
    assert torch.equal(whole[1], pieces[1])


def test_split_of_a_transposed_master() -> None:
    master = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).t()
    weight, residual = torch.empty(9, 6, dtype=BF16), torch.empty(9, 6, dtype=torch.int16)
    split_master(master, weight, residual)
    assert torch.equal(join_master(weight, residual), master)


def test_a_plain_sum_fails_on_the_tie() -> None:
    """The negative control: without its residual's second meaning the upper tie comes back one ulp off, and
    as a plain difference of 16 bits it wraps around, to a whole bf16 step away."""
    master = from_bits((0x3F82 << 16) + LOWER_HALVES)
    weight, residual = split(master)
    upper = weight.view(torch.int16).to(torch.int32) << 16
    tie = is_upper_tie(master)
    assert int(tie.sum()) == 1
    plain = upper + residual
    assert torch.equal(plain != to_bits(master), tie | is_moved(master))
    wrapped = upper + (to_bits(master) - upper).to(torch.int16)
    assert torch.equal(wrapped != to_bits(master), tie)
    assert float((wrapped.view(FP32) - master)[tie].abs()) == 2**-7


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


# Host memory of a process: what Linux counts against what the layout predicts.

SIZE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}

_MEASURE = """
import json, resource, sys

def memory():
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(rows[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")}

import torch
torch.set_num_threads(1)
found = {"torch": memory()["VmRSS"]}
import transformers.models.llama.modeling_llama
from horizon_lm.config import ModelSettings
from horizon_lm.run.host_model import HostModel
found["imported"] = memory()["VmRSS"]

kind, source, update = sys.argv[1:]
if kind == "folder":
    limit = None if update == "eager" else 1.0
    settings = {"update": update, "max_grad_norm": limit}
    model = HostModel.from_pretrained(source, device="cpu", dtype="bfloat16", **settings)
else:
    model = HostModel.from_config(json.loads(source), ModelSettings(device="cpu", dtype="bfloat16"))
found["loaded"], found["loading peak"] = memory()["VmRSS"], memory()["VmHWM"]
found["slabs"] = model.store.num_bytes.get("grad_slabs", 0)
found["parameters"], found["predicted"] = model.num_parameters, sum(model.store.num_bytes.values())
if kind == "folder":
    ids = torch.arange(16)[None]
    model.train_step([{"input_ids": ids, "labels": ids}], lr=1e-4)
    model.flush()
    found["trained"] = memory()["VmRSS"]
found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(found))
"""


def measure(kind: str, source: str, update: str = "deferred") -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, kind, source, update],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of more than 300 M parameters. Its values do not matter, so they are not drawn."""
    path = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZE)).to(BF16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.01)
    model.save_pretrained(path)
    yield str(path)
    for file in path.iterdir():
        file.unlink()


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@needs_linux
@pytest.mark.parametrize("update", ["deferred", "eager"])
def test_host_memory_is_what_the_layout_predicts(folder: str, update: str) -> None:
    """With eager updates: 12 bytes a parameter, and slabs of a layer or of the head."""
    found = measure("folder", folder, update)
    predicted, slabs = found["predicted"], found["slabs"]
    assert found["parameters"] > 300e6
    assert predicted == (14 if update == "deferred" else 12) * found["parameters"] + slabs
    assert (slabs > 0) == (update == "eager") and slabs < 0.1 * predicted
    print(f"\n{found['parameters'] / 1e6:.1f} M parameters in bf16; MB")
    print(
        f"{'above a process that has imported':36}{'predicted':>10}{'loading':>9}{'training':>10}{'ratio':>8}"
    )
    for base in ("torch", "imported"):
        loading, training = (found[key] - found[base] for key in ("loading peak", "peak"))
        name = {"torch": "torch", "imported": "torch, transformers, horizon_lm"}[base]
        figures = (
            f"{predicted / 1e6:10.0f}{loading / 1e6:9.0f}{training / 1e6:10.0f}{training / predicted:8.4f}"
        )
        print(f"{name:36}{figures}")
    assert 1.0 < (found["peak"] - found["imported"]) / predicted < 1.03
    # What the libraries take is a number of bytes and no share of the model: 133 MB with transformers 5.23.
    assert found["imported"] - found["torch"] < 160e6
    # While loading: file, weights and residuals, 6 of 14 bytes a parameter; then the file is gone.
    assert found["loading peak"] < found["imported"] + 0.5 * predicted
    assert found["loaded"] - found["imported"] < 4 * found["parameters"] + 50e6


@needs_linux
def test_random_weights_need_less_memory_than_training() -> None:
    """They are drawn in fp32 (4 bytes a parameter) and given back unit by unit as the store takes them."""
    values = SIZE | {"model_type": "llama", "num_hidden_layers": 12}
    found = measure("values", json.dumps(values))
    peak, kept = found["loading peak"] - found["imported"], found["loaded"] - found["imported"]
    p = found["parameters"]
    print(f"\n{p / 1e6:.1f} M random parameters: peak {peak / p:.2f}, kept {kept / p:.2f} bytes a parameter")
    assert peak < 0.6 * found["predicted"]
    assert kept < 4 * p + 60e6, "the source is still there"


# Device memory.


def slot_bytes(layers: int, hidden: int = 32) -> dict[str, int]:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    model = HostModel.from_pretrained(
        LlamaForCausalLM(config), device="cpu", dtype="bfloat16", lanes="adversarial"
    )
    batches = [zoo.batch(config, batch_size=1, length=4, seed=m) for m in range(2)]
    model.forward_backward(batches)
    model.step(lr=1e-3)
    sizes = model.memory_bytes()
    largest = max(unit.numel for unit in model.store.units)
    assert sizes["weight_slots"] == 2 * 2 * largest, "2 slots of bf16"
    assert sizes["gradient_slots"] == 2 * 4 * largest, "2 slots of fp32"
    return {name: sizes[name] for name in ("weight_slots", "gradient_slots", "weights")}


def test_device_slots_do_not_grow_with_depth() -> None:
    shallow, deep = slot_bytes(layers=4), slot_bytes(layers=40)
    assert shallow["weight_slots"] == deep["weight_slots"] > 0
    assert shallow["gradient_slots"] == deep["gradient_slots"] > 0
    assert deep["weights"] > 7 * shallow["weights"]  # the models do differ
    wide = slot_bytes(layers=4, hidden=64)  # the negative control
    assert wide["weight_slots"] > 2 * shallow["weight_slots"]
    assert wide["gradient_slots"] > 2 * shallow["gradient_slots"]
