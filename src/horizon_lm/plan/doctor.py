"""Examine this machine: what it has, how fast it is, what limits a run, and how to fix it."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil

from horizon_lm.config import TrainConfig
from horizon_lm.io import files
from horizon_lm.io.leftovers import sweep_files
from horizon_lm.machine.memory import available_host_bytes, lockable_bytes
from horizon_lm.machine.profile import Profile, cache_path, read_profile
from horizon_lm.words import parameters, size

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"
# Time for measuring, without imports; a measurement in progress is finished. CUDA processes start slowly.
SECONDS = {"cpu": 30.0, "cuda": 100.0}
_GB = 1e9
_STATE = "; host_memory_gb=NUMBER states the machine's memory to a run if the system shows too little"
# Names of unfinished profiles, by earlier versions.
_EARLIER = re.compile(r"tmp[a-z0-9_]{8}")


@dataclass(frozen=True)
class Finding:
    """One line: the item, the finding, and a fix unless it passes."""

    status: str
    what: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Examination:
    """Result of `examine`. path: the profile's file."""

    profile: Profile
    findings: list[Finding]
    cached: bool
    path: Path

    @property
    def has_failed(self) -> bool:
        return any(finding.status == FAIL for finding in self.findings)

    def to_json(self) -> str:
        rows = [asdict(finding) for finding in self.findings]
        return json.dumps(
            {"profile": self.profile.model_dump(), "findings": rows, "cached": self.cached}, indent=2
        )

    def to_text(self) -> str:
        lines = to_lines(self.findings)
        how = "measured earlier" if self.cached else "measured now"
        lines += ["", f"profile    {self.path} ({how}; `horizon doctor --fresh` measures again)"]
        return "\n".join(lines)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while measuring. findings: those made so far."""

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__()
        self.findings = findings


def examine(
    *,
    fresh: bool = False,
    thorough: bool = False,
    seconds: float | None = None,
    out: Path | None = None,
    config: TrainConfig | None = None,
    say: Callable[[str, str | None], None] | None = None,
) -> Examination:
    """Examine everything; rates are measured once and kept for `horizon plan` and `horizon train`.

    fresh: measure again. thorough: measure again without a time limit. seconds: time limit otherwise, kept
    even on a busy machine (default: `SECONDS`). out: also write the profile to this file, for a planner on
    another machine. config: also examine its model, without reading weights. say: called with each
    measurement's name before it, and with name and figure after it.
    Raises Interrupted, and for a model of `config` ConfigError and UnsupportedModelError.
    """
    import torch

    from horizon_lm.plan import calibrate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = cache_path()
    cached = path.is_file() and not (fresh or thorough)
    findings = [*_memory(), *_process_limits(device), *_processor(), *_device(), *_disk()]
    findings.append(_experts(config))
    if cached:
        profile = read_profile(path)
        if out:
            _write_named(out, profile)
        return Examination(profile, [*findings, *_rates(profile)], cached, out or path)
    known: dict[str, str] = {}

    def hear(what: str, figure: str | None) -> None:
        if figure is not None:
            known[what] = figure
        if say is not None:
            say(what, figure)

    limit = seconds if seconds is not None or thorough else SECONDS[device]
    budget = calibrate.Budget(limit, hear)
    repeats, runs = (5, 3) if thorough else (2, 1)
    try:
        profile = calibrate.measure(device, repeats=repeats, runs=runs, budget=budget)
    except KeyboardInterrupt:
        measured = [Finding(PASS, what, figure) for what, figure in known.items()]
        raise Interrupted(findings + measured) from None
    _write(path, profile.to_yaml())
    if out:
        _write_named(out, profile)
    findings += _rates(profile)
    if budget.missing:
        findings.append(
            Finding(
                WARN,
                "measuring",
                f"{', '.join(budget.missing)} skipped for lack of time",
                "predictions are less exact; run horizon doctor --thorough, which takes minutes",
            )
        )
    return Examination(profile, findings, cached, out or path)


def to_lines(findings: list[Finding]) -> list[str]:
    lines = []
    for finding in findings:
        lines.append(f"{finding.status}  {finding.what:16} {finding.found}")
        if finding.fix:
            lines.append(f"      fix: {finding.fix}")
    return lines


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_files(_EARLIER, path.parent)
    files.write_file(path, text)


def _write_named(path: Path, profile: Profile) -> None:
    """Write a profile named after the file, in words that also hold on another machine."""
    sources = {key: text.replace("this machine", "that machine") for key, text in profile.sources.items()}
    title = profile.title.removeprefix("this machine, ").replace("this machine", "CPU")
    title += f", {profile.cores} cores, {size(profile.host_bytes)}"
    named = profile.model_copy(update={"name": path.stem, "title": title, "sources": sources})
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_file(path, named.to_yaml())


def _memory() -> list[Finding]:
    total, available = psutil.virtual_memory().total, available_host_bytes()
    found = [
        judge_memory(total, available),
    ]
    swap = psutil.swap_memory()
    if swap.total and swap.used > 0.2 * swap.total:
        found.append(
            Finding(
                WARN,
                "swap",
                f"{swap.used / _GB:.1f} GB in use",
                "close programs that fill memory: training in swap is hundreds of times slower",
            )
        )
    return found


def judge_memory(total: int, available: int) -> Finding:
    """Judge RAM, and how much of it this process may take (cgroup and ulimit included)."""
    text = f"{total / _GB:.1f} GB, {available / _GB:.1f} GB for this process: "
    text += f"{available / 14 / _GB:.2f} B parameters in bf16"
    if available < 1e9:
        return Finding(FAIL, "host memory", text, f"free memory, or raise the cgroup's memory.max{_STATE}")
    if available < total / 2:
        cause = "other processes, a cgroup limit or ulimit -v withhold more than half"
        return Finding(WARN, "host memory", text, cause + _STATE)
    return Finding(PASS, "host memory", text)


def _process_limits(device: str) -> list[Finding]:
    return [judge_memlock(lockable_bytes(), device)]


def judge_memlock(limit: int | None, device: str) -> Finding:
    text = "no limit" if limit is None else f"ulimit -l is {size(limit)}"
    if limit is None or device == "cpu":
        return Finding(PASS, "locked memory", text)
    return Finding(
        WARN,
        "locked memory",
        text,
        "ulimit -l unlimited; CUDA commonly pins beyond the limit, but not in every container",
    )


def _processor() -> list[Finding]:
    from horizon_lm.machine.cores import usable_cores
    from horizon_lm.optim.kernel import describe, notice, way_to_build

    usable, there = usable_cores(), os.cpu_count() or 1
    status = WARN if usable < there else PASS
    fix = "a cgroup quota or taskset withholds cores from the optimizer" if usable < there else ""
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    found = [Finding(status, "cores", f"{usable} of {there} usable, {max(1, nodes)} NUMA node(s)", fix)]
    missing = notice()
    found.append(
        Finding(PASS, "update kernel", describe())
        if missing is None
        else Finding(WARN, "update kernel", missing.removesuffix(f"; {way_to_build()}"), way_to_build())
    )
    load = os.getloadavg()[0]
    if load > 1.5 * usable:
        found.append(
            Finding(
                WARN,
                "load",
                f"{load:.1f} on {usable} cores",
                "other load makes measured rates too low; run horizon doctor --fresh later",
            )
        )
    return found


def _device() -> list[Finding]:
    import torch

    from horizon_lm.machine import numa

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        node = numa.node_of(torch.device("cuda"))
        place = "" if node is None else f", next to NUMA node {node}"
        status, fix = (
            (PASS, "") if free > 0.9 * total else (WARN, "another process holds device memory (nvidia-smi)")
        )
        return [
            Finding(status, "device", f"{name}, {free / _GB:.1f} of {total / _GB:.1f} GB free{place}", fix)
        ]
    if Path("/proc/driver/nvidia/version").exists():
        return [
            Finding(
                FAIL,
                "device",
                "NVIDIA driver found, but torch sees no GPU",
                "install a torch build for CUDA, or check the driver",
            )
        ]
    return [
        Finding(
            WARN,
            "device",
            "no GPU: layers are computed on the CPU",
            "train small models only; horizon plan hardware=NAME plans for a GPU",
        )
    ]


def _experts(config: TrainConfig | None) -> Finding:
    """How experts of mixtures run here: those of a configuration's model, or of any."""
    import torch

    from horizon_lm.machine.device import resolve_device
    from horizon_lm.model.experts import experts_in_use, grouped_kernel

    device = resolve_device("auto" if config is None else config.device)
    if config is None:
        half, full = (grouped_kernel(device, dtype) for dtype in (torch.bfloat16, torch.float32))
        text = half if half == full else f"bfloat16: {half}; float32: {full}"
        return Finding(PASS, "experts", f"grouped_mm ({text})")
    from horizon_lm.plan.outline import Outline, model_config

    outline = Outline(partial(model_config, config), config)
    in_use = experts_in_use(outline.built.skeleton.model, config, device)
    return Finding(PASS, "experts", f"{outline.facts.model_type} has none" if in_use is None else str(in_use))


def _disk() -> list[Finding]:
    found = []
    for name, path in (("disk, here", Path.cwd()), ("disk, temporary", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(path).free
        low = free < 5e9
        found.append(
            Finding(
                WARN if low else PASS,
                name,
                f"{free / _GB:.1f} GB free",
                "free disk space: a bf16 export takes 2 bytes per parameter" if low else "",
            )
        )
    return found


def _rates(profile: Profile) -> list[Finding]:
    rows = [
        ("matrices, bf16", f"{profile.matmul.bfloat16 / 1e12:.3f} TFLOP/s"),
        ("matrices, fp32", f"{profile.matmul.float32 / 1e12:.3f} TFLOP/s"),
        ("host copy", f"{profile.host / _GB:.1f} GB/s read and written"),
        ("update", f"{parameters(profile.optimizer / 26)}/s"),
        ("disk write", f"{profile.disk / _GB:.2f} GB/s"),
    ]
    if profile.device == "cuda":
        rows.append(
            ("host link", f"{profile.h2d / _GB:.1f} GB/s up and {profile.d2h / _GB:.1f} down at once")
        )
    return [Finding(PASS, name, text) for name, text in rows]
