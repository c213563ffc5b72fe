"""Starts workers, measures one system or several in turns, and keeps what was found as JSON lines."""

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
from pathlib import Path
from typing import IO, Any

from horizon_lm.bench.figures import spread
from horizon_lm.bench.models import work_of
from horizon_lm.bench.protocol import Case
from horizon_lm.bench.worker import Session, fault

OURS, TORCH = "horizon_lm.bench.ours:build", "horizon_lm.bench.plain:build"
Row = dict[str, Any]


class WorkerError(Exception):
    """A worker that answered with a fault; `row` says which."""

    def __init__(self, row: Row) -> None:
        super().__init__(row.get("why", ""))
        self.row = row


class Worker:
    """One system in one process. A context manager; the process is gone on leaving."""

    def __init__(self, system: str, case: Case, *, deadline: float) -> None:
        """deadline: of `time.monotonic()`; what takes longer is killed."""
        self.system, self.case, self._deadline = system, case, deadline
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        threads = {"OMP_NUM_THREADS": str(case.threads)} if case.threads else {}
        paths = [str(Path(__file__).parents[2]), os.getcwd(), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "horizon_lm.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready: Row = {}

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
        """Raises WorkerError where the system cannot run."""
        self.ready = self.ask({"system": self.system, "case": self.case.to_json()})
        return self.ready

    def ask(self, request: Row) -> Row:
        """Raises WorkerError for a fault, a death of the process, or no answer before the deadline."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=max(0.1, self._deadline - time.monotonic()))
        except queue.Empty:
            raise WorkerError({"status": "no time", "why": "not done within the time of this part"}) from None
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
            why = "killed by signal 9, as the system does when host memory runs out"
            return {"status": "out of memory", "why": why}
        return {"status": "failed", "why": f"ended with code {code}", "log": self._last_lines()}

    def _last_lines(self) -> list[str]:
        self._log.seek(0)
        return self._log.read().decode(errors="replace").splitlines()[-8:]


class InlineWorker:
    """A worker in this process: for rehearsals, in which nothing is measured."""

    def __init__(self, system: str, case: Case, *, deadline: float) -> None:
        self.system, self.case, self.ready = system, case, Row()
        self._session: Session | None = None

    def __exit__(self, *_: object) -> None:
        self._session = None

    def build(self) -> Row:
        def begin() -> Row:
            self._session = Session({"system": self.system, "case": self.case.to_json()})
            return self._session.ready

        self.ready = self._caught(begin)
        return self.ready

    def ask(self, request: Row) -> Row:
        session = self._session
        assert session is not None
        return self._caught(lambda: session.answer(request))

    @staticmethod
    def _caught(call: Callable[[], Row]) -> Row:
        try:
            return call()
        except Exception as error:
            raise WorkerError(fault(error)) from error


AnyWorker = Worker | InlineWorker


def row_of(system: str, case: Case) -> Row:
    work, parameters = work_of(case)
    return {"key": case.key(system), "system": system, "case": case.to_json(), "parameters": parameters}


def measure(
    systems: Sequence[tuple[str, Case]], *, seconds: float = 3600.0, kind: type[AnyWorker] = Worker
) -> list[Row]:
    """A row for each system; two or more take their steps in turns (the order reversed every other step),
    so that a machine that changes its speed changes it for all. Each is in a process of its own. A system
    that cannot run is a row that says why, and the others run without it."""
    deadline = time.monotonic() + seconds
    rows = [row_of(system, case) for system, case in systems]
    workers: list[AnyWorker] = [kind(system, case, deadline=deadline) for system, case in systems]
    alive: list[int] = []
    try:
        for i, worker in enumerate(workers):
            if _attempt(rows[i], worker.build):
                rows[i] |= {"build_seconds": worker.ready["build_seconds"], "info": worker.ready["info"]}
                rows[i] |= {"seconds": [], "cpu_seconds": [], "losses": []}
                alive.append(i)
        _run_steps(workers, rows, alive)
        last = max((case.warmup + case.steps for _, case in systems), default=0)
        for i in list(alive):
            row, worker = rows[i], workers[i]

            def end(row: Row = row, worker: AnyWorker = worker) -> Row:
                row |= worker.ask({"end": last})
                return row

            if _attempt(row, end):
                row |= _summary(row, systems[i][1])
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)
    return rows


def _attempt(row: Row, call: Callable[[], Row]) -> bool:
    """Whether a call went well; else the row has its fault."""
    try:
        call()
        return True
    except WorkerError as error:
        row |= error.row
        return False


def _run_steps(workers: Sequence[AnyWorker], rows: Sequence[Row], alive: list[int]) -> None:
    """Warm-up and timed steps of all that are alive, in turns; one that fails is taken off the list."""
    total = max((w.case.warmup + w.case.steps for w in workers), default=0)
    for number in range(total):
        for i in list(alive) if number % 2 else list(reversed(alive)):
            case, row = workers[i].case, rows[i]

            def take(i: int = i, number: int = number, case: Case = case, row: Row = row) -> Row:
                if number == case.warmup:
                    workers[i].ask({"begin": True})
                found = workers[i].ask({"step": number})
                row["losses"].append(found["loss"])
                if number >= case.warmup:
                    row["seconds"].append(found["seconds"])
                    row["cpu_seconds"].append(found["cpu_seconds"])
                return found

            if not _attempt(row, take):
                alive.remove(i)


def _summary(row: Row, case: Case) -> Row:
    """What follows from the steps: tokens/s, FLOPs a step. MFU needs a peak, see table.py."""
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


def measure_fitting(system: str, case: Case, *, seconds: float, kind: type[AnyWorker] = Worker) -> Row:
    """One system; where memory runs out it tries again with half the rows in a micro-batch, down to one.
    `tried`: the rows that were too many."""
    deadline = time.monotonic() + seconds
    tried: list[int] = []
    while True:
        row = measure([(system, case)], seconds=max(0.0, deadline - time.monotonic()), kind=kind)[0]
        rows = case.rows or 1
        if row.get("status") != "out of memory" or rows <= 1:
            return row | {"tried": tried}
        tried.append(rows)
        case = case.replace(rows=rows // 2)


class Ledger:
    """Rows in a file, one JSON line each; a job whose key is there with the same `stamp` is not run again.

    stamp: what makes results comparable, such as the commit and the machine.
    """

    def __init__(self, path: Path, stamp: str) -> None:
        self.path, self.stamp = path, stamp
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Row] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a killed run was writing
            if row.get("stamp") == stamp:
                self.rows[row["job"]] = row

    def add(self, job: str, row: Row) -> Row:
        row = {**row, "job": job, "stamp": self.stamp}
        self.rows[job] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def get(self, job: str) -> Row | None:
        """The row of a job that has been done; `no time` is not done."""
        row = self.rows.get(job)
        return None if row is None or row.get("status") == "no time" else row
