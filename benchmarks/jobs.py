"""Additions to `horizon_lm.bench.jobs`: dry runs in one process, a ledger of results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from horizon_lm.bench.figures import Row
from horizon_lm.bench.jobs import Worker, WorkerError
from horizon_lm.bench.protocol import Case
from horizon_lm.bench.worker import Session, error_row


class InlineWorker(Worker):
    """A worker in this process, for dry runs and tests, which time nothing."""

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


def curve_difference(one: Sequence[float], two: Sequence[float]) -> float:
    """Return the largest relative difference of two loss curves over their common steps."""
    return max((abs(a - b) / abs(b) for a, b in zip(one, two, strict=False)), default=float("nan"))


class Ledger:
    """Rows in a file, one JSON line each, on disk before `add` returns. A job already there is not run again.

    stamp: the conditions that make results comparable, such as commit and machine; rows with another stamp
    are ignored, unless `any_stamp`. copy: a second file for the same lines.
    """

    def __init__(self, path: Path, stamp: str, *, any_stamp: bool = False, copy: Path | None = None) -> None:
        self.stamp = stamp
        self._paths = [path, *([copy] if copy else [])]
        self.rows: dict[str, Row] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # a killed run was writing this line
            if any_stamp or row.get("stamp") == stamp:
                self.rows[row["job"]] = row
        for place in self._paths:
            place.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            copy.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        elif path.exists() and not path.read_bytes().endswith(b"\n"):
            self._append("")

    def _append(self, line: str) -> None:
        for path in self._paths:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())

    def begin(self, job: str) -> None:
        """Record that a job begins. Unless `add` follows, the job counts as interrupted."""
        why = "the command that ran it was killed, or the machine went away"
        self.add(job, {"status": "interrupted", "why": why})

    def add(self, job: str, row: Row) -> Row:
        row = {**row, "job": job, "stamp": self.stamp}
        self.rows[job] = row
        self._append(json.dumps(row))
        return row

    def get(self, job: str) -> Row | None:
        """Return the row of a finished job; a job that ran out of time is not finished."""
        row = self.rows.get(job)
        return None if row is None or row.get("status") == "no time" else row
