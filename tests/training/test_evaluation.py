"""Evaluation: the mean over all targets whatever the batch, when it is due, and what it leaves."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM

import horizon_lm as hz
import zoo
from data_helpers import write_rows
from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.data import train_tokenizer
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.outputs import perplexity
from horizon_lm.report import flops, loggers
from horizon_lm.report.flops import measure_peak
from horizon_lm.report.metrics import read_evaluations, read_steps
from horizon_lm.training import train as run_train
from horizon_lm.training.eval_command import evaluate_model, target_of
from horizon_lm.training.evaluate import Evaluator, evaluate
from packed_rows import Document, rows_of

LENGTHS = [7, 12, 3, 9, 2, 16, 5, 4]


def documents() -> list[Document]:
    rng = np.random.default_rng(1)
    return [(rng.integers(0, zoo.VOCAB, n).tolist(), (rng.random(n) < 0.6).tolist()) for n in LENGTHS]


def plain_loss(model: Any, found: list[Document]) -> tuple[float, int]:
    """Mean cross-entropy over all targets, a document at a time, by transformers and torch alone."""
    total, count = 0.0, 0
    for ids, trained in found:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0]
        for at in range(1, len(ids)):
            if trained is None or trained[at]:
                total -= float(logits[at - 1].float().log_softmax(-1)[ids[at]])
                count += 1
    return total / count, count


@pytest.mark.parametrize("strategy", ["bfd", "none"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_loss_is_the_mean_over_all_targets(strategy: str, batch: int) -> None:
    expected, count = plain_loss(zoo.build("llama"), documents())
    model = hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", dtype="float32")
    found = evaluate(model, rows_of(documents(), strategy, 20), micro_batch_size=batch, pad_id=0, step=3)
    assert found.eval_loss == pytest.approx(expected, abs=1e-5) and found.eval_tokens == count
    assert found.eval_perplexity == pytest.approx(math.exp(expected), rel=1e-4) and found.step == 3
    # The control: the mean of the batches' means is another number.
    batches = [plain_loss(zoo.build("llama"), [document]) for document in documents() if any(document[1][1:])]  # type: ignore[index]
    assert abs(sum(loss for loss, _ in batches) / len(batches) - expected) > 1e-4


def test_perplexity_of_a_loss_beyond_floats() -> None:
    assert perplexity(0.0) == 1 and perplexity(1000.0) == math.inf


class Counting(Evaluator):
    def run(self, step: int) -> Any:
        return step


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [12]),
        ({"eval_strategy": "steps", "eval_steps": 5}, [5, 10, 12]),
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8, 12]),
        ({"eval_strategy": "epoch"}, [5, 9, 12]),
    ],
)
def test_when_an_evaluation_is_due(settings: dict[str, Any], expected: list[int]) -> None:
    values = {"model_name_or_path": "m", "datasets": "a", "eval_datasets": "b", **settings}
    evaluator = Counting(lambda step: None, TrainConfig.from_dict(values), num_steps=12)  # type: ignore
    due = [evaluator.after(step, step * 0.24) for step in range(1, 13)]  # 4.2 steps an epoch
    assert [step for step in due if step is not None] == expected


# ---- in a run -------------------------------------------------------------------------------

QUESTIONS = [("one", "two"), ("two", "three"), ("three", "four"), ("four", "five"), ("five", "six")]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"after {a}"},
                {"role": "assistant", "content": f"it is {b}"},
            ]
        }
        for a, b in QUESTIONS * 12
    ]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "eval.jsonl", rows[:5])
    train_tokenizer((json.dumps(row) for row in rows), 320).save_pretrained(folder / "tokenizer")
    return folder


def settings(chats: Path, output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "init_model": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        },
        "tokenizer_name_or_path": str(chats / "tokenizer"),
        "datasets": str(chats / "train.jsonl"),
        "eval_datasets": str(chats / "eval.jsonl"),
        "chat_template": "plain",
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "max_steps": 80,
        "learning_rate": 1e-2,
        "dtype": "float32",
        "device": "cpu",
        "reserve_host_gb": 0.0,
        "sample_max_new_tokens": 6,
        "progress": "plain",
        "output_dir": str(output),
    }
    return TrainConfig.from_dict({**values, **changes})


@pytest.fixture(scope="module")
def tuned(chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("runs") / "run"
    config = settings(chats, output, eval_strategy="steps", eval_steps=20, eval_on_start=True)
    return run_train.train(config)


def test_evaluations_of_a_run(tuned: Any, chats: Path) -> None:
    found = read_evaluations(tuned.metrics_path)
    assert [line["step"] for line in found] == [0, 20, 40, 60, 80]
    losses = [line["eval_loss"] for line in found]
    assert losses[-1] < losses[0] - 2 and tuned.eval_loss == losses[-1]
    events = [json.loads(line)["event"] for line in tuned.metrics_path.read_text().splitlines()]
    assert events[:3] == ["start", "step", "eval"] and events[-3:] == ["eval", "checkpoint", "end"]
    # What the exported model gives to transformers is what the run says.
    model = AutoModelForCausalLM.from_pretrained(tuned.model_dir)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned.model_dir)
    held_out: list[Document] = []
    for line in (chats / "eval.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        num_asked = len(tokenizer(asked, add_special_tokens=False).input_ids)
        num_after = len(tokenizer("\n\n", add_special_tokens=False).input_ids)  # after the end of the turn
        held_out.append((ids, [num_asked <= at < len(ids) - num_after for at in range(len(ids))]))
    expected, count = plain_loss(model, held_out)
    assert found[-1]["eval_tokens"] == count
    assert losses[-1] == pytest.approx(expected, abs=1e-4)


def test_the_header_says_how_the_data_was_packed_and_mfu_counted(tuned: Any) -> None:
    header = json.loads(tuned.metrics_path.read_text().splitlines()[0])
    assert header["packing"] == "bfd" and 0.5 < header["fill"] <= 1
    assert "6 N" in header["mfu_formula"] and header["peak_flops"] > 0


def test_tokens_of_a_run_are_real_tokens(chats: Path, tmp_path: Path) -> None:
    """Packed or padded: an epoch has the same tokens, and the same targets."""
    counts = []
    for packing in (True, False):
        config = settings(
            chats, tmp_path / str(packing), max_steps=-1, packing=packing, per_device_train_batch_size=1
        )
        result = run_train.train(config.replace(plot_loss=False))
        last = read_steps(result.metrics_path)[-1]
        counts.append((last["num_tokens"], last["num_target_tokens"], last["epoch"]))
    assert counts[0] == counts[1]


def test_a_tuned_model_answers_and_its_template_is_saved(tuned: Any, capsys: Any) -> None:
    assert "generation %}" not in (tuned.model_dir / "chat_template.jinja").read_text()
    ask = [
        "generate",
        str(tuned.output_dir),
        "--chat",
        "--temperature",
        "0",
        "--json",
        "--prompt",
        "after two",
    ]
    assert cli.main(ask) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "after two", "completion": "it is three"}


def test_eval_of_a_folder_equals_the_run(tuned: Any, chats: Path, capsys: Any) -> None:
    arguments = [
        f"model={tuned.output_dir}",
        f"eval_datasets={chats / 'eval.jsonl'}",
        "datasets=unused.jsonl",
    ]
    arguments += ["dtype=float32", "max_length=64", "chat_template=plain", "device=cpu", "reserve_host_gb=0"]
    assert cli.main(["eval", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["eval_loss"] == pytest.approx(tuned.eval_loss, abs=1e-5)
    assert cli.main(["eval", *arguments]) == 0
    assert f"loss {tuned.eval_loss:.4f}" in capsys.readouterr().out


def asked(capsys: Any, *arguments: object) -> tuple[dict[str, Any], str]:
    """What `horizon eval --json` answers, and what it says beside it."""
    assert cli.main(["eval", "--json", *map(str, arguments)]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def test_eval_takes_a_run_a_model_or_settings_alone(
    tuned: Any, chats: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model on the same data by five ways to name it, from another directory."""
    monkeypatch.chdir(tmp_path)
    run, model, data = tuned.output_dir, tuned.model_dir, f"eval_datasets={chats / 'eval.jsonl'}"
    by_hand = ["dtype=float32", "device=cpu", "chat_template=plain", "reserve_host_gb=0", data]
    found = {
        "run": asked(capsys, run),
        "run, data": asked(capsys, run, data),
        "checkpoint": asked(capsys, run / "checkpoint-80"),
        "model": asked(capsys, model, *by_hand),
        "settings": asked(capsys, f"model_name_or_path={model}", *by_hand),
    }
    for how, (values, said) in found.items():
        assert values["eval_loss"] == pytest.approx(tuned.eval_loss, abs=1e-5), how
        assert (values["eval_tokens"], values["eval_sequences"], values["dtype"]) == (25, 2, "float32"), how
        assert values["data"] == str(chats / "eval.jsonl") and values["model"] in said
    assert found["run"][0]["model"] == f"{model} (the run is finished, 80 steps)"
    assert found["checkpoint"][0]["model"] == f"{run / 'checkpoint-80'}, step 80"
    assert found["model"][0]["model"] == found["settings"][0]["model"] == str(model)
    other, _ = asked(capsys, run, f"eval_datasets={chats / 'train.jsonl'}")  # the control: other data
    assert other["eval_tokens"] > 100 and other["data"] == str(chats / "train.jsonl")
    assert cli.main(["eval", str(run)]) == 0
    assert (
        f"loss {tuned.eval_loss:.4f}" in (said := capsys.readouterr().out)
        and "25 tokens, 2 sequences" in said
    )


