"""Measurements of one system, or of several whose steps alternate, each in its own process."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from horizon_lm.bench.figures import Row, spread
from horizon_lm.bench.models import work_of
from horizon_lm.bench.protocol import Case
from horizon_lm.words import count

OURS, TORCH = "horizon_lm.bench.ours:build", "horizon_lm.bench.plain:build"


class WorkerError(Exception):
    """A failed worker; `row` has its status and the reason."""

    def __init__(self, row: Row) -> None:
        super().__init__(row.get("why", ""))
        self.row = row


class Worker:
    """One system in one process. A context manager that kills the process on exit."""

    def __init__(self, system: str, case: Case, *, deadline: float) -> None:
        """deadline: in `time.monotonic()` seconds; requests still running then fail with `no time`."""
        self.system, self.case, self._deadline = system, case, deadline
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "horizon_lm.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=self.environment(),
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready: Row = {}

    def environment(self) -> dict[str, str]:
        """Return the environment of the process."""
        return environment_of(self.case)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._log.close()

    def build(self) -> Row:
        """Build the system; `ready` keeps its answer. Raises WorkerError."""
        self.ready = self.ask({"system": self.system, "case": self.case.to_json()})
        return self.ready

    def ask(self, request: Row) -> Row:
        """Send a request and return the answer.

        Raises WorkerError if the system fails, the process dies or the deadline passes.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=max(0.1, self._deadline - time.monotonic()))
        except queue.Empty:
            raise WorkerError({"status": "no time", "why": "out of time for this part"}) from None
        except BrokenPipeError:
            line = None
        if line is None:
            raise WorkerError(self._death())
        answer: Row = json.loads(line)
        if answer.get("status", "ready") != "ready":
            raise WorkerError(answer | {"log": self._last_lines()})
        return answer

    def _death(self) -> Row:
        code = self._process.wait()
        if code == -9:
            why = "killed by signal 9, as the kernel does when host memory runs out"
            return {"status": "out of memory", "why": why}
        return {"status": "failed", "why": f"exited with code {code}", "log": self._last_lines()}

    def _last_lines(self) -> list[str]:
        self._log.seek(0)
        return self._log.read().decode(errors="replace").splitlines()[-8:]


def environment_of(case: Case) -> dict[str, str]:
    """Return the environment of a worker. On CUDA it enables expandable segments, so freed blocks of any size
    are reused, unless PYTORCH_ALLOC_CONF is set."""
    paths = [str(Path(__file__).parents[2]), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    if case.threads:
        found["OMP_NUM_THREADS"] = str(case.threads)
    if case.device.startswith("cuda"):
        found.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return found


def row_of(system: str, case: Case) -> Row:
    _, parameters = work_of(case)
    return {"key": case.key(system), "system": system, "case": case.to_json(), "parameters": parameters}


def measure(
    systems: Sequence[tuple[str, Case]], *, seconds: float = 3600.0, kind: type[Worker] = Worker
) -> list[Row]:
    """Measure each system in its own process and return a row for each.

    Steps of several systems alternate, in reversed order every other step, so that a change in the machine's
    speed affects all of them. A system that cannot run is a row with the reason; the others continue.
    """
    deadline = time.monotonic() + seconds
    rows = [row_of(system, case) for system, case in systems]
    workers = [kind(system, case, deadline=deadline) for system, case in systems]
    last = max((case.warmup + case.steps for _, case in systems), default=0)
    try:
        alive = [i for i, worker in enumerate(workers) if _attempt(rows[i], partial(_build, worker, rows[i]))]
        _run_steps(workers, rows, alive)
        for i in alive:
            if _attempt(rows[i], partial(_end, workers[i], rows[i], last)):
                rows[i] |= _summary(rows[i], systems[i][1])
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)
    return rows


Smaller = Callable[[Case, Row], Case | None]


