"""What metrics.jsonl tells of a run: its steps and evaluations, its sessions, and how it stands.

A session is one start of the program; a run that was resumed has several. Files of earlier versions lack
some fields, so that everything but the numbers of steps is looked up with a default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config.yaml import read_file
from horizon_lm.errors import DataError
from horizon_lm.report.metrics import read_lines, still_true
from horizon_lm.report.records import check_settings

_STEPS = ("step", "eval", "checkpoint", "fault", "rollback", "resume", "end")
_KNOWN = (*_STEPS, "start", "timeline", "note", "stopped", "best")

Line = dict[str, Any]


@dataclass
class Session:
    """header: the line `start`. step: the last one known to be done. end: the line `end`; None while it runs,
    and for good where it was killed. began, last_seen: UTC, as ISO 8601 writes it."""

    header: Line
    began: str
    last_seen: str
    resumed_at: int | None = None
    step: int = 0
    end: Line | None = None


@dataclass(frozen=True)
class State:
    """How a run stands. kind: finished, running, stopped or failed; title: `stopped at 22 of 59`; why: a
    sentence, empty where there is nothing to add."""

    kind: str
    title: str
    why: str = ""


@dataclass(frozen=True)
class History:
    """steps, evaluations: without those that a rollback or a resume undid. events: lines of all other kinds,
    as they came. settings: the resolved ones, empty where they are not known."""

    sessions: list[Session]
    steps: list[Line]
    evaluations: list[Line]
    events: list[Line]
    timeline: Line | None
    settings: Line
    is_running: bool

    @classmethod
    def read(cls, folder: RunFolder) -> History:
        """Raises DataError for a folder without a run, and for a run without a step."""
        try:
            lines = list(read_lines(folder.metrics))
        except OSError as error:
            reason = error.strerror or error
            raise DataError(
                f"{folder.path} holds no run: {folder.metrics.name} cannot be read ({reason})",
                hint="name the output_dir of a run",
            ) from error
        steps = still_true(lines, "step")
        if not steps:
            raise DataError(f"{folder.metrics} holds no step", hint="the run ended before its first step")
        sessions = _sessions(lines)
        timelines = [line for line in lines if line.get("event") == "timeline"]
        return cls(
            sessions=sessions,
            steps=steps,
            evaluations=still_true(lines, "eval"),
            events=[e for e in lines if e.get("event") not in ("step", "eval", "start", "timeline", "end")],
            timeline=timelines[-1] if timelines else None,
            settings=sessions[-1].header.get("settings") or _settings(folder),
            is_running=sessions[-1].end is None and folder.is_in_use,
        )

    @property
    def header(self) -> Line:
        return self.sessions[-1].header

    def of(self, event: str) -> list[Line]:
        return [line for line in self.events if line.get("event") == event]

    @property
    def unknown(self) -> list[Line]:
        """Lines of kinds that a later version may write."""
        return [line for line in self.events if line.get("event") not in _KNOWN]

    @property
    def state(self) -> State:
        session, total = self.sessions[-1], self.header.get("num_steps")
        where = f"{session.step:,} of {total:,}" if total else f"step {session.step:,}"
        if session.end is None:
            if self.is_running:
                return State("running", f"running: {where}")
            return State("stopped", f"stopped at {where}", "It was killed: no end was recorded.")
        status, reason = session.end.get("status"), session.end.get("reason") or ""
        if status == "finished" and total and session.step < total:
            return State("finished", f"ended early, at {where}", reason)
        if status == "finished":
            return State("finished", f"finished, {where}", reason)
        error = str(session.end.get("error") or reason)
        stopped = status == "interrupted" or error.startswith("stopped by ")
        error = error[:1].upper() + error[1:]
        return State(
            "stopped" if stopped else "failed", f"{'stopped' if stopped else 'failed'} at {where}", error
        )


def _sessions(lines: list[Line]) -> list[Session]:
    found: list[Session] = []
    for line in lines:
        event, time = line.get("event"), str(line.get("time") or "")
        if event == "start" or not found:
            found.append(Session(line if event == "start" else {}, time, time))
        session = found[-1]
        session.last_seen = time or session.last_seen
        if event == "resume":
            session.resumed_at = line["step"]
        if event == "end":
            session.end = line
        if event in _STEPS and isinstance(line.get("step"), int):
            forward = event not in ("resume", "rollback", "end")
            session.step = max(session.step, line["step"]) if forward else line["step"]
    return found


def _settings(folder: RunFolder) -> Line:
    """As the run's folder keeps them: settings that were left open are still open in it."""
    try:
        return check_settings(read_file(folder.settings).values, str(folder.settings))
    except (OSError, ValueError):
        return {}
