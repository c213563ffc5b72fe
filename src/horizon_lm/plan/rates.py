"""Rates of host memory, the optimizer, the disk and the host link, each timed by itself."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from horizon_lm.memory import arena
from horizon_lm.optim.kernel import update_run
from horizon_lm.optim.rules import Hyper, Numbers, Tensors

Clock = Callable[[], float]
_LONGEST_SECONDS = 2.0  # for one rate


def copy_rate(clock: Clock = time.perf_counter, num_bytes: int = 1 << 28) -> float:
    """Bytes a second of a copy in host memory, read and written, on torch's threads."""
    source, target = (arena.allocate(num_bytes).view(torch.float32) for _ in range(2))
    source.fill_(1.0)
    return 2 * num_bytes / _median_seconds(lambda: target.copy_(source), clock)


def optimizer_rate(threads: int, clock: Clock = time.perf_counter, numel: int = 1 << 24) -> float:
    """Bytes a second that an AdamW update of bf16 weights with fp32 masters reads and writes."""
    weights, grads = (arena.allocate(2 * numel).view(torch.bfloat16) for _ in range(2))
    residual = arena.allocate(2 * numel).view(torch.int16)
    moments = [arena.allocate(4 * numel).view(torch.float32) for _ in range(2)]
    tensors = Tensors(weights, residual, grads, *moments)
    numbers = Numbers("adamw", Hyper(1e-5), step=1)

    def update() -> None:
        update_run(tensors, numbers, threads=threads)

    return 26 * numel / _median_seconds(update, clock)


def _median_seconds(function: Callable[[], object], clock: Clock, repeats: int = 5) -> float:
    began = time.monotonic()
    function()
    found: list[float] = []
    for _ in range(repeats):
        if len(found) >= 2 and time.monotonic() - began > _LONGEST_SECONDS:
            break
        start = clock()
        function()
        found.append(clock() - start)
    return max(1e-9, statistics.median(found))


class Links(NamedTuple):
    """Bytes per second between pinned host memory and the device. up, down: with both directions busy."""

    up: float
    down: float
    up_alone: float
    down_alone: float


def link_rates(num_bytes: int = 1 << 30) -> Links:
    """Time copies of a pinned block in both directions at once, then in each alone. Needs CUDA."""
    hosts = [arena.allocate(num_bytes, pin_for=torch.device("cuda")) for _ in range(2)]
    devices = [torch.empty(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def rates(ways: tuple[int, ...]) -> list[float]:
        times: list[list[float]] = [[] for _ in ways]
        for _ in range(5):
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in ways]
            torch.cuda.synchronize()
            for way, (begin, end) in zip(ways, events, strict=True):
                with torch.cuda.stream(streams[way]):
                    begin.record()
                    target, source = (devices, hosts) if way == 0 else (hosts, devices)
                    target[way].copy_(source[way], non_blocking=True)
                    end.record()
            torch.cuda.synchronize()
            for found, (begin, end) in zip(times, events, strict=True):
                found.append(begin.elapsed_time(end) / 1e3)
        return [num_bytes / statistics.median(found[1:]) for found in times]

    return Links(*rates((0, 1)), *rates((0,)), *rates((1,)))


def disk_rate(num_bytes: int = 1 << 26) -> float:
    """Bytes a second of a file in the temporary folder, written and synced."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile() as file:
        start = time.perf_counter()
        written = 0
        while written < num_bytes:
            file.write(block)
            file.flush()
            written += len(block)
            if time.perf_counter() - start > _LONGEST_SECONDS:
                break
        os.fsync(file.fileno())
        return written / max(1e-9, time.perf_counter() - start)
