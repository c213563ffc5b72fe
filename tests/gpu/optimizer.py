"""The update on the device, with the bits of the host's, and how fast it is."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from gpu.common import Part, Place, same
from horizon_lm.optim import kernel
from horizon_lm.optim.progress import Progress
from horizon_lm.optim.rules import RULES, Hyper, Numbers, Tensors
from optimizer_runs import BF16, FP32, Run, make_run

STEPS = 2
_NUMBERS = Numbers("adamw", Hyper(1e-3, weight_decay=0.1, momentum=0.9), step=1, grad_scale=0.3, seed=7)


def check_optimizer(place: Place) -> Part:
    """Compare every rule and dtype bit by bit, any bit pattern among the values; then measure AdamW.

    A dry run compares by Triton's interpreter, few elements, if triton is installed.
    """
    part = Part("optimizer")
    if importlib.util.find_spec("triton") is None:
        part.add("update on the device", None, "triton is not installed")
        return part
    update = _interpreted() if place.dry else kernel.update_run
    numel = 5000 if place.dry else 3_000_001
    for rule in RULES:
        different = []
        for dtypes in itertools.product((BF16, FP32), repeat=3):
            found = _different(place, rule, dtypes, numel, update)
            different += [f"{found} elements with {dtypes}"] if found else []
        part.add(rule, not different, "; ".join(different), dtypes=8, elements=numel, steps=STEPS)
    part.add("a launch made twice", *_launched_twice(place, numel, update))
    if not place.dry:
        _measure(part, place)
    return part


def _interpreted() -> Callable[..., None]:
    import interpreted

    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # numpy's, of infinities
    update: Callable[..., None] = interpreted.device_kernel().update
    return update


def _moved(run: Run, device: torch.device) -> Run:
    return Run(*(None if t is None else t.to(device, copy=True) for t in run.tensors()))


def _runs(place: Place, rule: str, dtypes: tuple[torch.dtype, ...], numel: int) -> tuple[Run, Run]:
    """The same in host memory and on the device; a misaligned start, as a segment may have."""
    weights, grads, moments = dtypes
    host = make_run(numel, rule=rule, weights=weights, grads=grads, moments=moments, wild=True)
    usual = make_run(numel, rule=rule, weights=weights, grads=grads, moments=moments)
    for all_of_them, some in zip(host.tensors(), usual.tensors(), strict=True):
        if all_of_them is not None and some is not None:
            all_of_them[numel // 2 :] = some[numel // 2 :]
    device = _moved(host, place.device)
    return host.part(1, numel), device.part(1, numel)


def _different(
    place: Place, rule: str, dtypes: tuple[torch.dtype, ...], numel: int, update: Callable[..., None]
) -> int:
    """Elements that differ after some steps, across a change of the random numbers' keys."""
    host, device = _runs(place, rule, dtypes, numel)
    for step in range(1, STEPS + 1):
        numbers = replace(_NUMBERS, rule=rule, step=step, element_offset=(1 << 32) - numel // 3)
        kernel.update_run(Tensors(*host.tensors()), numbers)
        update(Tensors(*device.tensors()), numbers)
    pairs = zip(host.bits(), _moved(device, torch.device("cpu")).bits(), strict=True)
    return max(int((one != other).sum()) for one, other in pairs)


def _launched_twice(place: Place, numel: int, update: Callable[..., None]) -> tuple[bool, str]:
    """Whether the second of two launches for one piece changes nothing, and a new update something."""
    _, run = _runs(place, "adamw", (BF16, BF16, FP32), numel)
    tensors, progress = Tensors(*run.tensors()), Progress()
    update(tensors, _NUMBERS, progress=progress)
    once = _moved(run, place.device)
    progress.ended.clear()  # as an interrupt before the entry leaves it
    update(tensors, _NUMBERS, progress=progress)
    repeated = all(same(a, b) for a, b in zip(once.bits(), run.bits(), strict=True))
    update(tensors, _NUMBERS, progress=Progress())
    made = not all(same(a, b) for a, b in zip(once.bits(), run.bits(), strict=True))
    return repeated and made, "" if repeated and made else f"{repeated=}, {made=}"


def _measure(part: Part, place: Place, numel: int = 1 << 28) -> None:
    """Bytes per second that AdamW reads and writes: bf16 weights and gradients, fp32 or bf16 moments."""
    for moments, num_bytes in ((FP32, 26), (BF16, 18)):
        dtypes = (BF16, torch.int16, BF16, moments, moments)
        tensors = Tensors(*(torch.zeros(numel, dtype=dtype, device=place.device) for dtype in dtypes))
        seconds = []
        for _ in range(12):
            place.synchronize()
            begin = time.perf_counter()
            kernel.update_run(tensors, _NUMBERS)
            place.synchronize()
            seconds.append(time.perf_counter() - begin)
        rate = num_bytes * numel / statistics.median(seconds[2:])
        name = f"AdamW, {str(moments).removeprefix('torch.')} moments"
        part.data[name] = {"bytes_per_second": rate, "elements": numel, "seconds": seconds}
        part.note(f"{name}: {rate / 1e9:.0f} GB/s, {numel / statistics.median(seconds[2:]) / 1e9:.1f} G/s")
