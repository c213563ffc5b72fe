"""The update on a CUDA device: one pass of Triton over weights, residual, gradient and moments.

The same IEEE operations in the same order as csrc/optimizer.cpp, hence bitwise identical: every operation
rounds once (no fused multiply-add), division and square root are correctly rounded, denormals count. Needs
the triton package, which torch for CUDA brings along; `kernel.update_run` imports this module when a unit in
device memory is updated.

A repeated launch changes nothing. Each program of a launch writes a mark of its own after its elements, and
returns at once if it finds the mark. So whoever was interrupted between a launch and its entry in `Progress`
launches again (optim/progress.py).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from horizon_lm.optim.progress import Progress
from horizon_lm.optim.reference import rounding_keys
from horizon_lm.optim.rules import RULES, Numbers, Tensors, check_update, coefficients

BLOCK = 2048  # elements of a program
_WARPS = 8  # 8 elements a thread: 16 bytes of each bf16 buffer
# Compiler options. Without fusion, multiplications and additions are PTX's own rounded ones.
OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": False}

# Positions in RULES.
_ADAMW, _ADAM, _SGD, _LION = (tl.constexpr(number) for number in range(len(RULES)))
_NAN = tl.constexpr(0x7FC00000)  # every NaN is stored as this one


@triton.jit
def _widen(bits):
    """bf16 as int16 -> fp32."""
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _canonical_bits(value):
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, _NAN, bits)


@triton.jit
def _moment_bits(value):
    """Denormals become zero."""
    bits = _canonical_bits(value)
    return tl.where((bits & 0x7F800000) == 0, 0, bits)


@triton.jit
def _join_master(weight, residual):
    """int16 halves -> fp32 master (memory/master.py)."""
    upper_tie = (residual == 0x7FFF) & ((weight & 1) == 0)
    upper = weight.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    bits = upper + residual.to(tl.int32).to(tl.uint32, bitcast=True) + upper_tie.to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _storable_bits(master):
    bits = _canonical_bits(master)
    low = bits & 0x1FFFF
    return bits - ((low == 0x7FFF) | (low == 0x8000)).to(tl.uint32)


@triton.jit
def _lerp(start, end, weight):
    """As torch.lerp: from the nearer end."""
    near_start = weight < 0.5
    return tl.where(near_start, start, end) + (end - start) * tl.where(near_start, weight, weight - 1.0)


@triton.jit
def _random_bits(first, second, element):
    """Wellons' lowbias32 of the element's low 32 bits, with the two keys mixed in."""
    x = element ^ first
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15) ^ second) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _load(run, lanes, inside, IS_BF16: tl.constexpr):
    if IS_BF16:
        return _widen(tl.load(run + lanes, mask=inside, other=0))
    else:
        return tl.load(run + lanes, mask=inside, other=0.0)


@triton.jit
def _store_moment(run, lanes, inside, value, random, IS_BF16: tl.constexpr):
    """random: its low 16 bits round to bf16."""
    bits = _moment_bits(value)
    if IS_BF16:
        rounded = (bits + (random & 0xFFFF)) >> 16
        tl.store(run + lanes, rounded.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
    else:
        tl.store(run + lanes, bits.to(tl.float32, bitcast=True), mask=inside)


@triton.jit(
    do_not_specialize=["first_key", "second_key", "low"],  # another number is no other kernel
    do_not_specialize_on_alignment=["marks"],
)
def update_kernel(
    weights,
    residual,
    grads,
    exp_avg,
    exp_avg_sq,
    marks,
    count: tl.int64,
    first_key: tl.int32,
    second_key: tl.int32,
    low: tl.int32,
    grad_scale,
    decay,
    weight_decay,
    take1,
    take2,
    beta2,
    rescale2,
    epsilon,
    momentum,
    step_size,
    RULE: tl.constexpr,
    SPLIT: tl.constexpr,
    BF16_GRADS: tl.constexpr,
    BF16_MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update `count` elements, all in one block of 2**32 of the store. bf16 buffers come as int16.

    marks: int32, one for each program. first_key, second_key, low: the keys of the random numbers and the
    low 32 bits of element 0's number, as int32. SPLIT: bf16 weights with a residual.
    """
    program = tl.program_id(0)
    if tl.load(marks + program) == 0:
        start = program.to(tl.int64) * BLOCK
        lanes = start + tl.arange(0, BLOCK)
        inside = lanes < count

        if SPLIT:
            weight = tl.load(weights + lanes, mask=inside, other=0)
            master = _join_master(weight, tl.load(residual + lanes, mask=inside, other=0))
        else:
            master = tl.load(weights + lanes, mask=inside, other=0.0)
        grad = _load(grads, lanes, inside, BF16_GRADS) * grad_scale
        m = _load(exp_avg, lanes, inside, BF16_MOMENTS)
        if BF16_MOMENTS:
            first = first_key.to(tl.uint32, bitcast=True)
            second = second_key.to(tl.uint32, bitcast=True)
            random = _random_bits(first, second, low.to(tl.uint32, bitcast=True) + lanes.to(tl.uint32))
        else:
            random = tl.full([BLOCK], 0, tl.uint32)

        if (RULE == _ADAM) or (RULE == _SGD):  # noqa: SIM109
            grad = grad + master * weight_decay
        else:
            master = master * decay
        if (RULE == _ADAMW) or (RULE == _ADAM):  # noqa: SIM109
            m = _lerp(m, grad, take1)
            v = _load(exp_avg_sq, lanes, inside, BF16_MOMENTS) * beta2 + (grad * take2) * grad
            root = tl.sqrt_rn(v) * rescale2
            master = master - tl.div_rn(m * step_size, root + epsilon)
            _store_moment(exp_avg_sq, lanes, inside, v, random >> 16, BF16_MOMENTS)
        elif RULE == _SGD:
            m = m * momentum + grad
            master = master - m * step_size
        else:
            direction = _lerp(m, grad, take1)
            sign = tl.where(direction > 0.0, 1.0, tl.where(direction < 0.0, -1.0, direction))  # NaN stays
            master = master - sign * step_size
            m = _lerp(m, grad, take2)

        _store_moment(exp_avg, lanes, inside, m, random, BF16_MOMENTS)
        if SPLIT:
            bits = _storable_bits(master)
            upper = (bits + 0x8000) >> 16
            tl.store(weights + lanes, upper.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
            tl.store(residual + lanes, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)
        else:
            tl.store(weights + lanes, _canonical_bits(master).to(tl.float32, bitcast=True), mask=inside)
        tl.debug_barrier()  # every thread has read the mark, and written its elements
        tl.store(marks + program, 1)


def update(tensors: Tensors, numbers: Numbers, *, progress: Progress | None = None) -> None:
    """Update n elements in place, in the current stream, with the bits of `kernel.update`.

    progress: the call is its next piece; if it is repeated before the piece has an entry, it changes nothing.
    Raises ValueError as `kernel.update` does.
    """
    device = tensors.weights.device
    check_update(tensors, numbers, device)
    progress = progress or Progress()
    pieces = list(_pieces(tensors.numel, numbers.element_offset))
    marks = progress.marks(sum(triton.cdiv(stop - start, BLOCK) for start, stop in pieces), device)
    numbers_of_all = vars(coefficients(numbers))
    flags = {
        "RULE": RULES.index(numbers.rule),
        "SPLIT": tensors.residual is not None,
        "BF16_GRADS": tensors.grads.dtype == torch.bfloat16,
        "BF16_MOMENTS": tensors.exp_avg.dtype == torch.bfloat16,
    }
    runs = [_as_integers(run) for run in _all_runs(tensors)]
    # A lane's thread may have another device as its current one.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for start, stop in pieces:
            programs = triton.cdiv(stop - start, BLOCK)
            element = numbers.element_offset + start
            keys = (_signed(key) for key in rounding_keys(numbers.seed, numbers.step, element))
            update_kernel[(programs,)](
                *(None if run is None else run[start:stop] for run in runs),
                marks[:programs],
                stop - start,
                *keys,
                _signed(element & 0xFFFFFFFF),
                **numbers_of_all,
                **flags,
                BLOCK=BLOCK,
                **OPTIONS,
            )
            marks = marks[programs:]
    progress.ended.append(0)


def _pieces(count: int, offset: int) -> list[tuple[int, int]]:
    """Cut [0, count) where `offset` + element is a multiple of 2**32: the keys change there."""
    ends = [*range((1 << 32) - offset % (1 << 32), count, 1 << 32), count]
    return list(zip([0, *ends[:-1]], ends, strict=True)) if count else []


def _all_runs(tensors: Tensors) -> tuple[torch.Tensor | None, ...]:
    return tensors.weights, tensors.residual, tensors.grads, tensors.exp_avg, tensors.exp_avg_sq


def _as_integers(run: torch.Tensor | None) -> torch.Tensor | None:
    """bf16 as int16."""
    return run.view(torch.int16) if run is not None and run.dtype == torch.bfloat16 else run


def _signed(number: int) -> int:
    """The int32 with the bits of a uint32."""
    return number - (1 << 32) if number >= 1 << 31 else number
