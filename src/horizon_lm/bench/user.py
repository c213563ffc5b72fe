"""`horizon bench`: make a case from the user's options, measure it, print the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from horizon_lm.bench.figures import HEAD, Row, cells, lane_lines, peak_of
from horizon_lm.bench.jobs import OURS, TORCH, measure
from horizon_lm.bench.models import SHAPES, work_of
from horizon_lm.bench.protocol import Case
from horizon_lm.errors import ConfigError
from horizon_lm.machine.device import resolve_device


def model_values(name: str, layers: int = 0) -> dict[str, Any]:
    """Return the transformers configuration of a shape, a model folder, or a config.json.

    layers: replaces the model's depth unless 0. Raises ConfigError.
    """
    values = dict(SHAPES[name]) if name in SHAPES else _read(name)
    if layers:
        values["num_hidden_layers"] = layers
        if isinstance(values.get("layer_types"), list):
            kinds = values["layer_types"]
            values["layer_types"] = [kinds[i % len(kinds)] for i in range(layers)]
    return values


def _read(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    hint = f"name a shape ({', '.join(SHAPES)}) or a folder with config.json"
    if not path.is_file():
        raise ConfigError(f"MODEL {name!r} is neither a shape nor a model folder", hint)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not a valid configuration: {error}", hint) from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise ConfigError(f"{path} has no model_type", hint)
    dropped = {"architectures", "transformers_version", "torch_dtype", "dtype", "auto_map", "_name_or_path"}
    return {key: value for key, value in values.items() if key not in dropped}


def make_case(model: str, *, layers: int, device: str, **settings: Any) -> Case:
    """Make a case from the command's options. Raises ConfigError."""
    values = model_values(model, layers)
    place = resolve_device(device).type
    case = Case(values, device=place, init="quick", **settings)
    longest = values.get("max_position_embeddings")
    if isinstance(longest, int) and case.length > longest:
        raise ConfigError(
            f"--length {case.length} exceeds the model's {longest} positions", f"use --length {longest}"
        )
    if case.rows > case.sequences:
        raise ConfigError(
            f"--rows {case.rows} exceeds --sequences {case.sequences}",
            f"use --sequences {case.rows}",
        )
    try:
        work_of(case)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"transformers rejects the configuration of {model!r}: {reason}", "check its config.json"
        ) from error
    return case


def run(case: Case, against: list[str], *, as_json: bool) -> str:
    """Measure Horizon-LM and the systems in `against`, print the results, return Horizon-LM's status."""
    systems = [("horizon-lm", OURS, case)]
    for name in against:
        keep = "keep" if name == "torch-keep" else "recompute"
        systems.append((name, TORCH, case.replace(activations=keep)))
    rows = measure([(system, case) for _, system, case in systems])
    if as_json:
        for (name, _, _), row in zip(systems, rows, strict=True):
            print(json.dumps({"name": name, **row}))
    else:
        show([name for name, _, _ in systems], rows, case)
    return str(rows[0]["status"])


def show(names: list[str], rows: list[Row], case: Case) -> None:
    """Print a table, the basis of its figures, and the lanes of Horizon-LM."""
    peak, source = peak_of(torch.device(case.device), case.torch_dtype)
    memory_run = [r for n, r in zip(names, rows, strict=True) if n.startswith("torch") and "model_flops" in r]
    best = max((row["tokens_per_second"][0] for row in memory_run), default=None)
    found = [cells(n, r, peak=peak, in_memory=best) for n, r in zip(names, rows, strict=True)]
    table = Table("", *names)
    for i, title in enumerate(HEAD[1:], start=1):
        table.add_row(title, *(row[i] for row in found))
    Console(soft_wrap=True).print(table)
    print(f"{rows[0]['parameters'] / 1e9:.3f} B parameters; {case.tokens:,} tokens per step, no padding")
    print(f"{case.warmup} warm-up and {case.steps} timed steps; MFU and HFU of {peak / 1e12:.2f} TFLOP/s")
    print(f"  ({source}); formulas: docs/performance.md")
    info = rows[0].get("info", {})
    if "plan" in info:
        print(f"planned with profile {info['plan']!r}; run `horizon doctor` to measure this machine")
    for line in lane_lines(rows[0]["breakdown"]) if "breakdown" in rows[0] else rows[0].get("log", []):
        print(line)
