"""Runs that are killed at random moments, and resumed until they are done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_runs import losses_of, tensors_of

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
{more}
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


class Attempts:
    """A process of a script that answers each line of JSON with an exit code, and says first that it is
    ready."""

    def __init__(self, script: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, *values: Any) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(values) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0


class Victim(Attempts):
    """A process that tries the run again and again, killed or not."""

    def __init__(self, more: str = "") -> None:
        """more: lines that import what the runs need, once for all."""
        super().__init__(KILLED_RUN.format(path=[str(Path(__file__).parent)], more=more))

    def attempt(self, config: dict[str, Any], delay: float, number: int = signal.SIGKILL) -> int:
        """delay: seconds from the first step to the kill; negative for none. The exit code."""
        return self.ask(delay, config, number)


def killed_runs(
    values_of: Callable[[Path], dict[str, Any]],
    place: Path,
    kills: int,
    seed: int,
    *,
    state: Callable[[Path], dict[str, bytes]] = tensors_of,
    longest: float = 0.4,
    more: str = "",
) -> tuple[int, int, int]:
    """(kills, kills inside a save, runs that were finished); each must end with the straight run's bits.

    values_of: settings of a run in a folder. state: all that is trained, of a checkpoint. longest: seconds
    from the first step to a kill. more: see `Victim`.
    """
    victim = Victim(more)
    assert victim.attempt(values_of(place / "straight"), -1) == 0
    last = f"checkpoint-{values_of(place)['max_steps']}"
    expected = state(place / "straight" / last), losses_of(place / "straight")
    began = time.perf_counter()
    rng = random.Random(seed)
    done = inside = finished = 0
    while done < kills:
        run = place / f"run-{finished}"
        config = {**values_of(run), "resume_from_checkpoint": "auto"}
        while True:
            code = victim.attempt(config, rng.uniform(0, longest) if done < kills else -1)
            if code == 0:
                break
            assert code == -signal.SIGKILL, (code, sorted(p.name for p in run.iterdir()))
            done += 1
            inside += any(run.glob(".tmp-*")) if run.exists() else 0
        assert state(run / last) == expected[0]
        assert losses_of(run) == expected[1]
        assert not list(run.glob(".tmp-*")) and not list(run.glob(".del-*"))
        finished += 1
    victim.close()
    print(f"{done} kills, {inside} inside a save, {finished} runs: all with the bits of an undisturbed one")
    print(f"{time.perf_counter() - began:.0f} s, seed {seed}")
    return done, inside, finished
