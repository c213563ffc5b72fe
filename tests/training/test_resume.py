"""N steps, stopped, and M more equal N + M: the same bits of weights, residuals, moments; the same losses."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest
import torch

from adversarial import lanes_of
from horizon_lm import cli
from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.config import TrainConfig
from horizon_lm.config.base import ResumeRule, resumable
from horizon_lm.errors import CheckpointError, ConfigError, DataError, NonFiniteError, StoppedError
from horizon_lm.host_model import HostModel, TrainStepOutput
from horizon_lm.plan.step_size import CUT
from horizon_lm.training.resume import check_settings
from horizon_lm.training.train import train
from sizes import SOAK
from small_runs import GPT2_DROPOUT, losses_of, place_of, settings, tensors_of, values
from stopped_runs import STEPS, stop_at
from stopped_runs import straight as straight
from stopped_runs import text as text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


def fail_before(patch: pytest.MonkeyPatch, step: int, error: Exception) -> None:
    """A step fails before any of it has run."""
    honest, calls = HostModel.train_step, iter(range(1, 1000))

    def train_step(self: HostModel, *arguments: Any, **others: Any) -> TrainStepOutput:
        if next(calls) == step:
            raise error
        return honest(self, *arguments, **others)

    patch.setattr(HostModel, "train_step", train_step)


# Cuts and modes.


# The first checkpoint and those beside it, one in the middle, the last.
CUTS = range(1, STEPS) if SOAK else (1, 2, 3, STEPS // 2, STEPS - 1)


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_at_any_step_changes_no_bit(cut: int, straight: Path, text: Path, tmp_path: Path) -> None:
    """From each of the 19 checkpoints in `make soak`, into a folder of its own."""
    source = straight / f"checkpoint-{cut}"
    train(
        settings(
            text,
            tmp_path / "run",
            max_steps=STEPS,
            save_steps=STEPS,
            resume_from_checkpoint=str(source),
        )
    )
    last = f"checkpoint-{STEPS}"
    assert tensors_of(tmp_path / "run" / last) == tensors_of(straight / last)
    assert place_of(tmp_path / "run" / last) == place_of(straight / last)
    assert losses_of(tmp_path / "run") == losses_of(straight)[cut:]
    assert json.loads((tmp_path / "run" / last / "manifest.json").read_text())["parent"] == str(source)


def test_the_comparison_notices_a_difference(straight: Path) -> None:
    """The control of the tests above."""
    one, two = straight / f"checkpoint-{STEPS}", straight / f"checkpoint-{STEPS - 1}"
    assert tensors_of(one) != tensors_of(two) and place_of(one) != place_of(two)


UPDATES = ("sync", "deferred", "eager")
# What may be otherwise after the resume, beside the update mode: lanes, slots, what a layer keeps, threads.
OTHERWISE: list[dict[str, Any]] = [
    {"lanes": "adversarial", "slots": 3, "optimizer_threads": 1},
    {"activations": "keep", "lanes": "adversarial", "grad_slots": 3},
    {"boundaries": "host", "checkpoint_interval": 2, "optimizer_threads": 2},
]


@pytest.mark.parametrize(
    ("number", "update", "dtype", "moments"),
    [(i, *row) for i, row in enumerate(product(UPDATES, ("float32", "bfloat16"), ("float32", "bfloat16")))],
)
def test_every_mode_goes_on_with_the_same_bits(
    number: int, update: str, dtype: str, moments: str, text: Path, tmp_path: Path
) -> None:
    """12 combinations; resumed with another update mode, other lanes and another number of threads."""
    free = {"max_grad_norm": None} if number % 2 else {"max_grad_norm": 1.0}
    if "eager" in (update, UPDATES[(number // 4 + 1) % 3]):
        free = {"max_grad_norm": None}
    changes = {
        "dtype": dtype,
        "moment_dtype": moments,
        "gradient_accumulation_steps": 1 + 2 * (number % 2),
        "weight_decay": 0.1,
        "save_steps": 2,
        "max_steps": 4,
        **free,
    }
    train(settings(text, tmp_path / "straight", update=update, **changes))
    other = {"update": UPDATES[(number // 4 + 1) % 3], **OTHERWISE[number % 3]}
    source = tmp_path / "straight" / "checkpoint-2"
    torch.set_num_threads(2)
    try:
        changes |= other
        with lanes_of(changes):
            train(settings(text, tmp_path / "run", resume_from_checkpoint=str(source), **changes))
    finally:
        torch.set_num_threads(1)
    assert tensors_of(tmp_path / "run" / "checkpoint-4") == tensors_of(tmp_path / "straight" / "checkpoint-4")
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")[2:]


@pytest.mark.parametrize(
    "changes",
    [
        {"init_model": GPT2_DROPOUT},  # dropout, and a table that is tied to the head
        {"optim": "lion"},
        {"optim": "sgd", "sgd_momentum": 0.9},
        {"streaming": True, "buffer_size": 4},
        {"packing_strategy": "bfd", "truncation": "split"},
        {"dataloader_num_workers": 0, "num_train_epochs": 3.0},
        {"val_size": 0.2, "eval_strategy": "steps", "eval_steps": 2},
        {"loss_spike": "warn", "loss_spike_window": 5},
    ],
    ids=lambda c: "-".join(c),
)
def test_other_runs_go_on_with_the_same_bits(changes: dict[str, Any], text: Path, tmp_path: Path) -> None:
    if "streaming" in changes or "packing_strategy" in changes or "val_size" in changes:
        lines = text.read_text().splitlines()
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
        text = tmp_path / "rows.jsonl"
    common = {"max_steps": 6, "save_steps": 3, **changes}
    train(settings(text, tmp_path / "straight", **common))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(StoppedError):
            train(settings(text, tmp_path / "run", **common))
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    one, two = tmp_path / "straight" / "checkpoint-6", tmp_path / "run" / "checkpoint-6"
    assert tensors_of(one) == tensors_of(two) and place_of(one) == place_of(two)
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")


# What is resumed, and what is refused.


def test_a_finished_run_is_exported_again_and_not_trained_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(text, tmp_path / "run", max_steps=4, save_steps=4))
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model" / "model.safetensors").unlink()
    monkeypatch.setattr(HostModel, "train_step", None)
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before


def test_latest_is_what_manifests_say_not_what_names_say(text: Path, tmp_path: Path) -> None:
    """Gone back to an older checkpoint and on from there: the higher number is the older one."""
    run = tmp_path / "run"
    train(settings(text, run, max_steps=4, save_steps=1))
    changed = {"learning_rate": 1e-4, "allow_changed_settings": True}
    source = str(run / "checkpoint-2")
    train(settings(text, run, max_steps=3, resume_from_checkpoint=source, **changed))
    names = {path.name for path in run.glob("checkpoint-*")}
    assert {"checkpoint-3", "checkpoint-4"} < names and len(names) == 5
    newer = next(iter(names - {f"checkpoint-{i}" for i in range(1, 5)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostModel, "train_step", None)  # it resumes at step 3 of 3, not at 4
        patch.setattr("builtins.print", lambda *a, **k: None)
        train(settings(text, run, max_steps=3, resume_from_checkpoint="latest", **changed))
    assert newer.startswith("checkpoint-3-")


def test_auto_begins_where_there_is_nothing_and_resumes_where_there_is(text: Path, tmp_path: Path) -> None:
    steps = {"max_steps": 3, "save_steps": 2, "save_last": False}
    config = settings(text, tmp_path / "run", **steps, resume_from_checkpoint="auto")
    train(config)
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines if line["event"] == "resume"] == [2]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        train(settings(text, tmp_path / "other", resume_from_checkpoint="latest"))
    assert not (tmp_path / "other").exists()


def test_a_run_killed_as_it_wrote_its_first_file_can_begin_again(text: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.resolved.yaml.tmp").write_text("dty")
    config = settings(text, tmp_path / "run", max_steps=2, resume_from_checkpoint="auto")
    train(config)
    assert not (tmp_path / "run" / ".config.resolved.yaml.tmp").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "draft.txt").write_text("mine")  # the control: what is not ours is refused
    with pytest.raises(ConfigError, match="not empty"):
        train(config.replace(output_dir=str(tmp_path / "other")))


CHANGES: list[tuple[dict[str, Any], bool | None]] = [  # and whether a yes helps; None: none is needed
    ({"learning_rate": 1e-3}, True),
    ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, True),
    ({"weight_decay": 0.5}, True),
    ({"seed": 1}, True),
    ({"max_grad_norm": 0.1}, True),
    ({"adam_beta2": 0.9}, True),
    ({"lr_scheduler_type": "linear"}, True),
    ({"loss_chunk_tokens": 4}, True),
    ({"dtype": "bfloat16"}, False),
    ({"moment_dtype": "bfloat16"}, False),
    ({"optim": "sgd"}, False),
    ({"logging_steps": 2, "slots": 4, "save_steps": 7, "run_name": "x", "update": "sync"}, None),
]


@pytest.mark.parametrize(("changes", "helps"), CHANGES, ids=str)
def test_changed_settings_that_alter_results_are_named_and_need_a_yes(
    changes: dict[str, Any], helps: bool | None, straight: Path, text: Path, tmp_path: Path
) -> None:
    source = {"resume_from_checkpoint": str(straight / f"checkpoint-{STEPS - 1}"), "max_steps": STEPS}
    config = settings(text, tmp_path / "run", **{**source, **changes})
    if helps is None:
        train(config)
        return
    with pytest.raises(ConfigError) as caught:
        train(config)
    for key, value in changes.items():
        assert f"{key} was " in caught.value.message and f"is {value!r}" in caught.value.message
    assert not (tmp_path / "run").exists()
    yes = config.replace(allow_changed_settings=True)
    if helps:
        assert caught.value.hint and "allow_changed_settings=true" in caught.value.hint
        train(yes)
    else:
        with pytest.raises(ConfigError, match="cannot be changed"):
            train(yes)


def test_settings_of_datasets_that_are_newer_than_a_run_do_not_stop_it(text: Path, tmp_path: Path) -> None:
    """A manifest of before has entries of datasets without the keys that came later."""
    config = settings(text, tmp_path / "run", eval_datasets=str(text))
    then = config.to_dict()
    for key in ("datasets", "eval_datasets"):
        then[key] = [
            {k: v for k, v in entry.items() if k not in ("tags", "max_samples")} for entry in then[key]
        ]
    for key in ("max_samples", "dataset_dir"):
        del then[key]
    check_settings(config, saved_with(then, tmp_path))
    limited = config.replace(datasets=[{"path": str(text), "max_samples": 3}])
    with pytest.raises(ConfigError, match="datasets was"):  # the control
        check_settings(limited, saved_with(then, tmp_path))


def saved_with(config: dict[str, Any], run: Path) -> Checkpoint:
    """What `check_settings` looks at of a checkpoint."""
    manifest = SimpleNamespace(config=config, files={})
    return cast(Checkpoint, SimpleNamespace(manifest=manifest, path=run / "checkpoint-1"))


@pytest.mark.parametrize("rule", get_args(ResumeRule))
def test_every_setting_says_whether_a_resume_may_change_it(rule: ResumeRule, tmp_path: Path) -> None:
    """A new setting is declared `ask` until somebody shows that it changes no bit."""
    config = settings(tmp_path / "text.txt", tmp_path / "run")
    # auto takes over the saved run's
    config = config.replace(loss_chunk_tokens=64, method="sft", reduction="exact")
    allowing = config.replace(allow_changed_settings=True)
    for key in resumable(TrainConfig, rule) - {"allow_changed_settings"}:
        then = saved_with({**config.to_dict(), key: ["another", "value"]}, tmp_path)
        if rule in ("ask", "fixed"):
            with pytest.raises(ConfigError, match=f"{key} was"):
                check_settings(config, then)
        else:
            check_settings(config, then)
        if rule == "fixed":
            with pytest.raises(ConfigError, match=f"{key} was"):
                check_settings(allowing, then)
        else:
            check_settings(allowing, then)


def test_each_rule_has_its_settings() -> None:
    names = {rule: resumable(TrainConfig, rule) for rule in get_args(ResumeRule)}
    assert sum(map(len, names.values())) == len(TrainConfig.model_fields)  # each has one
    assert frozenset.union(*names.values()) == TrainConfig.model_fields.keys()
    assert {"learning_rate", "seed", "datasets", "max_length", "warmup_steps", "device"} < names["ask"]
    adapter = {"adapter", "lora_r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"}
    trained = {"modules_to_save", "train", "train_projector", "freeze", "base_dtype"}
    assert (
        names["fixed"] == {"dtype", "moment_dtype", "optim", "init_model", "new_tokens"} | adapter | trained
    )
    assert names["length"] == {"max_steps", "num_train_epochs"}


def test_other_data_are_refused(straight: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "text.txt"
    other.write_text(text.read_text().replace("store", "stove"))
    config = settings(
        other,
        tmp_path / "run",
        max_steps=STEPS,
        resume_from_checkpoint=str(straight / "checkpoint-5"),
        allow_changed_settings=True,
        train_tokenizer_vocab_size=300,
    )
    with pytest.raises((DataError, CheckpointError), match="data has changed|needs|tokenizer is not"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_keep_last_and_keep_every(text: Path, tmp_path: Path) -> None:
    config = settings(
        text, tmp_path / "run", max_steps=10, save_steps=1, save_total_limit=2, save_keep_every=4
    )
    train(config)
    names = {path.name for path in (tmp_path / "run").glob("*checkpoint-*")}
    assert names == {"checkpoint-4", "checkpoint-8", "checkpoint-9", "checkpoint-10"}


def test_other_times_to_save(text: Path, tmp_path: Path) -> None:
    names = {}
    for strategy, more in (
        ("no", {}),
        ("epoch", {"per_device_train_batch_size": 64, "max_steps": -1, "num_train_epochs": 2.0}),
        ("time", {"save_minutes": 1e-7, "max_steps": 3}),
        ("steps", {"save_steps": 50, "save_first_step": True, "max_steps": 3}),
    ):
        run = tmp_path / strategy
        train(settings(text, run, save_strategy=strategy, save_last=False, **more))
        names[strategy] = sorted(path.name for path in run.glob("*checkpoint-*"))
    assert names["no"] == [] and names["steps"] == ["checkpoint-1"]
    assert names["time"] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert len(names["epoch"]) == 2


def test_resume_without_a_value_means_latest() -> None:
    from horizon_lm.cli.run import split_arguments

    latest = "--resume_from_checkpoint=latest"
    assert split_arguments(["a.yaml", "--resume"]) == ("a.yaml", [latest])
    assert split_arguments(["--resume", "a.yaml", "x=1"]) == ("a.yaml", [latest, "x=1"])
    assert split_arguments(["a.yaml", "--resume", "x=1"]) == ("a.yaml", [latest, "x=1"])
    assert split_arguments(["a.yaml", "--resume", "runs/a"]) == (
        "a.yaml",
        ["--resume_from_checkpoint=runs/a"],
    )


@pytest.mark.parametrize("arguments", [[], ["absent"], ["."], ["--lr=1"]])
def test_resume_of_no_run_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(["resume", *arguments])
    shown = capsys.readouterr().err.splitlines()
    assert code == (2 if not arguments or arguments[0].startswith("-") else 5)
    assert len(shown) == 2 and shown[0].startswith("error: ") and shown[1].startswith("hint: ")


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_asked_for_is_written_although_no_step_comes_after_it(
    background: bool, straight: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written beside the next step, it would be lost with data that end in an error."""
    fail_before(monkeypatch, 5, DataError("row 9 cannot be read"))
    run = tmp_path / "run"
    config = settings(text, run, max_steps=STEPS, save_steps=4, save_in_background=background)
    with pytest.raises(DataError, match="row 9"):
        train(config)
    assert tensors_of(run / "checkpoint-4") == tensors_of(straight / "checkpoint-4")
    assert place_of(run / "checkpoint-4") == place_of(straight / "checkpoint-4")
    assert not list(run.glob("*tmp*"))


