"""Measure a profile of this machine: train small layers, time copies, updates and writes.

The layers run through the engine of a training run, and the meter of a plan (`plan.work`) counts their
operations. The rates are those that explain the measured times best (non-negative least squares). No rate is
taken from a data sheet.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoConfig

from horizon_lm.config import ModelSettings
from horizon_lm.engine.lanes import InlineLanes
from horizon_lm.engine.policies import Policies, store_spec
from horizon_lm.host_model import HostModel
from horizon_lm.machine.cores import usable_cores
from horizon_lm.machine.profile import FALLBACK, HERE, Profile, Rates, load_profile
from horizon_lm.memory.arena import keep_freed_memory
from horizon_lm.plan.costs import Costs
from horizon_lm.plan.outline import Outline
from horizon_lm.plan.predict import predict
from horizon_lm.plan.rates import Clock, copy_rate, disk_rate, link_rates, optimizer_rate
from horizon_lm.plan.work import KINDS, Work

_DTYPES = ("float32", "bfloat16")
_FEWEST_CASES = 4  # models measured however slow the machine is: two shapes in both formats
_COLUMNS = [(kind, dtype) for kind in KINDS for dtype in _DTYPES]


@dataclass(frozen=True)
class Shape:
    """Two decoder layers, and the micro-batch that they train on."""

    width: int
    mlp: int
    heads: int
    kv_heads: int
    tokens: int
    rows: int = 1
    head_dim: int | None = None

    def values(self) -> dict[str, Any]:
        """Return values of a transformers configuration, with model_type."""
        found = {"model_type": "llama", "hidden_size": self.width, "intermediate_size": self.mlp}
        found |= {"num_hidden_layers": 2, "num_attention_heads": self.heads, "vocab_size": 2048}
        found |= {"num_key_value_heads": self.kv_heads, "max_position_embeddings": max(2048, self.tokens)}
        return found | ({"head_dim": self.head_dim} if self.head_dim else {})


@dataclass(frozen=True)
class Case:
    """One small model: shape, dtype and activation policy."""

    shape: Shape
    dtype: str
    activations: str = "recompute"

    def __str__(self) -> str:
        rows = f"{self.shape.rows} x " if self.shape.rows > 1 else ""
        return f"width {self.shape.width}, {rows}{self.shape.tokens} tokens, {self.dtype}"


def cases_of(device: str) -> list[Case]:
    """Return the models to measure, the most informative first.

    On a CPU they are small, some dominated by the cost per operation, others by arithmetic. On CUDA they have
    the widths of Qwen3 4B and 8B: with enough tokens to fill the device, with long rows for attention, and
    with few tokens for the minimum cost of an operation. Smaller layers would measure only kernel launches.
    """
    if device == "cpu":
        order = [(s, d) for s in _CPU for d in _DTYPES]
        return [Case(shape, dtype, how) for how in ("recompute", "keep") for shape, dtype in order]
    wide, wider, long, few = _CUDA
    found = [Case(wide, "bfloat16"), Case(few, "bfloat16"), Case(few, "float32"), Case(_CUDA_FP32, "float32")]
    found += [Case(wider, "bfloat16"), Case(long, "bfloat16"), Case(wide, "bfloat16", "keep")]
    return [*found, Case(replace(long, tokens=4096), "float32")]


_CPU = (
    Shape(128, 352, 4, 4, 64),
    Shape(512, 1408, 8, 8, 512),
    Shape(256, 704, 4, 4, 2048),
    Shape(256, 704, 4, 2, 256),
    Shape(768, 2048, 12, 4, 384),
    Shape(1024, 2816, 16, 4, 256),
)
_CUDA = (
    Shape(2560, 9728, 32, 8, 1024, 16, 128),
    Shape(4096, 12288, 32, 8, 1024, 8, 128),
    Shape(2560, 9728, 32, 8, 16384, 1, 128),
    Shape(2560, 9728, 32, 8, 128, 1, 128),
)
_CUDA_FP32 = replace(_CUDA[0], rows=4)


@dataclass(frozen=True)
class Sample:
    """A measured op: its work, and its seconds."""

    work: Work
    seconds: float


class Budget:
    """The time that measuring may take, and progress reports.

    seconds: for everything, shared out among the measurements; None: unlimited. say: called with what is
    being measured, and again with its figure.
    """

    def __init__(
        self, seconds: float | None = None, say: Callable[[str, str | None], None] = lambda what, figure: None
    ) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self.say = say
        self.missing: list[str] = []  # what was left out for time

    def left(self) -> float:
        return math.inf if self._end is None else max(0.0, self._end - time.monotonic())

    def share(self, part: float) -> float:
        """The monotonic time at which a part of what is left is used up."""
        return time.monotonic() + part * self.left()


def measure_layers(
    cases: Sequence[Case],
    device: str = "cpu",
    clock: Clock = time.perf_counter,
    repeats: int = 5,
    budget: Budget | None = None,
    until: float = math.inf,
) -> list[Sample]:
    """Measure forward, backward and loss of small models.

    until: the monotonic time after which no further model begins, except for the first `_FEWEST_CASES`; each
    gets a share of the time for repetitions.
    """
    budget = budget or Budget()
    found: list[Sample] = []
    outlines: dict[tuple, Outline] = {}
    for number, case in enumerate(cases):
        now = time.monotonic()
        if number >= _FEWEST_CASES and now >= until:
            budget.missing.append(f"{len(cases) - number} of {len(cases)} models of layers")
            break
        what = f"layers {number + 1} of {len(cases)}: {case}"
        budget.say(f"{what}, {case.activations}", None)
        end = now + (until - now) / (len(cases) - number) if until < math.inf else math.inf
        samples = _measure(case, device, clock, repeats, end, outlines)
        found += samples
        budget.say(what, f"{sum(s.seconds for s in samples) * 1e3:.2f} ms")
    return found


def _measure(
    case: Case, device: str, clock: Clock, repeats: int, end: float, outlines: dict[tuple, Outline]
) -> list[Sample]:
    """end: the monotonic time after which nothing is repeated."""
    settings, shape = _settings_of(case, device), case.shape
    model = HostModel.from_config(shape.values(), settings)
    model.engine.lanes = InlineLanes(model.device, clock)
    if device == "cpu":
        keep_freed_memory()  # as `train` does
    costs = _costs_of(case, model.config, settings, outlines)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 2048, (shape.rows, shape.tokens), generator=generator) for _ in range(2)]
    batches = [{"input_ids": i, "labels": i} for i in ids]
    seconds: dict[tuple, list[float]] = {}
    work: dict[tuple, Work] = {}
    for repeat in range(repeats + 1):
        if repeat > 1 and time.monotonic() >= end:
            break
        model.forward_backward(batches, record=True)
        for op, began, ended in model.timeline:
            if op.kind in "FBL" and repeat:
                key = op.kind, op.unit, op.policy
                seconds.setdefault(key, []).append(ended - began)
                work[key] = costs.work_of(op)
    return [Sample(work[key], min(values)) for key, values in seconds.items()]


def _settings_of(case: Case, device: str) -> ModelSettings:
    chosen: dict[str, Any] = {"device": device, "dtype": case.dtype, "activations": case.activations}
    chosen |= {"skip_memory_check": True, "lanes": "inline", "update": "sync"}
    return ModelSettings.from_dict(chosen, source="calibrate")


def _costs_of(case: Case, config: Any, settings: ModelSettings, outlines: dict[tuple, Outline]) -> Costs:
    """Return the costs of the case's ops. outlines: cache shared by the activation policies."""
    key = case.shape, case.dtype
    if key not in outlines:
        outlines[key] = Outline(config, settings)
    outline, shape = outlines[key], case.shape
    policies = Policies.of(settings, outline)
    measures = outline.measures(shape.rows, shape.tokens, policies.loss_chunk)
    plan = policies.step_spec(2)
    spec = store_spec(settings, outline)
    return Costs(outline, measures, policies, plan, spec, _UNKNOWN, plan.micro_batches)


