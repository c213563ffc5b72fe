"""Steps of changing size have the same bits in every mode; smaller steps are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from adversarial import from_pretrained

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

SHAPES = [[3, 3, 3], [3, 2], [1], [3, 3, 3], [2, 3, 1]]  # rows of the micro-batches of each step


def micro_batches(step: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    found = []
    for rows in SHAPES[step]:
        ids = torch.randint(0, 96, (rows, 12), generator=generator)
        labels = ids.clone()
        labels[:, : 2 + rows] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def weights_after(**options: Any) -> dict[str, torch.Tensor]:
    model = from_pretrained(zoo.build("llama"), device="cpu", dtype="float32", **options)
    for step in range(len(SHAPES)):
        model.train_step(micro_batches(step), lr=1e-3)
    return dict(model.named_parameters())


WAYS: list[dict[str, Any]] = [
    {"update": "deferred"},
    {"update": "eager", "grad_slabs": 1},
    {"activations": "keep"},
    {"activations": "recompute", "boundaries": "host", "lanes": "adversarial"},
    {"boundaries": "host", "boundary_slots": 1, "slots": 3, "lanes": "adversarial", "update": "deferred"},
    {"checkpoint_interval": 2, "activations": "recompute", "lanes": "adversarial"},
    {"activations": "keep", "lanes": "adversarial", "update": "eager"},
]


def test_steps_of_changing_size_have_the_same_bits_in_every_mode() -> None:
    free = {"max_grad_norm": None}  # eager updates do not clip
    expected = weights_after(update="sync", activations="recompute", **free)
    for way in WAYS:
        found = weights_after(**{**free, **way})
        assert all(torch.equal(found[name], value) for name, value in expected.items()), way


@pytest.mark.parametrize("options", [{}, WAYS[3], WAYS[5]], ids=["plain", "adversarial", "blocks"])
def test_a_smaller_step_has_the_gradients_of_pytorch(options: dict[str, Any]) -> None:
    """After a full step, whose buffers it takes over: fewer micro-batches, the last with fewer rows."""
    reference = zoo.build("llama").float()
    model = from_pretrained(zoo.build("llama"), device="cpu", dtype="float32", **options)
    for step in (0, 1, 4):
        model.forward_backward(micro_batches(step))
        reference.zero_grad()
        batches = micro_batches(step)
        whole = {name: torch.cat([b[name] for b in batches]) for name in ("input_ids", "labels")}
        reference(**whole).loss.backward()
        for name, gradient in model.named_gradients():
            expected = reference.get_parameter(name).grad
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)  # sums in another order
    wrong = dict(model.named_gradients())["model.layers.0.mlp.up_proj.weight"] * 1.01  # the control
    assert not torch.allclose(
        wrong, reference.get_parameter("model.layers.0.mlp.up_proj.weight").grad, rtol=1e-4, atol=1e-6
    )
