"""Preferences with an adapter: its base is the reference, or what the adapter was when the run began."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import preference_runs
from horizon_lm.checkpoint.folder import open_checkpoint
from horizon_lm.checkpoint.reader import read_small
from horizon_lm.preference import reference
from horizon_lm.preference.reference import Reference
from horizon_lm.report.metrics import read_evaluations, read_steps
from horizon_lm.training import loop, preferences
from horizon_lm.training.eval_command import evaluate_target, target_of
from horizon_lm.training.train import train
from sizes import SOAK
from small_runs import losses_of, tensors_of
from small_tokenizers import byte_level

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

ROWS = 12
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SETTINGS = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, an adapter of the first that adds something, and data."""
    folder = tmp_path_factory.mktemp("models")
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
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    preference_runs.write_pairs(folder, ROWS)
    preference_runs.write_labelled(folder, ROWS)
    return folder


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of the samples that the reference computes, as it goes."""
    found: list[int] = []
    honest = reference._evaluate

    def evaluate(*arguments: Any) -> Any:
        numbers = honest(*arguments)
        found.extend(numbers.tolist())
        return numbers

    monkeypatch.setattr(reference, "_evaluate", evaluate)
    yield found


def settings(place: Path, run: Path, **changes: Any) -> Any:
    values = {
        "init_model": None,
        "train_tokenizer_vocab_size": None,
        "model_name_or_path": str(place / "model"),
        "max_length": 256,
        "packing": False,
        **(SETTINGS if "adapter_name_or_path" not in changes else {}),
        **changes,
    }
    rows = place / f"{'labelled' if values.get('method') == 'kto' else 'pairs'}.jsonl"
    return preference_runs.settings(rows, run, **values)


def values_of(place: Path, run: Path, part: str = "train", **changes: Any) -> torch.Tensor:
    """The reference's log-probabilities of a run of one step, computed by it alone."""
    train(settings(place, run, max_steps=1, **{"dataset_cache_dir": None, **changes}))
    saved = open_checkpoint(run / "checkpoint-1")
    return Reference.from_bytes(read_small(saved, preferences.FILE)).values[part]


# Which model is the reference.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"] if SOAK else ["bfloat16"])
def test_a_new_adapter_has_its_base(dtype: str, place: Path, tmp_path: Path) -> None:
    """Bit for bit the values of a run that trains all of it."""
    found, whole = (
        values_of(place, tmp_path / name, adapter=name, dtype=dtype, **more)
        for name, more in (("lora", {}), ("none", {"lora_r": 16, "lora_alpha": 32.0}))
    )
    assert found.equal(whole) and found.isfinite().all()


