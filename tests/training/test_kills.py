"""Runs that are killed at random moments, or stopped there, end with the bits of an undisturbed one."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from faulty_runs import text as text
from horizon_lm.checkpoint.folder import list_checkpoints
from killed_runs import Victim, killed_runs
from sizes import SOAK, times
from small_runs import losses_of, tensors_of, values

KILLS = times(5, 200)

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.mark.timeout(times(300, 1800))
def test_killed_at_random_moments_a_run_resumes_with_the_same_bits(
    text: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    seed = random.randrange(1 << 30) if SOAK else 5
    common = {"max_steps": 24, "save_steps": 2, "save_total_limit": 2, "update": "deferred"}
    kills, inside, _ = killed_runs(lambda run: values(text, run, **common), tmp_path, KILLS, seed)
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
