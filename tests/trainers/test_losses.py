"""Gradients of all losses that TRL's DPO trainer has, and of others of its settings, beside TRL's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer_pairs import build

pytestmark = pytest.mark.usefixtures("one_thread")

LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Our trainer and TRL's, after a step: before it, all margins are 0."""
    found = []
    for ours in (True, False):
        changes = {"gradient_accumulation_steps": 2, "max_steps": 2, "precompute_ref_log_probs": True}
        found.append(build("dpo", "llama", tmp_path_factory.mktemp("run"), ours=ours, **changes))
        found[-1].train()
    return found[0], found[1]


def gradients(trainer: Any, **settings: Any) -> dict[str, torch.Tensor]:
    """Of a step of three micro-batches, the last one short."""
    trainer.label_smoothing = 0.1
    defaults = {"loss_types": ["sigmoid"], "beta": 0.1, "f_divergence_type": "reverse_kl"}
    for name, value in {**defaults, **settings}.items():
        setattr(trainer, name, value)
    batches = list(trainer.get_eval_dataloader())
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    for batch in batches:
        trainer.accelerator.gradient_state._set_sync_gradients(batch is batches[-1])
        trainer.training_step(trainer.model, batch)
    if hasattr(trainer, "host"):
        return {name: value.clone() for name, value in trainer.host.named_gradients()}
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def largest_error(mine: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative to the largest entry of each gradient."""
    return max(float((mine[name] - value).abs().max() / value.abs().max()) for name, value in wanted.items())


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_a_loss(pair: tuple[Any, Any], loss: str) -> None:
    mine, wanted = (gradients(trainer, loss_types=[loss]) for trainer in pair)
    assert largest_error(mine, wanted) <= 3e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_a_divergence(pair: tuple[Any, Any], divergence: str) -> None:
    mine, wanted = (gradients(trainer, f_divergence_type=divergence, beta=0.7) for trainer in pair)
    assert largest_error(mine, wanted) <= 3e-5


def test_the_losses_differ(pair: tuple[Any, Any]) -> None:
    """The control: with another beta, or another loss, gradients are seen to differ."""
    ours, theirs = pair
    wanted = gradients(theirs)
    assert largest_error(gradients(ours, beta=0.11), wanted) > 1e-3
    for loss in LOSSES[1:]:
        assert largest_error(gradients(ours, loss_types=[loss]), wanted) > 1e-3, loss
