"""A system in a process of its own: `python -m horizon_lm.bench.worker`, spoken to in JSON lines.

The first line names the system as `module:function` and the case; the answer says whether it was built.
Then `{"step": n}` trains on the tokens of step n, `{"begin": true}` starts the count of memory, and
`{"end": n}` asks for peaks and breakdown (of one more step, n) and ends the process. What libraries print
goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import IO, Any

import torch

from horizon_lm.bench.memory import Meter
from horizon_lm.bench.protocol import AbsentError, Case, System, tokens_of
from horizon_lm.errors import DoesNotFitError, HorizonError

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


def fault(error: BaseException) -> dict[str, Any]:
    """An exception as a row: status absent, `out of memory` or failed, and why."""
    text = error.message if isinstance(error, HorizonError) else str(error).strip()
    why = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, AbsentError):
        return {"status": "absent", "why": why}
    full = isinstance(error, MemoryError | torch.OutOfMemoryError | DoesNotFitError)
    if full or any(words in text.lower() for words in _OUT_OF_MEMORY):
        return {"status": "out of memory", "why": why}
    return {"status": "failed", "why": f"{type(error).__name__}: {why}"}


class Session:
    """Answers requests with one system."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.case = Case.from_json(request["case"])
        self.meter = Meter(self.case.device)
        if self.case.threads:
            torch.set_num_threads(self.case.threads)
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
    """The system `module:function` for a case. Raises AbsentError where it cannot run."""
    module, _, function = name.partition(":")
    system: System = getattr(importlib.import_module(module), function)(case)
    return system


def serve(requests: Iterator[dict[str, Any]], out: IO[str]) -> None:
    """Answer until the requests end or one fails."""
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
            answer = fault(error)
        out.write(json.dumps(answer) + "\n")
        out.flush()
        if answer.get("status", "ready") != "ready" or "end" in request:
            return


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve((json.loads(line) for line in sys.stdin), out)
    out.close()
    os._exit(0)  # no library may wait for its threads here


if __name__ == "__main__":
    main()
