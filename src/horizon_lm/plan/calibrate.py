"""Rates of the machine at hand: measured by training small layers, and by copies and updates in host memory.

The layers run through the same engine as a training run, and their operations are counted by the same meter
as a plan's (`plan.work`); the rates are those that explain the measured times best (least squares without
negative times). No rate is taken from a data sheet.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from horizon_lm.config import ModelSettings
from horizon_lm.engine.lanes import InlineLanes
from horizon_lm.engine.policies import Policies, store_spec
from horizon_lm.machine.cores import usable_cores
from horizon_lm.machine.profile import FALLBACK, Profile, Rates, load_profile
from horizon_lm.memory import arena
from horizon_lm.optim.kernel import update_run
from horizon_lm.optim.rules import Hyper, Numbers, Tensors
from horizon_lm.plan.costs import Costs
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.predict import predict
from horizon_lm.plan.work import KINDS, Work

Clock = Callable[[], float]
# width, MLP, heads, keys and values, tokens: from where operations are what costs to where arithmetic is
LAYERS = [(128, 352, 4, 4, 64), (256, 704, 4, 2, 256), (512, 1408, 8, 8, 512), (768, 2048, 12, 4, 384)]
LAYERS += [(1024, 2816, 16, 4, 256), (256, 704, 4, 4, 2048)]
_DTYPES = ("float32", "bfloat16")
_ORDER = (0, 2, 5, 1, 3, 4)  # of LAYERS: operations, arithmetic and attention come first
_FEWEST_CASES = 4  # models that are measured however slow the machine is: two shapes in both formats
_LONGEST_SECONDS = 2.0  # of one rate in host memory or of the disk
_COLUMNS = [(kind, dtype) for kind in KINDS for dtype in _DTYPES]


@dataclass(frozen=True)
class Sample:
    """An op that was run: what it computed, and its seconds."""

    work: Work
    seconds: float


class Budget:
    """How long measuring may take, and who hears of it.

    seconds: of everything, shared out among the measurements; None for as long as it takes. say: told what
    is being measured, and again with its figure.
    """

    def __init__(
        self, seconds: float | None = None, say: Callable[[str, str | None], None] = lambda what, figure: None
    ) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self.say = say
        self.missing: list[str] = []  # what it was not enough for

    def left(self) -> float:
        return math.inf if self._end is None else max(0.0, self._end - time.monotonic())

    def share(self, part: float) -> float:
        """Seconds of the clock at which a part of what is left is used up."""
        return time.monotonic() + part * self.left()


def measure_layers(
    device: str = "cpu",
    clock: Clock = time.perf_counter,
    repeats: int = 5,
    budget: Budget | None = None,
    until: float = math.inf,
) -> list[Sample]:
    """Forward, backward and loss of small models, in fp32 and bf16, kept and computed again.

    until: the monotonic time at which no further model is begun, but for the first of each format; those
    that tell most come first, and each gets its share of the time for repeating.
    """
    budget = budget or Budget()
    cases = [(a, LAYERS[s], d) for a in ("recompute", "keep") for s in _ORDER for d in _DTYPES]
    found: list[Sample] = []
    outlines: dict[tuple, Outline] = {}
    for number, (activations, shape, dtype) in enumerate(cases):
        now = time.monotonic()
        if number >= _FEWEST_CASES and now >= until:
            budget.missing.append(f"{len(cases) - number} of {len(cases)} models of layers")
            break
        what = f"layers {number + 1} of {len(cases)}: width {shape[0]}, {shape[-1]} tokens, {dtype}"
        budget.say(f"{what}, {activations}", None)
        end = now + (until - now) / (len(cases) - number) if until < math.inf else math.inf
        samples = _measure(shape, dtype, activations, device, clock, repeats, end, outlines)
        found += samples
        budget.say(what, f"{sum(s.seconds for s in samples) * 1e3:.2f} ms")
    return found


def _measure(
    shape: tuple[int, ...],
    dtype: str,
    activations: str,
    device: str,
    clock: Clock,
    repeats: int,
    end: float,
    outlines: dict[tuple, Outline],
) -> list[Sample]:
    """end: the monotonic time after which nothing is repeated any more."""
    from horizon_lm.host_model import HostModel

    width, mlp, heads, kv, tokens = shape
    values = {"model_type": "llama", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": 2}
    values |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": 2048}
    chosen = {"device": device, "dtype": dtype, "activations": activations, "skip_memory_check": True}
    settings = ModelSettings.from_dict(chosen | {"lanes": "inline", "update": "sync"}, source="calibrate")
    model = HostModel.from_config(values, settings)
    model.engine.lanes = InlineLanes(model.device, clock)
    if device == "cpu":
        arena.keep_freed_memory()  # as `train` does
    if (shape, dtype) not in outlines:  # the same for both policies, with what was found on it
        outlines[shape, dtype] = Outline(model.config, settings)
    outline = outlines[shape, dtype]
    policies = Policies.of(settings, outline)
    plan = policies.step_spec(2)
    measures = outline.measures(1, tokens, policies.loss_chunk)
    costs = Costs(outline, measures, policies, plan, store_spec(settings, outline), _UNKNOWN)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 2048, (1, tokens), generator=generator) for _ in range(2)]
    batches = [{"input_ids": i, "labels": i} for i in ids]
    seconds: dict[tuple, list[float]] = {}
    work: dict[tuple, Work] = {}
    for repeat in range(repeats + 1):
        if repeat > 1 and time.monotonic() >= end:
            break
        model.forward_backward(batches, record=True)
        for op, start, end in model.timeline:
            if op.kind in "FBL" and repeat:
                key = op.kind, op.unit, op.policy
                seconds.setdefault(key, []).append(end - start)
                work[key] = costs.work_of(op)
    return [Sample(work[key], min(values)) for key, values in seconds.items()]


def fit_rates(samples: list[Sample]) -> tuple[dict[tuple[str, str], float], float]:
    """(seconds for a FLOP or byte by kind and format, seconds for an operation) that explain the samples
    best, by relative error."""
    rows, wanted = [], []
    for sample in samples:
        row = [0.0] * (len(_COLUMNS) + 1)
        for kernel, count in sample.work.items():
            dtype = "float32" if kernel.dtype == "float32" else "bfloat16"
            row[_COLUMNS.index((kernel.kind, dtype))] += count * kernel.amount
            row[-1] += count
        rows.append([value / sample.seconds for value in row])
        wanted.append(1.0)
    solution = _nonnegative(np.array(rows), np.array(wanted))
    return dict(zip(_COLUMNS, solution[:-1].tolist(), strict=True)), float(solution[-1])


def _nonnegative(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative parts: what would be negative is left out, the worst first."""
    scale = np.maximum(rows.max(axis=0), 1e-300)
    scaled = rows / scale
    active = [i for i in range(rows.shape[1]) if rows[:, i].any()]
    while True:
        found, *_ = np.linalg.lstsq(scaled[:, active], wanted, rcond=None)
        if not len(found) or found.min() >= 0:
            break
        active.pop(int(found.argmin()))
    solution = np.zeros(rows.shape[1])
    solution[active] = found / scale[active]
    return solution


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


