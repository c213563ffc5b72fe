"""Horizon-LM, plain transformers with torch's AdamW, and the Hugging Face Trainer, on the CPU.

Each system runs in its own process, so peak memory is its own. The two of a pair alternate steps and swap
their order every other step, so changes of the machine's speed affect both. All share configuration, seed,
tokens, attention (sdpa), AdamW with fp32 masters and moments, and bf16 compute; a step is one sequence of
512 tokens without padding. `torch` recomputes every layer and is compared with our `recompute`;
`torch-keep` and `hf-trainer` keep everything and are compared with our `keep`. Without clipping our updates
are eager, which needs no memory for gradients.

Losses: the tokens of two steps repeat, so the loss falls; the largest relative difference of the two curves
over all steps is reported. The control is ours with a 10 % higher learning rate: a pair whose curves differ
by less than that trains the same way. The Trainer uses autocast and keeps norms in fp32, so it rounds
differently.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from horizon_lm.bench.figures import HEAD as DETAILS
from horizon_lm.bench.figures import Row, lane_lines, peak_of, spread
from horizon_lm.bench.figures import cells as detail_cells
from horizon_lm.bench.jobs import OURS, Worker, measure
from horizon_lm.bench.models import shape
from horizon_lm.bench.protocol import Case

from .jobs import InlineWorker, Ledger, curve_difference
from .peers import PEERS
from .report import Report, commit, cpu_name

WORK = Path(__file__).parent.parent / "build" / "bench"
STEPS = {"tiny": (1, 3), "30m": (2, 7), "100m": (2, 5), "350m": (2, 3)}
PAIRS = {
    "torch": ("torch", "recompute"),
    "torch-keep": ("torch", "keep"),
    "hf-trainer": ("hf-trainer", "keep"),
}
HEAD = ["parameters", "beside", "clipping", "our tokens/s", "theirs", "ratio, wall", "ratio, CPU time"]
HEAD += ["our peak GB", "theirs", "ratio", "losses differ by"]


def case_of(size: str, peer: str, clip: float | None, threads: int, length: int) -> Case:
    warmup, steps = STEPS[size]
    return Case(
        model=shape(size),
        length=length,
        clip=clip,
        activations=PAIRS[peer][1],
        threads=threads,
        warmup=warmup,
        steps=steps,
        lr=3e-4,
        distinct=2,
    )


def pair(size: str, peer: str, clip: float | None, arguments: argparse.Namespace) -> Row:
    """Alternate ours and a peer; return one row with both results, reduced to what the table needs."""
    case = case_of(size, peer, clip, arguments.threads, arguments.length)
    kind = InlineWorker if arguments.inline else Worker
    ours, theirs = measure([(OURS, case), (PEERS[PAIRS[peer][0]].target, case)], kind=kind)
    return {"status": "done", "size": size, "peer": peer, "clip": clip, "ours": ours, "theirs": theirs}


def control(size: str, arguments: argparse.Namespace) -> Row:
    """Run ours with a 10 % higher learning rate, for comparison with the curve of torch-keep."""
    case = case_of(size, "torch-keep", 1.0, arguments.threads, arguments.length)
    kind = InlineWorker if arguments.inline else Worker
    return {"status": "done", "ours": measure([(OURS, case.replace(lr=1.1 * case.lr))], kind=kind)[0]}


def ratios(ours: Row, theirs: Row, clock: str) -> str:
    """Return their time over ours, step by step: our tokens/s over theirs."""
    found = spread([b / a for a, b in zip(ours[clock], theirs[clock], strict=True)])
    return found.text(3)


def cells(row: Row) -> list[str]:
    ours, theirs = row["ours"], row["theirs"]
    name = [f"{ours['parameters'] / 1e6:.0f} M", row["peer"], "1.0" if row["clip"] else "off"]
    for system in (ours, theirs):
        if system.get("status") != "done":
            why = f"{system.get('status')}: {system.get('why', '')}"
            return [*name, why, *[""] * (len(HEAD) - 4)]
    peaks = [system["peaks"]["host"] for system in (ours, theirs)]
    return [
        *name,
        f"{ours['tokens_per_second'][0]:,.0f}",
        f"{theirs['tokens_per_second'][0]:,.0f}",
        ratios(ours, theirs, "seconds"),
        ratios(ours, theirs, "cpu_seconds"),
        f"{peaks[0] / 1e9:.2f}",
        f"{peaks[1] / 1e9:.2f}",
        f"{peaks[0] / peaks[1]:.3f}",
        f"{curve_difference(ours['losses'], theirs['losses']):.1e}",
    ]


def curves(size: str, ledger: Ledger) -> list[str] | None:
    """Return size, first and last loss of torch-keep, our and the control's difference; None if one is
    missing."""
    row, other = ledger.get(f"{size}/torch-keep/1.0"), ledger.get(f"{size}/control")
    if row is None or other is None:
        return None
    if any(system.get("status") != "done" for system in (row["ours"], row["theirs"], other["ours"])):
        return None
    theirs = row["theirs"]["losses"]
    mine, wrong = (curve_difference(r["ours"]["losses"], theirs) for r in (row, other))
    verdict = "yes" if mine < 0.5 * wrong else "NO"
    found = [size, str(len(theirs)), f"{theirs[0]:.4f}", f"{theirs[-1]:.4f}", f"{mine:.1e}", f"{wrong:.1e}"]
    return [*found, verdict]


def run(arguments: argparse.Namespace) -> Ledger:
    """Run all unfinished pairs and controls."""
    ledger = Ledger(arguments.work / "cpu.jsonl", f"{commit()}, {cpu_name()}, {arguments.threads} threads")
    if arguments.fresh:
        ledger.rows.clear()
    for size in arguments.sizes:
        for peer in arguments.peers:
            for clip in arguments.clips:
                job = f"{size}/{peer}/{clip or 'off'}"
                if ledger.get(job) is None:
                    start = time.monotonic()
                    row = ledger.add(job, pair(size, peer, clip or None, arguments))
                    print(f"{' | '.join(cells(row))}  ({time.monotonic() - start:.0f} s)", flush=True)
        if "torch-keep" in arguments.peers and ledger.get(f"{size}/control") is None:
            ledger.add(f"{size}/control", control(size, arguments))
    return ledger


def fill(report: Report, arguments: argparse.Namespace) -> list[list[str]]:
    """Run, and add the tables to a report; return the rows of the first."""
    ledger = run(arguments)
    rows = [cells(row) for row in ledger.rows.values() if "theirs" in row]
    note = (
        "Medians (least to most) of the steps' ratios; a ratio above 1 is in our favour for speed, below 1 "
        f"for memory. {arguments.threads} threads. Peak: VmHWM of the process, building the model included; "
        "about 0.4 GB of it are Python, torch and transformers."
    )
    report.table(HEAD, rows, note=note)
    head = ["size", "steps", "first loss", "last loss", "ours differs by", "control differs by"]
    found = [line for size in arguments.sizes if (line := curves(size, ledger))]
    report.table([*head, "same training"], found, note="Beside torch-keep, clipping 1.0.")
    add_details(report, ledger)
    return rows


def add_details(report: Report, ledger: Ledger) -> None:
    """Add all figures of the suite for both systems of each pair, and the lanes of ours."""
    peak, source = peak_of(torch.device("cpu"), torch.bfloat16)
    rows, lanes = [], []
    for row in ledger.rows.values():
        if "theirs" not in row:
            continue
        name = f"{row['size']}, {row['peer']}, clipping {row['clip'] or 'off'}"
        rate = row["theirs"].get("tokens_per_second", [None])[0]
        for who in ("ours", "theirs"):
            rows.append(detail_cells(f"{name}: {who}", row[who], peak=peak, in_memory=rate))
        if "breakdown" in row["ours"]:
            lanes += ["", f"{name}: ours", *lane_lines(row["ours"]["breakdown"])]
    note = (
        f"MFU and HFU against {peak / 1e12:.2f} TFLOP/s ({source}). Practicality: over the other of the pair."
    )
    report.table(DETAILS, rows, note=note)
    report.parts.append("```" + "\n".join(lanes) + "\n```")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Ours beside plain transformers and the Trainer, on the CPU."
    )
    parser.add_argument("--sizes", nargs="+", choices=list(STEPS), default=["30m", "100m", "350m"])
    parser.add_argument("--peers", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--clips", nargs="+", type=float, default=[1.0, 0.0], help="0 is off")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fresh", action="store_true", help="repeat finished measurements of this commit")
    parser.set_defaults(work=WORK, inline=False)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = options(argv)
    torch.set_num_threads(arguments.threads)  # for the matrix product behind MFU
    command = " ".join(["python -m benchmarks cpu", *argv])
    report = Report("against-peers-cpu", __doc__ or "", command=command)
    fill(report, arguments)
    report.write()


def summary(rows: list[list[str]]) -> list[list[str]]:
    """Return ratios of speed and memory by size and peer, for the table at the end of `make bench`."""
    return [[f"{r[0]}, beside {r[1]}, clipping {r[2]}", f"{r[5]} speed, {r[9]} memory"] for r in rows]


if __name__ == "__main__":
    main()