def smaller_micro_batch(case: Case, row: Row) -> Case | None:
    """Return the case one size smaller than the one in `row`, which ran out of memory; None after the last.

    First, every layer is recomputed instead of following the planner, and half as many units are resident.
    Then micro-batches are halved, down to one sequence.
    """
    info = row.get("info", {})
    rows = case.rows or int(info.get("rows", 0))
    if case.activations == "auto":
        resident = int(info.get("resident", 0))
        leaner = info.get("recomputed", 0.0) < 1.0 or resident
        extra = case.extra | {"resident": resident // 2}
        case = case.replace(activations="recompute", rows=rows, extra=extra)
        if leaner:
            return case
    rows = rows or case.sequences
    return case.replace(rows=rows // 2) if rows > 1 else None


def size_of(case: Case, row: Row) -> str:
    """Describe the sizes that a retry reduces: depth, micro-batch, activations, residents."""
    rows = case.rows or row.get("info", {}).get("rows")
    cut = f"{rows} x {case.length} tokens a micro-batch" if rows else "the planner's micro-batches"
    resident = case.extra.get("resident", row.get("info", {}).get("resident", 0))
    units = f", {count(resident, 'resident unit')}" if isinstance(resident, int) and resident else ""
    return f"{case.model.get('num_hidden_layers')} layers, {cut}, activations {case.activations}{units}"


def measure_fitting(
    system: str,
    case: Case,
    *,
    seconds: float,
    kind: type[Worker] = Worker,
    smaller: Smaller = smaller_micro_batch,
) -> Row:
    """Measure one system, one size smaller each time memory runs out.

    smaller: returns the next case, or None. In the row, `tried` lists the sizes that did not fit, and
    `retried` describes the retries in words.
    """
    deadline = time.monotonic() + seconds
    tried: list[str] = []
    while True:
        row = measure([(system, case)], seconds=max(0.0, deadline - time.monotonic()), kind=kind)[0]
        if tried:
            row["retried"] = f"retried at {size_of(case, row)} after out of memory at {'; '.join(tried)}"
        next_case = smaller(case, row) if row.get("status") == "out of memory" else None
        if next_case is None:
            return row | {"tried": tried}
        tried.append(size_of(case, row))
        case = next_case


def _attempt(row: Row, call: Callable[[], None]) -> bool:
    """Return whether `call` succeeded; if not, add the error to `row`."""
    try:
        call()
        return True
    except WorkerError as error:
        row |= error.row
        return False


def _build(worker: Worker, row: Row) -> None:
    ready = worker.build()
    row |= {"build_seconds": ready["build_seconds"], "info": ready["info"]}
    row |= {"seconds": [], "cpu_seconds": [], "losses": []}


def _run_steps(workers: Sequence[Worker], rows: Sequence[Row], alive: list[int]) -> None:
    """Alternate warm-up and timed steps; a system that fails is removed from `alive`."""
    total = max((w.case.warmup + w.case.steps for w in workers), default=0)
    for number in range(total):
        for i in list(alive) if number % 2 else list(reversed(alive)):
            if not _attempt(rows[i], partial(_step, workers[i], rows[i], number)):
                alive.remove(i)


def _step(worker: Worker, row: Row, number: int) -> None:
    if number == worker.case.warmup:
        worker.ask({"begin": True})
    found = worker.ask({"step": number})
    row["losses"].append(found["loss"])
    if number >= worker.case.warmup:
        row["seconds"].append(found["seconds"])
        row["cpu_seconds"].append(found["cpu_seconds"])


def _end(worker: Worker, row: Row, number: int) -> None:
    row |= worker.ask({"end": number})


def _summary(row: Row, case: Case) -> Row:
    """Compute tokens/s and FLOPs per step. MFU needs the device's peak; see `figures.cells`."""
    work, parameters = work_of(case)
    recomputed = float(row["info"].get("recomputed", 1.0))
    rates = [case.tokens / s for s in row["seconds"]]
    found = spread(rates)
    host = row["peaks"]["steps"] or row["peaks"]["host"]
    return {
        "status": "done",
        "tokens_per_second": [found.median, found.least, found.most],
        "model_flops": work.model_flops(case.sequences, case.length),
        "hardware_flops": work.hardware_flops(case.sequences, case.length, recomputed),
        "host_bytes_per_parameter": host / parameters,
    }
