"""`horizon train` on preferences beside TRL's trainers: loss, metrics and gradients of the first step on the
same rows, from the same two models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import preference_runs
from horizon_lm.host_model import HostModel
from horizon_lm.preference.method import means
from horizon_lm.training import loop
from horizon_lm.training.train import train
from small_tokenizers import byte_level

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")
_ROWS = 6


@dataclass
class _Step:
    """Loss, metrics and gradients of a step."""

    loss: float
    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]


class _Stop(Exception):
    """Ends a run at its first step."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, of which the second is the reference, and data."""
    folder = tmp_path_factory.mktemp("trl")
    tokenizer = byte_level("<|end|>")
    tokenizer.pad_token = "<|end|>"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # else the two hardly differ
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    preference_runs.write_pairs(folder, _ROWS)
    preference_runs.write_labelled(folder, _ROWS)
    return folder


def _ours(place: Path, run: Path, **changes: Any) -> _Step:
    found: list[_Step] = []

    def first_step(run: loop.Run) -> Any:
        model, preferences = run.state.model, run.preferences
        assert preferences is not None
        batches, loss_fn = preferences.step(model, next(run.state.loader))
        out = model.forward_backward(batches, loss_fn)
        metrics = means(preferences.method.counted(out.metrics, batches))
        gradients = {name: value.clone() for name, value in model.named_gradients()}
        found.append(_Step(out.loss, metrics, gradients))
        raise _Stop

    values = {
        "init_model": None,
        "train_tokenizer_vocab_size": None,
        "model_name_or_path": str(place / "model"),
        "per_device_train_batch_size": _ROWS,
        "gradient_accumulation_steps": 1,
        "max_length": 256,
        "packing": False,
    }
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Stop):
        patch.setattr(loop, "_step", first_step)
        data = "labelled" if changes.get("method") == "kto" else "pairs"
        train(preference_runs.settings(place / f"{data}.jsonl", run, **{**values, **changes}))
    return found[0]


def _theirs(place: Path, trainer_class: Any, config_class: Any, data: str, **options: Any) -> _Step:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model, other = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("model", "other"))
    rows = [json.loads(line) for line in (place / f"{data}.jsonl").read_text().splitlines()]
    more = {} if "experimental" in trainer_class.__module__ else {"ref_model": other}
    trainer = trainer_class(
        model=model,
        args=config_class(
            output_dir=str(place / "theirs"),
            per_device_train_batch_size=_ROWS,
            max_length=256,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            **options,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        **more,
    )
    model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    stored = getattr(trainer, "_metrics", None) or trainer._stored_metrics
    metrics = {name: values[-1] for name, values in stored["train"].items()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return _Step(float(loss), metrics, gradients)


def _same(ours: _Step, theirs: _Step, metrics: tuple[str, ...] = ()) -> None:
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    named = metrics or tuple(theirs.metrics.keys() - {"num_tokens"})
    assert {n: ours.metrics[n] for n in named} == pytest.approx(
        {n: theirs.metrics[n] for n in named}, rel=1e-5, abs=1e-6
    )
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert (ours.gradients[name] - gradient).norm() <= 3e-5 * gradient.norm(), name


_AGAINST_REFERENCE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "dpo"}, {}),
    ({"method": "dpo", "packing": True, "beta": 0.3}, {"beta": 0.3}),
    ({"method": "ipo"}, {"loss_type": "ipo"}),
    ({"method": "apo"}, {"loss_type": "apo_zero"}),
    (
        {"method": "dpo", "rpo_alpha": 0.5, "ld_alpha": 0.4},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.4},
    ),
    ({"method": "dpo", "use_weighting": True, "packing": True}, {"use_weighting": True}),
]


@pytest.mark.parametrize(
    ("ours", "theirs"), _AGAINST_REFERENCE, ids=lambda one: "-".join(map(str, one.values())) or "default"
)
def test_steps_on_pairs_are_those_of_trl(
    ours: dict[str, Any], theirs: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    from trl import DPOConfig, DPOTrainer

    found = _ours(place, tmp_path / "run", ref_model_name_or_path=str(place / "other"), **ours)
    wanted = _theirs(place, DPOTrainer, DPOConfig, "pairs", **theirs)
    _same(found, wanted)
    assert abs(wanted.metrics["rewards/margins"]) > 0.01


def test_a_beta_ten_percent_off_is_seen(place: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    found = _ours(place, tmp_path / "run", ref_model_name_or_path=str(place / "other"), beta=0.11)
    with pytest.raises(AssertionError):
        _same(found, _theirs(place, DPOTrainer, DPOConfig, "pairs"))


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_steps_on_labels_are_those_of_trl(loss_type: str, place: Path, tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    weights = {"desirable_weight": 0.8, "undesirable_weight": 1.2, "loss_type": loss_type}
    other = str(place / "other")
    found = _ours(place, tmp_path / "run", method="kto", ref_model_name_or_path=other, **weights)
    wanted = _theirs(place, KTOTrainer, KTOConfig, "labelled", **weights)
    _same(found, wanted)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "orpo", "beta": 0.2}, {"beta": 0.2}),
        ({"method": "cpo"}, {}),
        (
            {"method": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
            {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
        ),
    ],
    ids=["orpo", "cpo", "simpo"],
)
def test_steps_without_a_reference_are_those_of_trl(
    ours: dict[str, Any], theirs: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    classes = (ORPOTrainer, ORPOConfig) if ours["method"] == "orpo" else (CPOTrainer, CPOConfig)
    found, wanted = _ours(place, tmp_path / "run", **ours), _theirs(place, *classes, "pairs", **theirs)
    rewards = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies"))
    _same(found, wanted, (*rewards, "logps/chosen", "logps/rejected"))


def test_only_one_model_is_ever_loaded(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[HostModel] = []
    most = 0
    make, close = HostModel.__init__, HostModel.close

    def made(self: HostModel, *arguments: Any, **others: Any) -> None:
        nonlocal most
        make(self, *arguments, **others)
        alive.append(self)
        most = max(most, len(alive))

    def closed(self: HostModel) -> None:
        close(self)
        alive.remove(self)

    monkeypatch.setattr(HostModel, "__init__", made)
    monkeypatch.setattr(HostModel, "close", closed)
    _ours(place, tmp_path / "run", ref_model_name_or_path=str(place / "other"), beta=0.2)
    assert most == 1 and len(alive) == 1
