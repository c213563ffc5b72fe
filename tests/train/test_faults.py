"""What breaks while a run works: kills, full disks, lanes that fail or die, losses not to be learned from."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import zoo
from fake_cuda import fake_cuda  # noqa: F401
from horizon_lm import cli
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import list_checkpoints
from horizon_lm.config import TrainConfig
from horizon_lm.engine import lanes as lanes_module
from horizon_lm.engine.disk_lane import DiskLane
from horizon_lm.engine.engine import Engine
from horizon_lm.engine.lanes import AdversarialLanes, CudaLanes, InlineLanes
from horizon_lm.errors import ConfigError, DoesNotFitError, LossSpikeError, NonFiniteError
from horizon_lm.plan.smaller import next_smaller
from horizon_lm.run import saver
from horizon_lm.run.guard import LossGuard
from horizon_lm.run.host_model import HostModel
from horizon_lm.run.metrics import read_steps
from horizon_lm.run.train import train
from horizon_lm.schedule import (
    Buffer,
    Lane,
    Op,
    StepPlan,
    build,
    build_save,
    build_steps,
    check,
    derive_waits,
)
from sizes import SOAK, times
from small_runs import losses_of, settings, tensors_of, values, write_text

KILLS = times(8, 200)
SECONDS = 10.0  # within which a fault must surface


pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


# kill -9 at random moments.

KILLED_RUN = """
import json, os, signal, sys, threading, time
sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
from pathlib import Path
from horizon_lm.run import sample
sample.reason_to_skip = lambda folder: "tests"
from horizon_lm import plan
plan.models_are_stock = True
from horizon_lm.run import train as run_train
from horizon_lm.run.train import train
from horizon_lm.config import TrainConfig
from horizon_lm.errors import StoppedError
import transformers.models.llama.modeling_llama
print("ready", flush=True)
for line in sys.stdin:  # one attempt in a child of its own: what is imported is imported once
    delay, values, number = json.loads(line)
    if os.fork() == 0:
        first = TrainConfig.from_dict(values)
        begun = threading.Event()
        steps = run_train.Trainer.steps
        def watched(self, *arguments):
            begun.set()
            return steps(self, *arguments)
        run_train.Trainer.steps = watched
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
    stops, rng = times(6, 60), random.Random(4)
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


# Disks that fail while a run goes on.


class Sick(Disk):
    """Fails at the calls that `ill` picks, by number."""

    def __init__(self, ill: Callable[[int], bool], code: int) -> None:
        self.ill, self.code, self.count = ill, code, 0

    def before(self, what: str, path: Path) -> None:
        self.count += what == "mkdir" and path.name.startswith(".tmp-")
        if what == "write" and self.ill(self.count):
            raise OSError(self.code, os.strerror(self.code), str(path))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_for_a_while_is_reported_and_the_run_goes_on(
    code: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = tmp_path / "straight"
    train(settings(text, straight, max_steps=8, save_steps=8))
    monkeypatch.setattr(saver, "Disk", lambda: Sick(lambda save: save in (3, 4, 5), code))
    run = tmp_path / "run"
    train(settings(text, run, max_steps=8, save_steps=1, save_total_limit=1))
    shown = capsys.readouterr().out
    for step in (3, 4, 5):
        assert f"warning: no checkpoint of step {step}: {os.strerror(code)}" in shown
    saved = [e.get("error") is None for e in events(run, "checkpoint")]
    assert saved == [True] * 2 + [False] * 3 + [True] * 3
    assert losses_of(run) == losses_of(straight)
    assert tensors_of(run / "checkpoint-8") == tensors_of(straight / "checkpoint-8")
    assert {p.name for p in run.glob("*checkpoint-*")} == {"checkpoint-8"}


def test_too_many_failures_in_a_row_end_the_run_with_the_last_good_one_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "Disk", lambda: Sick(lambda save: save > 2, errno.ENOSPC))
    with pytest.raises(DoesNotFitError, match="4 checkpoints in a row") as caught:
        train(settings(text, tmp_path / "run", max_steps=20, save_steps=1, save_total_limit=1))
    assert caught.value.exit_code == 3
    found, rejected = list_checkpoints(tmp_path / "run")
    assert [c.manifest.step for c in found] == [2] and not rejected
    monkeypatch.setattr(saver, "Disk", lambda: Sick(lambda save: save > 0, errno.ENOSPC))
    train(settings(text, tmp_path / "on", max_steps=6, save_steps=1, max_failed_saves=None))