def test_a_saved_adapter_has_itself(place: Path, tmp_path: Path) -> None:
    """As TRL's trainers take a copy of a PeftModel's adapter: the model as it was before the run."""
    adapter = {"adapter_name_or_path": str(place / "adapter")}
    found = values_of(place, tmp_path / "run", **adapter)
    merged = values_of(place, tmp_path / "merged", model_name_or_path=str(place / "merged"))
    torch.testing.assert_close(found, merged, rtol=1e-5, atol=1e-4)
    line = read_steps(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    base = values_of(place, tmp_path / "base")  # the control
    assert float((found - base).abs().min()) > 1e-2
    named = values_of(place, tmp_path / "named", **adapter, ref_model_name_or_path=str(place / "model"))
    assert named.equal(base)


def test_another_model_by_name(place: Path, tmp_path: Path) -> None:
    named = {"ref_model_name_or_path": str(place / "other")}
    found = values_of(place, tmp_path / "run", **named)
    other = values_of(place, tmp_path / "other", model_name_or_path=str(place / "other"))
    assert found.equal(other)
    assert not found.equal(values_of(place, tmp_path / "base"))


# Beside TRL.


class Stop(Exception):
    """Ends a run at its first step."""


def ours(place: Path, run: Path, **changes: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step."""
    found: list[Any] = []

    def first_step(run: loop.Run) -> Any:
        model, method = run.state.model, run.preferences
        assert method is not None
        out = model.forward_backward(*method.step(model, next(run.state.loader)))
        found.append((out.loss, {name: value.clone() for name, value in model.named_gradients()}))
        raise Stop

    step = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop, "_step", first_step)
        train(settings(place, run, **step, **changes))
    loss, gradients = found[0]
    return loss, gradients


def theirs(place: Path, run: Path, kind: Any, config: Any, **given: Any) -> tuple[float, dict[str, Any]]:
    rows = place / f"{'labelled' if kind is KTOTrainer else 'pairs'}.jsonl"
    trainer = kind(
        args=config(
            output_dir=str(run),
            per_device_train_batch_size=ROWS,
            max_length=256,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=datasets.Dataset.from_list(
            [json.loads(line) for line in rows.read_text().splitlines()]
        ),
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
        **given,
    )
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    named = trainer.model.named_parameters()
    return float(loss), {n.removeprefix("base_model.model."): p.grad for n, p in named if p.requires_grad}


@pytest.mark.parametrize(
    ("method", "is_new"),
    [("dpo", True), ("kto", False), *([("dpo", False), ("kto", True)] if SOAK else [])],
)
def test_the_first_step_is_that_of_trl(method: str, is_new: bool, place: Path, tmp_path: Path) -> None:
    kind, config = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}[method]
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    if is_new:
        mine = ours(place, tmp_path / "run", method=method, loss_type=[], seed=42)
        given = {"model": model, "peft_config": LoraConfig(**LORA)}
    else:
        adapter = place / "adapter"
        mine = ours(place, tmp_path / "run", method=method, adapter_name_or_path=str(adapter))
        given = {"model": PeftModel.from_pretrained(model, adapter, is_trainable=True)}
    loss, gradients = theirs(place, tmp_path / "theirs", kind, config, **given)
    assert mine[0] == pytest.approx(loss, rel=1e-5)
    assert mine[1].keys() == gradients.keys()
    sizes = {name: float(value.abs().max()) for name, value in gradients.items()}
    assert max(sizes.values()) > 1e-4
    for name, value in gradients.items():
        assert float((mine[1][name] - value).abs().max()) <= 3e-5 * max(sizes[name], 1e-3), name


# The cache, resuming, evaluation.


def test_a_kept_reference_is_that_of_a_base(place: Path, tmp_path: Path, evaluated: list[int]) -> None:
    """Whatever the adapter, also without one; not that of another base, or of a saved adapter."""

    def computed(name: str, **changes: Any) -> int:
        evaluated.clear()
        train(settings(place, tmp_path / name, max_steps=1, save_strategy="no", **changes))
        return len(evaluated)

    assert computed("first") == ROWS
    whole = {"adapter": "none", "lora_r": 16, "lora_alpha": 32.0}
    same: list[dict[str, Any]] = [{"adapter": "dora", "seed": 7, "data_seed": 42}, whole]
    for number, changes in enumerate(same):
        assert computed(f"same-{number}", **changes) == 0, changes
    other = {"model_name_or_path": str(place / "other")}, {"adapter_name_or_path": str(place / "adapter")}
    for number, changes in enumerate(other):
        assert computed(f"other-{number}", **changes) == ROWS, changes


@pytest.mark.parametrize("method", ["dpo", "kto"] if SOAK else ["kto"])
def test_a_resumed_run_ends_with_the_same_bits(
    method: str, place: Path, tmp_path: Path, evaluated: list[int]
) -> None:
    changes = {"method": method, "dataset_cache_dir": None, "save_steps": 1}
    train(settings(place, tmp_path / "straight", **changes))
    before = len(evaluated)
    source = tmp_path / "straight" / "checkpoint-2"
    train(settings(place, tmp_path / "run", **changes, resume_from_checkpoint=str(source)))
    assert len(evaluated) == before > 0
    last = "checkpoint-4"
    assert tensors_of(tmp_path / "run" / last) == tensors_of(tmp_path / "straight" / last)
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")[2:]


def test_data_that_a_resumed_run_adds_is_compared_with_the_base(place: Path, tmp_path: Path) -> None:
    """Not with the adapter of the checkpoint."""
    train(settings(place, tmp_path / "run", max_steps=2))
    more = {"eval_datasets": str(place / "pairs.jsonl"), "resume_from_checkpoint": "latest"}
    train(settings(place, tmp_path / "run", max_steps=3, dataset_cache_dir=None, **more))
    saved = open_checkpoint(tmp_path / "run" / "checkpoint-3")
    found = Reference.from_bytes(read_small(saved, preferences.FILE)).values
    assert found["eval"].equal(found["train"])


@pytest.mark.parametrize("is_new", [True, False])
def test_horizon_eval_measures_what_the_run_did(is_new: bool, place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved = {} if is_new else {"adapter_name_or_path": str(place / "adapter")}
    train(settings(place, run, eval_datasets=str(place / "pairs.jsonl"), learning_rate=1e-2, **saved))
    line = read_evaluations(run / "metrics.jsonl")[-1]
    found = evaluate_target(target_of(str(run), [])[0])
    names = [name for name in line if name.startswith("eval_") and name != "eval_seconds"]
    assert {n: found[n] for n in names} == pytest.approx({n: line[n] for n in names}, rel=1e-4, abs=1e-5)
    assert abs(found["eval_rewards/margins"]) > 1e-3


def test_a_packed_base_is_the_reference_as_it_is_packed(place: Path, tmp_path: Path) -> None:
    """Also by its name: a reference of its own is stored as the base is."""
    packed = {"base_dtype": "nf4", "dtype": "bfloat16"}
    found = values_of(place, tmp_path / "run", **packed)
    named = values_of(place, tmp_path / "named", **packed, ref_model_name_or_path=str(place / "model"))
    plain = values_of(place, tmp_path / "plain", dtype="bfloat16")
    assert found.equal(named)
    assert 1e-2 < float((found - plain).abs().max()) < 0.5 * float(plain.abs().max())