def test_a_rollback_before_the_next_step_has_begun_writes_the_checkpoint_of_its_own_step(
    straight: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the step after it would write the state that was gone back to under the name of a later one."""
    fail_before(monkeypatch, 5, NonFiniteError("before anything ran"))
    run = tmp_path / "run"
    train(settings(text, run, max_steps=STEPS, save_steps=4, nonfinite="rollback", max_rollbacks=1))
    assert tensors_of(run / "checkpoint-4") == tensors_of(straight / "checkpoint-4")


def test_a_run_of_tokens_per_step_goes_on_with_its_cut(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The planner's cut into micro-batches stays: with the folder's settings, and with the file's."""
    open_cut = {k: v for k, v in values(text, tmp_path / "run").items() if k not in CUT}
    config = tmp_path / "run.json"
    config.write_text(json.dumps({**open_cut, "tokens_per_step": 64, "max_steps": 6}))  # JSON is YAML
    assert cli.main(["train", str(config)]) == 0
    run = tmp_path / "run"
    manifest = json.loads((run / "checkpoint-6" / "manifest.json").read_text())["config"]
    size, count = (manifest[key] for key in CUT)
    assert size * count == 4
    weights = tensors_of(run / "checkpoint-6")
    shutil.rmtree(run / "checkpoint-6")
    assert cli.main(["resume", str(run), "save_steps=2"]) == 0
    assert tensors_of(run / "checkpoint-6") == weights
    for damaged in (run / "checkpoint-6", run / "checkpoint-5"):
        shutil.rmtree(damaged)
    assert cli.main(["train", str(config), "--resume"]) == 0
    assert tensors_of(run / "checkpoint-6") == weights
    # Settings of a run that did not keep its cut hold the defaults; a cut that is named must be that of then.
    with (run / "config.resolved.yaml").open("a") as file:
        file.write("".join(f"\n{key}: 1" for key in CUT) + "\n")
    assert cli.main(["resume", str(run), "max_steps=7"]) == 0
    capsys.readouterr()
    named = 1 if size != 1 else 2
    other = f"per_device_train_batch_size={named}"
    assert cli.main(["train", str(config), "--resume", "max_steps=8", other]) == 2
    assert "per_device_train_batch_size was" in capsys.readouterr().err


def test_resume_says_that_it_goes_on_in_the_run_itself(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["resume", str(straight), f"output_dir={tmp_path / 'new'}"]) == 2
    shown = capsys.readouterr().err
    assert "resume does not take output_dir" in shown and "horizon train" in shown


def test_names_of_dataset_dir_are_kept_as_the_files_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a relative dataset_dir goes on from another directory."""
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    rows = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(12)]
    (tmp_path / "data" / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json"}}))
    monkeypatch.chdir(tmp_path)
    changes = {"datasets": "mine", "dataset_dir": "data", "chat_template": "plain", "max_length": 32}
    train(settings(tmp_path, Path("run"), **changes, max_steps=2))
    kept = TrainConfig.from_yaml("run/config.resolved.yaml")
    assert kept.dataset_dir is None and kept.datasets[0].path == str(tmp_path / "data" / "rows.json")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["resume", "../run", "max_steps=3"]) == 0
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
