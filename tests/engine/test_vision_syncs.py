"""Steps with pictures on an emulated CUDA device: the gradients of the CPU, and what waits for the device."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import horizon_lm as hz
import vision_zoo as vision
from emulated_cuda import EmulatedCuda, watch_ops
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from plain_gradients import stream

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [[0], [1, 2]]
# Models whose forward writes where a mask is set: ids of placeholders beyond the vocabulary, positions.
WHERE_A_MASK_IS_SET = ("gemma3", "qwen2_5_vl", "qwen3_vl")
PUT = "aten::index_put_: by booleans"
ADDING = {
    "aten::equal: a value is read",
    "aten::index: by booleans",
    "aten::nonzero: a size depends on values",
}


Known = tuple[dict[str, Any], float, dict[str, torch.Tensor]]
CASES = [(name, projector) for name in vision.FAMILIES for projector in (False, True)]
CASES.remove(("qwen3_vl", True))  # it has several projectors


@cache
def on_cpu(name: str, train_projector: bool) -> Known:
    """(micro-batch with features, its loss, its gradients)."""
    host = stream(vision.build(name), train_projector=train_projector)
    pixels = vision.pixels(name, [0, 1, 2])
    batch = vision.batch(name, ROWS, padded=True) | {"image_features": host.encode_images(pixels)}
    batch |= {key: value for key, value in pixels.items() if key != "pixel_values"}
    loss = host.forward_backward([batch]).loss
    return batch, loss, {n: g.clone() for n, g in host.named_gradients()}


def on_device(name: str, cuda: EmulatedCuda, train_projector: bool) -> hz.HostModel:
    model = hz.HostModel.from_pretrained(
        vision.build(name),
        device="cuda",
        dtype="float32",
        skip_memory_check=True,
        train_projector=train_projector,
    )
    watch_ops(model.engine, cuda)
    return model


@pytest.fixture
def known(name: str, train_projector: bool) -> Known:
    """Requested before the emulated device."""
    return on_cpu(name, train_projector)


@pytest.mark.parametrize(("name", "train_projector"), CASES)
def test_steps_with_pictures(
    name: str, train_projector: bool, known: Known, emulated_cuda: EmulatedCuda
) -> None:
    """Nothing waits but what the models' own code does in the prologue, and for Qwen3-VL the comparison by
    which what happens between layers is known to be an addition."""
    batch, loss, gradients = known
    model = on_device(name, emulated_cuda, train_projector)
    emulated_cuda.waits.clear()
    assert model.forward_backward([batch]).loss == loss
    waits = emulated_cuda.on_compute_lane()
    for key, found in model.named_gradients():
        assert torch.equal(found, gradients[key]), key
    assert not emulated_cuda.mixed
    found_by = {reason for reason in waits if reason != PUT}
    assert found_by == (ADDING if name == "qwen3_vl" else set()), waits
    assert (PUT in waits) == (name in WHERE_A_MASK_IS_SET), waits


@pytest.mark.parametrize(("name", "train_projector"), [("qwen3_vl", False)])
def test_images_are_encoded_on_the_device(
    name: str, train_projector: bool, known: Known, emulated_cuda: EmulatedCuda
) -> None:
    model = on_device(name, emulated_cuda, train_projector)
    for one, other in zip(
        model.encode_images(vision.pixels(name, [0, 1, 2])), known[0]["image_features"], strict=True
    ):
        assert one.keys() == other.keys()
        assert all(not emulated_cuda.is_on_device(value) for value in one.values())
        assert all(torch.equal(one[key], other[key]) for key in one)