def test_eval_of_an_unfinished_run_takes_its_latest_sound_checkpoint(
    tuned: Any, chats: Path, tmp_path: Path, capsys: Any
) -> None:
    run = shutil.copytree(tuned.output_dir, tmp_path / "run")
    shutil.rmtree(run / "model")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    values, _ = asked(capsys, run)
    assert values["model"] == f"{run / 'checkpoint-80'}, step 80 (the run is not finished)"
    assert values["eval_loss"] == pytest.approx(tuned.eval_loss, abs=1e-5)
    newest = shutil.copytree(run / "checkpoint-80", run / "checkpoint-81")  # a later one, with a flipped bit
    manifest = json.loads((newest / "manifest.json").read_text())
    rest = {key: value for key, value in manifest.items() if key != "manifest_xxh3_128"} | {
        "serial": 9,
        "step": 81,
    }
    text = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    sealed = {**rest, "manifest_xxh3_128": xxhash.xxh3_128_hexdigest(text)}
    (newest / "manifest.json").write_text(json.dumps(sealed))
    unit = bytearray((newest / "unit-00001.safetensors").read_bytes())
    unit[-1] ^= 1
    (newest / "unit-00001.safetensors").write_bytes(unit)
    values, said = asked(capsys, run)
    assert "skipped" in said and "checkpoint-81/unit-00001" in said
    assert values["model"] == f"{run / 'checkpoint-80'}, step 80"


