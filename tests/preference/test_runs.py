"""Runs on preferences: the reference's pass and its cache, resume, metrics, evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import horizon_lm as hz
import preference_runs
import zoo
from horizon_lm.checkpoint.folder import open_checkpoint
from horizon_lm.checkpoint.reader import read_small
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.errors import CheckpointError, ConfigError
from horizon_lm.preference import kept, reference
from horizon_lm.preference.reference import Reference
from horizon_lm.report.html import write_report
from horizon_lm.report.metrics import read_evaluations, read_steps
from horizon_lm.training import preferences
from horizon_lm.training.eval_command import evaluate_target, target_of
from horizon_lm.training.train import train
from small_runs import GPT2_DROPOUT, losses_of, place_of, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")
_ROWS = 24
_LABELLED = ("kto",)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    pairs = preference_runs.write_pairs(folder, _ROWS)
    return {"pairs": pairs, "labelled": preference_runs.write_labelled(folder, _ROWS)}


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


def _settings(data: dict[str, Path], run: Path, **changes: Any) -> Any:
    rows = data["labelled" if changes.get("method") in _LABELLED else "pairs"]
    return preference_runs.settings(rows, run, **changes)


# Resume.


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "dpo", "rpo_alpha": 0.2},
        {"method": "dpo", "packing": False, "loss_type": "apo_zero"},
        {"method": "kto", "beta": 0.5},
        {"method": "simpo", "update": "sync"},
        {"method": "dpo", "init_model": GPT2_DROPOUT},
        {"method": "auto", "val_size": 4, "eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=lambda c: "-".join(map(str, c.values()))[:40],
)
def test_a_resumed_run_goes_on_with_the_same_bits(
    changes: dict[str, Any], data: dict[str, Path], tmp_path: Path, evaluated: list[int]
) -> None:
    """It computes nothing again: the values lie in the checkpoint."""
    train(_settings(data, tmp_path / "straight", **changes))
    before = len(evaluated)
    assert bool(before) == (changes["method"] != "simpo")
    source = tmp_path / "straight" / "checkpoint-2"
    train(
        _settings(
            data,
            tmp_path / "run",
            **{**changes, "dataset_cache_dir": None, "resume_from_checkpoint": str(source)},
        )
    )
    assert len(evaluated) == before
    last = "checkpoint-4"
    assert tensors_of(tmp_path / "run" / last) == tensors_of(tmp_path / "straight" / last)
    assert place_of(tmp_path / "run" / last) == place_of(tmp_path / "straight" / last)
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")[2:]
    read = [read_steps(tmp_path / run / "metrics.jsonl")[-1] for run in ("run", "straight")]
    one, other = ({k: v for k, v in line.items() if "/" in k} for line in read)
    assert one == other and one


def test_a_damaged_file_of_values_is_made_again_from_the_model(
    data: dict[str, Path], tmp_path: Path, evaluated: list[int]
) -> None:
    """Not from the weights of the checkpoint, which would be another reference."""
    train(_settings(data, tmp_path / "straight", dataset_cache_dir=None))
    source = tmp_path / "straight" / "checkpoint-2"
    file = source / preferences.FILE
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    evaluated.clear()
    train(_settings(data, tmp_path / "run", dataset_cache_dir=None, resume_from_checkpoint=str(source)))
    assert sorted(set(evaluated)) == list(range(_ROWS))
    made, sound = (
        Reference.from_bytes(read_small(open_checkpoint(tmp_path / run / "checkpoint-4"), preferences.FILE))
        for run in ("run", "straight")
    )
    assert made.values["train"].equal(sound.values["train"])
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")[2:]


def test_another_method_is_another_run(data: dict[str, Path], tmp_path: Path) -> None:
    train(_settings(data, tmp_path / "run", max_steps=2))
    with pytest.raises(ConfigError, match=r"beta was 0\.1, is 0\.2"):
        train(_settings(data, tmp_path / "run", max_steps=2, beta=0.2, resume_from_checkpoint="latest"))
    with pytest.raises(ConfigError, match="method was 'dpo', is 'ipo'"):
        train(_settings(data, tmp_path / "run", max_steps=2, method="ipo", resume_from_checkpoint="latest"))


def test_a_file_of_values_is_the_same_each_time() -> None:
    reference = Reference({name: torch.ones(2, 2) for name in ("train", "eval")}, {"train": "a", "eval": "b"})
    [content] = {reference.to_bytes() for _ in range(20)}
    assert Reference.from_bytes(content).made_of == reference.made_of


@pytest.mark.parametrize("key", ["ld_alpha", "ref_model_name_or_path"])
def test_a_changed_reference_is_computed_anew(key: str, data: dict[str, Path], tmp_path: Path) -> None:
    """Not taken from the checkpoint."""

    def values(run: str, **changes: Any) -> torch.Tensor:
        train(_settings(data, tmp_path / run, dataset_cache_dir=None, **changes))
        saved = open_checkpoint(tmp_path / run / f"checkpoint-{changes['max_steps']}")
        return Reference.from_bytes(read_small(saved, preferences.FILE)).values["train"]

    before = values("run", max_steps=2)
    value = {"ld_alpha": 0.5, "ref_model_name_or_path": str(tmp_path / "run" / "model")}[key]
    wanted = values("other", max_steps=1, **{key: value})
    more = {"resume_from_checkpoint": "latest", "allow_changed_settings": True}
    made = values("run", max_steps=3, **{key: value}, **more)
    assert made.equal(wanted) and not made.equal(before)


def test_a_reference_may_have_fewer_layers(tmp_path: Path) -> None:
    """Settings of the model to train name layers and units that it does not have. The control: they count."""
    model = zoo.build("llama")
    model.save_pretrained(tmp_path)
    per_layer = {"activations": ["keep*6"], "boundaries": ["host*6"], "resident": ["head", "layer 5"]}
    config = TrainConfig(
        model_name_or_path="m",
        ref_model_name_or_path=str(tmp_path),
        method="dpo",
        datasets=["pairs.jsonl"],
        device="cpu",
        skip_memory_check=True,
        **per_layer,  # type: ignore[arg-type]
    )
    rows: Any = SimpleNamespace(store=SimpleNamespace(ids=torch.zeros(3, dtype=torch.long)))
    assert (
        preferences.reference_model(config, 10, rows).skeleton.num_layers
        == model.config.num_hidden_layers
        < 5
    )
    for key, value in per_layer.items():
        with pytest.raises(ConfigError):
            hz.HostModel.from_pretrained(tmp_path, device="cpu", skip_memory_check=True, **{key: value})


def test_a_reference_of_the_same_name_has_the_same_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: another name is read at its newest."""
    asked: list[str | None] = []

    def stop(_: str, settings: ModelSettings) -> None:
        asked.append(settings.model_revision)
        raise ConfigError("stopped", hint="none")

    monkeypatch.setattr(preferences, "load_model_of", stop)
    rows: Any = SimpleNamespace(store=SimpleNamespace(ids=torch.zeros(3, dtype=torch.long)))
    for name in ("owner/model", "owner/other"):
        config = TrainConfig(
            model_name_or_path="owner/model",
            model_revision="a" * 40,
            ref_model_name_or_path=name,
            method="dpo",
            datasets=["pairs.jsonl"],
            device="cpu",
            skip_memory_check=True,
        )
        with pytest.raises(ConfigError, match="stopped"):
            preferences.reference_model(config, 10, rows)
    assert asked == ["a" * 40, None]


