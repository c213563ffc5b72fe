"""The drawings in docs/assets: `make drawings`.

Those of planned steps and memory are **simulated** with the rates of shipped profiles; nothing in them ran on
a GPU. Their theme is `auto`. `step-light.svg`, `step-dark.svg` and `step-recorded.svg` show one step that a
run of configs/quickstart.yaml recorded; `--run RUN` draws them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horizon_lm.bench.models import shape
from horizon_lm.config import TrainConfig
from horizon_lm.plan.run_plan import RunPlan, plan_run
from horizon_lm.report.drawings import draw_run, memories_of
from horizon_lm.report.memory_drawing import draw_memory
from horizon_lm.report.step_drawing import draw_step
from horizon_lm.report.svg import Caption

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
LENGTH = 1024


@dataclass(frozen=True)
class Scene:
    """A planned step. layers: 0 for all of the model's."""

    title: str
    model: str
    hardware: str
    settings: dict[str, Any]
    layers: int = 0

    def plan(self) -> RunPlan:
        changes = {"num_hidden_layers": self.layers} if self.layers else {}
        values: Any = {"init_model": shape(self.model, **changes), "datasets": ["none"], "max_length": LENGTH}
        return plan_run(TrainConfig(**values, **self.settings), self.hardware)

    def caption(self, plan: RunPlan, mark: str = "SIMULATED") -> Caption:
        found = plan.prediction
        cut = f", {self.layers} of its layers" if self.layers else ""
        step = f"{found.micro_batches} × {found.batch} sequences of {found.tokens_per_row:,} tokens"
        machine = f"{'rates of ' * (mark == 'SIMULATED')}{plan.profile.title}"
        return Caption(self.title, (f"{NAMES[self.model]}{cut} · {step}", machine), mark)


NAMES = {"qwen3-4b": "Qwen3-4B", "qwen3-8b": "Qwen3-8B"}
_CHUNK = {"loss_chunk_tokens": 2048, "optimizer_threads": 13}  # what a plan would search for


def _cut(rows: int, micro_batches: int) -> dict[str, Any]:
    return _CHUNK | {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}


_PLAIN = {"activations": "recompute", "boundaries": "device", "resident": 0, "rounds": 1}


def _few(title: str, cut: dict[str, Any], hardware: str = "rtx4090", **settings: Any) -> Scene:
    """Return a step of few layers, whose ops are wide enough for their numbers."""
    return Scene(title, "qwen3-4b", hardware, cut | _PLAIN | settings, layers=8)


# Drawings that are compared share a time axis.
UPDATES = {
    "step-deferred": _few("Deferred updates: during the next forward pass", _cut(8, 2), update="deferred"),
    "step-sync": _few("Sync updates: after the backward pass", _cut(8, 2), update="sync"),
    "step-eager": _few(
        "Eager updates: during the backward pass", _cut(8, 2), update="eager", max_grad_norm=None
    ),
}
PLACES = {
    "step-streamed": _few("One round, everything streamed", _cut(4, 4), "h100-sxm"),
    "step-rounds": _few(
        "Two rounds that keep activations; table and head are resident",
        _cut(4, 4),
        "h100-sxm",
        activations="keep",
        rounds=2,
        round_sums="host",
        resident=1,
    ),
}
WHOLE = {
    "step-whole": Scene(
        "A whole model: every op of one step",
        "qwen3-4b",
        "rtx4090",
        _cut(4, 4) | _PLAIN,
    ),
}
MEMORY = {
    "memory-8b": Scene(
        "Memory to train Qwen3-8B",
        "qwen3-8b",
        "rtx4090",
        _cut(8, 8) | _PLAIN | {"resident": 1, "boundaries": "host", "loss_chunk_tokens": 1024},
    )
}


def steps(scenes: dict[str, Scene]) -> dict[str, str]:
    """Return the drawings of planned steps by name, with one time axis."""
    plans = {name: scene.plan() for name, scene in scenes.items()}
    until = max(plan.prediction.seconds for plan in plans.values())
    found = {}
    for name, plan in plans.items():
        spans, caption = plan.prediction.simulation.spans, scenes[name].caption(plan)
        found[name] = draw_step(spans, caption, rows="lanes", until=until)
    return found


def memories(scenes: dict[str, Scene]) -> dict[str, str]:
    """Return the drawings of planned memory by name."""
    plans = {name: scene.plan() for name, scene in scenes.items()}
    return {
        name: draw_memory(memories_of(plan), scenes[name].caption(plan, "PLANNED"))
        for name, plan in plans.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="also draw the step that this run recorded")
    run = parser.parse_args(argv).run
    drawings = steps(UPDATES) | steps(PLACES) | steps(WHOLE) | memories(MEMORY)
    if run is not None:
        themes = {"light": "light", "dark": "dark", "recorded": "auto"}
        drawings |= {f"step-{name}": draw_run(run, theme=theme) for name, theme in themes.items()}
    for name, drawing in drawings.items():
        (ASSETS / f"{name}.svg").write_text(drawing)
        print(f"written: docs/assets/{name}.svg")


if __name__ == "__main__":
    main()
