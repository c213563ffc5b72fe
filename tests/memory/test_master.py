"""The split master is exact: every number that is stored comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon_lm.memory.master import join_master, split_master
from stored_bits import is_moved, to_bits

BF16, FP32 = torch.bfloat16, torch.float32
LOWER_HALVES = torch.arange(1 << 16, dtype=torch.int64)


pytestmark = pytest.mark.usefixtures("one_thread")


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    """fp32 values of unsigned 32-bit patterns in int64."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(FP32)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight, residual = torch.empty_like(master, dtype=BF16), torch.empty_like(master, dtype=torch.int16)
    split_master(master, weight, residual)
    return weight, residual


def is_upper_tie(master: torch.Tensor) -> torch.Tensor:
    """Half-way between a bf16 value with an even last bit and its neighbour further from zero."""
    return (to_bits(master).to(torch.int64) & 0x1FFFF) == 0x8000


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
