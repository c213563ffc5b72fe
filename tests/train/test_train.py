"""`horizon train` end to end on a tiny model: what a run leaves, what it equals, and how it fails."""

from __future__ import annotations

import errno
import gc
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

import small_runs
from horizon_lm import cli
from horizon_lm.config import SCHEDULER_KWARGS, TrainConfig
from horizon_lm.data import TokenLoader, load_training_data
from horizon_lm.engine.engine import Engine
from horizon_lm.errors import ConfigError, DoesNotFitError, NonFiniteError
from horizon_lm.model.loading import create_model
from horizon_lm.optim.curves import count_warmup_steps, learning_rates
from horizon_lm.plan import preflight
from horizon_lm.run import folder as run_folder
from horizon_lm.run import sample
from horizon_lm.run import train as run_train
from horizon_lm.run.host_model import HostModel, TrainStepOutput
from horizon_lm.run.loop import StepRecord
from horizon_lm.run.metrics import Metrics, read_steps
from horizon_lm.run.plot import smoothed
from horizon_lm.run.progress import RichProgress, choose_progress, clock, say, sparkline

LENGTH, STEPS, ROWS = 32, 50, 8  # tokens in a sequence, steps, sequences in a step
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
RUN_FILES = {"config.resolved.yaml", "metrics.jsonl", "model", "loss.png"}
LAST = f"checkpoint-{STEPS}"  # the end of a run whose checkpoint is small
STEP_KEYS = {
    *(
        "event",
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "mfu",
        "num_tokens",
        "num_target_tokens",
        "lanes",
    ),
    *("seconds", "skipped_steps", "host_rss_bytes", "device_bytes", "time"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def settings(text: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "init_model": LLAMA,
        "train_tokenizer_vocab_size": 300,
        "datasets": str(text),
        "max_length": LENGTH,
        "per_device_train_batch_size": ROWS // 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "dtype": "float32",
        "device": "cpu",
        "reserve_host_gb": 0.0,
        "sample_max_new_tokens": 8,
        "progress": "plain",
        "output_dir": str(output_dir),
    }
    return TrainConfig.from_dict({**values, **changes})


@dataclass
class Run:
    config: TrainConfig
    masters: dict[str, torch.Tensor]
    folder: Path
    printed: str


def remember_models(patch: pytest.MonkeyPatch) -> list[HostModel]:
    """The list receives the models that `train` builds."""
    made: list[HostModel] = []
    build = run_train.build_model

    def remember(*arguments: Any) -> HostModel:
        made.append(build(*arguments))
        return made[-1]

    patch.setattr(run_train, "build_model", remember)
    return made


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[HostModel]:
    return remember_models(monkeypatch)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_text(tmp_path_factory.mktemp("data") / "text.txt", sentences=600)


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run from random weights, by the command line; the tests below look at what it left."""
    folder = tmp_path_factory.mktemp("runs") / "deeper" / "run"
    config = settings(text, folder)
    file = text.parent / "run.yaml"
    file.write_text(config.to_yaml())
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        models = remember_models(patch)
        patch.setattr("sys.stdout", output)
        assert cli.main(["train", str(file)]) == 0
    return Run(config, dict(models[0].named_parameters()), folder, output.getvalue())


def random_model() -> Any:
    """The model of the run before it was trained, by transformers."""
    values = {**LLAMA, "vocab_size": 300}
    return create_model(values, dtype=torch.float32, seed=42, attn_implementation="sdpa")


def some_ids(rows: int = 2) -> torch.Tensor:
    return torch.arange(rows * LENGTH).reshape(rows, LENGTH) % 280


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What a run leaves.


def test_a_run_leaves_exactly_its_files_and_says_where(run: Run) -> None:
    assert entries(run.folder) == RUN_FILES | {LAST}
    for name in RUN_FILES:
        assert str(run.folder / name) in run.printed
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "completion" in run.printed and f"step {STEPS}/{STEPS}" in run.printed


def test_the_exported_folder_has_the_logits_of_the_store(run: Run) -> None:
    ids = some_ids()
    exported = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype="auto").eval()
    assert exported.dtype == torch.float32
    reference = random_model().eval()
    before = reference(ids).logits
    reference.load_state_dict(run.masters, strict=True)
    with torch.no_grad():
        expected, found = reference(ids).logits, exported(ids).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, before, atol=1e-2)  # else an export of untrained weights would pass


def test_the_exported_folder_has_its_tokenizer(run: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    text = "the store holds\n\tévery weight."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    config = json.loads((run.folder / "model" / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) and config["eos_token_id"] == tokenizer.eos_token_id


def rows_given(num_sequences: int) -> list[int]:
    """After each step; the last of an epoch has what is left."""
    given, found = 0, []
    for _ in range(STEPS):
        given += min(ROWS, num_sequences - given % num_sequences)
        found.append(given)
    return found


def test_metrics_are_one_uniform_line_a_step(run: Run) -> None:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("timeline") == 1
    lines = [line for line in lines if line["event"] != "timeline"]
    assert [line["event"] for line in lines] == ["start", *["step"] * STEPS, "checkpoint", "end"]
    assert lines[0]["versions"]["torch"] == torch.__version__ and lines[0]["num_steps"] == STEPS
    assert lines[-1]["status"] == "finished"
    steps = lines[1:-2]
    assert all(line.keys() == STEP_KEYS for line in steps)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    rows = rows_given(lines[0]["num_sequences"])
    assert [line["num_tokens"] for line in steps] == [LENGTH * given for given in rows]
    targets = [(LENGTH - 1) * given for given in rows]  # nothing predicts a first token
    assert [line["num_target_tokens"] for line in steps] == targets
    assert all(0 < line["mfu"] < 1 for line in steps)
    assert all(line["lanes"]["compute"] > 0 and 0.5 < sum(line["lanes"].values()) < 1.01 for line in steps)
    assert all(line["host_rss_bytes"] > 1e8 and line["tokens_per_second"] > 0 for line in steps)
    assert [line["seconds"] for line in steps] == sorted(line["seconds"] for line in steps)
    curve = learning_rates(run.config, STEPS)
    assert [line["learning_rate"] for line in steps] == [curve(s) for s in range(STEPS)]


def test_the_resolved_settings_reload_equal(run: Run) -> None:
    assert TrainConfig.from_yaml(run.folder / "config.resolved.yaml") == run.config


def test_training_equals_a_plain_pytorch_loop(run: Run) -> None:
    """fp32, all steps within 1e-5 of the loss: clipping, warmup, betas and data order are those asked for.

    The tolerance is for another order of summation: the reference takes the step as one batch.
    """
    reference = random_model()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    rows = load_training_data(run.config, tokenizer).rows
    loader = TokenLoader(rows, micro_batch_size=ROWS, seed=42)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=5e-3, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        loss = reference(**next(loader)[0]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    found = [line["loss"] for line in read_steps(run.folder / "metrics.jsonl")]
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_loss_falls(run: Run) -> None:
    losses = [line["loss"] for line in read_steps(run.folder / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(300), abs=0.3)
    assert losses[-1] < losses[0] - 1


def test_without_a_learning_rate_nothing_is_learned(
    text: Path, tmp_path: Path, built: list[HostModel]
) -> None:
    """The control of the test above, and of the export's. 1e-30 is below what any weight can take up."""
    run_train.train(settings(text, tmp_path / "run", learning_rate=1e-30, max_steps=3, plot_loss=False))
    for name, value in random_model().state_dict().items():
        assert torch.equal(dict(built[0].named_parameters())[name], value)
    assert entries(tmp_path / "run") == RUN_FILES - {"loss.png"} | {"checkpoint-3"}


@pytest.mark.parametrize(("dtype", "save_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_number_format_of_the_export_can_be_chosen(
    dtype: str, save_dtype: str, text: Path, tmp_path: Path
) -> None:
    """A bfloat16 run can export its fp32 masters: those are what was drawn in float32 before, but for
    the one in 131,072 that the store keeps as its neighbour (`memory.master`), hence the one ulp.
    """
    config = settings(
        text, tmp_path / "run", learning_rate=1e-30, max_steps=1, dtype=dtype, save_dtype=save_dtype
    )
    result = run_train.train(config)
    wanted = getattr(torch, save_dtype)
    exported = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype="auto").state_dict()
    for name, value in random_model().state_dict().items():
        torch.testing.assert_close(exported[name], value.to(wanted), rtol=2**-23, atol=0)
        assert "norm" in name or not torch.equal(value, value.bfloat16().float())  # the control


def test_training_goes_on_from_a_folder_on_jsonl(run: Run, tmp_path: Path) -> None:
    rows = run.config.datasets[0].path
    documents = [json.dumps({"body": line}) for line in Path(rows).read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("\n".join(documents))
    config = settings(
        tmp_path / "rows.jsonl",
        tmp_path / "tuned",
        init_model=None,
        train_tokenizer_vocab_size=None,
        model_name_or_path=str(run.folder / "model"),
        datasets=[{"path": str(tmp_path / "rows.jsonl"), "text_column": "body"}],
        dtype="bfloat16",
        max_steps=-1,
        num_train_epochs=0.5,
        logging_steps=3,
    )
    result = run_train.train(config, config_notes=["a note"])
    lines = [json.loads(line) for line in result.metrics_path.read_text().splitlines()]
    assert lines[0]["notes"][0] == "a note"
    steps = [line["step"] for line in lines if line["event"] == "step"]
    sequences = lines[0]["num_sequences"]
    assert result.num_steps == math.ceil(sequences / 2 / ROWS) == steps[-1]
    assert steps == sorted({1, *range(3, result.num_steps, 3), result.num_steps})
    assert lines[1]["loss"] < math.log(300) - 1  # it began where the first run ended
    assert lines[-3]["epoch"] == pytest.approx(0.5, abs=ROWS / sequences)
    tuned = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype="auto")
    assert tuned.dtype == torch.bfloat16
    assert result.final_loss == lines[-3]["loss"] and result.num_tokens == lines[-3]["num_tokens"]


# Where a run may be written.


def test_an_earlier_run_is_kept_unless_it_may_be_replaced(
    run: Run, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    first = settings(text, folder, max_steps=2)
    run_train.train(first)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    (tmp_path / "again.yaml").write_text(first.replace(max_steps=3).to_yaml())
    again = ["train", str(tmp_path / "again.yaml")]
    assert cli.main(again) == 2
    assert "holds an earlier run" in capsys.readouterr().err

    def fail(*_: Any) -> HostModel:
        raise DoesNotFitError("too large")

    with pytest.MonkeyPatch.context() as patch:  # a run that fails before its first step changes nothing
        patch.setattr(run_train, "build_model", fail)
        assert cli.main([*again, "overwrite_output_dir=true"]) == 3
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    assert cli.main([*again, "overwrite_output_dir=true"]) == 0
    assert entries(folder) == RUN_FILES | {"checkpoint-3"}
    assert len(read_steps(folder / "metrics.jsonl")) == 3


def test_a_foreign_folder_is_refused(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "papers"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "draft.txt").write_text("mine")
    for overwrite in (False, True):  # true is not enough where something would be replaced
        with pytest.raises(ConfigError, match="no run of ours"):
            run_train.train(settings(text, folder, overwrite_output_dir=overwrite))
    assert (folder / "model" / "draft.txt").read_text() == "mine" and entries(folder) == {"model"}
    (folder / "model").rename(folder / "other")
    with run_folder.claim(str(folder), overwrite=True) as claimed:
        assert claimed.path == folder
    assert entries(folder) == {"other"}


def test_a_model_is_not_trained_into_its_own_place(run: Run, text: Path) -> None:
    config = settings(
        text,
        run.folder,
        init_model=None,
        train_tokenizer_vocab_size=None,
        model_name_or_path=str(run.folder / "model"),
        overwrite_output_dir=True,
    )
    with pytest.raises(ConfigError, match="lies in output_dir"):
        run_train.train(config)
    assert entries(run.folder) == RUN_FILES | {LAST}


# Bad input: the exit code, one clear line with a hint, and nothing written.


def break_nothing(run: Run, tmp_path: Path) -> list[str]:
    return []


def no_tokenizer(run: Run, tmp_path: Path) -> list[str]:
    folder = copy_model(run, tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return [f"model_name_or_path={folder}"]


def nan_weight(run: Run, tmp_path: Path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    folder = copy_model(run, tmp_path)
    model.save_pretrained(folder)
    return [f"model_name_or_path={folder}"]


def empty_data(run: Run, tmp_path: Path) -> list[str]:
    (tmp_path / "empty.txt").write_text("")
    return [f"datasets={tmp_path / 'empty.txt'}"]


def short_data(run: Run, tmp_path: Path) -> list[str]:
    (tmp_path / "short.txt").write_text("the store.")
    return [f"datasets={tmp_path / 'short.txt'}"]


def small_vocabulary(run: Run, tmp_path: Path) -> list[str]:
    """A tokenizer with tokens that the model does not know."""
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path / "small")
    return [f"model_name_or_path={tmp_path / 'small'}", f"tokenizer_name_or_path={run.folder / 'model'}"]


def copy_model(run: Run, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (run.folder / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


BAD_INPUT: dict[str, tuple[Callable[[Run, Path], list[str]], int, str]] = {
    "missing model": (lambda run, tmp: [f"model_name_or_path={tmp / 'absent'}"], 2, "is not a folder"),
    "missing data": (lambda run, tmp: [f"datasets={tmp / 'absent.txt'}"], 4, "does not exist"),
    "no tokenizer": (no_tokenizer, 2, "holds no tokenizer"),
    "empty data": (empty_data, 4, "holds no text"),
    "text shorter than a sequence": (short_data, 4, "less than one sequence of 32"),
    "token outside the vocabulary": (small_vocabulary, 4, "outside the model's vocabulary of 200"),
    "sequences too long": (lambda run, tmp: ["max_length=65"], 2, "max_position_embeddings=64"),
    "NaN loss": (nan_weight, 6, "the loss of step 1 is nan"),
    "no such device": (lambda run, tmp: ["device=cuda:99"], 2, "device="),
    "curve refuses": (
        lambda run, tmp: ["lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs.min_lr=many"],
        2,
        "is refused",
    ),
    "nothing wrong": (break_nothing, 0, ""),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_its_code_and_writes_nothing(
    case: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, code, message = BAD_INPUT[case]
    folder = tmp_path / "runs" / "bad"
    config = settings(
        Path(run.config.datasets[0].path),
        folder,
        init_model=None,
        train_tokenizer_vocab_size=None,
        model_name_or_path=str(run.folder / "model"),
        max_steps=2,
    )
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    overrides = spoil(run, tmp_path)
    assert cli.main(["train", str(tmp_path / "run.yaml"), *overrides]) == code
    shown = capsys.readouterr().err
    if code == 0:  # the control: it is not the settings around the fault
        assert entries(folder) == RUN_FILES | {"checkpoint-2"}
        return
    assert message in shown and "hint: " in shown and "Traceback" not in shown
    assert len([line for line in shown.splitlines() if line.startswith("error: ")]) == 1
    assert not folder.parent.exists()


def test_not_enough_memory_ends_with_3_before_anything_is_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "available_host_bytes", lambda: 100_000)
    (tmp_path / "run.yaml").write_text(settings(text, tmp_path / "run").to_yaml())
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 3
    assert "short by" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_not_enough_disk_ends_with_3(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DoesNotFitError, match="disk space"):
        run_train.train(settings(text, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_at_the_export_leaves_metrics_and_no_half_model(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_train, "_save_beside", full)
    with pytest.raises(DoesNotFitError, match="No space left"):
        run_train.train(settings(text, tmp_path / "run", max_steps=2))
    assert entries(tmp_path / "run") == {"config.resolved.yaml", "metrics.jsonl", "checkpoint-2"}


def test_a_device_that_runs_out_of_memory_ends_with_3(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(HostModel, "train_step", out)
    with pytest.raises(DoesNotFitError, match="Tried to allocate") as caught:
        run_train.train(settings(text, tmp_path / "run"))
    assert caught.value.hint == "next smaller: boundaries=host"
    assert not (tmp_path / "run").exists()


# Numbers that are not finite, and runs that are stopped.


@pytest.fixture
def spoil_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Makes the losses of some calls NaN."""

    def spoil(calls: set[int]) -> None:
        honest, count = Engine._loss, iter(range(1, 1000))

        def loss(self: Engine, step: Any, op: Any) -> None:
            honest(self, step, op)
            if op.micro_batch == 0 and next(count) in calls:
                step.losses[op.micro_batch] = torch.tensor(math.nan)

        monkeypatch.setattr(Engine, "_loss", loss)

    return spoil


def test_skipped_steps_update_nothing_and_are_reported(
    text: Path,
    tmp_path: Path,
    built: list[HostModel],
    spoil_losses: Callable[[set[int]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil_losses({2, 3, 5})
    seen: list[dict[str, torch.Tensor]] = []
    add = run_train.Meter.add

    def look(self: Any, record: StepRecord) -> Metrics | None:
        seen.append(dict(built[0].named_parameters()))
        return add(self, record)

    monkeypatch.setattr(run_train.Meter, "add", look)
    config = settings(
        text, tmp_path / "run", max_steps=6, nonfinite="skip", max_skipped_steps=2, warmup_steps=0
    )
    run_train.train(config)
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(seen, seen[1:], strict=False)]
    assert same == [True, True, False, True, False]  # steps 2 to 6
    lines = read_steps(tmp_path / "run" / "metrics.jsonl")
    assert [line["loss"] is None for line in lines] == [False, True, True, False, True, False]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 3, 3]
    assert built[0].steps_done == 3
    assert capsys.readouterr().out.count("not updated") == 3


def test_steps_are_not_held_up_by_the_garbage_collector(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there before the first step is frozen, and no longer when the run has ended, or failed."""
    add, frozen = run_train.Meter.add, []

    def look(self: Any, record: StepRecord) -> Metrics | None:
        frozen.append(gc.get_freeze_count())
        if record.step == 3:
            raise RuntimeError("no luck")
        return add(self, record)

    monkeypatch.setattr(run_train.Meter, "add", look)
    run_train.train(settings(text, tmp_path / "run", max_steps=2))
    assert gc.get_freeze_count() == 0
    with pytest.raises(RuntimeError, match="no luck"):
        run_train.train(settings(text, tmp_path / "other", max_steps=3))
    assert gc.get_freeze_count() == 0
    assert len(frozen) == 5 and min(frozen) > 100_000


def test_too_many_skipped_steps_in_a_row_end_the_run(
    text: Path, tmp_path: Path, spoil_losses: Callable[[set[int]], None]
) -> None:
    spoil_losses({1, 3, 4, 5, 6})
    config = settings(text, tmp_path / "run", max_steps=9, nonfinite="skip", max_skipped_steps=3)
    with pytest.raises(NonFiniteError, match="4 steps in a row"):
        run_train.train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if line["event"] == "fault"] == [1, 3, 4, 5]
    assert (
        lines[-1]["event"] == "end" and lines[-1]["status"] == "failed" and "in a row" in lines[-1]["error"]
    )
    assert entries(tmp_path / "run") == {"config.resolved.yaml", "metrics.jsonl"}


def test_an_infinite_gradient_norm_is_a_skipped_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, norms = Engine.norm_of, iter([0.0, 0.0, math.inf])
    monkeypatch.setattr(Engine, "norm_of", lambda self, step: honest(self, step) + next(norms))
    run_train.train(settings(text, tmp_path / "run", max_steps=2, nonfinite="skip"))
    last = read_steps(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["grad_norm"] is None and last["skipped_steps"] == 1


def test_an_interrupted_run_keeps_its_metrics(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest, calls = HostModel.train_step, iter(range(1, 100))

    def train_step(self: HostModel, *arguments: Any, **options: Any) -> TrainStepOutput:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return honest(self, *arguments, **options)

    monkeypatch.setattr(HostModel, "train_step", train_step)
    (tmp_path / "run.yaml").write_text(settings(text, tmp_path / "run").to_yaml())
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 130
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "step", "step", "end"]
    assert lines[-1]["status"] == "interrupted"
    assert "the metrics so far" in capsys.readouterr().out


# The pieces.

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


def metrics(step: int, loss: float = 2.0) -> Metrics:
    return Metrics(step, 0.1, loss, 0.5, 1e-3, 1234.5, 0.42, 100, 90, 1.0, 0, 2_000_000_000, 5_000_000)


def record(step: int) -> StepRecord:
    return StepRecord(step, 0.1, 2.0, 0.5, 1e-3, 100, 0.01, False)


def test_plain_progress_prints_one_line_a_second_and_the_first_and_the_last() -> None:
    stream = io.StringIO()
    progress = choose_progress("auto", stream)  # not a terminal
    with progress:
        progress.start(500)
        for step in range(1, 501):
            progress.step(record(step), metrics(step, math.nan if step == 1 else 2.0))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "loss nan" in lines[0] and lines[1].startswith("step 500/500")
    assert (
        "1,234 tokens/s  mfu 42%" in lines[1]
        and "epoch 0.10" in lines[1]
        and "2.00 GB" in lines[1]
        and "5.00 MB" in lines[1]
    )


def test_rich_progress_shows_the_numbers_and_no_progress_shows_none() -> None:
    stream = io.StringIO()
    progress = choose_progress("rich", stream)
    assert isinstance(progress, RichProgress)
    with progress:
        progress.start(10)
        for step in range(1, 11):
            progress.step(record(step), metrics(step) if step % 2 == 0 else None)
        progress.warn("a [red]warning")
    shown = stream.getvalue()
    for part in (
        "step 10/10",
        "2.0000",
        "1.00e-03",
        "1,234",
        "2.00 GB",
        "5.00 MB",
        "0:00 left",
        "a [red]warning",
    ):
        assert part in shown
    silent = io.StringIO()
    with choose_progress("off", silent) as progress:
        progress.start(1)
        progress.step(record(1), metrics(1))
    assert silent.getvalue() == ""


def test_small_formats() -> None:
    assert (clock(59.7), clock(61), clock(3661)) == ("1:00", "1:01", "1:01:01")
    assert sparkline([]) == "" and sparkline([3.0]) == "▁" and sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([float(-i) for i in range(100)], 8) == "█▇▆▅▄▃▂▁"
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smoothed([1.0, math.nan, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert np.std(smoothed([0.0, 1.0] * 100)[50:]) < 0.1
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("é", ascii_only)
    assert ascii_only.buffer.getvalue() == b"?\n"  # type: ignore[attr-defined]


def test_a_sample_is_skipped_where_it_would_not_fit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample.reason_to_skip(run.folder / "model") is None
    monkeypatch.setattr(sample, "available_host_bytes", lambda: 3 * sample.weight_bytes(run.folder / "model"))
    reason = sample.reason_to_skip(run.folder / "model")
    assert reason is not None and "are free" in reason


def test_a_sample_is_the_greedy_completion(run: Run) -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "trust_remote_code": False, "temperature": 0}
    made = sample.complete(run.folder / "model", "the store", max_new_tokens=6, **options)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model").eval()
    ids = tokenizer("the store").input_ids
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert made.prompt == "the store"
    assert "the store" + made.completion == tokenizer.decode(ids, skip_special_tokens=True)
    empty = sample.complete(run.folder / "model", "", max_new_tokens=2, **options)
    assert empty.prompt == ""


def test_a_sample_is_drawn_with_a_fixed_seed(run: Run) -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "trust_remote_code": False}
    made = [
        sample.complete(run.folder / "model", "the store", max_new_tokens=12, temperature=t, **options)
        for t in (2.0, 2.0, 0.0)
    ]
    assert made[0] == made[1] != made[2]


def test_metrics_of_a_killed_run_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert read_steps(path) == [{"event": "step", "step": 1}]
