"""What fails, hangs or dies on one rank of a checkpoint: all ranks know, and the one before stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from horizon_lm.checkpoint import folder as checkpoints
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import list_checkpoints, open_checkpoint
from horizon_lm.checkpoint.reader import verify
from horizon_lm.checkpoint.writer import CheckpointWriter, Outcome
from horizon_lm.distributed.ranks import Ranks
from horizon_lm.engine.disk_lane import DiskLane
from horizon_lm.errors import RankError
from horizon_lm.memory.shards import Shard
from horizon_lm.memory.store import HostStore
from rank_checkpoints import bits, content, load, save, share, writer_of
from threaded_ranks import ThreadedRanks, on_ranks

CODES = ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole() -> HostStore:
    return content("bf16")


class Failing(Disk):
    """Fails from the `at`th call on (None: never), and counts."""

    def __init__(self, at: int | None = None, code: int = errno.ENOSPC) -> None:
        self.at, self.code, self.count = at, code, 0

    def before(self, what: str, path: Path) -> None:
        self.count += 1
        if self.at is not None and self.count >= self.at:
            raise OSError(self.code, os.strerror(self.code), str(path))


def check_previous(run: Path, whole: HostStore) -> None:
    """Only checkpoint-0 is left once what was half written is swept, and it is intact."""
    checkpoints.sweep(run, Disk())
    assert {p.name for p in run.iterdir()} == {"checkpoint-0"}
    assert bits(load(open_checkpoint(run / "checkpoint-0"), whole, 1)) == bits([whole])


def test_a_disk_that_fails_on_one_rank_fails_the_checkpoint_on_all(
    whole: HostStore, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """At each call of each rank: one outcome, that names the rank; the run goes on."""
    counting = {rank: Failing() for rank in range(2)}
    save(tmp_path, whole, 2, 0, disks=counting)
    cases = 0
    for rank, disk in counting.items():
        assert disk.count > 15
        for at in range(1, disk.count + 1):
            name = CODES[cases % len(CODES)]
            failing = Failing(at, getattr(errno, name))
            outcomes = save(tmp_path, whole, 2, 1, disks={rank: failing})
            assert outcomes[0] == outcomes[1]
            error = outcomes[0].error
            assert error is not None and outcomes[0].path is None
            assert error.startswith(f"rank {rank}: {os.strerror(failing.code)} ({tmp_path}"), error
            # The last call of rank 0 is the fsync after the rename: it was made, but is not known to last.
            committed = (tmp_path / "checkpoint-1").exists()
            assert committed == (rank == 0 and at == disk.count)
            shutil.rmtree(tmp_path / "checkpoint-1", ignore_errors=True)
            if rank > 0:  # else removing fails too
                assert not (tmp_path / ".tmp-checkpoint-1").exists()
            check_previous(tmp_path, whole)
            cases += 1
    assert save(tmp_path, whole, 2, 1)[1].error is None  # the control
    record_property("cases", cases)
    print(f"{cases} failing calls on one of two ranks: the same outcome on all, the one before intact")


def test_several_failures_name_the_first_rank(whole: HostStore, tmp_path: Path) -> None:
    disks = {rank: Failing(5, errno.EIO) for rank in (1, 2)}
    outcomes = save(tmp_path, whole, 3, 1, disks=disks)
    assert outcomes[0].error is not None and outcomes[0].error.startswith("rank 1: Input/output error")
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("after", [0, 3])
def test_a_step_that_fails_on_one_rank_abandons_it_for_all(
    rank: int, after: int, whole: HostStore, tmp_path: Path
) -> None:
    save(tmp_path, whole, 2, 0)

    def work(ranks: Ranks) -> Outcome | None:
        writer = writer_of(tmp_path, share(whole, Shard(ranks.rank, ranks.world)), 1, ranks)
        for unit in range(len(whole.units)):
            if ranks.rank == rank and unit == after:
                writer.abandon()
            writer.write_unit(unit)
        writer.finish()
        return writer.outcome

    outcomes = on_ranks(2, work)
    assert outcomes[0] == outcomes[1] and outcomes[0] is not None and outcomes[0].path is None
    assert outcomes[0].error is not None
    assert outcomes[0].error.startswith(f"rank {rank}: the step it was written alongside failed")
    check_previous(tmp_path, whole)


# Disks that do not answer.


class Hanging(Disk):
    """Waits in a call of this kind until the gate opens."""

    def __init__(self, what: str, name: str) -> None:
        self.what, self.name, self.gate = what, name, threading.Event()

    def before(self, what: str, path: Path) -> None:
        if what == self.what and path.name == self.name:
            self.gate.wait(30)


def on_lane(writer: CheckpointWriter, num_units: int, seconds: float) -> Outcome:
    """Write it as the engine and the run do, on a disk lane with patience."""
    lane = DiskLane(seconds)
    lane.give_up = writer.abandon
    for unit in range(num_units):
        lane.submit(frozenset(), partial(writer.write_unit, unit))
    lane.submit(frozenset(), writer.finish)
    lane.drain()
    if writer.outcome is None:
        assert writer.was_abandoned and lane.is_idle
        writer.give_up("the disk has not answered")
    assert writer.outcome is not None
    return writer.outcome


@pytest.mark.parametrize(
    ("rank", "what", "name"),
    [
        (1, "write", "unit-00002.safetensors"),
        (1, "mkdir", "rank-00001"),
        (1, "fsync", "index.json"),
        (0, "mkdir", ".tmp-checkpoint-1"),
        (0, "write", "unit-00002.safetensors"),
        (0, "create", "manifest.json"),
        (0, "rename", "checkpoint-1"),
    ],
)
@pytest.mark.parametrize("patience", [(0.2, 0.2), (0.2, 0.6), (0.6, 0.2)])
def test_a_disk_that_never_answers_one_rank_is_given_up_by_all(
    rank: int, what: str, name: str, patience: tuple[float, float], whole: HostStore, tmp_path: Path
) -> None:
    """The runs go on, with the next checkpoint too, however long each rank waits."""
    save(tmp_path, whole, 2, 0)
    disk = Hanging(what, name)

    def work(ranks: ThreadedRanks) -> list[Outcome]:
        store = share(whole, Shard(ranks.rank, ranks.world))
        seconds = patience[ranks.rank]
        own = disk if ranks.rank == rank else Disk()
        first = on_lane(writer_of(tmp_path, store, 1, ranks, own), len(whole.units), seconds)
        second = on_lane(writer_of(tmp_path, store, 2, ranks, Disk()), len(whole.units), 30.0)
        return [first, second]

    outcomes = on_ranks(2, work)
    disk.gate.set()
    assert outcomes[0] == outcomes[1]
    first, second = outcomes[0]
    assert first.error is not None and "the disk did not answer in time" in first.error
    assert second.error is None and second.path == tmp_path / "checkpoint-2"
    assert {c.manifest.step for c in list_checkpoints(tmp_path)[0]} >= {0, 2}
    assert bits(load(open_checkpoint(tmp_path / "checkpoint-2"), whole, 3)) == bits([whole])


# Ranks that are lost.


def test_a_lost_rank_is_an_error_and_not_an_outcome(whole: HostStore, tmp_path: Path) -> None:
    save(tmp_path, whole, 3, 0)
    raised: list[int] = []

    def work(ranks: ThreadedRanks) -> None:
        writer = writer_of(tmp_path, share(whole, Shard(ranks.rank, ranks.world)), 1, ranks)
        for unit in range(4):
            writer.write_unit(unit)
        if ranks.rank == 2:
            return ranks.leave()
        with pytest.raises(RankError):
            writer.finish()
        assert writer.outcome is None
        with pytest.raises(RankError):
            writer.give_up("the disk has not answered")
        raised.append(ranks.rank)

    on_ranks(3, work)
    assert sorted(raised) == [0, 1]
    check_previous(tmp_path, whole)


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from multiprocessing import Pipe
from pathlib import Path
import torch; torch.set_num_threads(1)
import rank_checkpoints as t
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.distributed.ranks import Ranks
from horizon_lm.errors import RankError
from horizon_lm.memory.shards import Shard

class Dying(Disk):
    count, at = 0, None
    def before(self, what, path):
        Dying.count += 1
        if Dying.count == Dying.at:
            os.kill(os.getpid(), signal.SIGKILL)

class PipedRanks(Ranks):
    world = 2
    def __init__(self, rank, pipe):
        self.rank, self.pipe = rank, pipe
    def exchange(self, value, channel=None):
        try:
            self.pipe.send(value)
            other = self.pipe.recv()
        except (EOFError, OSError):
            raise RankError("another rank is lost")
        return [value, other] if self.is_first else [other, value]
    def from_first(self, value, channel=None):
        return self.exchange(value)[0]

whole = t.content("bf16")
stores = [t.share(whole, Shard(rank, 2)) for rank in range(2)]

def run(folder, killed, at):
    pipes, children = Pipe(), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            pipes[1 - rank].close()
            Dying.count, Dying.at = 0, at if rank == killed else None
            writer = t.writer_of(folder, stores[rank], 2, PipedRanks(rank, pipes[rank]), Dying())
            try:
                t.write(writer, len(whole.units))
            except RankError:
                os._exit(100)
            os._exit(Dying.count)
        children.append(child)
    for pipe in pipes:
        pipe.close()
    return [os.waitpid(child, 0)[1] for child in children]

root = Path({root!r})
counts = [os.waitstatus_to_exitcode(status) for status in run(root / "count", 0, None)]
print(*counts, flush=True)
for rank, count in enumerate(counts):
    for at in range(1, count + 1):
        statuses = run(root / f"run-{{rank}}-{{at}}", rank, at)
        codes = [os.waitstatus_to_exitcode(status) for status in statuses]
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 100, (rank, at, codes)
"""


