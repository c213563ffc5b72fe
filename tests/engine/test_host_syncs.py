"""Nothing in the compute lane waits for the device: whole steps on an emulated CUDA device, waits counted.

What is emulated runs on the CPU, so gradients must be those of the CPU to the bit, too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import horizon_lm as hz
import zoo
from emulated_cuda import EmulatedCuda, watch_ops
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.engine import ops as ops_module
from horizon_lm.schedule import Op

pytestmark = pytest.mark.usefixtures("one_thread")

CHUNK = 16  # tokens: three loss chunks in a micro-batch


def _with_metrics(log_probs: torch.Tensor, batch: dict[str, torch.Tensor]) -> Any:
    wanted = batch["labels"][:, 1:] != -100
    loss = -log_probs.sum() / wanted.sum()
    return loss, {"mean": log_probs.mean(), "least": log_probs.detach().min(), "number": 3}


def _on_device(name: str, cuda: EmulatedCuda, dtype: str = "bfloat16", **settings: Any) -> hz.HostModel:
    model = hz.HostModel.from_pretrained(
        zoo.build(name), device="cuda", dtype=dtype, skip_memory_check=True, loss_chunk_tokens=CHUNK, **settings
    )
    watch_ops(model.engine, cuda)
    return model


def _step(model: hz.HostModel, kinds: list[str], loss_fn: Any = None) -> Any:
    name = str(model.skeleton.model_type)
    batches = [zoo.batch(CASE_OF.get(name, name), kind=kind, seed=m) for m, kind in enumerate(kinds)]
    return model.forward_backward(batches, loss_fn=loss_fn)


CASE_OF = {"mixtral": "mixtral-aux"}
# A dense model, a tied one with windows, learned positions, experts, experts with their auxiliary loss.
CASES: dict[str, list[tuple[list[str], Callable | None]]] = {
    "llama": [(["padded", "packed", "plain"], None), (["padded"], _with_metrics)],
    "gemma3_text": [(["padded"], None), (["packed", "plain"], _with_metrics)],
    "gpt2": [(["plain"], None), (["packed"], None)],
    "qwen3_moe": [(["padded", "packed"], None), (["plain"], _with_metrics)],
    "mixtral-aux": [(["padded", "packed"], None)],
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
