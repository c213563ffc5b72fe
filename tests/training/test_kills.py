"""Runs that are killed at random moments, or stopped there, end with the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faulty_runs import text as text
from horizon_lm.checkpoint.folder import list_checkpoints
from sizes import SOAK, times
from small_runs import losses_of, tensors_of, values

KILLS = times(5, 200)

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

KILLED_RUN = """
import json, os, signal, sys, threading, time
sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
from pathlib import Path
from horizon_lm.training import sample
sample.reason_to_skip = lambda *_: "tests"
from horizon_lm import plan
plan.models_are_stock = True
from horizon_lm.training import train as run_train
from horizon_lm.training.train import train
from horizon_lm.config import TrainConfig
from horizon_lm.errors import StoppedError
import transformers.models.llama.modeling_llama
print("ready", flush=True)
for line in sys.stdin:  # one attempt in a child of its own: what is imported is imported once
    delay, values, number = json.loads(line)
    if os.fork() == 0:
        first = TrainConfig.from_dict(values)
        begun = threading.Event()
        loop = run_train.run_loop
        def watched(run):
            begun.set()
            return loop(run)
        run_train.run_loop = watched
        def kill():
            begun.wait()
            time.sleep(delay)
            os.kill(os.getpid(), number)
        if delay >= 0:
            threading.Thread(target=kill, daemon=True).start()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            train(first)
        except StoppedError as stopped:
            os._exit(stopped.exit_code)
        except KeyboardInterrupt:
            os._exit(1)
        os._exit(0)
    _, status = os.wait()
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Victim:
    """A process that tries the run again and again, killed or not."""

    def __init__(self) -> None:
        script = KILLED_RUN.format(path=[str(Path(__file__).parents[1] / "helpers")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def attempt(self, config: dict[str, Any], delay: float, number: int = signal.SIGKILL) -> int:
        """delay: seconds from the first step to the kill; negative for none. The exit code."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([delay, config, number]) + "\n")
        self.process.stdin.flush()
        return int(self.answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(20) == 0


def killed_runs(text: Path, place: Path, kills: int, seed: int) -> tuple[int, int, int]:
    """(kills, kills inside a save, runs that were finished); each must end with the straight run's bits."""
    common = {"max_steps": 24, "save_steps": 2, "save_total_limit": 2, "update": "deferred"}
    victim = Victim()
    assert victim.attempt(values(text, place / "straight", **common), -1) == 0
    expected = tensors_of(place / "straight" / "checkpoint-24"), losses_of(place / "straight")
    began = time.perf_counter()
    rng = random.Random(seed)
    done = inside = finished = 0
    while done < kills:
        run = place / f"run-{finished}"
        config = values(text, run, **common, resume_from_checkpoint="auto")
        while True:
            code = victim.attempt(config, rng.uniform(0, 0.4) if done < kills else -1)
            if code == 0:
                break
            assert code == -signal.SIGKILL, (code, sorted(p.name for p in run.iterdir()))
            done += 1
            inside += any(run.glob(".tmp-*")) if run.exists() else 0
        assert tensors_of(run / "checkpoint-24") == expected[0]
        assert losses_of(run) == expected[1]
        assert not list(run.glob(".tmp-*")) and not list(run.glob(".del-*"))
        finished += 1
    victim.close()
    print(f"{done} kills, {inside} inside a save, {finished} runs: all with the bits of an undisturbed one")
    print(f"{time.perf_counter() - began:.0f} s, seed {seed}")
    return done, inside, finished


@pytest.mark.timeout(times(300, 1800))
def test_killed_at_random_moments_a_run_resumes_with_the_same_bits(
    text: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = random.randrange(1 << 30) if SOAK else 5
    kills, inside, _ = killed_runs(text, tmp_path, KILLS, seed)
    record_property("kills", kills)
    record_property("inside a save", inside)
    assert kills >= KILLS


@pytest.mark.timeout(times(300, 1800))
def test_stopped_at_random_moments_a_run_resumes_with_the_same_bits(text: Path, tmp_path: Path) -> None:
    """SIGTERM, SIGINT, SIGUSR1 from outside: each ends with its code, and nothing has to be done again."""
    stops, rng = times(3, 60), random.Random(4)
    common = {"max_steps": 24, "save_steps": 10, "update": "deferred"}
    victim = Victim()
    assert victim.attempt(values(text, tmp_path / "straight", **common), -1) == 0
    run, done, late = tmp_path / "run", 0, 0
    codes = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGUSR1: 75}
    while done < stops:
        number = list(codes)[done % 3]
        config = values(text, run, **common, resume_from_checkpoint="auto")
        code = victim.attempt(config, rng.uniform(0, 0.1), number)
        if code == codes[number]:
            done += 1
            found, rejected = list_checkpoints(run)
            assert found and not rejected
            recorded = losses_of(run)
            assert recorded[-1][0] == found[0].manifest.step  # no step was lost
        else:
            assert code in (0, 1, -number), code  # the steps were done: it came in the export, or after it
            late += 1
            assert losses_of(run) == losses_of(tmp_path / "straight")
            shutil.rmtree(run)
    if run.exists():
        assert victim.attempt(values(text, run, **common, resume_from_checkpoint="auto"), -1) == 0
        assert tensors_of(run / "checkpoint-20") == tensors_of(tmp_path / "straight" / "checkpoint-20")
        assert losses_of(run) == losses_of(tmp_path / "straight")
    victim.close()
    print(
        f"{done} stops from outside, each with its code and a checkpoint of its step ({late} came too late)"
    )
