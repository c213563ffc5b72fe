"""Nothing in the compute lane waits for the device: whole steps on an emulated CUDA device, waits counted.

What is emulated runs on the CPU, so gradients must be those of the CPU to the bit, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as MODELS

import horizon_lm as hz
import zoo
from emulated_cuda import EmulatedCuda, watch_ops
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.engine import ops as ops_module
from horizon_lm.engine.loss import VALUES
from horizon_lm.schedule import Op

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK = 16  # tokens: three loss chunks in a micro-batch


def _with_metrics(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> Any:
    wanted = batch["labels"][:, 1:] != -100
    loss = -log_probs.sum() / wanted.sum()
    return loss, {"mean": log_probs.mean(), "least": log_probs.detach().min(), "number": 3}


def _of_values(values: hz.TokenValues, batch: dict[str, torch.Tensor]) -> Any:
    assert values.entropy is not None
    loss, metrics = _with_metrics(values.log_probs * values.entropy, batch)
    return loss, metrics | {"mean": values.entropy.mean()}


_ALL_VALUES = hz.TokenLoss(_of_values, VALUES, temperature=0.7)


def _on_device(name: str, cuda: EmulatedCuda, dtype: str = "bfloat16", **settings: Any) -> hz.HostModel:
    model = hz.HostModel.from_pretrained(
        zoo.build(name),
        device="cuda",
        dtype=dtype,
        skip_memory_check=True,
        loss_chunk_tokens=CHUNK,
        **settings,
    )
    watch_ops(model.engine, cuda)
    return model


def _step(model: hz.HostModel, kinds: list[str], loss_fn: Any = None) -> Any:
    name = str(model.skeleton.model_type)
    batches = [zoo.batch(CASE_OF.get(name, name), kind=kind, seed=m) for m, kind in enumerate(kinds)]
    return model.forward_backward(batches, loss_fn=loss_fn)


CASE_OF = {"mixtral": "mixtral-aux"}
# A dense model, a tied one with windows, learned positions, experts, experts with their auxiliary loss.
CASES: dict[str, list[tuple[list[str], Callable | hz.TokenLoss | None]]] = {
    "llama": [(["padded", "packed", "plain"], None), (["padded"], _with_metrics), (["plain"], _ALL_VALUES)],
    "gemma3_text": [(["padded"], None), (["packed", "plain"], _with_metrics)],
    "gpt2": [(["plain"], None), (["packed"], None)],
    "qwen3_moe": [(["padded", "packed"], None), (["plain"], _with_metrics)],
    "mixtral-aux": [(["padded", "packed"], None), (["padded"], _ALL_VALUES)],
}


@pytest.mark.parametrize("name", CASES)
def test_the_compute_lane_never_waits(name: str, emulated_cuda: EmulatedCuda) -> None:
    model = _on_device(name, emulated_cuda)
    for kinds, loss_fn in CASES[name]:
        emulated_cuda.waits.clear()
        out = _step(model, kinds, loss_fn)
        assert not emulated_cuda.on_compute_lane()
        assert torch.isfinite(torch.tensor(out.loss))
        assert len(out.metrics) == len(kinds)
        assert all(m.keys() == {"mean", "least", "number"} for m in out.metrics if loss_fn is not None)
    assert model.step(lr=1e-3, max_grad_norm=1.0).grad_norm > 0  # the update waits for the gradients
    assert emulated_cuda.waits
    emulated_cuda.waits.clear()
    kinds, _ = CASES[name][0]
    data = [zoo.batch(name, kind=kind) for kind in kinds]
    found = model.evaluate(data, values=VALUES, temperature=0.7, return_router_losses=True)
    assert found.values is not None and bool(found.router_losses) == (name == "mixtral-aux")
    assert not emulated_cuda.on_compute_lane()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_gradients_are_those_of_the_cpu(name: str, emulated_cuda: EmulatedCuda) -> None:
    loss_fn = _with_metrics if name == "llama" else None
    model = _on_device(name, emulated_cuda, dtype="float32")
    plain = hz.HostModel.from_pretrained(zoo.build(name), "cpu", "float32", loss_chunk_tokens=CHUNK)
    one, two = (_step(m, ["padded", "plain"], loss_fn) for m in (model, plain))
    assert (one.loss, one.metrics) == (two.loss, two.metrics)
    for (key, found), (_, wanted) in zip(model.named_gradients(), plain.named_gradients(), strict=True):
        assert wanted.abs().sum() > 0 and torch.equal(found, wanted), key


# Negative controls: each of these waits, and is counted by its name.


def _planted(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    device, values = log_probs.device, log_probs.detach()
    rows = torch.arange(3, device=device)
    float(values.sum())
    bool((values < 0).all())
    values.nonzero()
    values[values < -1]
    values[:, torch.tensor([0, 1])]
    values.cpu()
    values[0].tolist()
    torch.unique(rows)
    torch.masked_select(rows, rows > 1)
    rows.repeat_interleave(rows)
    rows.repeat_interleave(rows, output_size=3)  # waits for nothing
    torch.tensor(1.0, device=device)
    torch.ones(3).to(device, non_blocking=True)
    torch.ones(3).pin_memory().to(device)
    torch.ones(3).pin_memory().to(device, non_blocking=True)  # waits for nothing
    torch.empty(3, pin_memory=True).copy_(rows)
    torch.cuda.synchronize()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    return -log_probs.mean()


PLANTED = {
    "aten::_local_scalar_dense: a value is read": 2,
    "aten::nonzero: a size depends on values": 1,
    "aten::index: by booleans": 1,
    "aten::index: by indices of the host": 1,
    "a copy to pageable memory": 2,
    "aten::_unique2: a size depends on values": 1,
    "aten::masked_select: a size depends on values": 1,
    "aten::repeat_interleave: a size depends on values": 1,
    "tensor(device='cuda')": 1,
    "a copy from or to pageable memory": 1,
    "a copy that blocks": 2,
    "torch.cuda.synchronize": 1,
    "Event.synchronize": 1,
}


def test_planted_waits_are_counted(emulated_cuda: EmulatedCuda) -> None:
    model = _on_device("llama", emulated_cuda)
    emulated_cuda.waits.clear()
    _step(model, ["plain"], _planted)
    assert dict(emulated_cuda.on_compute_lane()) == PLANTED
    honest = model.engine.ops.functions["L"]

    def reads_the_loss(step: Any, op: Op) -> None:
        honest(step, op)
        with emulated_cuda.modes(op):
            float(step.losses[0])

    emulated_cuda.waits.clear()
    model.engine.ops.functions["L"] = reads_the_loss
    _step(model, ["plain"])
    assert dict(emulated_cuda.on_compute_lane()) == {"aten::_local_scalar_dense: a value is read": 1}


def test_without_twins_the_prologue_waits(
    emulated_cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops_module, "host_twins", lambda device: nullcontext())
    model = _on_device("gemma3_text", emulated_cuda)
    for kinds in (["padded"], ["packed"]):
        emulated_cuda.waits.clear()
        _step(model, kinds)
        assert "aten::_local_scalar_dense: a value is read" in emulated_cuda.on_compute_lane()


def test_the_whole_forward_as_head_waits_in_every_chunk(emulated_cuda: EmulatedCuda) -> None:
    model = _on_device("llama", emulated_cuda)
    model.skeleton.own_head = None
    emulated_cuda.waits.clear()
    _step(model, ["plain"])
    assert sum(emulated_cuda.on_compute_lane().values()) >= 2 * zoo.LENGTH // CHUNK


def test_experts_in_a_loop_and_in_fp32_wait(emulated_cuda: EmulatedCuda) -> None:
    """transformers' loop takes the experts that have tokens, and torch's grouped product reads the groups'
    sizes, except of bf16 on Hopper and Blackwell."""
    looping = zoo.build("qwen3_moe")
    looping.set_experts_implementation("eager")
    for source, dtype in ((looping, "bfloat16"), (zoo.build("qwen3_moe"), "float32")):
        model = hz.HostModel.from_pretrained(source, device="cuda", dtype=dtype, skip_memory_check=True)
        watch_ops(model.engine, emulated_cuda)
        emulated_cuda.waits.clear()
        _step(model, ["plain"])
        assert emulated_cuda.on_compute_lane()


# Mixtures of experts that transformers does not compute in groups, and which of them wait in every layer.
OWN_EXPERTS = {"dbrx", "doge", "jetmoe", "llama4_text", "longcat_flash"}
WAITING = ["dbrx", "jetmoe", "longcat_flash"]


def test_which_models_compute_experts_in_their_own_way() -> None:
    found = set()
    for case in zoo.CASES.values():
        config = case.config()
        if "moe" in case.tags and not MODELS[type(config)]._can_set_experts_implementation():
            found.add(config.model_type)
    assert found == OWN_EXPERTS


@pytest.mark.parametrize("name", sorted(OWN_EXPERTS))
def test_which_of_them_wait(name: str, emulated_cuda: EmulatedCuda) -> None:
    model = _on_device(name, emulated_cuda)
    emulated_cuda.waits.clear()
    _step(model, ["plain"])
    assert bool(emulated_cuda.on_compute_lane()) == (name in WAITING)
