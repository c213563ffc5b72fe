"""Drawings of a run's recorded step, and of a plan's simulated step and memory: `horizon draw`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from horizon_lm.checkpoint.folder import RunFolder, writing
from horizon_lm.config import TrainConfig
from horizon_lm.errors import DataError
from horizon_lm.io import files
from horizon_lm.plan.run_plan import RunPlan
from horizon_lm.report.history import History
from horizon_lm.report.memory_drawing import Memory, draw_memory
from horizon_lm.report.step_drawing import draw_step
from horizon_lm.report.svg import Caption
from horizon_lm.words import count, parameters


def draw_run(run: Path, *, theme: str = "auto", rows: str = "auto") -> str:
    """Draw the step that a run recorded; of several ranks that of rank 0.

    Raises DataError for a folder without a run, and for a run without a recorded step.
    """
    folder = RunFolder(run.expanduser())
    history = History.read(folder)
    if not history.spans:
        raise DataError(
            f"{folder.path} has no recorded step",
            hint=f"draw the planned step: horizon draw {folder.settings}",
        )
    return draw_step(history.spans, _caption_of_run(folder, history), theme=theme, rows=rows)


def draw_planned_step(plan: RunPlan, *, theme: str = "auto", rows: str = "auto", until: float = 0.0) -> str:
    """Draw the step that a plan simulates."""
    caption = Caption(f"A training step of {model_name(plan.config)}", _lines(plan), "SIMULATED")
    return draw_step(plan.prediction.simulation.spans, caption, theme=theme, rows=rows, until=until)


def draw_planned_memory(plan: RunPlan, *, theme: str = "auto") -> str:
    """Draw what a planned run takes of host and device memory."""
    caption = Caption(f"Memory to train {model_name(plan.config)}", _lines(plan), "PLANNED")
    return draw_memory(memories_of(plan), caption, theme=theme)


def memories_of(plan: RunPlan) -> list[Memory]:
    """Return the memories of a plan's machine; on this machine what a run can get of them."""
    found, limits = plan.prediction, plan.planner.limits
    process = found.host["process"] if limits.here else 0
    memories = [Memory("Host memory", found.host, limits.host + process)]
    if found.device:
        device = limits.device if limits.here else int(plan.profile.device_bytes)
        memories.append(Memory("Device memory", found.device, device or found.device_bytes))
    return memories


def write_drawing(path: Path, drawing: str) -> None:
    """Write a file that a user named, or a result in a run's folder.

    Raises ConfigError, and DoesNotFitError if the disk is full.
    """
    with writing(path, "choose another file with --out FILE"):
        if (path.parent / "metrics.jsonl").is_file():  # never through a link
            files.write_file(path, drawing)
        else:
            files.write_output(path, drawing)


def model_name(config: TrainConfig) -> str:
    """Name a model: the last part of its folder's or Hub name, or the type of one with random weights."""
    if config.model_name_or_path is not None:
        return config.model_name_or_path.rstrip("/").rpartition("/")[2] or config.model_name_or_path
    values: Any = config.init_model
    return f"a {values['model_type']} model" if isinstance(values, dict) else Path(str(values)).name


def _lines(plan: RunPlan) -> tuple[str, str]:
    found, outline = plan.prediction, plan.planner.outline
    step = f"{found.micro_batches} × [{found.batch}, {found.tokens_per_row}] tokens a step"
    shown = "" if found.step.is_exact else ", drawn shorter"
    layers = count(outline.num_layers, "layer")
    return f"{parameters(outline.num_parameters)}, {layers} · {step}{shown}", plan.machine


def _caption_of_run(folder: RunFolder, history: History) -> Caption:
    header, line = history.header, history.timeline
    assert line is not None, "a run with spans has a timeline"
    name = str(header.get("run_name") or folder.path.resolve().name)
    step = (
        f"step {line['step']:,} of {header['num_steps']:,}"
        if header.get("num_steps")
        else f"step {line['step']:,}"
    )
    tokens = next((s.get("num_tokens") for s in history.steps if s["step"] == 1), None)
    about = [str(header["model_type"])] if header.get("model_type") else []
    about += [parameters(header["num_parameters"])] if header.get("num_parameters") else []
    about += [f"{count(tokens, 'token')} a step"] if tokens else []
    machine = header.get("machine") or {}
    device = str(header.get("device") or "unknown device")
    where = [str(machine.get("cpu") or "CPU") if device == "cpu" else device]
    if device == "cpu" and header.get("num_threads"):
        where.append(count(header["num_threads"], "thread"))
    where.append(str(line.get("time") or "")[:10])
    lines = [" · ".join(part for part in parts if part) for parts in ([*about, step], where)]
    return Caption(f"A training step of {name}", lines, "MEASURED")
