"""Trainers that are killed while they save end with the bits of an undisturbed one."""

from __future__ import annotations

import random
import signal
from pathlib import Path

from horizon_lm.checkpoint.folder import list_checkpoints
from killed_runs import Attempts
from sizes import times
from small_runs import tensors_of
from trainer_runs import model_folder

KILLS = times(4, 60)

# One attempt in a child of its own: what is imported is imported once.
SCRIPT = """
import itertools, json, os, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
import torch; torch.set_num_threads(1)
from horizon_lm.checkpoint.disk import Disk
from trainer_runs import make
print("ready", flush=True)
for line in sys.stdin:
    last, model, run = json.loads(line)
    if os.fork() == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        trainer = make("sft", Path(model), Path(run), max_steps=12, save_steps=1, save_total_limit=2)
        calls = itertools.count(1)
        def before(self, what, path):
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
        Disk.before = before
        resumes = any(Path(run).glob("checkpoint-*"))
        code = 1
        try:
            trainer.train(resume_from_checkpoint=resumes)
            code = 0
        finally:
            os._exit(code)
    _, status = os.wait()
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Victim(Attempts):
    """A process that trains again and again, killed or not."""

    def __init__(self) -> None:
        super().__init__(SCRIPT.format(path=[str(Path(__file__).parents[1] / "helpers")]))

    def attempt(self, model: Path, run: Path, last: int | None = None) -> int:
        """last: the call of the disk at which it is killed, if it is. Return the exit code."""
        return self.ask(last, str(model), str(run))


def test_killed_at_random_calls_of_the_disk(tmp_path: Path) -> None:
    model, victim, rng = model_folder(tmp_path / "model"), Victim(), random.Random(0)
    assert victim.attempt(model, tmp_path / "straight") == 0
    expected = tensors_of(tmp_path / "straight" / "checkpoint-12")
    done = inside = finished = 0
    while done < KILLS:
        run = tmp_path / f"run-{finished}"
        steps = 0
        while True:
            code = victim.attempt(model, run, rng.randint(1, 300) if done < KILLS else None)
            found, _ = list_checkpoints(run)
            now = found[0].manifest.step if found else 0
            assert now >= steps, "a checkpoint got lost"
            steps = now
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            done += 1
            inside += any(path.name.startswith((".tmp-", ".del-")) for path in run.iterdir())
        ended = {k: v for k, v in tensors_of(run / "checkpoint-12").items() if k != "trainer.safetensors"}
        assert ended == {k: v for k, v in expected.items() if k != "trainer.safetensors"}
        finished += 1
    victim.close()
    assert inside > KILLS // 2
    print(f"{done} kills, {inside} within a save, {finished} runs ended with the same bits")
