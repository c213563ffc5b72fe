"""A checkpoint is whole or absent: disks that fail or are full at every write position, and kills."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from horizon_lm.checkpoint import folder as checkpoints
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import list_checkpoints, open_checkpoint
from horizon_lm.checkpoint.reader import verify
from horizon_lm.host_model import HostModel
from saved_models import model as model
from saved_models import regions, save

pytestmark = pytest.mark.usefixtures("one_thread")


class Failing(Disk):
    """Raises at the `at`th call (None: never) and counts."""

    buffer_bytes = 4096  # many write positions

    def __init__(self, at: int | None = None, code: int = errno.ENOSPC, kinds: str = "") -> None:
        self.at, self.code, self.kinds, self.count = at, code, kinds.split(), 0

    def before(self, what: str, path: Path) -> None:
        if self.kinds and what not in self.kinds:
            return
        self.count += 1
        if self.at is not None and self.count >= self.at:
            raise OSError(self.code, os.strerror(self.code), str(path))


CODES = ["ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES"]


def test_a_failure_at_any_call_leaves_the_last_checkpoint_and_no_rest(
    model: HostModel, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    counting = Failing()
    save(tmp_path, model, 0, counting)
    total = counting.count
    expected, cases = regions(model), 0
    assert total > 60
    for number, at in enumerate(range(1, total + 1)):
        disk = Failing(at, getattr(errno, CODES[number % len(CODES)]))
        writer = save(tmp_path, model, 1, disk)
        outcome = writer.outcome
        assert outcome is not None
        committed = (tmp_path / "checkpoint-1").exists()
        # the last fsync is that of the run folder: the rename has been made, but is not known to last
        assert outcome.error is not None and committed == (at == total)
        assert CODES[number % len(CODES)] in errno.errorcode.values() and str(tmp_path) in outcome.error
        good = open_checkpoint(tmp_path / "checkpoint-0")
        assert not verify(good).faults
        shutil.rmtree(tmp_path / "checkpoint-1", ignore_errors=True)
        disk.at = None
        checkpoints.sweep(tmp_path, disk)
        assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-0"}
        cases += 1
    assert regions(model) == expected  # the run goes on with what it had
    record_property("cases", cases)
    print(f"{cases} failing calls of one save: the checkpoint before it was intact every time")


def test_a_full_file_system_at_every_size(
    model: HostModel, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Real ENOSPC: a tmpfs of 60 sizes, from one checkpoint to three."""
    place = tmp_path / "mount"
    place.mkdir()
    size = sum(len(data) for data in regions(model).values())
    sizes = [int(size * (1 + 2 * i / 59)) // 4096 * 4096 + 65536 for i in range(60)]
    full = committed = 0
    for number in sizes:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={number}", "tmpfs", str(place)], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("mounting a tmpfs is not allowed here; the test above has every write position")
        try:
            first = save(place, model, 1).outcome
            second = save(place, model, 2).outcome
            assert first is not None and second is not None
            found, rejected = list_checkpoints(place)
            assert not rejected
            assert [c.manifest.step for c in found] == [o.step for o in (second, first) if o.error is None]
            for one in found:
                assert not verify(one).faults
            assert not [p for p in place.iterdir() if p.name.startswith(".tmp")]
            full += second.error is not None
            committed += second.error is None
            if second.error is not None:
                assert "No space left" in second.error
        finally:
            subprocess.run(["umount", str(place)], check=True)
    assert full >= 20 and committed >= 20
    record_property("full", full)
    print(f"60 file systems: {full} full ones kept the checkpoint before, {committed} had room")


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
import saved_models as t
from horizon_lm.checkpoint.disk import Disk
class Dying(Disk):
    count = writes = 0
    buffer_bytes = 4096
    def before(self, what, path):
        Dying.writes += what == "write"
        if what == "write" and Dying.writes % {stride}:
            return
        Dying.count += 1
        if Dying.count == at:
            os.kill(os.getpid(), signal.SIGKILL)
model = t.new_model(); t.take_step(model, 1); model.flush()
root = Path({root!r})
at = None
t.save(root / "count", model, 1, Dying()); total = Dying.count
print(total, flush=True)
for at in range(1, total + 1):
    if os.fork() == 0:
        Dying.count = Dying.writes = 0
        t.save(root / f"run-{{at}}", model, 2, Dying())
        os._exit(0)
    _, status = os.wait()
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (at, status)
"""


def test_a_kill_at_any_call_leaves_the_last_checkpoint(
    model: HostModel, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """SIGKILL before each create, fsync and rename of a save, and before every fifth write."""
    save(tmp_path, model, 1)
    (tmp_path / "count").mkdir()
    for at in range(1, 140):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / f"run-{at}" / "checkpoint-1")
    script = KILLED.format(path=[str(Path(__file__).parents[1] / "helpers")], root=str(tmp_path), stride=5)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    total = int(done.stdout.split()[0])
    assert 40 < total < 140
    for at in range(1, total + 1):
        run = tmp_path / f"run-{at}"
        found, rejected = list_checkpoints(run)
        assert not rejected and found
        latest = found[0].manifest.step
        assert latest == (2 if at == total else 1)  # the last call is the fsync after the rename
        assert not verify(found[0]).faults
        checkpoints.sweep(run, Disk())
        assert not [p for p in run.iterdir() if p.name.startswith(".")]
    record_property("cases", total)
    print(f"{total} kills between the calls of one save: the run could be resumed every time")