def link_rates(num_bytes: int = 1 << 28) -> tuple[float, float]:
    """(to the device, from it) in bytes a second, pinned, both at work at once. Needs CUDA."""
    hosts = [arena.allocate(num_bytes, pin=True) for _ in range(2)]
    devices = [torch.empty(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    times: list[list[float]] = [[], []]
    for _ in range(6):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2)]
        torch.cuda.synchronize()
        for way, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                events[way][0].record()
                if way == 0:
                    devices[0].copy_(hosts[0], non_blocking=True)
                else:
                    hosts[1].copy_(devices[1], non_blocking=True)
                events[way][1].record()
        torch.cuda.synchronize()
        for way in range(2):
            times[way].append(events[way][0].elapsed_time(events[way][1]) / 1e3)
    up, down = (num_bytes / statistics.median(found[1:]) for found in times)
    return up, down


def measure(
    device: str = "cpu",
    clock: Clock = time.perf_counter,
    threads: int | None = None,
    repeats: int = 5,
    *,
    runs: int = 3,
    budget: Budget | None = None,
) -> Profile:
    """The profile of this machine. clock: seconds; another one only for machines that are shared.
    repeats: steps of each small model, of which the fastest counts; runs: processes whose memory is looked
    at, for short and for long rows. budget: the time for all of it, within which less is repeated."""
    import psutil

    budget = budget or Budget()
    cores = threads or usable_cores()
    is_cpu = device == "cpu"

    def one(what: str, rate: Callable[[], float], unit: str = "GB/s", scale: float = 1e9) -> float:
        budget.say(what, None)
        found = rate()
        budget.say(what, f"{found / scale:.3g} {unit}")
        return found

    host = one("copies in host memory", lambda: copy_rate(clock))
    optimizer = one("updates of the optimizer", lambda: optimizer_rate(cores, clock))
    disk = one("writing to the disk", disk_rate)
    up, down = (host, host) if is_cpu else link_rates()
    budget.say("memory of a process", None)
    memory = _process_memory_within(device, runs, budget)
    if memory is None:
        budget.missing.append("the memory of a process")
    process, heap_share = memory or (load_profile(FALLBACK).process_bytes, load_profile(FALLBACK).heap_share)
    budget.say("memory of a process", f"{process / 1e9:.2f} GB" + ("" if memory else " (not measured)"))
    until = budget.share(1.0) if budget.left() < math.inf else math.inf
    rates, operation = fit_rates(measure_layers(device, clock, repeats, budget, until))

    def pair(kind: str) -> Rates:
        # A kind that explains no time at all is as fast as can be told.
        speeds = {dtype: 1 / max(rates[kind, dtype], 1e-16) for dtype in _DTYPES}
        return Rates(**speeds)

    free, total = (0, 0) if is_cpu else torch.cuda.mem_get_info()
    how = "measured by `horizon doctor` on this machine"
    names = set(Profile.model_fields) - {"name", "title", "device", "measured", "sources"}
    sources = dict.fromkeys(sorted(names), how)
    if memory is None:
        taken = (
            f"that of {FALLBACK}: the machine was too busy to measure it; `horizon doctor --thorough` does"
        )
        sources |= dict.fromkeys(("process_bytes", "heap_share"), taken)
    return Profile(
        name="here",
        title="this machine" if is_cpu else f"this machine, {torch.cuda.get_device_name()}",
        device="cpu" if is_cpu else "cuda",
        measured=True,
        cores=cores,
        host_bytes=float(psutil.virtual_memory().total),
        device_bytes=float(total),
        process_bytes=float(process),
        heap_share=heap_share,
        context_bytes=0.0 if is_cpu else float(total - free - torch.cuda.memory_reserved()),
        **{kind: pair(kind) for kind in KINDS},
        operation_seconds=operation,
        h2d=up,
        d2h=down,
        host=host,
        optimizer=optimizer,
        disk=disk,
        sources=sources,
    )


