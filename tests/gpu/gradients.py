"""Part 1: loss and every gradient equal those of plain transformers on the same device.

Bitwise, where transformers itself gives the same bits twice. Exceptions are named in the table:

- the embedding table: its gradient rows are summed once per row in use, in another order;
- models whose own kernels are not reproducible, or compute other bits without a graph.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import horizon_lm as hz
import zoo
from gpu.common import (
    TOLERANCE,
    Difference,
    Gradients,
    Part,
    Place,
    compare,
    deterministic,
    first_line,
    free,
    listed,
    same,
)
from gpu.common import run_plain as plain
from horizon_lm.errors import UnsupportedModelError

# Dense and mixture of experts, tied and untied, learned positions, soft-capping, alternating
# attention, parallel blocks, router losses, layers without attention, scaled embeddings.
CASES = (
    "llama",
    "llama-tied",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt2-untied",
    "mixtral-aux",
    "qwen3_moe",
    "gpt_oss",
    "qwen3_next",
    "cohere",
    "opt",
    "phi3",
    "falcon-new",
    "olmoe-aux",
    "lfm2",
)
AT_LEAST = 10
KINDS = ("plain", "padded", "packed")
EMBEDDING = "embedding rows are summed in another order"


@dataclass
class _Reference:
    """What transformers computes, and how far its own bits can be relied upon."""

    loss: torch.Tensor
    gradients: Gradients
    reason: str  # why bits may differ; empty where they may not


def check_gradients(place: Place, models: Sequence[str] | None = None) -> Part:
    """models: of CASES; all by default."""
    part = Part("gradients")
    compared = 0
    with deterministic():
        for name in models or CASES:
            try:
                zoo.CASES[name].config()
            except (KeyError, ValueError, AttributeError) as error:
                part.add(name, None, f"absent from this transformers: {type(error).__name__}: {error}")
                continue
            ran = []
            for dtype in (torch.float32, torch.bfloat16):
                ran.append(_check_case(part, place, name, dtype))
                free()
            compared += all(ran)
    passed = None if models else compared >= AT_LEAST
    part.add("architectures", passed, f"at least {AT_LEAST} are asked for", compared=compared)
    return part


def _check_case(part: Part, place: Place, name: str, dtype: torch.dtype) -> bool:
    """Whether there was anything to compare with."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    source = zoo.build(name, dtype=dtype)
    reference = copy.deepcopy(source).to(place.device)
    try:
        model = hz.HostModel.from_pretrained(
            source, device=str(place.device), dtype=str(dtype).split(".")[1], skip_memory_check=True
        )
    except UnsupportedModelError as error:
        part.add(f"{name} {short}", False, first_line(error))
        return False
    compared = False
    table = model.skeleton.anatomy.embedding
    for kind in KINDS:
        label = f"{name} {short} {kind}"
        if kind not in zoo.CASES[name].kinds:
            part.add(label, None, "the model takes no such batch")
            continue
        batch = zoo.batch(name, kind=kind)
        try:
            wanted = _reference(reference, batch, place)
        except Exception as error:
            part.add(label, None, f"transformers itself fails: {first_line(error)}")
            continue
        compared = True
        try:
            out = model.forward_backward([batch])
            found = {key: g.clone() for key, g in model.named_gradients()}
        except Exception as error:  # one architecture that fails must not hide the others
            part.add(label, False, first_line(error))
            continue
        _judge(part, label, place, dtype, batch, wanted, out.loss, found, table, reference, model)
    if compared and dtype == torch.float32 and not model.skeleton.has_router_loss:
        _check_union(part, place, name, model, reference)
    return compared


def _reference(model: torch.nn.Module, batch: dict, place: Place) -> _Reference:
    loss, gradients = plain(model, batch, place.device)
    reason = ""
    for _ in range(2):
        again = plain(model, batch, place.device)
        if not same(loss, again[0]) or compare(again[1], gradients).different:
            reason = f"transformers' own bits change from run to run: {compare(again[1], gradients)}"
    with torch.no_grad():
        quiet = model(**{key: value.to(place.device) for key, value in batch.items()}).loss.cpu()
    if not reason and not same(loss, quiet):
        reason = "transformers itself computes another loss without a graph"
    return _Reference(loss, gradients, reason)


def _judge(
    part: Part,
    label: str,
    place: Place,
    dtype: torch.dtype,
    batch: dict,
    wanted: _Reference,
    loss: float,
    found: Gradients,
    table: str,
    reference: torch.nn.Module,
    model: hz.HostModel,
) -> None:
    limit = TOLERANCE[dtype]
    expected = float(wanted.loss)
    loss_same = loss == expected
    loss_error = abs(loss - expected) / abs(expected)
    difference = compare(found, wanted.gradients)
    beside = [key for key in difference.different if key != table]
    close = difference.worst <= limit and loss_error <= limit
    reasons = [wanted.reason] if wanted.reason and (beside or not loss_same) else []
    if table in difference.different and not wanted.reason:
        reasons.append(EMBEDDING)
    passed = close and (bool(wanted.reason) or (loss_same and not beside))
    if not passed:
        reasons.append(f"not equal: {listed(beside or ['loss'])}")
        reasons.append(_same_in_runs(reference, model, batch, place, loss, found, table))
    part.add(
        label,
        passed,
        "; ".join(reasons),
        loss="same" if loss_same else f"{loss_error:.1e}",
        gradients=str(difference),
    )


def _same_in_runs(
    reference: torch.nn.Module,
    model: hz.HostModel,
    batch: dict,
    place: Place,
    loss: float,
    found: Gradients,
    table: str,
) -> str:
    """Whether transformers gives our bits once its weights lie as ours do, side by side: cuBLAS may
    choose a kernel by the alignment of its operands."""
    moved = copy.deepcopy(reference)
    parameters = dict(moved.named_parameters())
    for unit in model.store.units:
        run = torch.zeros(unit.numel, dtype=model.store.dtype, device=place.device)
        for p in unit.parameters:
            view = unit.view(run, p)
            if parameters[p.name].dtype == view.dtype:
                parameters[p.name].data = view.copy_(parameters[p.name].data)
    expected, gradients = plain(moved, batch, place.device)
    difference = compare(found, gradients)
    equal = loss == float(expected) and not [n for n in difference.different if n != table]
    verdict = "the bits are ours" if equal else f"still {difference}"
    return f"with transformers' weights laid out as ours, {verdict}"


def _check_union(
    part: Part, place: Place, name: str, model: hz.HostModel, reference: torch.nn.Module
) -> None:
    """Four micro-batches against the one batch that they make together, in fp32."""
    label = f"{name} fp32 4 micro-batches"
    try:
        whole = zoo.batch(name, batch_size=8, kind="padded" if "padded" in zoo.CASES[name].kinds else "plain")
        parts = [{key: value[2 * m : 2 * m + 2] for key, value in whole.items()} for m in range(4)]
        out = model.forward_backward(parts)
        found = {key: g.clone() for key, g in model.named_gradients()}
        loss, gradients = plain(reference, whole, place.device)
    except Exception as error:
        part.add(label, False, first_line(error))
        return
    difference: Difference = compare(found, gradients)
    error = max(difference.worst, abs(out.loss - float(loss)) / abs(float(loss)))
    limit = TOLERANCE[torch.float32]
    why = f"relative error at most {limit:.0e} against their union"
    part.add(label, error <= limit, why, worst=f"{error:.1e} {difference.where}")