def test_eval_without_anything_to_evaluate_on_says_what_to_set(tuned: Any, chats: Path, capsys: Any) -> None:
    for arguments in ([str(tuned.model_dir)], [f"model={tuned.model_dir}"]):
        assert cli.main(["eval", *arguments]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note")]
        assert lines == [
            "error: there is nothing to evaluate on",
            "hint: set eval_datasets=FILE, a folder or a Hub name",
        ]
    assert cli.main(["eval", f"eval_datasets={chats / 'eval.jsonl'}"]) == 2
    assert "no model" in capsys.readouterr().err


def test_eval_cuts_to_the_models_length_unless_one_is_asked_for(tuned: Any, chats: Path) -> None:
    data = [f"eval_datasets={chats / 'eval.jsonl'}"]
    assert target_of(str(tuned.model_dir), data)[0].config.max_length == 64
    assert target_of(str(tuned.model_dir), [*data, "max_length=32"])[0].config.max_length == 32


def test_eval_needs_a_model_and_something_to_evaluate_on(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model to evaluate"):
        evaluate_model(settings(chats, tmp_path / "x"))
    nothing = rows_of([([1, 2, 3, 4], [True, False, False, False])], "wrapped", 4)
    model = hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", dtype="float32")
    with pytest.raises(DataError, match="no token to predict"):
        evaluate(model, nothing, micro_batch_size=1, pad_id=0)


def test_streaming_trains_too(chats: Path, tmp_path: Path) -> None:
    config = settings(chats, tmp_path / "run", streaming=True, buffer_size=20, max_steps=20, plot_loss=False)
    result = run_train.train(config)
    losses = [line["loss"] for line in read_steps(result.metrics_path)]
    assert losses[-1] < losses[0] - 1 and result.eval_loss is not None


# ---- loggers --------------------------------------------------------------------------------


class Recorder:
    """Stands in for a logging program: remembers what it is given."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.config, self.lines, self.status = config, [], ""  # type: ignore[var-annotated]
        made.append(self)

    def log(self, values: Any, step: int) -> None:
        self.lines.append((step, dict(values)))

    def close(self, status: str) -> None:
        self.status = status


made: list[Recorder] = []


def test_loggers_get_what_the_file_gets(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setitem(loggers._KINDS, "wandb", loggers._Kind("json", Recorder))
    config = settings(
        chats, tmp_path / "run", report_to="wandb", max_steps=4, logging_steps=2, plot_loss=False
    )
    result = run_train.train(config)
    recorder = made[0]
    assert recorder.status == "finished"
    assert recorder.config.output_dir == config.output_dir  # (what was left open has been chosen)
    trained = [(step, values) for step, values in recorder.lines if "train/loss" in values]
    steps = read_steps(result.metrics_path)
    assert [step for step, _ in trained] == [line["step"] for line in steps] == [1, 2, 4]
    assert trained[-1][1]["train/loss"] == steps[-1]["loss"]
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second", "train/mfu"} <= set(
        trained[-1][1]
    )
    assert trained[-1][1]["train/lanes/compute"] > 0
    assert recorder.lines[-1][1]["eval/loss"] == result.eval_loss


def test_a_failed_run_is_closed_as_failed(
    chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.clear()
    monkeypatch.setitem(loggers._KINDS, "trackio", loggers._Kind("json", Recorder))
    monkeypatch.setattr(Evaluator, "run", lambda self, step: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_train.train(settings(chats, tmp_path / "run", report_to="trackio", max_steps=1))
    assert made[0].status == "failed"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow", "comet_ml"])
def test_a_logger_that_is_not_installed_is_refused_at_once(
    name: str, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=f"report_to: {name} is not installed") as caught:
        run_train.train(settings(chats, tmp_path / "run", report_to=name))
    assert caught.value.hint == f"pip install {name}" and not (tmp_path / "run").exists()


# ---- the peak --------------------------------------------------------------------------------


def test_the_peak_is_a_rate() -> None:
    peak = measure_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < peak < 1e15


def test_a_slow_device_is_measured_in_half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(one: torch.Tensor, other: torch.Tensor) -> None:
        clock.append(clock[-1] + 0.2)

    clock = [0.0]
    monkeypatch.setattr(flops.time, "perf_counter", lambda: clock[-1])
    monkeypatch.setattr(torch, "mm", slow)
    assert measure_peak(torch.device("cpu"), torch.float32) == pytest.approx(2 * 1024**3 / 0.2)
    assert len(clock) - 1 == 3  # not six
