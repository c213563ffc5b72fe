"""Trainers on the streamed engine train as TRL's do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer_pairs import Trained, assert_equal, build

pytestmark = pytest.mark.usefixtures("one_thread")

EVALUATED = {"eval_strategy": "steps", "eval_steps": 5}
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("plain", "llama", {"gradient_accumulation_steps": 4, **EVALUATED}),
    ("sft", "llama", {"weight_decay": 0.1, **EVALUATED}),
    ("sft", "qwen3", {"gradient_accumulation_steps": 4, "loss_type": "dft"}),
    ("sft", "gemma", {"packing": True, "max_length": 16}),
    ("sft", "mixtral", {"gradient_accumulation_steps": 4}),
    ("dpo", "llama", {"gradient_accumulation_steps": 4, **EVALUATED}),
    ("dpo", "qwen3", {"beta": 0.5, "loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]}),
    ("dpo", "gemma", {"use_weighting": True, "ld_alpha": 0.5, "max_length": 9}),
    ("dpo", "mixtral", {"gradient_accumulation_steps": 4, "router_aux_loss_coef": 0.01}),
    ("kto", "llama", {"gradient_accumulation_steps": 4, **EVALUATED}),
    ("kto", "qwen3", {"loss_type": "apo_zero_unpaired"}),
]


@pytest.mark.parametrize(
    ("method", "kind", "changes"), RUNS, ids=[f"{method}-{kind}" for method, kind, _ in RUNS]
)
def test_ten_steps(method: str, kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    ours = Trained.by(build(method, kind, tmp_path, ours=True, **changes))
    theirs = Trained.by(build(method, kind, tmp_path, ours=False, **changes))
    assert_equal(ours, theirs)


def test_another_beta_is_seen(tmp_path: Path) -> None:
    ours = Trained.by(build("dpo", "llama", tmp_path, ours=True, beta=0.11))
    theirs = Trained.by(build("dpo", "llama", tmp_path, ours=False, beta=0.1))
    with pytest.raises(AssertionError):
        assert_equal(ours, theirs)
    theirs.log = ours.log  # by the parameters alone
    with pytest.raises(AssertionError):
        assert_equal(ours, theirs)