def fit_rates(samples: list[Sample]) -> tuple[dict[tuple[str, str], float], float]:
    """Fit (seconds per FLOP or byte by kind and format, seconds per operation) to the samples, by relative
    error."""
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
    """Solve least squares without negative parts: drop the most negative column until there is none."""
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


def measure(
    device: str = "cpu",
    clock: Clock = time.perf_counter,
    threads: int | None = None,
    repeats: int = 5,
    *,
    runs: int = 3,
    budget: Budget | None = None,
) -> Profile:
    """Measure the profile of this machine.

    clock: seconds; another than the default only for shared machines. repeats: steps of each small model, of
    which the fastest counts. runs: processes whose memory is measured, for short and for long rows. budget:
    time for everything; less is repeated to stay within it.
    """
    budget = budget or Budget()
    cores, is_cpu = threads or usable_cores(), device == "cpu"
    updating = cores if is_cpu else measure_update_threads(cores, clock, budget)

    def one(what: str, rate: Callable[[], float]) -> float:
        budget.say(what, None)
        found = rate()
        budget.say(what, f"{found / 1e9:.3g} GB/s")
        return found

    host = one("copies in host memory", lambda: copy_rate(clock))
    optimizer = one("updates of the optimizer", lambda: optimizer_rate(updating, clock))
    disk = one("writing to the disk", disk_rate)
    up, down = (host, host) if is_cpu else _links(budget)
    process_bytes, heap_share, how = _process_figures(device, runs, budget)
    until = budget.share(1.0) if budget.left() < math.inf else math.inf
    rates, operation = fit_rates(measure_layers(cases_of(device), device, clock, repeats, budget, until))
    free, total = (0, 0) if is_cpu else torch.cuda.mem_get_info()
    return Profile(
        name=HERE,
        title="this machine" if is_cpu else f"this machine, {torch.cuda.get_device_name()}",
        device="cpu" if is_cpu else "cuda",
        measured=True,
        cores=cores,
        host_bytes=float(psutil.virtual_memory().total),
        device_bytes=float(total),
        process_bytes=process_bytes,
        heap_share=heap_share,
        context_bytes=0.0 if is_cpu else float(total - free - torch.cuda.memory_reserved()),
        **{kind: _rates(rates, kind) for kind in KINDS},
        node=None,
        operation_seconds=operation,
        h2d=up,
        d2h=down,
        host=host,
        optimizer=optimizer,
        disk=disk,
        update_threads=None if is_cpu else updating,
        sources=_sources(is_cpu) | dict.fromkeys(("process_bytes", "heap_share"), how),
    )