def test_too_little_room_is_seen_before_a_byte_is_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = iter([10**12, 10**12, 1000, 1000])  # of the plan, before the run, and before each checkpoint
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: type("Usage", (), {"free": next(free)}))
    train(settings(text, tmp_path / "run", max_steps=2, save_steps=1))
    out = capsys.readouterr().out
    assert re.search(r"no checkpoint of step 1: it needs [0-9.]+ kB of disk space, 1.00 kB are free", out)
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def test_a_folder_that_vanishes_does_not_end_the_steps(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Vanishing(Disk):
        count = 0

        def before(self, what: str, path: Path) -> None:
            Vanishing.count += what == "fsync"
            if Vanishing.count == 3 and what == "fsync":
                shutil.rmtree(path.parent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "Disk", Vanishing)
        train(settings(text, tmp_path / "run", max_steps=4, save_steps=2))
    assert "no checkpoint of step 2: No such file" in capsys.readouterr().out
    assert [c.manifest.step for c in list_checkpoints(tmp_path / "run")[0]] == [4]


# Memory that runs out.


@pytest.mark.parametrize("update", ["deferred", "eager"])
def test_a_device_out_of_memory_leaves_the_checkpoint_and_names_the_next_smaller_choice(
    update: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a backward pass, beside which a checkpoint is being written."""
    common = {"max_steps": 8, "save_steps": 3, "update": update, "max_grad_norm": None}
    train(settings(text, tmp_path / "straight", **common))
    honest, calls = Engine._backward, iter(range(1, 1000))

    def backward(self: Engine, step: Any, op: Op) -> None:
        if next(calls) == 17:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        honest(self, step, op)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_backward", backward)
        with pytest.raises(DoesNotFitError, match="Tried to allocate 2 GiB") as caught:
            train(settings(text, tmp_path / "run", **common))
    assert caught.value.exit_code == 3 and caught.value.hint is not None
    assert caught.value.hint.startswith("next smaller: boundaries=host; horizon resume ")
    assert cli.main(["verify", str(tmp_path / "run")]) == 0
    assert cli.main(["resume", str(tmp_path / "run"), "boundaries=host"]) == 0
    one, two = tmp_path / "straight" / "checkpoint-6", tmp_path / "run" / "checkpoint-6"
    assert tensors_of(one) == tensors_of(two)


def test_the_next_smaller_choices_end_and_each_is_a_valid_configuration() -> None:
    config = TrainConfig.from_dict(
        {"model": "m", "datasets": "d", "per_device_train_batch_size": 8, "activations": "keep", "slots": 4}
    )
    seen = []
    while (choice := next_smaller(config)) not in seen and len(seen) < 40:
        seen.append(choice)
        pairs = dict(part.split("=") for part in choice.split())
        config = config.replace(**{k: int(v) if v.isdigit() else v for k, v in pairs.items()})
    assert seen[0] == "activations=recompute" and seen[1] == "boundaries=host"
    assert "per_device_train_batch_size=1 gradient_accumulation_steps=8" in seen
    assert any(choice.startswith("max_length=") for choice in seen) and len(seen) > 10


# Two runs, one folder.


def test_a_folder_in_use_is_refused(text: Path, tmp_path: Path) -> None:
    config = settings(text, tmp_path / "run", max_steps=3, save_steps=1)
    train(config)
    script = (
        "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    for changes in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ConfigError, match="in use by another run"):
            train(config.replace(**changes))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    other.kill()
    other.wait()
    train(config.replace(resume_from_checkpoint="latest"))  # the lock went with the process that held it


def test_a_run_folder_may_have_any_name(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run – ünïcode = 'x'"
    train(settings(text, run, max_steps=2, save_steps=1))
    assert cli.main(["verify", str(run)]) == 0
    assert cli.main(["resume", str(run)]) == 0


# Lanes: an error in any op, and a thread that dies.


def model_on(lanes: str, **settings: Any) -> HostModel:
    config = zoo.CASES["llama"].config()
    source = zoo._from_config(config, torch.float32, seed=0, attn="sdpa")
    common = {"dtype": "float32", "skip_memory_check": True, "boundaries": "host", "checkpoint_interval": 2}
    return HostModel.from_pretrained(source, device="cpu", lanes=lanes, **{**common, **settings})


def with_cuda_lanes(model: HostModel) -> None:
    """The threads of CudaLanes, on a CUDA that is not there."""
    model.engine.lanes = CudaLanes(torch.device("cpu"))


class Injected(Exception):
    pass


class NoSaving:
    """Takes units and throws them away."""

    def __init__(self) -> None:
        self.units: list[int] = []
        self.ended = self.abandoned = False

    def write_unit(self, unit: int) -> None:
        self.units.append(unit)

    def finish(self) -> None:
        self.ended = True

    def abandon(self) -> None:
        self.abandoned = True


KINDS = "GUFXLRCBDSNOW"


@pytest.mark.parametrize("lanes", ["inline", "adversarial", "cuda"])
@pytest.mark.parametrize("update", ["sync", "deferred", "eager"])
def test_an_error_in_any_op_surfaces_with_its_name(
    lanes: str,
    update: str,
    fake_cuda: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    limit = {"max_grad_norm": None if update == "eager" else 1.0}
    model = model_on("adversarial" if lanes == "cuda" else lanes, update=update, **limit)
    if lanes == "cuda":
        with_cuda_lanes(model)
    batch = [zoo.batch("llama", batch_size=1, length=8, seed=1)]
    model.train_step(batch, lr=1e-3)
    threads, honest = threading.active_count(), dict(model.engine._run)
    cases = 0
    for kind in KINDS:
        where: list[Op] = []

        def broken(step: Any, op: Op, kind: str = kind, where: list[Op] = where) -> None:
            where.append(op)
            raise Injected(f"in {kind}")

        model.engine._run = {**honest, kind: broken}
        saving = NoSaving()
        model.save_state(saving, background=True)
        began = time.perf_counter()
        with pytest.raises(Injected) as caught:
            model.train_step(batch, lr=1e-3)
            model.finish_saving()
        assert time.perf_counter() - began < SECONDS
        notes = caught.value.__notes__
        if update == "eager" and len(notes) > 1:  # what was updated before the error
            assert "units were updated already (update: eager)" in notes.pop()
        assert len(notes) == 1 and f"in op {where[0]} ({where[0].lane} lane" in notes[0], (kind, notes)
        model.engine._run = dict(honest)
        model.state_was_replaced(model.steps_done)
        model.finish_saving()
        out = model.train_step(batch, lr=1e-3)  # usable, and nothing is left over
        assert math.isfinite(out.loss)
        cases += 1
    model.finish_saving()
    deadline = time.monotonic() + SECONDS
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    record_property("cases", cases)
    print(f"{cases} op kinds on {lanes} lanes, update {update}: each error surfaced with the op")


def test_memory_comes_back_after_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty steps that fail in the middle of the backward pass leave no activations behind."""
    model = model_on("inline")
    batch = [zoo.batch("llama", batch_size=4, length=64, seed=1)]
    model.train_step(batch, lr=1e-3)
    honest = model.engine._run["B"]

    def broken(step: Any, op: Op) -> None:
        if op.unit == 1:
            raise Injected
        honest(step, op)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    model.engine._run["B"] = broken
    counts, process = [], psutil.Process()
    for i in range(50):
        with pytest.raises(Injected):
            model.train_step(batch, lr=1e-3)
        if i in (9, 49):
            counts.append((tensors(), process.memory_info().rss))
    assert counts[1][0] <= counts[0][0] + 5
    # (Memory of other tests in the same process comes and goes.)
    assert counts[1][1] < counts[0][1] * 1.05


def test_a_lane_that_dies_without_a_word_is_noticed(
    fake_cuda: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread of the update lane is gone; the others would wait for its ops for ever."""
    monkeypatch.setattr(lanes_module, "_LOOK_SECONDS", 0.2)
    honest = lanes_module._CudaRun._lane

    def lane(self: Any, name: Lane, mine: list[int]) -> None:
        if name is not Lane.UPLOAD:
            honest(self, name, mine)

    monkeypatch.setattr(lanes_module._CudaRun, "_lane", lane)
    model = model_on("adversarial")
    with_cuda_lanes(model)
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match="the thread of the lane horizon-upload is gone") as caught:
        model.train_step([zoo.batch("llama", batch_size=1, length=8, seed=1)], lr=1e-3)
    assert time.perf_counter() - began < SECONDS
    assert "in op U1 (upload lane" in caught.value.__notes__[0]


def test_an_error_that_ends_a_run_names_its_op(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Engine, step: Any, op: Op) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Engine, "_download", broken)
    (tmp_path / "run.yaml").write_text(settings(text, tmp_path / "run").to_yaml())
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 1
    assert "oops (in op D" in capsys.readouterr().err


# The disk lane.


def test_an_op_waits_for_the_write_of_what_it_changes_and_for_no_other() -> None:
    disk, gate, order = DiskLane(), threading.Event(), []
    one, two = Buffer("weights", 1), Buffer("weights", 2)
    disk.submit(frozenset({one}), lambda: order.append("one"))
    disk.submit(frozenset({two}), lambda: (gate.wait(5), order.append("two")))
    disk.settle({one})
    disk.settle({Buffer("weights", 3)})
    assert order == ["one"] and not disk.is_idle
    threading.Timer(0.05, gate.set).start()
    disk.settle({two})
    assert order == ["one", "two"]
    disk.drain()
    assert disk.is_idle


def test_a_failure_on_the_disk_lane_surfaces_once_and_forgets_the_rest() -> None:
    disk, later = DiskLane(), []

    def fail() -> None:
        raise Injected

    disk.submit(frozenset({Buffer("weights", 1)}), fail)
    disk.submit(frozenset({Buffer("weights", 2)}), lambda: later.append(1))
    with pytest.raises(Injected):
        disk.drain()
    disk.drain()
    disk.settle({Buffer("weights", 2)})
    assert later == []


@pytest.mark.parametrize("lanes", ["inline", "adversarial", "cuda"])
@pytest.mark.parametrize("update", ["sync", "deferred", "eager"])
def test_what_is_written_beside_a_step_is_the_state_before_it(
    lanes: str,
    update: str,
    fake_cuda: list[str],  # noqa: F811
) -> None:
    """With a slow disk the next steps run while units are written, and change none of them before that."""
    limit = {"max_grad_norm": None if update == "eager" else 1.0}
    model = model_on("adversarial" if lanes == "cuda" else lanes, update=update, **limit)
    twin = model_on("inline", update="sync", **limit)
    if lanes == "cuda":
        with_cuda_lanes(model)
    batches = [[zoo.batch("llama", batch_size=1, length=8, seed=s)] for s in range(5)]

    def copy_of(model: HostModel, unit: int) -> list[str]:
        store = model.store
        names = [r for r in ("weights", "exp_avg", "exp_avg_sq") if store.has(r)]
        # Digests: the control fails on purpose, and pytest would compare megabytes letter by letter.
        return [hashlib.sha256(store.run(region, unit).numpy().tobytes()).hexdigest() for region in names]

    class Slow(NoSaving):
        seen: dict[int, list[str]] = {}

        def write_unit(self, unit: int) -> None:
            time.sleep(0.03)
            self.seen[unit] = copy_of(model, unit)

    for number in (0, 1):
        model.train_step(batches[number], lr=1e-2)
        twin.train_step(batches[number], lr=1e-2)
    saving = Slow()
    model.save_state(saving, background=True)
    for number in (2, 3, 4):
        model.train_step(batches[number], lr=1e-2)
    model.finish_saving()
    assert saving.ended and not saving.abandoned
    assert saving.seen == {u: copy_of(twin, u) for u, unit in enumerate(twin.store.units) if unit.numel}
    for number in (2, 3, 4):
        twin.train_step(batches[number], lr=1e-2)
    model.flush()
    assert all(copy_of(model, u) == copy_of(twin, u) for u in saving.seen)


def test_a_missing_wait_would_write_a_unit_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    monkeypatch.setattr(DiskLane, "settle", lambda self, writes: None)
    with pytest.raises(AssertionError):
        test_what_is_written_beside_a_step_is_the_state_before_it("inline", "eager", [])


# The schedule of a step beside which a checkpoint is written.


def saving_plans() -> list[StepPlan]:
    plans = []
    grid = product((1, 3), (True, False), ("sync", "deferred", "eager"), (1, 2), (True, False))
    for layers, tied, update, m, prologue in grid:
        head = layers + 1
        uploaded = frozenset(range(0 if prologue else 1, head + 1))
        embedding = head if tied else head + 1
        units = uploaded | {embedding}
        for frozen in (frozenset(), frozenset({1})):
            plans.append(
                StepPlan(
                    layers,
                    uploaded,
                    units - frozen,
                    embedding,
                    m,
                    update=update,
                    saved=units | {head + 2},  # and a unit that nothing uses
                )
            )
    return plans


SAVING = saving_plans()


def test_schedules_with_a_checkpoint_are_sound(record_property: Callable[[str, object], None]) -> None:
    for plan in SAVING:
        ops = build_steps(plan, 2)
        assert check(ops, plan) == []
    record_property("plans", len(SAVING))


def test_each_wait_of_a_write_is_needed() -> None:
    """Without any one of the waits between W and O the checker objects."""
    removed = 0
    for plan in SAVING:
        ops = build_steps(plan, 2)
        waits = derive_waits(ops)
        for i, targets in enumerate(waits):
            for j in targets:
                if "W" in (ops[i].kind, ops[j].kind):
                    fewer = [t if k != i else tuple(x for x in t if x != j) for k, t in enumerate(waits)]
                    assert any("may run before" in fault for fault in check(ops, plan, fewer))
                    removed += 1
    assert removed > 300


def test_a_write_is_between_two_updates() -> None:
    for plan in SAVING:
        ops = build_steps(plan, 2)
        for unit in plan.trainable:
            kinds = [(op.kind, op.step) for op in ops if op.kind in "OW" and op.unit == unit]
            assert kinds == [("W", 0), ("O", 0), ("W", 1), ("O", 1)]
    late = SAVING[0]
    ops = build(late, 1)
    moved = [op for op in ops if op.kind != "W"] + [op for op in ops if op.kind == "W"]
    assert any("instead of 0" in fault for fault in check(moved, late))  # the control


def test_saving_alone_updates_first() -> None:
    plan = next(p for p in SAVING if p.update == "deferred" and p.layers == 3)
    text = [str(op) for op in build_save(plan, 1, plan.trainable)]
    for unit in plan.trainable:
        assert text.index(f"O{unit}") < text.index(f"W{unit}")


# Losses that are not learned from.


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Makes the losses of some calls other ones."""

    def spoil(calls: dict[int, float]) -> None:
        honest, count = Engine._loss, iter(range(1, 10_000))

        def loss(self: Engine, step: Any, op: Op) -> None:
            honest(self, step, op)
            number = next(count)
            if number in calls:
                step.losses[op.micro_batch] = torch.tensor(calls[number])

        monkeypatch.setattr(Engine, "_loss", loss)

    return spoil


SPIKES = {"loss_spike_window": 10, "loss_spike_sigmas": 8.0, "max_steps": 16, "save_steps": 4}


def test_a_spike_is_skipped_or_reported_or_ends_the_run(
    text: Path, tmp_path: Path, losses: Callable[[dict[int, float]], None]
) -> None:
    losses({12: 99.0, 28: 99.0, 44: 99.0, 60: 99.0})
    train(settings(text, tmp_path / "skip", loss_spike="skip", **SPIKES))
    assert [line["skipped_steps"] for line in read_steps(tmp_path / "skip" / "metrics.jsonl")][-1] == 1
    fault = events(tmp_path / "skip", "fault")
    assert [(f["step"], f["done"]) for f in fault] == [(12, "not updated")]
    assert "far above" in fault[0]["reason"]
    train(settings(text, tmp_path / "warn", loss_spike="warn", **SPIKES))
    fault = events(tmp_path / "warn", "fault")
    assert [(f["step"], f["done"]) for f in fault] == [(12, "learned from")]
    train(settings(text, tmp_path / "ignore", **SPIKES))
    assert events(tmp_path / "ignore", "fault") == []
    with pytest.raises(LossSpikeError, match="step 12: the loss is 99") as caught:
        train(settings(text, tmp_path / "stop", loss_spike="stop", **SPIKES))
    assert caught.value.exit_code == 6
    assert [c.manifest.step for c in list_checkpoints(tmp_path / "stop")[0]] == [8, 4]


@pytest.mark.parametrize(
    ("update", "bad", "policy"),
    [
        ("deferred", 99.0, {"loss_spike": "rollback"}),
        ("eager", 99.0, {"loss_spike": "rollback", "max_grad_norm": None}),
        ("sync", math.nan, {"nonfinite": "rollback"}),
        ("deferred", math.inf, {"nonfinite": "rollback"}),
    ],
)
def test_a_rollback_goes_on_with_the_data_after_the_spike(
    update: str,
    bad: float,
    policy: dict[str, Any],
    text: Path,
    tmp_path: Path,
    losses: Callable[[dict[int, float]], None],
) -> None:
    losses({11: bad})
    config = settings(text, tmp_path / "run", update=update, **{**SPIKES, **policy})
    train(config)
    back = events(tmp_path / "run", "rollback")
    assert [b["step"] for b in back] == [8]
    assert [step for step, _ in losses_of(tmp_path / "run")] == list(range(1, 17))
    last = json.loads((tmp_path / "run" / "checkpoint-16" / "manifest.json").read_text())["state"]
    rows = last["loader"]["epoch"] * last["loader"]["rows"] + last["loader"]["position"]
    assert rows == 2 * (16 + 3)  # the three steps that were undone took their rows with them
    assert last["loop"]["rollbacks"] == 1 and last["steps_done"] == 16


def test_too_many_rollbacks_end_the_run(
    text: Path, tmp_path: Path, losses: Callable[[dict[int, float]], None]
) -> None:
    losses({call: math.nan for call in range(7, 100)})
    config = settings(
        text, tmp_path / "run", nonfinite="rollback", max_rollbacks=2, save_steps=3, max_steps=20
    )
    with pytest.raises(NonFiniteError, match="for the 3th time and max_rollbacks allows 2"):
        train(config)
    assert [c.manifest.step for c in list_checkpoints(tmp_path / "run")[0]] == [6, 3]


def test_spikes_do_not_become_normal() -> None:
    config = TrainConfig.from_dict(
        {"model": "m", "datasets": "d", "loss_spike": "warn", "loss_spike_window": 10}
    )
    guard = LossGuard(config)
    for step in range(10):
        guard.learned(2.0 + 0.01 * (step % 2))
    limit = guard.limit()
    for bad in (50.0, math.nan, math.inf):
        guard.learned(bad)
    assert guard.limit() == limit < 3
    assert LossGuard(config).limit() == math.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_spike": "skip", "update": "eager", "max_grad_norm": None}, "loss_spike: skip leaves updates"),
        ({"loss_spike": "rollback", "save_strategy": "no"}, "nothing to go back to"),
        ({"nonfinite": "rollback", "save_strategy": "no"}, "nothing to go back to"),
    ],
)
def test_policies_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict({"model": "m", "datasets": "d", **changes})


def test_inline_and_adversarial_have_a_disk_lane() -> None:
    assert InlineLanes().disk.is_idle and AdversarialLanes().disk.is_idle


# Long runs.


@pytest.mark.timeout(times(300, 1800))
def test_steps_and_checkpoints_leave_nothing_behind(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 steps (400 in the short form), a checkpoint every 20: resident memory, open files and threads."""
    steps = times(400, 2000)
    process, seen = psutil.Process(), []
    after = saver.Saver.after

    def look(self: Any, record: Any, *, is_last: bool, **more: Any) -> None:
        after(self, record, is_last=is_last, **more)
        if record.step % 20 == 19 and not is_last:  # no checkpoint is being written
            self.finish()
            gc.collect()
            seen.append((process.memory_info().rss, process.num_fds(), threading.active_count()))

    monkeypatch.setattr(saver.Saver, "after", look)
    train(
        settings(text, tmp_path / "run", max_steps=steps, save_steps=20, save_total_limit=2, progress="off")
    )
    settled = seen[len(seen) // 4 :]
    grown = settled[-1][0] / settled[0][0] - 1
    print(
        f"{steps} steps: resident memory {grown:+.2%}, open files and threads {set(s[1:] for s in settled)}"
    )
    assert grown < 0.01
    assert len({s[1:] for s in settled}) == 1
