"""Optimizer settings and learning rates out of range are refused by name, before the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from bad_calls import batch, digest, host
from data_helpers import config
from horizon_lm.errors import ConfigError
from horizon_lm.optim.curves import learning_rates
from horizon_lm.optim.optimizer import Optimizer, UpdateSettings

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("adam_beta1", v) for v in (1, 1.0, -0.1, math.nan, "0.9", True)),
        *(("adam_beta2", v) for v in (1.0, 2, -1e-9)),
        *(("adam_epsilon", v) for v in (0, -1e-8, math.inf, "1e-8", 1e-40, 1e39)),
        *(("sgd_momentum", v) for v in (1, -0.5, "0.9")),
        *(("max_grad_norm", v) for v in (-1, math.nan, "1.0", True)),
        *(("lr_factors", v) for v in ({"mlp": -1}, {"mlp": math.nan}, {"mlp": "2"}, {"mlp": True}, [2], 0.5)),
        *(("seed", v) for v in (-1, 1.5, "1")),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        host("sync" if key != "max_grad_norm" else "deferred", **{key: value})


def test_a_factor_that_overflows_is_found_before_the_step() -> None:
    model = host(lr_factors={"mlp": 1e300})
    before = digest(model)
    with pytest.raises(ConfigError) as caught:
        model.train_step(batch(), lr=1e20)
    assert "lr_factors=1e+300" in caught.value.message and caught.value.message.endswith("cannot use lr=inf")
    assert caught.value.hint and digest(model) == before
    model.train_step(batch(), lr=0.0)


def test_what_the_check_lets_through_the_kernel_computes_with() -> None:
    """The largest learning rate that passes leaves finite weights; ten times as much does not pass."""
    largest = float(torch.finfo(torch.float32).max) * (1 - 0.9) * 0.99
    optimizer = Optimizer(segments=())
    optimizer.check(UpdateSettings(1, largest, None, 0.0))
    with pytest.raises(ConfigError, match="step_size overflows float32"):
        optimizer.check(UpdateSettings(1, 10 * largest, None, 0.0))


# ---- curves ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"), [(-1e-3, "-"), (math.nan, "nan"), (math.inf, "inf"), (1e45, "e")]
)
@pytest.mark.parametrize("at", [0, 50, 99])
def test_a_curve_with_a_bad_rate_anywhere_is_refused(
    at: int, value: float, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle, between a first and a last rate that are good."""

    def scheduler(name: str, optimizer: Any, **rest: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: value if step == at else 0.5)

    settings = config(learning_rate=1e-3)
    monkeypatch.setattr("transformers.get_scheduler", scheduler)
    with pytest.raises(ConfigError, match=f"the learning rate of step {at + 1} is .*{shown}") as caught:
        learning_rates(settings, 100)
    assert caught.value.hint
    assert learning_rates(settings, at)(0) == 5e-4 if at else True  # a run that ends before


@pytest.mark.parametrize(
    ("curve", "arguments"),
    [
        ("cosine_with_min_lr", {"min_lr": -1e-5}),
        ("cosine_with_min_lr", {"min_lr_rate": -0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 10, "min_lr_ratio": -0.1}),
    ],
)
def test_a_lowest_rate_below_zero_is_refused(curve: str, arguments: dict[str, float]) -> None:
    """transformers cuts it off at 0 without a word."""
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs\.min_lr.* expected a number >= 0"):
        config(lr_scheduler_type=curve, lr_scheduler_kwargs=arguments)
    positive = {key: abs(value) for key, value in arguments.items()}
    assert learning_rates(config(lr_scheduler_type=curve, lr_scheduler_kwargs=positive), 100)(99) > 0
