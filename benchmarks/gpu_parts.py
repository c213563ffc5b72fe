"""Jobs of the GPU suite, and its long parts. Pure data; `gpu_runner.py` runs them.

Sequences have 1024 tokens unless the name says 4k; steps have 4, 16, 64 and 148 thousand tokens. Peers
begin with micro-batches of 16 thousand tokens and halve them while device memory runs out; the planner
splits ours. Rows named `clip off` train without clipping, all others clip at 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from horizon_lm.bench.jobs import OURS, TORCH
from horizon_lm.bench.models import shape
from horizon_lm.bench.protocol import Case

from .peers import PEERS
from .placement import CHOICES

SIZES = ("qwen3-0.6b", "qwen3-4b", "qwen2.5-7b", "llama-3.1-8b")
TOKENS = {"4k": 4096, "16k": 16384, "64k": 65536, "148k": 148 * 1024}
DEPTHS = (28, 56, 84, 132, 180)
LONG = (32768, 65536, 131072, 262144)
FIRST_ROWS = 16384  # tokens of a peer's first micro-batch


LIMIT_SECONDS = 480.0  # per job; a command on such a machine may take ten minutes


@dataclass(frozen=True)
class Job:
    """One system at one setting, a row of results.

    group: rows of a group have the same model and tokens, and share an in-memory reference. largest: give the
    model as many layers as the planner says will fit. repeats: runs whose losses are compared bitwise.
    trace: profile one more step. needs: a setting; without it the job is skipped. seconds: an estimate.
    """

    name: str
    system: str
    case: Case
    group: str
    reference: bool = False
    largest: bool = False
    repeats: int = 1
    trace: bool = False
    needs: str = ""
    seconds: float = 70.0
    limit: float = LIMIT_SECONDS

    @property
    def key(self) -> str:
        """Return the job's name in the ledger."""
        return f"{self.group}: {self.name}"


@dataclass(frozen=True)
class Command:
    """A job that measures no system: `python -m module`, which writes JSON to the file `{json}`.

    dry: more arguments for a dry run on the CPU. `{folder}` in arguments is the folder of results.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    group: str
    dry: tuple[str, ...] = ("--dry-run",)
    seconds: float = 60.0
    limit: float = LIMIT_SECONDS

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"


Stage = Callable[[], "Iterator[Job | Command]"]


def case_of(model: dict[str, Any], sequences: int, length: int, **changes: Any) -> Case:
    """Return a step of `sequences` x `length`; fewer steps if one takes long."""
    long = sequences * length >= 65536
    base = Case(model, length=length, sequences=sequences, rows=0, device="cuda", init="quick")
    return base.replace(warmup=2 if long else 5, steps=5 if long else 10, **changes)


def ours(size: str, sequences: int, length: int, group: str, **changes: Any) -> Job:
    case = case_of(shape(size), sequences, length, activations="auto", **changes)
    return Job("ours" if case.clip else "ours, clip off", OURS, case, group)


def placed(size: str, sequences: int, choices: str, *, seconds: float = 70.0) -> Job:
    """Return ours with fixed choices of `placement.CHOICES`, in the group of the same tokens."""
    case = case_of(shape(size), sequences, 1024, activations="auto", extra=dict(CHOICES[choices]))
    return Job(f"ours, {choices}", OURS, case, group_of(size, sequences), needs="resident", seconds=seconds)


def group_of(size: str, sequences: int) -> str:
    return f"{size}, {sequences}k tokens, 1024 a sequence"


def peer(name: str, size: str, sequences: int, length: int, group: str, **changes: Any) -> Job:
    rows = max(1, min(sequences, FIRST_ROWS // length))
    case = case_of(shape(size), sequences, length, **changes).replace(rows=rows)
    title = name if case.clip else f"{name}, clip off"
    return Job(title, PEERS[name].target, case, group, reference=name == "torch")


def _sweep(size: str) -> Iterator[Job]:
    """Return ours and the in-memory run at each number of tokens, in sequences of 1k and 4k."""
    for what, tokens in TOKENS.items():
        for length in (1024, 4096):
            group = f"{size}, {what} tokens, {length} a sequence"
            yield ours(size, tokens // length, length, group)
            if size in ("qwen3-0.6b", "qwen3-4b"):
                yield peer("torch", size, tokens // length, length, group)
            else:  # fp32 masters do not fit; pure bf16 trains differently, but is the nearest there is
                rows = max(1, FIRST_ROWS // length)
                case = case_of(shape(size), tokens // length, length, extra={"masters": False})
                case = case.replace(rows=min(rows, case.sequences))
                yield Job("torch, pure bf16", TORCH, case, group, reference=True)


def _clipping(size: str) -> Iterator[Job]:
    """Return runs with clipping, without it in the same update mode, and without it in the mode then
    chosen."""
    group = f"{size}, clipping, 16k tokens"
    yield ours(size, 16, 1024, group)
    yield ours(size, 16, 1024, group, clip=None)
    case = case_of(shape(size), 16, 1024, activations="auto", clip=None, extra={"update": "deferred"})
    yield Job("ours, clip off, deferred", OURS, case, group)


def _race(size: str, sequences: int, length: int, clip: float | None) -> Iterator[Job]:
    """Return all peers at one setting."""
    group = f"{size}, peers, {sequences} x {length}, clip {clip or 'off'}"
    yield ours(size, sequences, length, group, clip=clip)
    for name in PEERS:
        yield peer(name, size, sequences, length, group, clip=clip)


def megatrain_case() -> Case:
    return case_of(shape("qwen2.5-7b"), 148, 1024, activations="auto")


def _megatrain() -> Iterator[Job]:
    """Return MegaTrain's own setting, one micro-batch of 148 x 1024."""
    group = "qwen2.5-7b, 148 x 1024"
    yield Job("ours", OURS, megatrain_case(), group)
    case = case_of(shape("qwen2.5-7b"), 148, 1024).replace(rows=148)
    yield Job("megatrain", PEERS["megatrain"].target, case, group)
    yield Job("llmq", PEERS["llmq"].target, case.replace(rows=4), group)


