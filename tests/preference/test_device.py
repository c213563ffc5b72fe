"""Losses of preferences on a device: nothing waits for it, and no tensor of the host is mixed in.

The device is emulated on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import horizon_lm as hz
import zoo
from emulated_cuda import EmulatedCuda, watch_ops
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.config import TrainConfig
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.preference.method import Method

pytestmark = pytest.mark.usefixtures("one_thread")

_PROMPT, _LENGTHS = 2, (7, 9, 6, 8)  # of the documents, all chosen first


def _documents(packed: bool) -> MicroBatch:
    """Two pairs: each document in a row, or all in one."""
    width = sum(_LENGTHS) if packed else max(_LENGTHS)
    ids = torch.zeros(1 if packed else len(_LENGTHS), width, dtype=torch.long)
    labels, positions, mask = torch.full_like(ids, -100), torch.zeros_like(ids), torch.zeros_like(ids)
    documents = []
    for number, length in enumerate(_LENGTHS):
        row, start = (0, sum(_LENGTHS[:number])) if packed else (number, 0)
        place = slice(start, start + length)
        ids[row, place] = torch.arange(3, 3 + length) + number
        labels[row, place] = torch.where(torch.arange(length) < _PROMPT, -100, ids[row, place])
        positions[row, place], mask[row, place] = torch.arange(length), 1
        documents.append((row, start, length))
    more = {"position_ids": positions} if packed else {"attention_mask": mask}
    return {"input_ids": ids, "labels": labels, "documents": torch.tensor(documents), **more}


def _pairs(packed: bool) -> MicroBatch:
    return {**_documents(packed), "samples": torch.arange(len(_LENGTHS) // 2)}


def _labelled() -> MicroBatch:
    found = {**_documents(False), "samples": torch.arange(len(_LENGTHS))}
    found |= {f"KL_{name}": value for name, value in _documents(False).items()}
    return {**found, "label": torch.tensor([True, False, True, False])}


CASES: list[tuple[dict[str, Any], bool]] = [
    ({"method": "dpo", "rpo_alpha": 0.5, "ld_alpha": 0.5, "f_divergence_type": "js_divergence"}, True),
    ({"method": "dpo", "loss_type": ["aot", "bco_pair"], "use_weighting": True}, False),
    ({"method": "kto"}, False),
    ({"method": "orpo"}, True),
    ({"method": "cpo", "loss_type": "simpo"}, False),
]


@pytest.mark.parametrize(("settings", "packed"), CASES, ids=[str(one["method"]) for one, _ in CASES])
def test_nothing_waits_and_nothing_is_mixed(
    settings: dict[str, Any], packed: bool, emulated_cuda: EmulatedCuda
) -> None:
    config = TrainConfig.from_dict({"model_name_or_path": "m", "datasets": "d.jsonl", **settings})
    batch = _labelled() if config.method == "kto" else _pairs(packed)
    reference = -torch.rand(len(batch["samples"]), 2)
    found = []
    for device in ("cpu", "cuda"):
        model = hz.HostModel.from_pretrained(zoo.build("llama"), device, "float32", loss_chunk_tokens=16)
        if device == "cuda":
            watch_ops(model.engine, emulated_cuda)
            emulated_cuda.waits.clear()
        batches, loss = Method(config).step(model, [batch, batch], reference)
        out = model.forward_backward(batches, loss)
        found.append((out.loss, out.metrics, dict(model.named_gradients())))
    assert not emulated_cuda.on_compute_lane() and not emulated_cuda.mixed
    (loss, metrics, gradients), (there, others, moved) = found
    assert (loss, metrics) == (there, others)
    assert all(torch.equal(value, moved[name]) for name, value in gradients.items())


def test_what_is_mixed_is_found(emulated_cuda: EmulatedCuda) -> None:
    there = torch.ones(3, device="cuda")
    _ = there + torch.ones(3).sum(), there[torch.tensor([0])], torch.ones(3).to("cuda") + there
    assert not emulated_cuda.mixed
    _ = there + torch.ones(3)
    assert emulated_cuda.mixed == ["aten::add"]