def _links(budget: Budget) -> tuple[float, float]:
    """Return the rates of the host link with both directions busy; also report those of each alone."""
    budget.say("host link", None)
    found = link_rates()
    alone = f"{found.up_alone / 1e9:.3g} and {found.down_alone / 1e9:.3g}"
    budget.say("host link", f"{found.up / 1e9:.3g} up, {found.down / 1e9:.3g} down GB/s; alone {alone}")
    return found.up, found.down


_CLOSE = 0.97  # share of the fastest rate that counts as fast, within the noise of a measurement
_HERE = "measured by `horizon doctor` on this machine"


def _sources(is_cpu: bool) -> dict[str, str]:
    names = set(Profile.model_fields) - {"name", "title", "device", "measured", "sources"}
    names -= {"update_threads"} if is_cpu else set()
    return dict.fromkeys(sorted(names), _HERE)


def _rates(seconds: dict[tuple[str, str], float], kind: str) -> Rates:
    """Rates of a kind of operation; one that explains no time at all gets the largest that we write."""
    speeds = {dtype: 1 / max(seconds[kind, dtype], 1e-16) for dtype in _DTYPES}
    return Rates(**speeds)


def _process_figures(device: str, runs: int, budget: Budget) -> tuple[float, float, str]:
    """(process_bytes, heap_share, their source); those of the fallback if its share of the time ran out."""
    budget.say("memory of a process", None)
    memory = _process_memory_within(device, runs, budget)
    if memory is not None:
        budget.say("memory of a process", f"{memory[0] / 1e9:.2f} GB")
        return float(memory[0]), memory[1], _HERE
    budget.missing.append("the memory of a process")
    fallback = load_profile(FALLBACK)
    budget.say("memory of a process", f"{fallback.process_bytes / 1e9:.2f} GB (not measured)")
    how = f"that of {FALLBACK}: the machine was too busy to measure it; `horizon doctor --thorough` does"
    return fallback.process_bytes, fallback.heap_share, how


def _process_memory_within(device: str, runs: int, budget: Budget) -> tuple[int, float] | None:
    """None if half of the time left was not enough."""
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
    """Measure (bytes of a process before it has a model, share of the heap beyond what is alive in it).

    Both are what the prediction does not explain of models trained with short and with long rows. Medians of
    `runs` processes each: the heap's layout varies by chance (10 % of the peak with rows of 2,048 tokens).
    Raises subprocess.TimeoutExpired if not even one of each has ended at the monotonic time `until`.
    """
    values = {"model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4}
    values |= {"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 16384}
    chosen = {"device": device, "skip_memory_check": True, "activations": "recompute"}
    settings = ModelSettings.from_dict(chosen, source="calibrate")
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
    if device != "cpu":  # host memory is pinned, and allocated once
        return max(0, *rest), 0.0
    share = max(0.0, (rest[1] - rest[0]) / (transient[1] - transient[0]))
    return int(rest[0] - share * transient[0]), share


_UNKNOWN = Profile(
    name="unknown",
    title="rates to be measured",
    device="cpu",
    measured=False,
    cores=1,
    host_bytes=1.0,
    device_bytes=0.0,
    process_bytes=0.0,
    heap_share=0.0,
    context_bytes=0.0,
    **dict.fromkeys(KINDS, Rates(bfloat16=1.0, float32=1.0)),
    node=None,
    operation_seconds=0.0,
    h2d=1.0,
    d2h=1.0,
    host=1.0,
    optimizer=1.0,
    disk=1.0,
    update_threads=None,
    sources={},
)


def measure_update_threads(cores: int, clock: Clock, budget: Budget) -> int:
    """Return the fewest threads with which a host update is about as fast as with any number, by measurement.

    Updates are bound by memory bandwidth, which fewer than all cores may saturate; the others are more useful
    to the lanes. At least one core is left to the thread that launches kernels.
    """
    counts = sorted({max(1, n) for n in (cores // 2, *(cores - k for k in range(5)))})
    budget.say("threads of the update", None)
    rates = {n: optimizer_rate(n, clock) for n in counts}
    fastest = max(rates.values())
    chosen = next((n for n in counts if n < cores and rates[n] >= _CLOSE * fastest), max(1, cores - 1))
    budget.say("threads of the update", ", ".join(f"{n}: {r / 1e9:.3g}" for n, r in rates.items()) + " GB/s")
    return chosen
