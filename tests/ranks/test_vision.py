"""Steps with pictures on two ranks have the bits of one; each rank holds half of the vision unit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import vision_zoo as vision
from horizon_lm.config.python import model_settings
from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.host_model import HostModel
from threaded_ranks import on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(
    model: Any, name: str, ranks: Ranks, **settings: Any
) -> tuple[list[float], dict[str, torch.Tensor], int]:
    values = {"skip_memory_check": True, "reduction": "exact", **settings}
    host = HostModel(copy.deepcopy(model), model_settings("a test", "cpu", "float32", values), ranks=ranks)
    assert host.skeleton.vision is not None
    held = host.store.run("weights", host.skeleton.vision).numel()
    batches = [
        vision.batch(name, [[0, 1], []], seed=0) | vision.pixels(name, [0, 1]),
        vision.batch(name, [[], []], seed=1),
        vision.batch(name, [[2]], seed=2) | vision.pixels(name, [2]),
    ]
    found = [host.train_step(batches, lr=1e-2).loss for _ in range(2)]
    found.append(host.evaluate(batches).loss)
    return found, dict(host.named_parameters()), held


@pytest.mark.parametrize(("name", "settings"), [("qwen3_vl", {}), ("mistral3", {"train_projector": True})])
def test_two_ranks_have_the_bits_of_one(name: str, settings: dict[str, Any]) -> None:
    model = vision.build(name)  # once: threads share torch's random numbers
    losses, parameters, whole = trained(model, name, ALONE, **settings)
    for found, values, held in on_ranks(2, lambda ranks: trained(model, name, ranks, **settings)):
        assert found == losses
        assert values.keys() == parameters.keys()
        assert all(torch.equal(value, parameters[key]) for key, value in values.items())
        assert whole / 2 <= held <= whole / 2 + 4096
