"""Additions to `horizon_lm.bench.jobs`: rehearsals in one process, retries, a ledger of results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from horizon_lm.bench.figures import Row
from horizon_lm.bench.jobs import Worker, WorkerError, measure
from horizon_lm.bench.protocol import Case
from horizon_lm.bench.worker import Session, error_row


class InlineWorker(Worker):
    """A worker in this process, for rehearsals and tests, which time nothing."""

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
            raise WorkerError(error_row(error)) from error


def measure_fitting(system: str, case: Case, *, seconds: float, kind: type[Worker] = Worker) -> Row:
    """Measure one system, halving the rows per micro-batch, down to one, while memory runs out.

    `tried` in the result lists the rows that did not fit.
    """
    deadline = time.monotonic() + seconds
    tried: list[int] = []
    while True:
        row = measure([(system, case)], seconds=max(0.0, deadline - time.monotonic()), kind=kind)[0]
        rows = case.rows or 1
        if row.get("status") != "out of memory" or rows <= 1:
            return row | {"tried": tried}
        tried.append(rows)
        case = case.replace(rows=rows // 2)


def curve_difference(one: Sequence[float], two: Sequence[float]) -> float:
    """Return the largest relative difference of two loss curves over their common steps."""
    return max((abs(a - b) / abs(b) for a, b in zip(one, two, strict=False)), default=float("nan"))


class Ledger:
    """Rows in a file, one JSON line each. A job already there with the same `stamp` is not run again.

    stamp: the conditions that make results comparable, such as the commit and the machine.
    """

    def __init__(self, path: Path, stamp: str) -> None:
        self.path, self.stamp = path, stamp
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Row] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a killed run was writing this line
            if row.get("stamp") == stamp:
                self.rows[row["job"]] = row

    def add(self, job: str, row: Row) -> Row:
        row = {**row, "job": job, "stamp": self.stamp}
        self.rows[job] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def get(self, job: str) -> Row | None:
        """Return the row of a finished job; a job that ran out of time is not finished."""
        row = self.rows.get(job)
        return None if row is None or row.get("status") == "no time" else row
