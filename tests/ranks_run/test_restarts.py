"""torchrun itself: a rank that is killed is restarted with the others, and the run resumes by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rank_runs import PATH, free_port, lines_of, write_settings
from rank_server import RankServer
from rank_states import logical_state
from small_runs import losses_of, settings

STEPS = 12


def torchrun(settings_file: Path, *arguments: str, restarts: int = 1) -> subprocess.Popen[str]:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", f"--max-restarts={restarts}"]
    command += ["--monitor-interval=0.1", f"--master-port={free_port()}"]
    return subprocess.Popen(
        [sys.executable, *command, "-m", "horizon_lm", "train", str(settings_file), *arguments],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL_"))},
            **{"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            **{"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    return [one.pid for one in children if "horizon_lm" in one.cmdline() and one.status() != "zombie"]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=30)[0]
        time.sleep(0.02)


def values(text: Path, run: Path, **changes: Any) -> Any:
    more = {"gradient_accumulation_steps": 2, "max_steps": STEPS, "save_steps": 2, "reduction": "exact"}
    return settings(text, run, dataset_cache_dir=str(text.parent / "cache"), **{**more, **changes})


@pytest.mark.timeout(300)
def test_a_killed_rank_is_restarted_and_the_run_resumes_by_itself(
    server: RankServer, text: Path, tmp_path: Path
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    ended = server.run(1, ["train", str(write_settings(values(text, straight), tmp_path / "a.yaml"))])
    assert ended.codes == [0], ended.said()
    process = torchrun(write_settings(values(text, run, max_steps=STEPS), tmp_path / "b.yaml"))
    wait_for(run / "checkpoint-4" / "manifest.json", process)
    victims = workers(process)
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert "resumed from " in output, output
    assert logical_state(run / f"checkpoint-{STEPS}") == logical_state(straight / f"checkpoint-{STEPS}")
    assert losses_of(run) == losses_of(straight)
    first, second = lines_of(run, "start")
    assert first["launched_by"] == second["launched_by"] and len(first["launched_by"]) == 1
    assert lines_of(run, "resume")


@pytest.mark.timeout(300)
def test_an_earlier_run_is_not_resumed_by_a_restart(server: RankServer, text: Path, tmp_path: Path) -> None:
    """output_dir holds another run: each attempt is refused, and nothing of it changes."""
    run = tmp_path / "run"
    file = write_settings(values(text, run, max_steps=2), tmp_path / "a.yaml")
    assert server.run(1, ["train", str(file)]).codes == [0]
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    process = torchrun(write_settings(values(text, run), tmp_path / "b.yaml"))
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 1
    assert output.count("holds an earlier run") == 2, output  # once per attempt, by rank 0
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before
