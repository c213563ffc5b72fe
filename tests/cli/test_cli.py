"""The command `horizon`: answers at once, ends with the documented codes, and says what to do."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import horizon_lm
from horizon_lm import cli, errors
from horizon_lm.cli import run as run_verbs
from horizon_lm.config import TrainConfig, shipped
from horizon_lm.config import yaml as config_yaml

SOURCE = str(Path(horizon_lm.__file__).parent.parent)
HEAVY = ("torch", "transformers", "datasets", "numpy", "pydantic")


def python(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": SOURCE, "COLUMNS": "100"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def horizon(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-c", "import sys; from horizon_lm.cli import main; sys.exit(main())", *arguments)


def seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, list[str]]]:
    """Replaces the training run; the list receives what it was called with."""
    calls: list[tuple[TrainConfig, list[str]]] = []
    module = types.ModuleType("horizon_lm.training.train")
    module.train = lambda config, *, config_notes=(): calls.append((config, list(config_notes)))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "horizon_lm.training", types.ModuleType("horizon_lm.training"))
    monkeypatch.setitem(sys.modules, "horizon_lm.training.train", module)
    monkeypatch.setattr(run_verbs, "require_named_model", lambda config: None)  # there is none
    return calls


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: folder\ndatasets: text.jsonl\nlr: 1e-4\n")
    return path


def test_help_answers_at_once() -> None:
    bare = seconds(lambda: python("-c", "import typer, rich"))
    helped = seconds(lambda: horizon("--help"))
    # 0.3 s on an idle machine (0.07 s measured); on a loaded one, no more than a bare typer takes and a bit.
    assert helped < max(0.3, 2.5 * bare), f"--help took {helped:.2f} s, 'import typer, rich' {bare:.2f} s"


def test_the_command_line_imports_nothing_heavy() -> None:
    check = "import sys, horizon_lm.cli as c; c.main(%r); print([m for m in %r if m in sys.modules])"
    done = python("-c", check % (["--help"], HEAVY))
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    done = python("-c", check % (["train", "--help"], HEAVY))
    assert done.stdout.splitlines()[-1] == "['pydantic']", done.stderr


def test_help_of_train_lists_every_setting() -> None:
    done = horizon("train", "--help")
    assert done.returncode == 0
    for key in TrainConfig.model_fields:
        assert f"\n  {key} = " in done.stdout
    assert "in tokens]" in done.stdout and "Optimizer settings:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["trian"], "no such command 'trian'", "did you mean 'train'?"),
        (["config", "shwo"], "no such command 'shwo'", "did you mean 'show'?"),
        (["xyzzy"], "no such command 'xyzzy'", "'horizon --help' lists the commands"),
        (["version", "--loud"], "no such option: --loud", "'horizon --help' lists the commands"),
        (
            ["train", "learnig_rate=1", "model=m", "datasets=d"],
            "command line: unknown key 'learnig_rate'",
            "did you mean 'learning_rate'?",
        ),
        (
            ["train", "absent.yaml"],
            "absent.yaml: no such file",
            "give the path of a YAML file, or key=value pairs",
        ),
        (
            ["train", "--learning-rate"],
            "command line: '--learning-rate' has no value",
            "write --learning-rate=VALUE",
        ),
        (
            ["train", "-x"],
            "command line: '-x' is not an option",
            "write settings as key=value or --key value",
        ),
        (
            ["config", "validate", "a.yaml", "b.yaml"],
            "command line: 'b.yaml' is neither key=value nor the only file",
            "write settings as key=value, and quote text with spaces",
        ),
    ],
)
def test_wrong_usage_ends_with_2(
    arguments: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\nhint: {hint}\n" and captured.out == ""


def test_a_fault_in_a_file_names_file_and_line(config_file: Path) -> None:
    config_file.write_text(config_file.read_text() + "learnig_rate: 1\n")
    done = horizon("train", str(config_file))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        f"error: {config_file}:4: unknown key 'learnig_rate'",
        "hint: did you mean 'learning_rate'?",
    ]
    assert "Traceback" not in done.stderr
    assert "Traceback" in horizon("train", "--debug", str(config_file)).stderr


def test_a_shipped_configuration_is_run_by_its_name(
    training: list[tuple[TrainConfig, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any folder, as after `pip install`; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "quickstart", "max_steps=3"]) == 0
    configs = Path(__file__).parents[2] / "configs"
    expected = TrainConfig.from_yaml(configs / "quickstart.yaml").replace(max_steps=3)
    assert training[0] == (expected, [])
    Path("quickstart").mkdir()  # a folder does not hide it
    assert cli.main(["train", "quickstart", "max_steps=3"]) == 0 and training.pop() == (expected, [])
    Path("quickstart").rmdir()
    Path("quickstart").write_text("model_name_or_path: mine\ndatasets: text.jsonl\n")
    assert cli.main(["train", "quickstart"]) == 0
    assert training[1][0].model_name_or_path == "mine"


def test_each_file_of_configs_has_its_name() -> None:
    names = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert shipped.names() == names and len(names) >= 10


def test_init_writes_a_shipped_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "--example", "quickstart"]) == 0
    written = Path("quickstart.yaml").read_text()
    assert written == (Path(__file__).parents[2] / "configs/quickstart.yaml").read_text()
    assert "next: horizon train quickstart.yaml" in capsys.readouterr().out
    assert cli.main(["init", "--example", "quickstart"]) == 2  # is there
    assert cli.main(["init", "--example", "quickstart", "-o", "deeper.yaml"]) == 0
    assert cli.main(["init", "--example", "quickstart", "--model", "m"]) == 2
    assert cli.main(["init", "--example", "absent"]) == 2 and "| sft |" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deeper.yaml", "quickstart.yaml"]
    for missing in ([], ["--model", "m"], ["--dataset", "d"]):
        assert cli.main(["init", *missing]) == 2
        assert "--example quickstart" in capsys.readouterr().err


def test_a_file_of_the_checkout_that_is_not_here_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pages name `configs/sft.yaml`, which only a checkout has."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "configs/sft.yaml"]) == 2
    assert "hint: write sft, without folder and suffix" in capsys.readouterr().err


def test_no_arguments_print_help_and_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("Usage: horizon ")


def test_train_gets_file_and_overrides(
    training: list[tuple[TrainConfig, list[str]]], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--max-steps", "-1", str(config_file), "slots=3", "--weight-decay=0.1", "--run_name", "a b"]
    assert cli.main(["train", *arguments]) == 0
    config, notes = training[0]
    assert (config.slots, config.weight_decay, config.run_name, config.max_steps) == (3, 0.1, "a b", -1)
    assert config.learning_rate == 1e-4
    assert notes == [f"{config_file}:3: 'lr' is read as 'learning_rate'"]
    assert capsys.readouterr().err == f"note: {notes[0]}\n"
    assert cli.main(["train", "model=m", "datasets=d"]) == 0
    assert training[1][0].model_name_or_path == "m"


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (errors.DoesNotFitError("too big", "smaller"), 3, "error: too big\nhint: smaller\n"),
        (errors.DataError("no text"), 4, "error: no text\n"),
        (errors.CheckpointError("none valid"), 5, "error: none valid\n"),
        (errors.NonFiniteError("loss is nan"), 6, "error: loss is nan\n"),
        (errors.UnsupportedModelError("no"), 2, "error: no\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("oops"), 1, "error: this is a bug in horizon: ZeroDivisionError: oops\n"),
    ],
)
def test_exit_codes(
    raised: BaseException,
    code: int,
    message: str,
    training: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(sys.modules["horizon_lm.training.train"], "train", fail)
    assert cli.main(["train", "model=m", "datasets=d"]) == code
    captured = capsys.readouterr().err
    assert message in captured
    assert ("Traceback" in captured) == (code == 1)


def test_config_verbs(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "show", str(config_file), "seed=7"]) == 0
    shown = capsys.readouterr().out
    values = config_yaml.read_text(shown, "shown").values
    assert (
        values["seed"] == 7
        and values["learning_rate"] == 1e-4
        and set(values) == set(TrainConfig.model_fields)
    )
    config_file.write_text(shown)
    assert cli.main(["config", "validate", str(config_file)]) == 0
    assert capsys.readouterr().out == "the configuration is valid\n"
    assert cli.main(["config", "schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(TrainConfig.model_fields)
    assert cli.main(["config", "docs"]) == 0
    assert capsys.readouterr().out.startswith("# Configuration\n")


def test_env_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip()[0].isdigit()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == printed
    assert cli.main(["env"]) == 0
    listed = capsys.readouterr().out
    for name in ("update kernel:", "python:", "platform:", "torch:", "transformers:", "peft:"):
        assert f"\n{name}" in listed
    assert str(Path.home()) + os.sep not in listed


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "9"}, "9"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_spin_briefly(
    given: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user has decided; in a process of the command's own, before torch is there to read it."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == given.get("GOMP_SPINCOUNT")
    look = """
import os, sys
from horizon_lm.cli import main
assert "torch" not in sys.modules
print(main(), os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""
    assert python("-c", look, "version").stdout.split()[1:] == ["0", str(spins), "False"]