def _process_memory_within(device: str, runs: int, budget: Budget) -> tuple[int, float] | None:
    """None where the budget's share for it was not enough."""
    try:
        return process_memory(device, runs, until=budget.share(0.5))
    except subprocess.TimeoutExpired:
        return None


_RUN = """
import torch, json, sys
from horizon_lm import HostModel
from horizon_lm.config import ModelSettings
from horizon_lm.memory.arena import keep_freed_memory
values, settings, tokens = json.loads(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
model = HostModel.from_config(values, ModelSettings(**settings))
if model.device.type == "cpu":
    keep_freed_memory()  # as `train` does
ids = torch.zeros(1, tokens, dtype=torch.long)
for _ in range(3):
    model.train_step([dict(input_ids=ids, labels=ids)], lr=1e-5)
lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(int(lines["VmHWM"].split()[0]) * 1024)
"""


def process_memory(device: str = "cpu", runs: int = 3, until: float = math.inf) -> tuple[int, float]:
    """(bytes of a process before it has a model, share that the heap takes beyond what is alive in it): of
    a model trained with short and with long rows, what the prediction does not explain. Medians of `runs`
    processes each: where blocks come to lie in the heap is a matter of luck (10 % of the peak with rows of
    2,048 tokens). Raises subprocess.TimeoutExpired when not even one of each has ended at the monotonic time
    `until`."""
    values = {"model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4}
    values |= {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 16384}
    chosen = {"device": device, "skip_memory_check": True, "activations": "recompute"}
    settings = ModelSettings.from_dict(chosen, source="calibrate")
    from transformers import AutoConfig

    kind = {name: value for name, value in values.items() if name != "model_type"}
    outline = Outline(AutoConfig.for_model(str(values["model_type"]), **kind), settings)
    rest, transient = [], []
    for tokens in (128, 2048):
        given = json.dumps([values, chosen, tokens])
        command = [sys.executable, "-c", _RUN, given, str(torch.get_num_threads())]
        found = []
        for _ in range(runs):
            left = min(600.0, max(0.1, until - time.monotonic()))
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=left)
            found.append(int(done.stdout.split()[-1]))
        said = predict(outline, settings, _UNKNOWN, batch=1, tokens=tokens, micro_batches=1)
        transient.append(said.host_bytes - said.store_bytes)
        rest.append(int(statistics.median(found)) - said.host_bytes)
    if device != "cpu":  # what lies on the host is pinned, and taken once
        return max(0, *rest), 0.0
    share = max(0.0, (rest[1] - rest[0]) / (transient[1] - transient[0]))
    return int(rest[0] - share * transient[0]), share


def disk_rate(num_bytes: int = 1 << 26) -> float:
    """Bytes a second of a file in the temporary folder, written and synced."""
    import os
    import tempfile

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


_UNKNOWN = Profile(
    name="unknown",
    title="rates that are being measured",
    device="cpu",
    measured=False,
    cores=1,
    host_bytes=1.0,
    device_bytes=0.0,
    process_bytes=0.0,
    heap_share=0.0,
    context_bytes=0.0,
    **dict.fromkeys(KINDS, Rates(bfloat16=1.0, float32=1.0)),
    operation_seconds=0.0,
    h2d=1.0,
    d2h=1.0,
    host=1.0,
    optimizer=1.0,
    disk=1.0,
    sources={},
)
