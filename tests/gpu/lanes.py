"""Part 2: streams give the same bits as one thread on one stream, however long an upload takes, and
whatever layers leave for their backward pass."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import horizon_lm as hz
import zoo
from gpu.common import Part, Place, deterministic, free, llama, random_batches, same
from horizon_lm.config import ModelSettings
from horizon_lm.engine.engine import Engine
from horizon_lm.engine.lanes import choose_lanes
from horizon_lm.schedule.draw import text_timeline

SMALL = ("llama-tied", "gemma3_text", "mixtral-aux", "gpt2")


POLICIES = {
    "keep": {"activations": "keep"},
    "spilled": {"boundaries": "host"},
    "blocks of 2, spilled": {"checkpoint_interval": 2, "boundaries": "host"},
}
REGIONS = ("weights", "residual", "exp_avg", "exp_avg_sq", "grads")
# Of a step: its loss, its gradient norm, a checksum of each unit's gradient.
Bits = tuple[float, float, tuple[int, ...]]


def check_lanes(place: Place, repeats: int = 20, seconds: float = 150.0) -> Part:
    """repeats: steps of each run. seconds: time for all runs of the large model; where that does
    not suffice there are fewer steps, and the table says how many."""
    part = Part("lanes")
    with deterministic():
        for name in SMALL[:1] if place.dry else SMALL:
            source = zoo.build(name, dtype=torch.bfloat16)
            model = hz.HostModel.from_pretrained(
                source, device=str(place.device), dtype="bfloat16", skip_memory_check=True
            )
            batches = [[zoo.batch(name, seed=10 * step + m) for m in range(3)] for step in range(repeats)]
            _compare_lanes(part, place, name, model, batches)
            del model, source
            free()
        _check_large(part, place, repeats, seconds)
    free()
    return part


def _check_large(part: Part, place: Place, repeats: int, seconds: float) -> None:
    """Layers whose upload takes longer than their compute: a missing wait would show as other bits."""
    size = llama(3, 64, 128, 256) if place.dry else llama(6, 4096, 14336, 1024, heads=32)
    tokens = 16
    begin = time.perf_counter()
    settings = ModelSettings(
        device=str(place.device), dtype="bfloat16", attn_implementation="eager", skip_memory_check=True
    )
    model = hz.HostModel.from_config(size, settings)
    took = time.perf_counter() - begin
    part.note(f"large: {model.num_parameters / 1e9:.2f} B parameters, built in {took:.0f} s")
    steps = 2 if place.dry else repeats
    batches = [random_batches(size["vocab_size"], 1, 1, tokens, seed=step) for step in range(steps)]
    _restart(model, place, "auto", {})
    for _ in range(2):  # the second step is the one that counts: the first warms up
        model.forward_backward(batches[0], record=True)
    upload, forward = _middle(model, "U"), _middle(model, "F")
    outlasts = upload > forward
    part.add(
        "large: upload outlasts compute",
        None if place.dry else outlasts,
        "" if outlasts else "the case that this model is for does not arise here",
        upload_ms=f"{upload * 1e3:.2f}",
        forward_ms=f"{forward * 1e3:.2f}",
    )
    for line in text_timeline(model.timeline).splitlines():
        part.note(line)
    begin = time.perf_counter()
    model.forward_backward(batches[0])
    model.step(lr=1e-4, max_grad_norm=1.0)
    one = time.perf_counter() - begin
    steps = max(2, min(steps, int(seconds / 3 / max(one, 1e-3))))
    part.note(f"large: a step takes {one:.2f} s; {steps} of {repeats} steps are run with each kind of lanes")
    _compare_lanes(part, place, "large", model, batches[:steps])


def _middle(model: hz.HostModel, kind: str) -> float:
    """Median seconds of the layers' ops of a kind, in the timeline."""
    layers = range(1, model.skeleton.head)
    mine = [end - start for op, start, end in model.timeline if op.kind == kind and op.unit in layers]
    return statistics.median(mine)


def _compare_lanes(
    part: Part, place: Place, name: str, model: hz.HostModel, batches: list[list[dict[str, torch.Tensor]]]
) -> None:
    start = [run.clone() for run in _runs(model, "weights")]
    wanted = _run(model, place, "inline", batches, start, {})
    state = {r: [run.clone() for run in _runs(model, r)] for r in REGIONS if model.store.has(r)}
    again = _run(model, place, "inline", batches[:2], start, {})
    variants: dict[str, dict[str, Any]] = {f"{slots} slots": {"slots": slots} for slots in (2, 3)}
    if name != "large":
        variants |= POLICIES
    for what, settings in variants.items():
        found = _run(model, place, "auto", batches, start, settings)
        first = next((k + 1 for k in range(len(found)) if found[k] != wanted[k]), None)
        regions = [
            region
            for region, runs in state.items()
            if not all(same(a, b) for a, b in zip(_runs(model, region), runs, strict=True))
        ]
        why = ""
        if first or regions:
            why = f"first different step: {first}; regions that differ at the end: {regions}"
            if again != wanted[:2]:
                why += "; inline lanes themselves differ from run to run"
        cells = {"steps": len(batches), "micro_batches": len(batches[0]), "loss": f"{found[-1][0]:.4f}"}
        part.add(f"{name}: {what}", not why, why, **cells)


def _runs(model: hz.HostModel, region: str) -> list[torch.Tensor]:
    return [model.store.run(region, unit) for unit in range(len(model.store.units))]


def _restart(
    model: hz.HostModel,
    place: Place,
    lanes: str,
    settings: dict[str, Any],
    start: list[torch.Tensor] | None = None,
) -> None:
    """Other lanes and settings; with `start`, the model as it was at first (its masters rounded)."""
    model.flush()
    if start is not None:
        for run, value in zip(_runs(model, "weights"), start, strict=True):
            run.copy_(value)
        for region in ("residual", "exp_avg", "exp_avg_sq"):
            for run in _runs(model, region):
                run.zero_()
    old = model.engine
    model.engine = Engine(
        model.skeleton,
        model.store,
        old.optimizer,
        choose_lanes(lanes, place.device),
        model.settings.replace(**settings),
    )
    model.state_was_replaced(0)
    del old
    free()


def _run(
    model: hz.HostModel,
    place: Place,
    lanes: str,
    batches: list[list[dict[str, torch.Tensor]]],
    start: list[torch.Tensor],
    settings: dict[str, Any],
) -> list[Bits]:
    _restart(model, place, lanes, settings, start)
    found = []
    for step in batches:
        loss = model.forward_backward(step).loss
        # Wrapping sums of the bits; what exactly differs is seen in the state at the end.
        gradients = tuple(int(run.view(torch.int64).sum()) for run in _runs(model, "grads"))
        norm = model.step(lr=1e-4, max_grad_norm=1.0, weight_decay=0.1).grad_norm
        found.append((loss, norm, gradients))
    model.flush()
    return found
