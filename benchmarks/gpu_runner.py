"""The runner of the GPU suite: each job in its own process, within the time limit of a call, resumable.

A job gets a line in the ledger before it runs, and another when it ends. A job killed at its limit or by a
signal gets a row that says so, and runs again only on request (`--again`). A job cut short by the end of a
call runs again in the next.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from horizon_lm.bench.figures import Row
from horizon_lm.bench.jobs import Smaller, Worker, measure_fitting, row_of, smaller_micro_batch
from horizon_lm.bench.ours import train_config
from horizon_lm.bench.protocol import Case
from horizon_lm.config import TrainConfig
from horizon_lm.errors import HorizonError
from horizon_lm.plan.run_plan import plan_run

from .gpu_parts import LIMIT_SECONDS, Command, Job, Stage, dry
from .jobs import InlineWorker, Ledger

TRACED = "benchmarks.traced:build"
STAGE_SECONDS = 530.0  # per call
ROOT = Path(__file__).parent.parent
_LONGEST_TEXT = 40  # lines of output kept in a row


@dataclass
class Call:
    """One call of the suite.

    folder: results folder. deadline: in `time.monotonic()` seconds. dry: tiny, on the CPU, in this process.
    again: repeat jobs that failed, were killed or ran out of memory. tried: keys of this call's jobs. seen:
    rows of a dry run by case, since many jobs shrink to the same case.
    """

    folder: Path
    deadline: float
    dry: bool = False
    again: bool = False
    tried: set[str] = field(default_factory=set)
    seen: dict[str, Row] = field(default_factory=dict)

    @property
    def kind(self) -> type[Worker]:
        return InlineWorker if self.dry else Worker


def run_stages(
    stages: Mapping[str, Stage],
    ledger: Ledger,
    call: Call,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run the unfinished jobs of the stages in order while time remains. after: called when a stage ends.

    A stage ends at the first job that does not fit into its time. If that is the call's, the call ends too.
    """
    for name, jobs in stages.items():
        todo = [j for j in jobs() if j.key not in call.tried and not is_done(j, ledger, call.again)]
        if not todo:
            continue
        print(f"== {name}", flush=True)
        end = min(call.deadline, time.monotonic() + STAGE_SECONDS)
        while todo and _has_time(todo[0], end, call) and run_row(todo[0], ledger, call, end):
            todo.pop(0)
        after()
        if todo and end == call.deadline:
            return


def waiting(stages: Mapping[str, Stage], ledger: Ledger, again: bool = False) -> dict[str, int]:
    """Return how many jobs of each stage have not run."""
    counts = {name: sum(not is_done(job, ledger, again) for job in jobs()) for name, jobs in stages.items()}
    return {name: count for name, count in counts.items() if count}


def is_done(job: Job | Command, ledger: Ledger, again: bool = False) -> bool:
    row = ledger.get(job.key)
    return row is not None and not (again and row["status"] not in ("done", "absent"))


def _has_time(job: Job | Command, end: float, call: Call) -> bool:
    """Whether the job's estimate fits. A call always runs its first job, so every call makes progress."""
    left = end - time.monotonic()
    return left > 0 and (not call.tried or left >= job.seconds)


def run_row(job: Job | Command, ledger: Ledger, call: Call, end: float) -> bool:
    """Run one job and add its row to the ledger; return False if the end of the call cut it short."""
    began = time.monotonic()
    cuts = ledger.rows.get(job.key, {}).get("cuts", 0)
    given = min(job.limit, max(1.0, end - began))
    call.tried.add(job.key)
    ledger.begin(job.key)
    try:
        row = run_job(job, given, call) if isinstance(job, Job) else run_command(job, given, call)
    except KeyboardInterrupt:
        ledger.add(job.key, {"status": "no time", "why": "stopped by a signal", "cuts": cuts})
        raise
    if row["status"] == "no time":
        row = row | ended_by_time(given, job.limit, cuts)
    labels = {"group": job.group, "name": job.name, "reference": getattr(job, "reference", False)}
    ledger.add(job.key, row | labels | {"took": round(time.monotonic() - began, 1)})
    print(f"{job.key}: {said(row)} ({time.monotonic() - began:.0f} s)", flush=True)
    return row["status"] != "no time"


def ended_by_time(given: float, limit: float, cuts: int) -> Row:
    """Return status and reason of a job that did not end: killed at its limit, or cut short twice."""
    if given >= limit or cuts:
        return {"status": "killed", "why": f"ran longer than {given:.0f} s, and was killed"}
    why = f"cut short after {given:.0f} s by the end of the call; the next call runs it again"
    return {"status": "no time", "why": why, "cuts": cuts + 1}


def said(row: Row) -> str:
    """Return a row in one line."""
    rate = row.get("tokens_per_second", [0])[0]
    words = [str(row.get("status")), f"{rate:,.0f} tokens/s" if rate else "", row.get("why", "")]
    return ", ".join(word for word in [*words, row.get("retried", ""), row.get("repeats", "")] if word)


