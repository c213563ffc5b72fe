"""A run goes on from checkpoints made under other placements and rounds: the same bits in all files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adversarial import lanes_of
from horizon_lm.errors import StoppedError
from horizon_lm.training.train import train
from small_runs import GPT2_DROPOUT, LLAMA, losses_of, place_of, settings, tensors_of
from stopped_runs import stop_at
from stopped_runs import text as text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

# Each goes on from the one before it.
LEGS: list[dict[str, Any]] = [
    {"resident": 2, "rounds": 4, "round_sums": "host", "boundaries": "host"},
    {"resident": ["layer 1"], "rounds": 2, "round_sums": "device", "lanes": "adversarial"},
    {"rounds": 4, "round_sums": "add", "activations": ["attention", "products"], "update": "sync"},
    {"resident": 4, "activations": "keep", "lanes": "adversarial"},
]
STEPS = 2 * len(LEGS)
MODELS = {
    "untied": {"init_model": {**LLAMA, "tie_word_embeddings": False}},
    "learned positions, dropout": {"init_model": GPT2_DROPOUT},
}


def model_files(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((run / "model").iterdir()) if p.name != "README.md"}


def started(text: Path, run: Path, **changes: Any) -> None:
    values = {
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "save_steps": 2,
    } | changes
    with lanes_of(values):
        train(settings(text, run, **values))


CASES = [("untied", "float32"), ("learned positions, dropout", "bfloat16")]


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_each_leg_of_a_run_under_another_placement(
    model: str, dtype: str, text: Path, tmp_path: Path
) -> None:
    given = {**MODELS[model], "dtype": dtype, "moment_dtype": dtype}
    straight = tmp_path / "straight"
    started(text, straight, **given)
    source = None
    for leg, placement in enumerate(LEGS):
        run = tmp_path / f"leg {leg}"
        started(text, run, **given, **placement, resume_from_checkpoint=source)
        for step in range(2 * leg + 2, STEPS + 1, 2):
            found, expected = run / f"checkpoint-{step}", straight / f"checkpoint-{step}"
            assert tensors_of(found) == tensors_of(expected), (leg, step)
            assert place_of(found) == place_of(expected), (leg, step)
        assert losses_of(run) == losses_of(straight)[2 * leg :]
        assert model_files(run) == model_files(straight)
        source = str(run / f"checkpoint-{2 * leg + 2}")
    # The control: one step apart.
    last = straight / f"checkpoint-{STEPS}"
    assert tensors_of(last) != tensors_of(straight / f"checkpoint-{STEPS - 2}")


@pytest.mark.parametrize("placement", LEGS[:3], ids=lambda more: " ".join(more))
def test_a_stopped_run_goes_on_without_the_placement(
    placement: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the middle of a step, and a run in place that goes on in the same folder."""
    started(text, tmp_path / "straight", save_steps=STEPS)
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        stop_at(patch, 3)
        started(text, tmp_path / "run", **placement, save_steps=STEPS)
    started(text, tmp_path / "run", save_steps=STEPS, resume_from_checkpoint="auto")
    last = f"checkpoint-{STEPS}"
    assert tensors_of(tmp_path / "run" / last) == tensors_of(tmp_path / "straight" / last)
    assert model_files(tmp_path / "run") == model_files(tmp_path / "straight")
