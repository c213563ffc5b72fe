"""History of a run, read from metrics.jsonl: steps, evaluations, sessions and state.

A session is one start of the program; a resumed run has several. Files of earlier versions lack some fields,
so all but step numbers have defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config.yaml import read_file
from horizon_lm.errors import DataError
from horizon_lm.report.metrics import read_lines, still_true
from horizon_lm.report.records import check_settings
from horizon_lm.schedule.draw import Span
from horizon_lm.schedule.ops import Op, parse_op

_STEPS = ("step", "eval", "checkpoint", "fault", "rollback", "resume", "end")
_KNOWN = (*_STEPS, "start", "timeline", "note", "stopped", "best")

Line = dict[str, Any]


@dataclass
class Session:
    """One start of the program.

    header: line `start`. step: last step known to be done. end: line `end`; None while the session runs, or
    if it was killed. began, last_seen: UTC, ISO 8601.
    """

    header: Line
    began: str
    last_seen: str
    resumed_at: int | None = None
    step: int = 0
    end: Line | None = None


@dataclass(frozen=True)
class State:
    """State of a run. kind: finished, running, stopped or failed; title: `stopped at 22 of 59`; why: a
    sentence, or empty."""

    kind: str
    title: str
    why: str = ""


@dataclass(frozen=True)
class History:
    """The history of a run.

    steps, evaluations: without those undone by a rollback or resume. events: all other lines, in order.
    settings: resolved settings, empty if unknown.
    """

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
                f"{folder.path} is not a run: {folder.metrics.name} cannot be read ({reason})",
                hint="pass the output_dir of a run",
            ) from error
        steps = still_true(lines, "step")
        if not steps:
            raise DataError(f"{folder.metrics} has no step", hint="pass a run with at least one step")
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

    @cached_property
    def spans(self) -> list[Span]:
        """Spans of the recorded step; empty without one."""
        lines = self.timeline["spans"] if self.timeline is not None else ()
        return [(Op(*parse_op(name)), start, end) for name, _, start, end in lines]

    def of(self, event: str) -> list[Line]:
        return [line for line in self.events if line.get("event") == event]

    @property
    def unknown(self) -> list[Line]:
        """Lines of unknown kinds, which later versions may write."""
        return [line for line in self.events if line.get("event") not in _KNOWN]

    @property
    def state(self) -> State:
        session, total = self.sessions[-1], self.header.get("num_steps")
        where = f"{session.step:,} of {total:,}" if total else f"step {session.step:,}"
        if session.end is None:
            if self.is_running:
                return State("running", f"running: {where}")
            return State("stopped", f"stopped at {where}", "It was killed: no end recorded.")
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
    """Read settings from the run's folder, where `auto` may be unresolved."""
    try:
        return check_settings(read_file(folder.settings).values, str(folder.settings))
    except (OSError, ValueError):
        return {}