# ---- measurements ---------------------------------------------------------------------------


def run_job(job: Job, seconds: float, call: Call) -> Row:
    """Run one measurement, one size smaller each time memory runs out; `largest`: 5 % fewer layers."""
    if call.dry:
        job = dry(job)
    if job.needs and job.needs not in TrainConfig.model_fields:
        why = f"this version has no setting {job.needs}"
        return row_of(job.system, job.case) | {"status": "absent", "why": why}
    deadline, smaller = time.monotonic() + seconds, smaller_micro_batch
    if job.largest and not call.dry:
        try:
            job = with_largest_model(job)
        except HorizonError as error:
            return row_of(job.system, job.case) | {"status": "failed", "why": error.message}
    if job.largest:
        smaller = fewer_layers
    same = f"{job.case.key(job.system)} {job.repeats} {job.trace}"
    if same in call.seen:
        return dict(call.seen[same])
    rows = [_measured(job, deadline, smaller, call) for _ in range(job.repeats)]
    if call.dry:
        call.seen[same] = rows[0]
    return rows[-1] | _repetition(rows) if job.repeats > 1 else rows[0]


def _measured(job: Job, deadline: float, smaller: Smaller, call: Call) -> Row:
    system, case = job.system, job.case
    if job.trace:
        trace = {"system": system, "trace": str(call.folder.resolve() / "trace.json.gz")}
        system, case = TRACED, case.replace(extra=case.extra | trace)
    left = max(1.0, deadline - time.monotonic())
    row = measure_fitting(system, case, seconds=left, kind=call.kind, smaller=smaller)
    return row | {"system": job.system, "case": row["case"] | {"extra": dict(job.case.extra)}}


def _repetition(rows: list[Row]) -> Row:
    """Compare the losses of all runs bitwise."""
    if any(row.get("status") != "done" for row in rows):
        return next(row for row in rows if row.get("status") != "done")
    same = all(row["losses"] == rows[0]["losses"] for row in rows)
    steps = len(rows[0]["losses"])
    return {"same": same, "repeats": f"losses of {steps} steps are {'equal' if same else 'NOT equal'}"}


def fewer_layers(case: Case, row: Row) -> Case | None:
    """Return the case with 5 % fewer layers, at least one fewer."""
    layers = int(case.model["num_hidden_layers"])
    if layers <= 1:
        return None
    return case.replace(model=case.model | {"num_hidden_layers": max(1, int(0.95 * layers))})


def with_largest_model(job: Job) -> Job:
    """Return the job with as many layers as the planner says will fit."""
    config = train_config(job.case).replace(skip_memory_check=True)  # the original may be too large
    model = job.case.model | {"num_hidden_layers": max(1, plan_run(config).most_layers())}
    return replace(job, case=job.case.replace(model=model))


# ---- commands -------------------------------------------------------------------------------


def run_command(job: Command, seconds: float, call: Call) -> Row:
    """Run a command within its time limit; return its status and the JSON that it wrote."""
    out = call.folder / "result.json"
    out.unlink(missing_ok=True)
    places = {"json": str(out.resolve()), "folder": str(call.folder.resolve())}
    arguments = [word.format(**places) for word in (*job.arguments, *(job.dry if call.dry else ()))]
    row = _inline(job.module, arguments) if call.dry else _process(job.module, arguments, seconds)
    if out.is_file():
        row["result"] = json.loads(out.read_text(encoding="utf-8"))
        out.unlink()
    return row


def _inline(module: str, arguments: list[str]) -> Row:
    code = importlib.import_module(module).main(arguments)
    return {"status": "failed" if code else "done", **({"why": f"ended with {code}"} if code else {})}


def _process(module: str, arguments: list[str], seconds: float) -> Row:
    """Run a module in its own process group, which is killed on timeout or a signal."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return {"status": "no time", "why": "", "log": text.splitlines()[-_LONGEST_TEXT:]}
    return status_of(process.returncode, text)


def status_of(code: int, text: str) -> Row:
    """Return status, reason and last lines of a command that ended."""
    log = text.splitlines()[-_LONGEST_TEXT:]
    if code < 0:
        return {"status": "killed", "why": f"killed by signal {-code}", "log": log}
    if code:
        return {"status": "failed", "why": f"exit code {code}: {log[-1] if log else ''}", "log": log}
    return {"status": "done", "log": log}


def build_kernel() -> tuple[bool, list[str]]:
    """Build the C++ optimizer if necessary; return whether it is available, and the compiler's output."""
    from horizon_lm.optim import kernel

    if kernel.library() is not None:
        return True, [kernel.describe()]
    row = _process("horizon_lm.optim.kernel", ["--build"], LIMIT_SECONDS)
    kernel.library.cache_clear()
    return kernel.library() is not None, row["log"]