def test_a_kill_of_one_rank_at_any_call_leaves_the_last_checkpoint(
    whole: HostStore, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """SIGKILL of rank 0 or 1 before each create, write, fsync and rename; the other ends with RankError."""
    save(tmp_path, whole, 2, 1)
    for name in ("count", *(f"run-{rank}-{at}" for rank in range(2) for at in range(1, 60))):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name / "checkpoint-1")
    script = KILLED.format(path=[str(Path(__file__).parents[1] / "helpers")], root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [int(count) for count in done.stdout.split()]
    assert all(20 < count < 60 for count in counts)
    for rank, count in enumerate(counts):
        for at in range(1, count + 1):
            run = tmp_path / f"run-{rank}-{at}"
            found, rejected = list_checkpoints(run)
            assert found and not rejected
            # The last call of rank 0 is the fsync after the rename.
            assert found[0].manifest.step == (2 if (rank, at) == (0, count) else 1)
            assert not verify(found[0]).faults
            checkpoints.sweep(run, Disk())
            assert not [p for p in run.iterdir() if p.name.startswith(".")]
    assert bits(load(list_checkpoints(tmp_path / "run-1-5")[0][0], whole, 3)) == bits([whole])
    record_property("cases", sum(counts))
    print(f"{sum(counts)} kills of one of two ranks: the run could be resumed every time")
