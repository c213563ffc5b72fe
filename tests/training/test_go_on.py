"""A run goes on: past its end, from another folder, without the model or the place that it began with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.config import yaml as config_yaml
from horizon_lm.data import train_tokenizer
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.training import checkpoint_series as series
from horizon_lm.training import prepare
from horizon_lm.training import save as saver
from horizon_lm.training.run_settings import absolute
from horizon_lm.training.train import train
from small_runs import LLAMA, losses_of, place_of, settings, tensors_of, write_text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


def names_of(run: Path) -> set[str]:
    return {path.name for path in run.glob("*checkpoint-*")}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def are_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# Past the end.


def test_a_finished_run_is_gone_on_with_from_its_end(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a constant rate 4 + 2 steps are 6; updates are deferred, so the end has to be flushed."""
    common = {"save_steps": 3, "lr_scheduler_type": "constant", "warmup_steps": 0, "dtype": "bfloat16"}
    run, straight = tmp_path / "run", tmp_path / "straight"
    train(settings(text, straight, max_steps=6, **common))
    train(settings(text, run, max_steps=4, **common))
    assert (
        names_of(run) == {"checkpoint-3", "checkpoint-4"} and events(run, "end")[-1]["status"] == "finished"
    )
    order = [json.loads(line)["event"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert order[-2:] == ["checkpoint", "end"]  # it is on the disk before the run says that it is finished
    four = (run / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()

    assert cli.main(["resume", str(run), "max_steps=6"]) == 0
    shown = capsys.readouterr().out
    assert f"resumed from {run / 'checkpoint-4'}, after step 4\n" in shown and "done again" not in shown
    assert (
        "max_steps was 4, is 6: the learning rate follows the curve of 6 steps and goes on at 5.00e-03"
        in shown
    )
    assert [line["step"] for line in events(run, "resume")] == [4]
    assert losses_of(run) == losses_of(straight) and len(losses_of(run)) == 6
    assert tensors_of(run / "checkpoint-6") == tensors_of(straight / "checkpoint-6")
    assert place_of(run / "checkpoint-6") == place_of(straight / "checkpoint-6")
    assert are_equal(weights(run / "model"), weights(straight / "model"))
    assert (run / "model" / "model.safetensors").read_bytes() != four
    assert TrainConfig.from_yaml(run / "config.resolved.yaml").max_steps == 6


def test_without_its_end_steps_are_done_again_and_that_is_said(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control of the test above, and the same through `train`."""
    run = tmp_path / "run"
    config = settings(text, run, max_steps=5, save_steps=3, save_last=False)
    train(config)
    assert names_of(run) == {"checkpoint-3"}
    capsys.readouterr()
    train(config.replace(max_steps=6, resume_from_checkpoint="latest"))
    shown = capsys.readouterr().out
    assert f"resumed from {run / 'checkpoint-3'}, after step 3; steps 4-5 are done again\n" in shown
    assert "max_steps was 5, is 6: the learning rate follows the curve of 6 steps" in shown
    assert [step for step, _ in losses_of(run)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_says_so_and_how_to_go_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(settings(text, run, max_steps=2, save_steps=9))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(prepare, "load_training_data", None)
    capsys.readouterr()
    assert cli.main(["resume", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{run}: this run is finished (2 of 2 steps); its model is in {run / 'model'}",
        f"to train further: horizon resume {run} max_steps=3",
    ]
    assert cli.main(["resume", str(run), "max_steps=1"]) == 2  # also before anything is read
    shown = capsys.readouterr().err
    assert "max_steps=1: the run would have 1 step," in shown and "max_steps=3 trains further" in shown
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_epochs_make_a_run_longer_too(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the run was as long as max_steps said, which would win over num_train_epochs."""
    run = tmp_path / "run"
    train(settings(text, run, max_steps=2, per_device_train_batch_size=64))
    assert cli.main(["resume", str(run), "num_train_epochs=2"]) == 0
    shown = capsys.readouterr()
    assert "'num_train_epochs' replaces the run's max_steps=2" in shown.err
    assert "num_train_epochs was 1.0, is 2.0" in shown.out
    assert losses_of(run)[-1][0] > 2 and events(run, "step")[-1]["epoch"] >= 1.9


@pytest.mark.parametrize(
    ("changes", "small", "kept"),
    [
        ({"save_last": "auto", "save_steps": 2}, 0, True),  # it is long enough for others
        ({"save_last": "auto", "save_steps": 9}, 0, False),
        ({"save_last": "auto", "save_steps": 9}, 1 << 40, True),  # it is small
        ({"save_last": True, "save_steps": 9}, 0, True),
        ({"save_last": False, "save_steps": 2}, 1 << 40, False),
        ({"save_last": True, "save_strategy": "no"}, 1 << 40, False),
    ],
    ids=str,
)
def test_when_the_end_is_kept(
    changes: dict[str, Any],
    small: int,
    kept: bool,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saver, "_SMALL", small)
    train(settings(text, tmp_path / "run", max_steps=3, **changes))
    assert ("checkpoint-3" in names_of(tmp_path / "run")) == kept


def test_a_disk_without_room_for_the_end_fails_no_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has room for the model, which matters more, and the settings allow no failed checkpoint."""
    monkeypatch.setattr(
        series.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 400_000)
    )
    run = tmp_path / "run"
    train(settings(text, run, max_steps=2, save_steps=9, max_failed_saves=0))
    shown = capsys.readouterr().out
    assert "warning: no checkpoint of step 2: it and the trained model need" in shown
    assert names_of(run) == set() and (run / "model" / "model.safetensors").is_file()
    assert events(run, "end")[-1]["status"] == "finished"


def test_the_end_counts_among_the_checkpoints_that_are_kept(text: Path, tmp_path: Path) -> None:
    train(settings(text, tmp_path / "run", max_steps=5, save_steps=2, save_total_limit=1))
    assert names_of(tmp_path / "run") == {"checkpoint-5"}


def test_all_steps_done_in_a_new_folder_leave_a_whole_run(straight: Project, tmp_path: Path) -> None:
    source = straight.ref / "checkpoint-4"
    config = TrainConfig.from_yaml(straight.ref / "config.resolved.yaml")
    result = train(config.replace(output_dir=str(tmp_path / "new"), resume_from_checkpoint=str(source)))
    assert are_equal(weights(tmp_path / "new" / "model"), weights(straight.ref / "model"))
    assert [line["step"] for line in events(tmp_path / "new", "resume")] == [4]
    assert result.num_steps == 4 and result.tail_loss == result.final_loss


# From another folder.


class Project(NamedTuple):
    """home: a project with models/tiny, data/, run.yaml (paths relative to it) and runs/a, 4 steps with a
    checkpoint at 2 and 4. ref: a copy of the run as it was."""

    home: Path
    ref: Path


RUN = """
model_name_or_path: models/tiny
datasets: data/train.txt
max_length: 16
per_device_train_batch_size: 2
max_steps: 4
learning_rate: 5.0e-3
device: cpu
reserve_host_gb: 0
peak_tflops: 1
plot_loss: false
progress: plain
save_steps: 2
save_total_limit: null
dataset_cache_dir: null
output_dir: runs/a
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Trained in bf16, so that the masters have a residual."""
    home = tmp_path_factory.mktemp("projects") / "home"
    (home / "data").mkdir(parents=True)
    lines = write_text(home / "data" / "train.txt").read_text().splitlines()
    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, bos_token_id=0, eos_token_id=0, **values))
    model.save_pretrained(home / "models" / "tiny")
    train_tokenizer(lines, 300).save_pretrained(home / "models" / "tiny")
    (home / "run.yaml").write_text(RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert cli.main(["train", "run.yaml"]) == 0
    return Project(home, shutil.copytree(home / "runs" / "a", home.parent / "ref"))


@pytest.fixture
def project(straight: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A copy of the project as it was after step 2, at another place; we are elsewhere."""
    home = shutil.copytree(straight.home, tmp_path / "home")
    shutil.rmtree(home / "runs" / "a" / "checkpoint-4")
    shutil.rmtree(home / "runs" / "a" / "model")
    settings_file = home / "runs" / "a" / "config.resolved.yaml"
    settings_file.write_text(settings_file.read_text().replace(str(straight.home), str(home)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Project(home, straight.ref)


def check_ends_as(run: Path, ref: Path) -> None:
    assert tensors_of(run / "checkpoint-4") == tensors_of(ref / "checkpoint-4")
    assert place_of(run / "checkpoint-4") == place_of(ref / "checkpoint-4")
    assert are_equal(weights(run / "model"), weights(ref / "model"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "README.md"):
        assert (run / "model" / name).read_bytes() == (ref / "model" / name).read_bytes(), name


def test_paths_are_kept_absolute_and_names_as_they_are(
    straight: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = straight.home
    written = config_yaml.read_file(straight.ref / "config.resolved.yaml").values
    assert written["model_name_or_path"] == str(home / "models" / "tiny")
    assert written["datasets"][0]["path"] == str(home / "data" / "train.txt")
    assert written["output_dir"] == str(home / "runs" / "a")
    then = json.loads((straight.ref / "checkpoint-4" / "manifest.json").read_text())["config"]
    assert then["model_name_or_path"] == written["model_name_or_path"]
    monkeypatch.chdir(home)
    (home / "own.jinja").write_text("{{ messages }}")
    names = {
        "model_name_or_path": "owner/model",
        "tokenizer_name_or_path": "gpt2",
        "chat_template": "chatml",
        "datasets": ["python-stdlib", "owner/data", {"path": "data/*.txt"}],
        "eval_datasets": ["absent.jsonl"],
    }
    found = absolute(TrainConfig.from_dict(names))
    for key in ("model_name_or_path", "tokenizer_name_or_path", "chat_template", "dataset_cache_dir"):
        assert getattr(found, key) == TrainConfig.from_dict(names).to_dict()[key]
    assert [entry.path for entry in found.datasets] == [
        "python-stdlib",
        "owner/data",
        str(home / "data" / "*.txt"),
    ]
    assert found.eval_datasets[0].path == str(home / "absent.jsonl")
    other = {
        **names,
        "chat_template": "own.jinja",
        "dataset_cache_dir": "kept",
        "resume_from_checkpoint": "x",
    }
    found = absolute(TrainConfig.from_dict(other))
    assert found.chat_template == str(home / "own.jinja") and found.dataset_cache_dir == str(home / "kept")
    assert found.resume_from_checkpoint == str(home / "x")


def test_resumed_from_another_directory(project: Project) -> None:
    run = project.home / "runs" / "a"
    assert cli.main(["resume", os.path.relpath(run)]) == 0
    check_ends_as(run, project.ref)


def test_a_run_of_before_with_relative_paths_is_found_again(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """config.resolved.yaml as earlier versions wrote it, with fewer settings."""
    run = project.home / "runs" / "a"
    old = (run / "config.resolved.yaml").read_text().replace(str(project.home) + "/", "")
    old = "".join(line for line in old.splitlines(keepends=True) if not line.startswith("save_last:"))
    assert "models/tiny" in old and str(project.home) not in old
    (run / "config.resolved.yaml").write_text(old)
    assert cli.main(["resume", str(run)]) == 0
    check_ends_as(run, project.ref)
    shutil.rmtree(run / "model")
    moved = shutil.move(run, project.home.parent / "alone")  # the control: nothing says any more where it was
    (moved / "config.resolved.yaml").write_text(old)
    assert cli.main(["resume", str(moved)]) == 4
    shown = capsys.readouterr().err
    assert "error: data/train.txt does not exist" in shown and "datasets=NEW" in shown


def test_a_project_and_a_run_may_move(project: Project) -> None:
    """Together: what moved with the run is found beside it. Then the run alone: its paths still hold."""
    home = shutil.move(project.home, project.home.parent / "new home")
    assert cli.main(["resume", str(home / "runs" / "a")]) == 0
    check_ends_as(home / "runs" / "a", project.ref)
    (home.parent / "alone").mkdir()
    alone = Path(shutil.move(home / "runs" / "a", home.parent / "alone"))
    shutil.rmtree(alone / "checkpoint-4")
    shutil.rmtree(alone / "model")
    assert cli.main(["resume", str(alone)]) == 0
    check_ends_as(alone, project.ref)


def test_a_model_that_is_gone_is_no_obstacle(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = project.home / "runs" / "a"
    shutil.rmtree(project.home / "models")
    assert cli.main(["resume", str(run)]) == 0
    name = str(project.home / "models" / "tiny")
    assert (
        f"model_name_or_path={name!r} does not exist; {run / 'checkpoint-2'} replaces it"
        in capsys.readouterr().out
    )
    check_ends_as(run, project.ref)
    assert TrainConfig.from_yaml(run / "config.resolved.yaml").model_name_or_path == name
    # The control: without a checkpoint the model is needed.
    arguments = [
        "train",
        str(run / "config.resolved.yaml"),
        "output_dir=other",
        "resume_from_checkpoint=null",
    ]
    assert cli.main(arguments) == 2
    assert "models/tiny' is not a folder" in capsys.readouterr().err


def test_a_model_with_code_of_its_own_has_to_be_there(project: Project) -> None:
    from horizon_lm.training import build

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match="code of its own") as caught:
        patch.setattr(build, "has_own_code", lambda checkpoint: True)
        shutil.rmtree(project.home / "models")
        config = TrainConfig.from_yaml(project.home / "runs" / "a" / "config.resolved.yaml")
        train(config.replace(resume_from_checkpoint="latest"))
    assert caught.value.hint and "model_name_or_path=NEW" in caught.value.hint


def test_moved_data_and_a_moved_model_are_taken_by_their_content(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    run, home = project.home / "runs" / "a", project.home
    data, model = home.parent / "d.txt", home.parent / "m"
    shutil.move(home / "data" / "train.txt", data)
    shutil.move(home / "models" / "tiny", model)
    assert cli.main(["resume", str(run)]) == 4
    shown = capsys.readouterr().err
    assert f"error: {home / 'data' / 'train.txt'} does not exist" in shown and "hint: datasets=NEW" in shown
    # Two controls: other words, and another model.
    (home / "other.txt").write_text(data.read_text().replace("store", "stove"))
    assert cli.main(["resume", str(run), f"datasets={home / 'other.txt'}"]) == 4
    assert "the data has changed" in capsys.readouterr().err
    other = shutil.copytree(model, home / "other")
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 0.5}))
    assert cli.main(["resume", str(run), f"datasets={data}", f"model_name_or_path={other}"]) == 2
    assert "rms_norm_eps was 1e-06, is 0.5" in capsys.readouterr().err
    assert cli.main(["resume", str(run), f"datasets={data}", f"model_name_or_path={model}"]) == 0
    readme = run / "model" / "README.md"
    readme.write_text(readme.read_text().replace("d.txt", "train.txt").replace("`m`", "`tiny`"))
    check_ends_as(run, project.ref)


def test_tokens_in_the_cache_are_known_by_content_alone(project: Project, tmp_path: Path) -> None:
    from horizon_lm.data import load_training_data

    config = TrainConfig.from_yaml(project.home / "run.yaml", [f"dataset_cache_dir={tmp_path / 'cache'}"])
    name, found = str(project.home / "models" / "tiny"), []
    for place in ("a", "b"):
        data = Path(shutil.copytree(project.home / "data", tmp_path / place)) / "train.txt"
        found.append(load_training_data(config.replace(model_name_or_path=name, datasets=str(data))))
    assert [one.was_cached for one in found] == [False, True]
    assert found[0].rows.fingerprint == found[1].rows.fingerprint


def test_a_tokenizer_that_is_gone_is_no_obstacle(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Beside init_model, whose weights no folder holds."""
    tokenizer = train_tokenizer(text.read_text().splitlines(), 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = {"train_tokenizer_vocab_size": None, "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    config = settings(text, tmp_path / "run", max_steps=3, save_steps=2, **own)
    train(config)
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "three")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    shutil.rmtree(tmp_path / "tokenizer")
    honest, taken = HostModel.train_step, []
    monkeypatch.setattr(HostModel, "train_step", lambda *a, **k: taken.append(1) or honest(*a, **k))
    train(config.replace(resume_from_checkpoint="latest"))
    assert taken == [1] and tensors_of(tmp_path / "run" / "checkpoint-3") == tensors_of(tmp_path / "three")
