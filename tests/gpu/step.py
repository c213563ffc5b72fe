"""Part 4: steps of a model of about a billion parameters: timeline, lane use, device memory."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

import horizon_lm as hz
from gpu.common import Part, Place, free, llama, random_batches
from horizon_lm.config import ModelSettings
from horizon_lm.engine.lanes import CudaLanes
from horizon_lm.schedule import Lane
from horizon_lm.schedule.draw import chrome_trace, text_timeline, utilisation

STEPS = 3
MICRO_BATCHES = 2


def check_step(place: Place, trace: Path | None) -> Part:
    """trace: where the timeline of the last step is written, for ui.perfetto.dev."""
    part = Part("step")
    if place.dry:
        values, rows, tokens = llama(3, 64, 128, 512, tied=True), 2, 32
    else:  # the size of Llama 3.2 1B
        values, rows, tokens = llama(16, 2048, 8192, 128256, tied=True, heads=32), 4, 1024
    begin = time.perf_counter()
    model = hz.HostModel.from_config(
        values, ModelSettings(device=str(place.device), dtype="bfloat16", skip_memory_check=True)
    )
    part.note(
        f"{model.num_parameters / 1e9:.3f} B parameters, host store "
        f"{sum(model.store.num_bytes.values()) / 1e9:.2f} GB, "
        f"built and pinned in {time.perf_counter() - begin:.0f} s"
    )
    cuda = place.device.type == "cuda"
    if cuda:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    batches = random_batches(values["vocab_size"], MICRO_BATCHES, rows, tokens)
    count = MICRO_BATCHES * rows * tokens
    timings, losses = [], []
    for step in range(STEPS):
        last = step == STEPS - 1
        start = time.perf_counter()
        loss = model.forward_backward(batches, record=last).loss
        place.synchronize()
        middle = time.perf_counter()
        norm = model.step(lr=1e-4, max_grad_norm=1.0, record=last).grad_norm
        timings.append((middle - start, time.perf_counter() - middle))
        losses.append(loss)
        part.note(
            f"step {step + 1}: loss {loss:.4f}, norm {norm:.3f}, forward + backward {timings[-1][0]:.3f} s, "
            f"update {timings[-1][1]:.3f} s, {count / timings[-1][0]:.0f} tokens/s without the update"
        )
    part.add("loss falls on the same batch", losses[-1] < losses[0], losses=[round(x, 4) for x in losses])
    _timeline(part, model, trace)
    _memory(part, model, held if cuda else None)
    part.data |= {"seconds": timings, "losses": losses, "tokens": count, "model": values}
    if cuda:
        part.add("lanes are CUDA streams", isinstance(model.engine.lanes, CudaLanes))
    del model
    free()
    return part


def _timeline(part: Part, model: hz.HostModel, trace: Path | None) -> None:
    spans = model.timeline
    engine = model.engine
    ops = engine.schedule(engine.spec(MICRO_BATCHES), pending=True).ops
    complete = {op for op, _, _ in spans} == set(ops) and len(spans) == len(ops)
    part.add("every op is in the timeline", complete, ops=len(ops), spans=len(spans))
    streamed = [span for span in spans if span[0].lane is not Lane.UPDATE]
    for line in ["without the updates:", *text_timeline(streamed).splitlines()]:
        part.note(line)
    for line in ["with the updates of the step before:", *text_timeline(spans).splitlines()]:
        part.note(line)
    part.data["utilisation"] = {"forward_backward": utilisation(streamed), "step": utilisation(spans)}
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(spans)))
        part.note(f"timeline: {trace} (open it in ui.perfetto.dev)")


def _memory(part: Part, model: hz.HostModel, held: int | None) -> None:
    sizes = model.memory_bytes()
    slots = sizes["weight_slots"] + sizes["gradient_slots"]
    if held is None:
        part.add("device memory", None, "only CUDA counts it", slots_mb=f"{slots / 1e6:.1f}")
        return
    peak = torch.cuda.max_memory_allocated()
    weights = 2 * model.num_parameters
    sizes |= {"peak": peak, "slots": slots, "before_the_steps": held, "all_weights": weights}
    part.data["bytes"] = sizes
    part.add(
        "slots are allocated before the steps",
        held >= slots,
        slots_mb=f"{slots / 1e6:.1f}",
        held_mb=f"{held / 1e6:.1f}",
    )
    rest = peak - slots
    part.note(f"device memory: peak {peak / 1e6:.1f} MB = slots {slots / 1e6:.1f} MB + {rest / 1e6:.1f} MB")
    part.note(f"of activations, logits and work space; all weights would be {weights / 1e6:.1f} MB")
