"""The guide of many GPUs and its example files: commands are understood, scripts do what they say."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from horizon_lm.cli.run import split_arguments
from horizon_lm.config import load_config

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guides" / "many-gpus.md"
EXAMPLES = ROOT / "examples" / "many-gpus"
FILES = ("torchrun.sh", "slurm.sbatch", "ray_train.py", "sky.yaml")


def launched(text: str) -> list[list[str]]:
    """Return the words after `-m horizon_lm` of each command that starts ranks."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(found, comments=True) for found in re.findall(r"-m horizon_lm ([^\n`]+)", joined)]


def check(words: list[str]) -> None:
    """Raise unless the settings of `train` are known."""
    verb, *rest = words
    assert verb == "train"
    _, overrides = split_arguments(rest)
    given = {override.partition("=")[0] for override in overrides}
    overrides += [f"{key}=X" for key in ("model_name_or_path", "datasets") if key not in given]
    assert load_config(None, overrides)[0]


@pytest.mark.parametrize("words", launched(GUIDE.read_text()), ids=" ".join)
def test_a_command_of_the_guide_is_understood(words: list[str]) -> None:
    check(words)


def test_a_setting_that_does_not_exist_is_found() -> None:
    """The negative control."""
    (words,) = launched("    torchrun --nproc-per-node 2 -m horizon_lm train run.yaml no_such_setting=1\n")
    with pytest.raises(Exception, match="no_such_setting"):
        check(words)


def test_every_file_says_what_was_tested() -> None:
    text = GUIDE.read_text()
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == set(FILES)
    for name in FILES:
        held = (EXAMPLES / name).read_text()
        assert "UNTESTED" in held and f"`examples/many-gpus/{name}`" in text, name
    assert "NCCL has not run" in text


# ---- scripts, with stand-ins for the programs that they call ---------------------------------


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "{name} $*" >> "$LOG"\n{body}\n')
    path.chmod(0o755)


def run(folder: Path, script: str, *words: str, **variables: str) -> tuple[int, list[str]]:
    """Run a script of the examples; return its exit code and the commands that it called."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(log)} | variables
    done = subprocess.run(["bash", str(EXAMPLES / script), *words], env=environment, capture_output=True)
    return done.returncode, log.read_text().splitlines() if log.exists() else []


def test_torchrun_is_started_for_one_node_and_for_several(tmp_path: Path) -> None:
    stand_in(tmp_path, "torchrun", "exit 0")
    code, called = run(tmp_path, "torchrun.sh", "run.yaml", "max_steps=3")
    assert (code, called) == (
        0,
        [
            "torchrun --nnodes=1 --nproc-per-node=gpu --max-restarts=3 --standalone -m horizon_lm train "
            "run.yaml max_steps=3"
        ],
    )
    _, called = run(tmp_path, "torchrun.sh", "run.yaml", NODES="2", HEAD="node-a", RANKS="8", RESTARTS="0")
    assert "--nnodes=2 --nproc-per-node=8 --max-restarts=0 --rdzv-backend=c10d" in called[0]
    assert "--rdzv-endpoint=node-a:29500" in called[0]
    assert run(tmp_path, "torchrun.sh", "run.yaml", NODES="2")[0] != 0  # nobody said where ranks meet


@pytest.mark.parametrize(("code", "is_requeued"), [(75, True), (0, False), (1, False), (130, False)])
def test_a_slurm_job_goes_back_into_the_queue_only_if_it_was_stopped(
    tmp_path: Path, code: int, is_requeued: bool
) -> None:
    stand_in(tmp_path, "srun", f"exit {code}")
    stand_in(tmp_path, "scontrol", "exit 0")
    found, called = run(
        tmp_path,
        "slurm.sbatch",
        "run.yaml",
        "max_steps=3",
        SLURM_JOB_ID="123",
        SLURM_CPUS_PER_TASK="12",
    )
    assert found == code and ("scontrol requeue 123" in called) == is_requeued
    (started,) = [line for line in called if line.startswith("srun")]
    assert "--kill-on-bad-exit=0 --cpus-per-task=12" in started
    assert started.endswith("-m horizon_lm train run.yaml max_steps=3 resume_from_checkpoint=auto")


def test_slurm_signals_the_tasks_before_the_end() -> None:
    text = (EXAMPLES / "slurm.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", text, re.M))
    assert directives["signal"] == "USR1@600" and "requeue" in directives  # not B:, the script itself
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time"} <= directives.keys()


def test_the_task_of_skypilot_starts_all_nodes() -> None:
    task = yaml.safe_load((EXAMPLES / "sky.yaml").read_text())
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "volumes", "setup", "run"}
    (words,) = launched(task["run"])
    check(words)
    assert "output_dir=/shared/run" in words and "/shared" in task["volumes"]
    variables = {
        "SKYPILOT_NUM_NODES",
        "SKYPILOT_NODE_RANK",
        "SKYPILOT_NUM_GPUS_PER_NODE",
        "SKYPILOT_NODE_IPS",
    }
    assert set(re.findall(r"\$(SKYPILOT_\w+)", task["run"])) == variables


def test_the_ray_script_imports_only_ray_and_ours() -> None:
    tree = ast.parse((EXAMPLES / "ray_train.py").read_text())
    found = {node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert found == {"argparse", "pathlib", "typing", "ray", "horizon_lm"}
