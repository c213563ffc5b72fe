"""Tables of the GPU suite from its ledger, whichever machine reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from horizon_lm.bench.figures import HEAD, Row, cells, lane_lines

from .gpu_parts import Command, Stage
from .gpu_runner import said, waiting
from .jobs import Ledger
from .peers import PEERS
from .report import Report

MACHINE = "machine"  # the ledger's row about the machine and the software


def add_stages(report: Report, stages: Mapping[str, Stage], ledger: Ledger) -> None:
    """Add a section for each stage that has rows, and name the jobs still to run."""
    about = ledger.rows.get(MACHINE, {})
    if about.get("dry"):
        report.parts.append("**A dry run at a tiny size on the CPU: the figures below are meaningless.**")
    peak = float(about.get("peak", 1.0))
    if about:
        report.parts.append(f"MFU and HFU against {peak / 1e12:.0f} TFLOP/s ({about['peak_source']}).")
    left = [f"{name} ({count})" for name, count in waiting(stages, ledger).items()]
    if left:
        report.parts.append(f"**Unfinished.** Jobs still to run, by stage: {', '.join(left)}.")
    for name, jobs in stages.items():
        found = [(job, ledger.rows[job.key]) for job in jobs() if job.key in ledger.rows]
        if not found:
            continue
        report.section(name)
        _commands(report, [row for job, row in found if isinstance(job, Command)])
        _measurements(report, [row for job, row in found if not isinstance(job, Command)], peak)
    other = sorted({row["stamp"] for row in ledger.rows.values()} - {ledger.stamp})
    if other:
        report.parts.append(f"Some rows come from other commits or machines: {'; '.join(other)}.")


def _commands(report: Report, rows: list[Row]) -> None:
    """Add a table of commands, then the tables that each command wrote, or its last lines."""
    if not rows:
        return
    table = []
    for row in rows:
        parts = row.get("result", {}).get("parts", [])
        checks = [part for part in parts if isinstance(part, dict)]
        found = "; ".join(_verdict(part) for part in checks) or row.get("why", "")
        table.append([row["name"], row.get("status", ""), f"{row.get('took', 0.0):.0f}", found])
    report.table(["job", "status", "seconds", "found"], table)
    for row in rows:
        report.parts += [part for part in row.get("result", {}).get("parts", []) if isinstance(part, str)]
        if row.get("log") and (row["status"] != "done" or "result" not in row):
            report.parts.append("\n".join(["```", row["name"], *row["log"], "```"]))


def _verdict(part: dict[str, Any]) -> str:
    """Return one part of gpu-check in a few words: comparisons passed, and names of those that failed."""
    compared = [row for row in part["rows"] if row["passed"] is not None]
    failed = [row["name"] for row in compared if not row["passed"]]
    text = f"{part['name']}: {len(compared) - len(failed)} of {len(compared)} passed"
    return text + (f", FAILED: {', '.join(failed)}" if failed else "")


def _measurements(report: Report, rows: list[Row], peak: float) -> None:
    for group in dict.fromkeys(row["group"] for row in rows if "case" in row):
        mine = [row for row in rows if row["group"] == group and "case" in row]
        reference = next((r for r in mine if r["reference"] and r.get("status") == "done"), None)
        best = reference["tokens_per_second"][0] if reference else None
        table = [cells(_title(row), row, peak=peak, in_memory=best) for row in mine]
        report.table(HEAD, table, note="\n".join(_notes(group, mine)))
    lost = [f"- {row['job']}: {said(row)}" for row in rows if "case" not in row]
    if lost:
        report.parts.append("\n".join(lost))


def _title(row: Row) -> str:
    peer = PEERS.get(row["name"].partition(",")[0])
    return row["name"] + (" (not exact)" if peer is not None and not peer.exact else "")


def _notes(group: str, rows: list[Row]) -> Iterable[str]:
    yield f"{group}; {rows[0]['parameters'] / 1e9:.2f} B parameters."
    for row in rows:
        if group == "largest":
            layers = row["case"]["model"]["num_hidden_layers"]
            yield f"{row['name']}: {layers} layers, {row['parameters'] / 1e9:.2f} B parameters."
        peer = PEERS.get(row["name"].partition(",")[0])
        if peer is not None:
            yield f"{row['name']}: {peer.note}."
        for words in (row.get("retried"), row.get("repeats")):
            if words:
                yield f"{row['name']}: {words}."
        if "breakdown" in row:
            yield from _breakdown(row)


def _breakdown(row: Row) -> Iterable[str]:
    found = row["breakdown"]
    yield from ("", "```", row["name"])
    if "lanes" in found:
        yield from lane_lines(found)
    profile = found.get("profile", {})
    if "failed" in profile:
        yield f"no profile: {profile['failed']}"
    if "kernels" in profile:
        yield f"profile of one step ({profile['trace']}): milliseconds, calls, kernel"
        yield from (f"{took:>10.2f} {calls:>6} {name}" for name, calls, took in profile["kernels"])
        waits = ", ".join(f"{calls} {name}" for name, calls in profile["waits"].items())
        yield f"calls that wait for the device: {waits or 'none'}"
    yield "```"
