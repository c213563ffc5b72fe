"""Stages of the GPU evidence, the most telling first; those up to the largest model are estimated at half an
hour.

First the basis of everything else (machine, calibration, gradients), then the main comparison, then large,
slow or optional jobs. The estimated seconds, which `--list` prints, come from reading the code, not from a
GPU. Pure data; `gpu_runner.py` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from horizon_lm.bench.jobs import OURS
from horizon_lm.bench.models import shape

from .gpu_parts import Command, Job, Stage, case_of, group_of, largest, megatrain_case, ours, peer, placed
from .peers import PEERS

MICRO, CHECK = "benchmarks.micro", "tests.gpu.check"
STEP_16K, STEP_64K = group_of("qwen3-4b", 16), group_of("qwen3-4b", 64)
RACE = "qwen3-4b, peers, 16 x 1024, clip 1.0"
REPETITION = "qwen3-0.6b, 16k tokens, repeated"


def _micro(name: str, part: str, *more: str, seconds: float) -> Command:
    arguments = ("--part", part, *more, "--json", "{json}")
    return Command(name, MICRO, arguments, "machine", seconds=seconds, limit=2 * seconds + 60)


def _check(part: str, *more: str, seconds: float, limit: float) -> Command:
    arguments = ("--part", part, "--out", "{json}", *more)
    dry = ("--dry-run", "--model", "llama")
    return Command(part, CHECK, arguments, "gpu-check", dry, seconds=seconds, limit=limit)


def _machine() -> Iterator[Command]:
    yield _micro("probe", "probe", seconds=15)
    yield _micro("links and registration", "links", seconds=25)
    yield _micro("update by threads", "update", "--threads", "8", "12", "14", "16", seconds=40)
    yield _micro("one layer", "layer", seconds=75)


def _calibration() -> Iterator[Command]:
    arguments = ("doctor", "--fresh", "--out", "{folder}/hardware.yaml")
    dry = ("--seconds", "0")
    yield Command("profile", "horizon_lm.cli", arguments, "calibration", dry, seconds=120, limit=240)


def _first_checks() -> Iterator[Command]:
    trace = ("--trace", "{folder}/timeline.json")
    yield _check("step", *trace, seconds=60, limit=240)
    yield _check("gradients", seconds=120, limit=420)
    yield _check("optimizer", seconds=60, limit=240)


def _step_16k() -> Iterator[Job]:
    """Return the in-memory reference, ours, and ours with other kernels."""
    yield peer("torch", "qwen3-4b", 16, 1024, STEP_16K)
    case = ours("qwen3-4b", 16, 1024, STEP_16K).case
    yield Job("ours", OURS, case, STEP_16K, trace=True, seconds=80)
    without = case.replace(cudnn_attention=False)
    yield Job("ours, cuDNN attention off", OURS, without, STEP_16K)
    compiled = case.replace(extra={"compile": True})
    yield Job("ours, compiled", OURS, compiled, STEP_16K, needs="compile", seconds=120)


def _step_64k() -> Iterator[Job]:
    yield peer("torch", "qwen3-4b", 64, 1024, STEP_64K)
    yield ours("qwen3-4b", 64, 1024, STEP_64K)


def _placement() -> Iterator[Job]:
    """Return what residents and rounds are worth: `ours` of the same groups has both."""
    yield placed("qwen3-4b", 16, "streamed")
    yield placed("qwen3-4b", 16, "residents")
    yield placed("qwen3-4b", 64, "streamed")


def _more_placement() -> Iterator[Job]:
    """Return the other sizes of `placement.STEPS` that fit 128 GB of host memory and one H200."""
    yield replace(ours("qwen2.5-14b", 64, 1024, group_of("qwen2.5-14b", 64)), seconds=150)
    yield placed("qwen3-4b", 64, "rounds")
    yield replace(ours("qwen3-4b", 4, 1024, group_of("qwen3-4b", 4)), seconds=60)
    yield replace(peer("torch", "qwen3-4b", 4, 1024, group_of("qwen3-4b", 4)), seconds=60)
    yield placed("qwen3-4b", 4, "streamed", seconds=60)
    yield ours("qwen3-4b", 64, 1024, STEP_64K, clip=None)


def _half_a_million() -> Iterator[Job]:
    """Return Qwen2.5-7B at 512k tokens a step, 45 seconds each, and at 16k."""
    group = group_of("qwen2.5-7b", 512)
    for job in (ours("qwen2.5-7b", 512, 1024, group), placed("qwen2.5-7b", 512, "streamed")):
        yield replace(job, case=job.case.replace(warmup=2, steps=2), seconds=215)
    yield replace(ours("qwen2.5-7b", 16, 1024, group_of("qwen2.5-7b", 16)), seconds=90)


def _lanes() -> Iterator[Job | Command]:
    """Return the bit tests: lanes against one stream, and runs against their repetition."""
    yield _check("lanes", "--repeats", "6", seconds=120, limit=400)
    yield _check("determinism", seconds=60, limit=300)
    case = case_of(shape("qwen3-0.6b"), 16, 1024, activations="recompute").replace(rows=16)
    fixed = case.replace(extra={"deterministic": True})
    title = "ours, deterministic, twice"
    yield Job(title, OURS, fixed, REPETITION, repeats=2, needs="deterministic", seconds=60)
    yield Job("ours, default kernels, twice", OURS, case, REPETITION, repeats=2, seconds=60)


def _ranks() -> Iterator[Command]:
    """Return NCCL with one rank, ranks that share a GPU, and one rank per GPU where there are several."""
    yield _check("ranks", seconds=75, limit=480)


def _seven_billion() -> Iterator[Job]:
    yield Job("ours", OURS, megatrain_case(), "qwen2.5-7b, 148 x 1024", seconds=130)


def _largest() -> Iterator[Job]:
    yield from islice(largest(), 2)


def _fsdp2() -> Iterator[Job]:
    yield replace(peer("fsdp2-offload", "qwen3-4b", 16, 1024, RACE), seconds=110)


def _sanitizer() -> Iterator[Command]:
    yield _check("sanitizer", seconds=90, limit=440)


def _peers() -> Iterator[Job]:
    """Return the other peers; one whose package is missing gets a row that says so."""
    others = (name for name in PEERS if name not in ("torch", "fsdp2-offload"))
    for name in others:
        yield replace(peer(name, "qwen3-4b", 16, 1024, RACE), seconds=90)


EVIDENCE: dict[str, Stage] = {
    "machine": _machine,
    "calibration": _calibration,
    "first-checks": _first_checks,
    "4b-16k": _step_16k,
    "4b-64k": _step_64k,
    "placement": _placement,
    "lanes": _lanes,
    "7b": _seven_billion,
    "largest-exact": _largest,
    "ranks": _ranks,
    "7b-512k": _half_a_million,
    "placement-more": _more_placement,
    "fsdp2": _fsdp2,
    "sanitizer": _sanitizer,
    "peers": _peers,
}
