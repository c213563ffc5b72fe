"""Worker process for one system: `python -m horizon_lm.bench.worker`, controlled by JSON lines on stdin.

    {"system": "module:function", "case": {...}}   build the system; answers `ready` or an error
    {"step": n}                                    train on the tokens of step n
    {"begin": true}                                reset peak memory before the timed steps
    {"end": n}                                     return peaks and the breakdown of one more step, n; exit

Answers go to stdout; whatever libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from horizon_lm.bench.protocol import AbsentError, Case, System, tokens_of
from horizon_lm.errors import DoesNotFitError, HorizonError

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


def error_row(error: BaseException) -> dict[str, Any]:
    """Convert an exception to a row: status absent, `out of memory` or failed, and the reason."""
    text = error.message if isinstance(error, HorizonError) else str(error).strip()
    why = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, AbsentError):
        return {"status": "absent", "why": why}
    full = isinstance(error, MemoryError | torch.OutOfMemoryError | DoesNotFitError)
    if full or any(words in text.lower() for words in _OUT_OF_MEMORY):
        return {"status": "out of memory", "why": why}
    return {"status": "failed", "why": f"{type(error).__name__}: {why}"}


@dataclass(frozen=True)
class Peaks:
    """Peak bytes of a process.

    host, steps: resident since process start (VmHWM), since `begin_steps` (0 if the kernel cannot reset it).
    device, reserved: allocated and reserved by torch during the steps. pinned: page-locked by torch's own
    allocator, which resident memory may not include.
    """

    host: int
    steps: int
    device: int
    reserved: int
    pinned: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def resident_peak() -> int:
    """Return VmHWM in bytes; ru_maxrss would include the parent process before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class MemoryMeter:
    """Peak memory of this process. CUDA stays uninitialized unless `device` is a CUDA device."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._before = 0
        self._was_reset = False

    def begin_steps(self) -> None:
        """Reset the peaks, so that the steps are counted without building the model."""
        self._before = resident_peak()
        with suppress(OSError):  # missing in some kernels and sandboxes
            Path("/proc/self/clear_refs").write_text("5")
            self._was_reset = True
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> Peaks:
        now = resident_peak()
        device = reserved = pinned = 0
        if self._cuda:
            device, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            pinned = _pinned()
        steps = now if self._was_reset else 0
        return Peaks(max(now, self._before), steps, device, reserved, pinned)


def _pinned() -> int:
    with suppress(AttributeError, RuntimeError):
        return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))
    return 0


class Session:
    """One system and the requests it answers."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.case = Case.from_json(request["case"])
        self.meter = MemoryMeter(self.case.device)
        if self.case.threads:
            torch.set_num_threads(self.case.threads)
        if not self.case.cudnn_attention:
            torch.backends.cuda.enable_cudnn_sdp(False)
        start = time.perf_counter()
        self.system = build(request["system"], self.case)
        self.info = self.system.describe() if hasattr(self.system, "describe") else {}
        self.rows = int(self.info.get("rows", self.case.rows or self.case.sequences))
        self.ready = {"status": "ready", "build_seconds": time.perf_counter() - start, "info": self.info}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "step" in request:
            return self._step(request["step"])
        if "begin" in request:
            self.meter.begin_steps()
            return {}
        return self._end(request["end"])

    def _step(self, number: int) -> dict[str, Any]:
        batches = tokens_of(self.case, number, self.rows)
        self._settle()
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.system.step(batches)
        self._settle()
        return {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "loss": loss,
        }

    def _end(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = {"peaks": self.meter.peaks().to_json()}
        if hasattr(self.system, "breakdown"):
            found["breakdown"] = self.system.breakdown(tokens_of(self.case, number, self.rows))
        self.system.close()
        return found

    def _settle(self) -> None:
        if self.case.device.startswith("cuda"):
            torch.cuda.synchronize()


def build(name: str, case: Case) -> System:
    """Build the system `module:function` for a case. Raises AbsentError if it cannot run here."""
    module, _, function = name.partition(":")
    system: System = getattr(importlib.import_module(module), function)(case)
    return system


def serve(requests: Iterator[dict[str, Any]], out: IO[str]) -> None:
    """Answer requests until they end or one fails."""
    session: Session | None = None
    for request in requests:
        try:
            if session is None:
                session = Session(request)
                answer = session.ready
            else:
                answer = session.answer(request)
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer = error_row(error)
        out.write(json.dumps(answer) + "\n")
        out.flush()
        if answer.get("status", "ready") != "ready" or "end" in request:
            return


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve((json.loads(line) for line in sys.stdin), out)
    out.close()
    os._exit(0)  # skip libraries' exit handlers, which may wait for threads


if __name__ == "__main__":
    main()