# The cache.


def _chats(folder: Path) -> Path:
    rows = [json.loads(line) for line in preference_runs.write_pairs(folder, 8).read_text().splitlines()]

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    path = folder / "chats.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": said("user", row["prompt"]),
                    "chosen": said("assistant", row["chosen"]),
                    "rejected": said("assistant", row["rejected"]),
                }
            )
            + "\n"
            for row in rows
        )
    )
    return path


def test_what_changes_the_numbers_makes_them_anew(
    data: dict[str, Path], tmp_path: Path, evaluated: list[int]
) -> None:
    chats = _chats(tmp_path)

    def run(**changes: Any) -> int:
        evaluated.clear()
        values = {"chat_template": "alpaca", "max_steps": 1, "save_strategy": "no", "method": "dpo"}
        train(
            preference_runs.settings(
                chats, tmp_path / "run", **{**values, "overwrite_output_dir": True, **changes}
            )
        )
        return len(evaluated)

    assert run() == 8
    for unchanged in ({}, {"learning_rate": 1e-5, "beta": 0.3, "loss_type": "hinge"}):
        assert run(**unchanged) == 0
    for changed in (
        {"seed": 7, "data_seed": 42},  # other weights
        {"chat_template": "plain"},
        {"max_length": 40, "truncation": "keep_end"},
        {"dtype": "bfloat16"},
        {"attn_implementation": "eager"},
        {"ld_alpha": 0.5},
    ):
        assert run(**changed) > 0, changed
        assert run(**changed) == 0, changed
    assert run(dataset_cache_dir=None) == 8


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_piece_is_found(
    damage: str, data: dict[str, Path], tmp_path: Path, evaluated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_SECONDS", 0.0)
    monkeypatch.setattr(reference, "TOGETHER", 1)
    once = {"max_steps": 1, "packing": False, "precompute_ref_batch_size": 4, "save_strategy": "no"}
    train(_settings(data, tmp_path / "one", **once))
    pieces = sorted((tmp_path / "cache").glob("reference-*/*.part"))
    assert len(pieces) == _ROWS // 4 and sorted(evaluated) == list(range(_ROWS))
    content = bytearray(pieces[0].read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    pieces[0].write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    evaluated.clear()
    train(_settings(data, tmp_path / "two", **once))
    assert len(evaluated) == 4
    assert losses_of(tmp_path / "two") == losses_of(tmp_path / "one")
    assert sorted((tmp_path / "cache").glob("reference-*/*.part")) == pieces


def test_a_killed_pass_goes_on_where_it_stopped(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "_SECONDS", 0.0)
    monkeypatch.setattr(reference, "TOGETHER", 1)
    honest, found = reference._evaluate, []

    def killed(*arguments: Any) -> Any:
        if len(found) == 3:
            raise KeyboardInterrupt
        found.append(honest(*arguments))
        return found[-1]

    once = {"max_steps": 1, "packing": False, "precompute_ref_batch_size": 4, "save_strategy": "no"}
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            train(_settings(data, tmp_path / "run", **once))
    assert not (tmp_path / "run").exists()
    done = {int(n) for numbers in found for n in numbers}
    assert len(done) == 12
    rest: list[int] = []

    def going_on(*arguments: Any) -> Any:
        numbers = honest(*arguments)
        rest.extend(numbers.tolist())
        return numbers

    monkeypatch.setattr(reference, "_evaluate", going_on)
    train(_settings(data, tmp_path / "run", **once))
    assert not done & set(rest) and len(done) + len(rest) == _ROWS


# What a run says.


def test_metrics_of_a_run_and_its_report(data: dict[str, Path], tmp_path: Path) -> None:
    config = _settings(
        data,
        tmp_path / "run",
        val_size=6,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="rewards/margins",
        load_best_model_at_end=True,
        logging_steps=2,
    )
    train(config)
    lines = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4]
    names = {"chosen", "rejected", "margins", "accuracies"}
    for line in lines:
        assert {f"rewards/{name}" for name in names} <= line.keys()
        assert line["rewards/margins"] == pytest.approx(
            line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6
        )
        assert {"logps/chosen", "logps/rejected", "logits/chosen", "entropy"} <= line.keys()
        assert "preferences" not in line
    evaluations = read_evaluations(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in evaluations] == [2, 4]
    for line in evaluations:
        assert {f"eval_rewards/{name}" for name in names} <= line.keys() and "eval_perplexity" not in line
    best = max(evaluations, key=lambda line: line["eval_rewards/margins"])
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    event = next(json.loads(line) for line in text.splitlines() if '"event": "best"' in line)
    assert event["step"] == best["step"] and event["metric"] == "eval_rewards/margins"
    write_report(tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Reward accuracy" in page and "held-out chosen" in page
    assert "method: dpo" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_evaluation_does_not_depend_on_its_batch(method: str, data: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for batch in (1, 5):
        run = tmp_path / f"run-{batch}"
        train(
            _settings(data, run, method=method, val_size=10, packing=False, per_device_eval_batch_size=batch)
        )
        line = read_evaluations(run / "metrics.jsonl")[-1]
        found.append({k: v for k, v in line.items() if k not in ("time", "eval_seconds", "event")})
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)


def test_horizon_eval_measures_what_the_run_did(data: dict[str, Path], tmp_path: Path) -> None:
    """Of a run against the model from which it started; of a model against none it is refused."""
    train(_settings(data, tmp_path / "first", max_steps=1, dataset_cache_dir=None))
    base = tmp_path / "first" / "model"
    own = {"init_model": None, "train_tokenizer_vocab_size": None, "model_name_or_path": str(base)}
    train(_settings(data, tmp_path / "run", **own, val_size=8))
    line = read_evaluations(tmp_path / "run" / "metrics.jsonl")[-1]
    found = evaluate_target(target_of(str(tmp_path / "run"), [])[0])
    names = [name for name in line if name.startswith("eval_") and name != "eval_seconds"]
    assert {n: found[n] for n in names} == pytest.approx({n: line[n] for n in names}, rel=1e-5, abs=1e-6)
    assert abs(found["eval_rewards/margins"]) > 1e-4
    lone = target_of(str(base), [f"eval_datasets={data['pairs']}", "dtype=float32"])[0]
    with pytest.raises(ConfigError, match="compares the model with a reference, and there is none"):
        evaluate_target(lone)


def test_two_settings_that_do_not_belong_together(data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="desirable_weight has no effect with method: dpo"):
        train(_settings(data, tmp_path / "run", desirable_weight=2.0))
    with pytest.raises(ConfigError, match="eval_rewards/margins is measured by methods on preferences"):
        _settings(data, tmp_path / "run", method="sft", metric_for_best_model="rewards/margins")


def test_a_model_that_is_gone_needs_the_values_of_the_checkpoint(
    data: dict[str, Path], tmp_path: Path
) -> None:
    once = {"max_steps": 2, "dataset_cache_dir": None}
    train(_settings(data, tmp_path / "first", **once))
    base = tmp_path / "base"
    (tmp_path / "first" / "model").rename(base)
    own = {"init_model": None, "train_tokenizer_vocab_size": None, "model_name_or_path": str(base), **once}
    train(_settings(data, tmp_path / "run", **{**own, "max_steps": 3}))
    base.rename(tmp_path / "elsewhere")
    again = {**own, "resume_from_checkpoint": "latest"}
    train(_settings(data, tmp_path / "run", **{**again, "max_steps": 4}))
    assert [step for step, _ in losses_of(tmp_path / "run")] == [1, 2, 3, 4]
    with pytest.raises(CheckpointError, match="has no reference log-probabilities of this data"):
        train(
            _settings(data, tmp_path / "run", **{**again, "max_steps": 5}, eval_datasets=str(data["pairs"]))
        )