def _long() -> Iterator[Job]:
    """Return steps of one long sequence."""
    for length in LONG:
        group = f"qwen3-4b, one sequence of {length}"
        model = shape("qwen3-4b", max_position_embeddings=max(LONG))
        case = case_of(model, 1, length, activations="auto").replace(warmup=2, steps=3)
        yield Job("ours", OURS, case, group)
        yield Job("torch", TORCH, case.replace(rows=1, activations="recompute"), group, reference=True)


def _depth() -> Iterator[Job]:
    """Return the width of qwen3-0.6b at other depths, 16k tokens."""
    for layers in DEPTHS:
        group = f"qwen3-0.6b width, {layers} layers, 16k tokens"
        case = case_of(shape("qwen3-0.6b", num_hidden_layers=layers), 16, 1024, activations="auto")
        yield Job("ours", OURS, case.replace(warmup=2, steps=5), group)


def largest() -> Iterator[Job]:
    """Return the deepest models of qwen3-8b's width that train 10 steps, by bytes kept per parameter.

    pooled: in host and device memory; the others in host memory alone.
    """
    alone, small = {"resident": 0}, {"moment_dtype": "bfloat16"}
    modes: dict[str, dict[str, Any]] = {
        "exact, clip 1.0, pooled": {},
        "exact, clip 1.0": {"extra": alone},
        "exact, clip off": {"clip": None, "extra": alone},
        "bf16 moments, clip 1.0, pooled": {"extra": small},
        "bf16 moments, clip 1.0": {"extra": alone | small},
        "bf16 moments, clip off": {"clip": None, "extra": alone | small},
    }
    for name, changes in modes.items():
        case = case_of(shape("qwen3-8b"), 8, 1024, activations="auto", **changes)
        seconds = 150.0 if "pooled" in name else 70.0
        case = case.replace(warmup=2, steps=8)
        yield Job(f"ours, {name}", OURS, case, "largest", largest=True, seconds=seconds)


PARTS: dict[str, Stage] = {
    **{f"sweep-{size}": (lambda size=size: _sweep(size)) for size in SIZES},
    "clipping-0.6b": lambda: _clipping("qwen3-0.6b"),
    "clipping-4b": lambda: _clipping("qwen3-4b"),
    "peers-0.6b": lambda: _race("qwen3-0.6b", 16, 1024, 1.0),
    "peers-4b": lambda: _race("qwen3-4b", 16, 1024, 1.0),
    "peers-4b-clip-off": lambda: _race("qwen3-4b", 16, 1024, None),
    "peers-4b-long": lambda: _race("qwen3-4b", 4, 4096, 1.0),
    "megatrain-7b": _megatrain,
    "long": _long,
    "depth": _depth,
    "largest": largest,
}


def dry(job: Job) -> Job:
    """Return the same job at a tiny size on the CPU, uncompiled, since compiling would take too long."""
    extra = {key: value for key, value in job.case.extra.items() if key != "compile"}
    case = job.case.replace(
        extra=extra,
        model=shape("tiny"),
        device="cpu",
        length=16,
        sequences=2,
        rows=min(job.case.rows, 1),
        warmup=0,
        steps=1,
    )
    return replace(job, case=case)
