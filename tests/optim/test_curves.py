"""Learning rates are those of transformers, and steps are counted as it counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from horizon_lm import cli
from horizon_lm.config import SCHEDULER_KWARGS
from horizon_lm.errors import ConfigError
from horizon_lm.optim.curves import count_warmup_steps, learning_rates
from tiny_runs import settings
from tiny_runs import text as text

pytestmark = pytest.mark.usefixtures("one_thread")

CURVES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.75}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 30}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.2, "warmup_lr_rate": 0.05, "num_cycles": 0.4}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 30, "num_stable_steps": 40, "warmup_type": "cosine"}),
    ("warmup_stable_decay", {"num_decay_steps": 30, "decay_type": "linear", "warmup_type": "1-sqrt"}),
    ("warmup_stable_decay", {"num_decay_steps": 30, "decay_type": "cosine", "num_cycles": 1.5}),
]


def test_every_curve_and_each_of_its_arguments_is_compared_below() -> None:
    tried = {name: set().union(*(k for n, k in CURVES if n == name)) for name in dict(CURVES)}
    assert tried == {name: set(arguments) for name, arguments in SCHEDULER_KWARGS.items()}


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("polynomial", {"lr_end": 1.0}, "must be smaller than initial lr"),
        ("polynomial", {"lr_end": -1e-3}, "lr_end is -0.001, expected a number >= 0"),
        ("inverse_sqrt", {"timescale": -3}, "is refused"),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 30, "num_stable_steps": 10, "min_lr_ratio": -0.5},
            "min_lr_ratio is -0.5, expected a number >= 0",
        ),
        ("warmup_stable_decay", {"num_decay_steps": 30, "decay_type": "sudden"}, "Unknown decay type"),
    ],
)
def test_rates_that_are_negative_or_no_numbers_anywhere_are_refused(
    name: str, kwargs: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        learning_rates(
            settings(Path("text.txt"), Path("run"), lr_scheduler_type=name, lr_scheduler_kwargs=kwargs), 100
        )


@pytest.mark.parametrize(("name", "kwargs"), CURVES)
@pytest.mark.parametrize("warmup", [0, 7, 0.055])
def test_learning_rates_are_those_of_transformers(
    name: str, kwargs: dict[str, Any], warmup: int | float
) -> None:
    config = settings(
        Path("text.txt"),
        Path("run"),
        lr_scheduler_type=name,
        lr_scheduler_kwargs=kwargs,
        warmup_steps=warmup,
        learning_rate=3e-3,
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=3e-3)
    steps = {0: 0, 7: 7, 0.055: 6}[warmup]
    scheduler = get_scheduler(name, optimizer, steps, 100, scheduler_specific_kwargs=kwargs)
    expected = []
    for _ in range(100):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    curve = learning_rates(config, 100)
    assert [curve(step) for step in range(100)] == expected
    assert curve(40) == expected[40]  # in any order


def test_counts_of_steps() -> None:
    assert count_warmup_steps(0.03, 100) == 3 and count_warmup_steps(0.03, 101) == 4
    assert count_warmup_steps(12, 100) == 12 and count_warmup_steps(0.0, 100) == 0
    for warmup in (0.99, 1.0 - 1e-9, 100, 5000):  # the peak is always reached
        assert count_warmup_steps(warmup, 100) == 99 and count_warmup_steps(warmup, 1) == 0
    assert count_warmup_steps(0.03, 1) == 0 and count_warmup_steps(0.03, 2) == 1
    assert count_warmup_steps(0.03, 1, as_before=True) == 1 and count_warmup_steps(9, 5, as_before=True) == 9


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.03, 0.5, 3, 100])
@pytest.mark.parametrize(("name", "kwargs"), CURVES)
def test_the_peak_is_reached_whatever_the_warmup(
    name: str, kwargs: dict[str, Any], warmup: int | float, steps: int
) -> None:
    if name == "warmup_stable_decay":
        kwargs = {"num_decay_steps": 1}
    changes = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "warmup_steps": warmup}
    config = settings(Path("text.txt"), Path("run"), learning_rate=3e-3, **changes)
    curve = learning_rates(config, steps)
    top = max(curve(step) for step in range(steps))
    if name == "cosine_warmup_with_min_lr":  # it falls from the first step after the warmup on
        assert steps < 7 or top > 2.5e-3
    elif name != "warmup_stable_decay" or count_warmup_steps(warmup, steps) < steps - 1 or steps == 1:
        assert top == pytest.approx(3e-3)
    assert top > 0


def test_a_run_that_would_train_nothing_is_refused_before_it_writes(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes, said in (
        ({"learning_rate": 0.0}, "learning_rate=0 would train nothing"),
        ({"lr_factors": {".": 0.0}}, "the learning rate of every parameter 0"),
    ):
        config = settings(text, tmp_path / "run", max_steps=2, **changes)
        (tmp_path / "run.yaml").write_text(config.to_yaml())
        assert cli.main(["train", str(tmp_path / "run.yaml")]) == 2
        shown = capsys.readouterr().err
        assert said in shown and "hint:" in shown and not (tmp_path / "run").exists()
    config = settings(text, tmp_path / "run", max_steps=1, learning_rate=1e-3)  # the control: one step trains
    assert learning_rates(config, 1)(0) == 1e-3
    assert learning_rates(config, 1, as_before=True)(0) == 0  # as it was: the warmup was all of the run
