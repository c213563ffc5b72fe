"""TRL's own loss methods, called unbound on token values, as authorities."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from horizon_lm.config import TrainConfig

_ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
)


def _stub(config: TrainConfig, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=_ACCELERATOR,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **more,
    )


def _means(stub: SimpleNamespace) -> dict[str, float]:
    return {name: found[-1] for name, found in stub._metrics["train"].items()}


def dpo(config: TrainConfig, values: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Return TRL's DPO loss of one padded batch, chosen first, and what it logs."""
    stub = _stub(
        config,
        ld_alpha=config.ld_alpha,
        f_divergence_type=config.f_divergence_type,
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
        loss_types=[name for name, _ in config.losses],
        loss_weights=[weight for _, weight in config.losses],
        use_weighting=config.use_weighting,
        args=SimpleNamespace(discopop_tau=config.discopop_tau),
    )
    loss = DPOTrainer._compute_loss(stub, lambda **_: values, inputs, False)
    return loss, _means(stub)


def kto(
    config: TrainConfig, values: Any, inputs: dict[str, torch.Tensor], kl: torch.Tensor
) -> tuple[torch.Tensor, dict]:
    """Return TRL's KTO loss of one batch and what it logs. kl: log-probabilities of the KL documents."""
    stub = _stub(
        config,
        calculate_KL=config.uses_kl,
        loss_type=config.losses[0][0],
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        _compute_kl_logps=lambda model, batch: kl,
    )
    loss = KTOTrainer._compute_loss(stub, lambda **_: values, inputs, False)
    return loss, _means(stub)


def without_reference(
    config: TrainConfig, chosen: torch.Tensor, rejected: torch.Tensor, nll: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return TRL's ORPO, CPO or SimPO loss of sums or means per document, and rewards."""
    stub = _stub(config, alpha=0.0, loss_type=config.losses[0][0], simpo_gamma=config.simpo_gamma)
    if config.method == "orpo":
        found, good, bad, ratio, odds = ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)
        logged = {"log_odds_ratio": float(ratio), "log_odds_chosen": float(odds)}
        loss = nll - found.mean()
    else:
        found, good, bad = CPOTrainer.cpo_loss(stub, chosen, rejected)
        loss, logged = found.mean() + config.nll_weight * nll, {}
    return loss, {
        **logged,
        "rewards/chosen": float(good.mean()),
        "rewards/rejected": float(bad.mean()),
        "rewards/accuracies": float((good > bad).float().mean()),
        "rewards/margins": float((good - bad).mean()),
        "nll_loss": float(nll),
    }
