"""Sweeps against an authority: learning rates, optimizers, and packed documents over the zoo."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

import horizon_lm as hz
import zoo
from horizon_lm.data.collate import collate
from horizon_lm.errors import ConfigError, UnsupportedModelError
from horizon_lm.optim.curves import learning_rates
from horizon_lm.training.checks import check_separation
from optimizer_runs import Lion
from packed_rows import documents_for, gradients, rows_of
from sizes import SOAK

# ---- learning rates -------------------------------------------------------------------------

CURVES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-6}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 7}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.25}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.05}),
    ("warmup_stable_decay", {"num_decay_steps": 2}),
    ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "1-sqrt", "min_lr_ratio": 0.1}),
]
WARMUPS: list[float] = [0, 1, 2, 4, 0.03, 0.1, 0.2, 0.5]
LENGTHS = [6, 17, 40, 101, 230]


def curve_config(name: str, arguments: dict[str, Any], warmup: float) -> hz.TrainConfig:
    return hz.TrainConfig.from_dict(
        {
            "model_name_or_path": "m",
            "datasets": "d.jsonl",
            "learning_rate": 3e-4,
            "lr_scheduler_type": name,
            "lr_scheduler_kwargs": arguments,
            "warmup_steps": warmup,
        }
    )


def scheduled(name: str, arguments: dict[str, Any], warmup: float, steps: int) -> list[float]:
    """What transformers' scheduler, stepped beside an optimizer, leaves in it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    warmup_steps = TrainingArguments(warmup_steps=warmup).get_warmup_steps(steps)
    scheduler = get_scheduler(name, optimizer, warmup_steps, steps, arguments)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_every_learning_rate_is_that_of_transformers() -> None:
    """To the bit, at each step of each run."""
    cases = list(itertools.product(CURVES, WARMUPS, LENGTHS))
    assert len(cases) >= 520
    for (name, arguments), warmup, steps in cases:
        curve = learning_rates(curve_config(name, arguments, warmup), steps)
        found = [curve(step) for step in range(steps)]
        assert found == scheduled(name, arguments, warmup, steps), (name, arguments, warmup, steps)


def test_another_warmup_has_other_rates() -> None:
    curve = learning_rates(curve_config("cosine", {}, 4), 40)
    assert [curve(step) for step in range(40)] != scheduled("cosine", {}, 5, 40)


# ---- optimizers -----------------------------------------------------------------------------

Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[dict[str, Any], float, Make]] = {}  # settings, weight decay, the authority
for decay, (b1, b2), eps in itertools.product((0.0, 0.1), ((0.9, 0.999), (0.8, 0.95)), (1e-8, 1e-4)):
    betas = {"adam_beta1": b1, "adam_beta2": b2, "adam_epsilon": eps}
    for rule, kind in (("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)):
        OPTIMIZERS[f"{rule} {decay} {b1} {eps}"] = (
            {"optim": rule, **betas},
            decay,
            lambda p, kind=kind, b=(b1, b2), e=eps, w=decay: kind(p, 1e-2, b, e, w),
        )
for decay, momentum in itertools.product((0.0, 0.1), (0.0, 0.9)):
    OPTIMIZERS[f"sgd {decay} {momentum}"] = (
        {"optim": "sgd", "sgd_momentum": momentum},
        decay,
        lambda p, w=decay, m=momentum: torch.optim.SGD(p, 1e-2, momentum=m, weight_decay=w),
    )
for decay, (b1, b2) in itertools.product((0.0, 0.1), ((0.9, 0.99), (0.95, 0.98))):
    OPTIMIZERS[f"lion {decay} {b1}"] = (
        {"optim": "lion", "adam_beta1": b1, "adam_beta2": b2},
        decay,
        lambda p, b=(b1, b2), w=decay: Lion(p, 1e-2, b, w),
    )


def follow(settings: dict[str, Any], decay: float, make: Make, lr: float = 1e-2) -> float:
    """The largest difference from the authority, relative to the largest weight, after 4 steps.

    The gradients are ours, clipped by torch: what the update makes of them is compared.
    """
    model = hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", dtype="float32", **settings)
    theirs = {name: value.requires_grad_() for name, value in model.named_parameters()}
    decays = {name: decay if value.ndim > 1 else 0.0 for name, value in theirs.items()}
    optimizer = make([{"params": [p], "weight_decay": decays[name]} for name, p in theirs.items()])
    for number in range(4):
        model.forward_backward([zoo.batch("llama", batch_size=2, length=9, seed=number)])
        for name, gradient in model.named_gradients():
            theirs[name].grad = gradient.float().clone()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.step()
        model.step(lr=lr, max_grad_norm=1.0, weight_decay=decay)
    far = [
        float((theirs[name].detach() - value).abs().max() / value.abs().max())
        for name, value in model.named_parameters()
    ]
    return max(far)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_that_of_torch(name: str) -> None:
    """Within 2e-6 of the largest weight in fp32: other orders of rounding, and the norm's."""
    settings, decay, make = OPTIMIZERS[name]
    assert follow(settings, decay, make) < 2e-6


def test_another_learning_rate_is_another_optimizer() -> None:
    settings, decay, make = OPTIMIZERS["adamw 0.1 0.9 1e-08"]
    assert len(OPTIMIZERS) >= 24
    assert follow(settings, decay, make, lr=1.1e-2) > 1e-4


# ---- packing --------------------------------------------------------------------------------

# Without those whose loss also balances their routers over a batch: of another batch it is another loss.
TYPES = sorted(name for name, case in zoo.CASES.items() if "aux" not in case.tags)


@pytest.mark.parametrize("name", TYPES if SOAK else ["llama", "qwen3", "bamba", "gemma2", "opt", "phimoe"])
def test_packed_is_one_by_one_or_refused(name: str) -> None:
    """fp32: where packing is not refused, its gradients are those of the documents one by one."""
    documents = documents_for(zoo.VOCAB)
    try:
        model = hz.HostModel.from_pretrained(zoo.build(name), device="cpu", dtype="float32")
    except UnsupportedModelError:
        return
    # A sparse attention chooses among more tokens than it takes by scores that are often equal here: relu
    # makes them 0, and which of those it takes hangs on the length of the sequence.
    most = getattr(model.config, "index_topk", None) or 20
    documents = [document for document in documents if len(document[0]) <= most]
    rows, alone = rows_of(documents, "bfd", 20), rows_of(documents, "none", 20)
    try:
        check_separation(model, rows)
    except ConfigError:
        return
    loss, count, grads = gradients(model, [collate([rows.row(r) for r in range(len(rows))], "bfd", 0)[0]])
    single = [collate([alone.row(r)], "none", 0)[0] for r in range(len(alone))]
    expected_loss, expected_count, expected = gradients(model, single)
    assert count == expected_count and loss == pytest.approx(expected_loss, abs=1e-5)
    for key, value in expected.items():
        torch.testing.assert_close(grads[key], value, rtol=1e-4, atol=1e-5)
