"""Horizon-LM as a system of the benchmark, and the breakdown of one recorded step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from horizon_lm.bench.models import source_model
from horizon_lm.bench.protocol import Case
from horizon_lm.config import ModelSettings, TrainConfig, model_settings_of
from horizon_lm.errors import ConfigError, UnsupportedModelError
from horizon_lm.host_model import HostModel
from horizon_lm.memory.arena import keep_freed_memory
from horizon_lm.memory.regions import regions
from horizon_lm.memory.staging import staged_bytes
from horizon_lm.memory.store import HostStore
from horizon_lm.optim import kernel
from horizon_lm.plan.run_plan import plan_run
from horizon_lm.schedule import Lane, Op
from horizon_lm.schedule.draw import Span, utilisation


class Ours:
    """Horizon-LM under test. extra: any field of `ModelSettings`.

    With activations=auto or rows=0 the planner chooses, as for `horizon train`, using this machine's profile
    if `horizon doctor` has measured one.
    """

    def __init__(self, case: Case) -> None:
        need_kernel(case.device)
        self.case = case
        settings, self.rows, self.chosen = settle(case)
        self.model = HostModel(source_model(case), settings)
        if self.model.device.type == "cpu":
            keep_freed_memory()  # as `train` does

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        return self._step(micro_batches, record=False)

    def _step(self, micro_batches: list[torch.Tensor], record: bool) -> float:
        batches = [{"input_ids": ids, "labels": ids} for ids in micro_batches]
        decay = self.case.weight_decay
        return self.model.train_step(batches, lr=self.case.lr, weight_decay=decay, record=record).loss

    def breakdown(self, micro_batches: list[torch.Tensor]) -> dict[str, Any]:
        """Run and record one more step; see `breakdown`."""
        self._step(micro_batches, record=True)
        return breakdown(self.model)

    def describe(self) -> dict[str, Any]:
        """Return the planner's choices, the share of layers that repeat matrix products, and memory by part
        in bytes."""
        policies, layers = self.model.engine.ops.policies, self.model.skeleton.num_layers
        kept = len(policies.kept | policies.products)
        memory = self.model.memory_bytes()
        pinned = sum(memory.get(n, 0) for n in ("weights", "grads", "grad_slabs", "boundaries"))
        return {
            "rows": self.rows,
            "recomputed": 1 - kept / layers,
            "update": self.model.settings.update_mode,
            "resident": len(policies.resident),
            "rounds": policies.rounds,
            "memory": memory,
            "pinned": pinned if self.model.device.type == "cuda" else 0,
            **self.chosen,
        }

    def close(self) -> None:
        self.model.flush()


def need_kernel(device: str) -> None:
    """Raise ConfigError if a CUDA benchmark would measure the torch reference instead of the C++ update."""
    if device.startswith("cuda") and kernel.library() is None:
        raise ConfigError(
            "the C++ optimizer is not built; a GPU benchmark of the torch reference would mislead",
            hint="run python -m horizon_lm.optim.kernel --build",
        )


def train_config(case: Case) -> TrainConfig:
    """Return the training run that a case stands for, as `horizon plan` takes it."""
    cut: dict[str, Any] = {"tokens_per_step": case.tokens}
    if case.rows:
        rows = min(case.rows, case.sequences)
        count = -(-case.sequences // rows)
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": count}
    data: Any = ["none"]  # no dataset is read
    common = {"init_model": case.model, "datasets": data, "max_length": case.length}
    return TrainConfig(**common, **cut, **_settings(case))


def _settings(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": case.device,
        "dtype": case.dtype,
        "attn_implementation": case.attention,
    }
    found |= {"max_grad_norm": case.clip, "adam_beta1": case.betas[0], "adam_beta2": case.betas[1]}
    found |= {"adam_epsilon": case.eps, "activations": case.activations, "seed": case.seed}
    if case.threads:
        found["optimizer_threads"] = case.threads
    return found | case.extra


def settle(case: Case) -> tuple[ModelSettings, int, dict[str, Any]]:
    """Return (settings, rows per micro-batch, the profile and predicted seconds of the plan, if any)."""
    config = train_config(case)
    rows = case.rows or case.sequences
    chosen: dict[str, Any] = {}
    if case.activations == "auto" or not case.rows:
        try:
            plan = plan_run(config)
        except UnsupportedModelError as error:
            chosen = {"plan": f"none: {error.message}"}
        else:
            config, rows = plan.config, plan.config.per_device_train_batch_size
            chosen = {"plan": plan.profile.name, "predicted_seconds": plan.prediction.seconds}
    return model_settings_of(config), rows, chosen


def build(case: Case) -> Ours:
    return Ours(case)


Interval = tuple[float, float]


def hidden_share(spans: Iterable[Span]) -> float:
    """Return the share of the other lanes' time under compute: 0.0 on the CPU, where lanes alternate."""
    compute: list[Interval] = []
    others: list[Interval] = []
    for op, start, end in spans:
        (compute if op.lane is Lane.COMPUTE else others).append((start, end))
    total = sum(end - start for start, end in others)
    merged = _union(compute)
    hidden = sum(_common(other, merged) for other in others)
    return hidden / total if total else 0.0


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _common(one: Interval, merged: Iterable[Interval]) -> float:
    return sum(max(0.0, min(one[1], end) - max(one[0], start)) for start, end in merged)


def moved_bytes(model: HostModel, spans: Iterable[Span]) -> dict[str, int]:
    """Return the bytes that a step moves: `to_device` (weights, boundaries), `from_device` (gradients,
    boundaries), and `update`, read and written by the optimizer in host memory. On the CPU only `update`."""
    store, engine = model.store, model.engine
    size = store.dtype.itemsize
    # State is read and written, gradients are read.
    per_parameter = size + sum(2 * row.dtype.itemsize for row in regions(store.spec) if row.is_updated)
    streamed = model.device.type != "cpu"
    found = {"to_device": 0, "from_device": 0, "update": 0}
    for op, _, _ in spans:
        if op.kind == "O" or (op.kind == "A" and not streamed):
            found["update"] += store.units[op.unit].trainable_numel * per_parameter
        elif not streamed:
            continue
        elif op.kind == "U":
            found["to_device"] += _uploaded_bytes(store, op)
        elif op.kind == "D":
            downloaded = 0 if store.is_resident(op.unit) else store.units[op.unit].trainable_numel
            found["from_device"] += downloaded * size
        elif op.kind in "PG":  # unfinished gradients, fp32
            direction = "from_device" if op.kind == "P" else "to_device"
            found[direction] += store.units[op.unit].trainable_numel * torch.float32.itemsize
        elif op.kind in "RX":
            size_on_host = engine.ops.boundary_slots.host_bytes_of(op.unit, op.micro_batch)
            found["to_device" if op.kind == "R" else "from_device"] += size_on_host
    return found


def _uploaded_bytes(store: HostStore, op: Op) -> int:
    layout, spec = store.units[op.unit], store.spec
    if op.staging >= 0:
        return staged_bytes(layout, store.is_split(op.unit), spec.dtype, spec.packing)
    return store.streamed_numel(op.unit) * spec.dtype.itemsize


def breakdown(model: HostModel) -> dict[str, Any]:
    """Break down the last recorded step (record=True).

    lanes: busy seconds and share of the step; a lane's overlapping ops count once.
    hidden: see `hidden_share`. moved: see `moved_bytes`.
    """
    spans = model.timeline
    return {
        "lanes": utilisation(spans),
        "hidden": hidden_share(spans),
        "moved": moved_bytes(model, spans),
        "seconds": max((end for _, _, end in spans), default=0.0),
    }
