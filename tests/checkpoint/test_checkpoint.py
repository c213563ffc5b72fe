"""What a checkpoint holds, how it reaches the disk, and which one is taken."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from horizon_lm.checkpoint.disk import Disk, HashedFile
from horizon_lm.checkpoint.folder import Retention, candidates, list_checkpoints, open_checkpoint
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.reader import verify
from horizon_lm.checkpoint.writer import CheckpointWriter, Snapshot
from horizon_lm.errors import CheckpointError
from horizon_lm.host_model import HostModel
from horizon_lm.training.resume import load_checkpoint
from saved_models import empty, flip, new_model, regions, remove, save, take_step, truncate
from saved_models import model as model
from saved_models import sound as sound

pytestmark = pytest.mark.usefixtures("one_thread")


# What is in it.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("moments", ["bfloat16", "float32"])
def test_what_is_saved_is_read_back_and_is_plain_safetensors(
    dtype: str, moments: str, tmp_path: Path
) -> None:
    model = new_model(dtype, moment_dtype=moments)
    take_step(model, 1)
    take_step(model, 2)
    writer = save(tmp_path, model, 2)
    assert writer.outcome is not None and writer.outcome.error is None
    assert writer.outcome.path == tmp_path / "checkpoint-2"
    other = new_model(dtype, seed=9, moment_dtype=moments)
    assert regions(other) != regions(model)
    checkpoint = open_checkpoint(tmp_path / "checkpoint-2")
    load_checkpoint(checkpoint, other)
    assert regions(other) == regions(model) and other.steps_done == 2
    named = dict(model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "checkpoint-2").glob("unit-*.safetensors"):
        found |= load_file(file)  # the library's own reader, which maps the file
    for name, master in named.items():
        weight = found[f"weights.{name}"]
        assert weight.shape == master.shape and torch.equal(weight, master.to(weight.dtype))
        assert found[f"exp_avg.{name}"].dtype == getattr(torch, moments)
    assert not verify(checkpoint).faults
    take_step(model, 3)
    take_step(other, 3)
    model.flush(), other.flush()
    assert regions(other) == regions(model)


@pytest.mark.parametrize("buffer", [4096, 1 << 16, 4 << 20])
@pytest.mark.parametrize("refuses", ["nothing", "the flag", "each write"])
def test_a_file_is_written_past_the_page_cache_where_that_is_possible(
    tmp_path: Path, buffer: int, refuses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes with and without; a file system may refuse the flag (tmpfs did), or what is written."""
    direct = 0

    class Watching(Disk):
        buffer_bytes = buffer

        def write(self, number: int, path: Path, data: memoryview) -> None:
            nonlocal direct
            is_direct = bool(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_DIRECT)
            assert len(data) <= buffer
            if is_direct:
                direct += 1
                address = np.frombuffer(data, dtype=np.uint8).ctypes.data
                assert address % 4096 == len(data) % 4096 == os.lseek(number, 0, os.SEEK_CUR) % 4096 == 0
                if refuses == "each write":
                    raise OSError(errno.EINVAL, "Invalid argument")
            super().write(number, path, data)

    if refuses == "the flag":

        def refuse(number: int, command: int, *rest: int) -> int:
            if command == fcntl.F_SETFL and rest[0] & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return actual(number, command, *rest)

        actual = fcntl.fcntl
        monkeypatch.setattr("horizon_lm.checkpoint.disk.fcntl.fcntl", refuse)
    expected = np.random.default_rng(0).integers(0, 256, 300_001, dtype=np.uint8).tobytes()
    file = HashedFile(Watching(), tmp_path / "file")
    could = file.is_direct
    for start, end in ((0, 7), (7, 7), (7, 200_000), (200_000, 300_001)):
        file.write(memoryview(expected)[start:end])
    assert file.close() == (300_001, xxhash.xxh3_128_hexdigest(expected))
    assert (tmp_path / "file").read_bytes() == expected
    if refuses == "the flag":
        assert not could and not direct
    elif could and buffer < 300_001:
        assert direct == (1 if refuses == "each write" else 300_001 // buffer + (buffer > 4096))


def test_a_save_holds_a_buffer_and_not_a_copy(model: HostModel, tmp_path: Path) -> None:
    seen = 0

    class Watching(Disk):
        buffer_bytes = 1 << 14

        def write(self, file: int, path: Path, data: memoryview) -> None:
            nonlocal seen
            assert len(data) <= self.buffer_bytes
            seen += len(data)
            super().write(file, path, data)

    tracemalloc.start()
    try:
        writer = save(tmp_path, model, 1, Watching())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = sum(len(data) for data in regions(model).values())
    assert writer.outcome is not None and writer.outcome.error is None, writer.outcome
    assert seen > size > 4 * peak


def test_everything_is_synced_before_the_rename_and_the_rename_before_old_ones_go(
    model: HostModel, tmp_path: Path
) -> None:
    calls: list[tuple[str, str]] = []

    class Listening(Disk):
        def before(self, what: str, path: Path) -> None:
            calls.append((what, path.name))

    save(tmp_path, model, 1)
    save(tmp_path, model, 2, Listening(), Retention(last=1))
    rename = calls.index(("rename", "checkpoint-2"))
    synced = [name for what, name in calls[:rename] if what == "fsync"]
    files = {p.name for p in (tmp_path / "checkpoint-2").rglob("*") if p.is_file()}
    assert set(synced) == files | {".tmp-checkpoint-2", "templates"}
    assert synced[-1] in (".tmp-checkpoint-2", "templates")
    manifest = calls.index(("create", "manifest.json"))
    assert all(("fsync", name) in calls[:manifest] for name in files - {"manifest.json"})
    assert calls[rename + 1] == ("fsync", tmp_path.name)
    assert calls.index(("rename", ".del-checkpoint-1")) > rename + 1
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2"}


# Which one is taken.


def test_the_best_sound_checkpoint_is_taken_and_the_others_are_named(
    model: HostModel, tmp_path: Path
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, model, step)
    flip(tmp_path / "checkpoint-4" / "manifest.json", random.Random(1))
    truncate(tmp_path / "checkpoint-3" / "unit-00001.safetensors", random.Random(1))
    warnings: list[str] = []
    found = candidates(tmp_path, warnings.append)
    assert [c.manifest.step for c in found] == [2, 1] and len(warnings) == 2
    assert any("checkpoint-4" in w for w in warnings)
    assert any("unit-00001.safetensors" in w for w in warnings)


def test_none_sound_ends_with_5_and_deletes_nothing(sound: Path, tmp_path: Path) -> None:
    """20 folders in which every checkpoint is damaged."""
    rng = random.Random(2)
    for case in range(20):
        run = tmp_path / f"run-{case}"
        for step in range(1, 1 + case % 3 + 1):
            copy = shutil.copytree(sound, run / f"checkpoint-{step}")
            rng.choice([truncate, remove, empty])(copy / "unit-00002.safetensors", rng)
        before = {p: p.stat().st_size for p in run.rglob("*") if p.is_file()}
        with pytest.raises(CheckpointError, match=r"no valid checkpoint in .*unit-00002") as caught:
            candidates(run, lambda text: None)
        assert caught.value.exit_code == 5 and caught.value.message.count("unit-00002") == 1 + case % 3
        assert {p: p.stat().st_size for p in run.rglob("*") if p.is_file()} == before


def test_a_linked_checkpoint_is_not_followed(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").symlink_to(sound)
    with pytest.raises(CheckpointError, match="is a link"):
        open_checkpoint(tmp_path / "checkpoint-1")
    assert list_checkpoints(tmp_path)[0] == []


def test_a_slow_or_hanging_disk_lets_the_run_go_on(tmp_path: Path) -> None:
    """A write that never ends: after the patience the checkpoint is given up and training goes on."""
    import threading

    model, gate = new_model(), threading.Event()

    class Hanging(Disk):
        def before(self, what: str, path: Path) -> None:
            if what == "write" and "unit-00002" in str(path):
                gate.wait(60)

    twin = new_model()
    for seed in (1, 2):
        take_step(model, seed), take_step(twin, seed)
    model.engine.lanes.disk.patience_seconds = 0.3
    writer = CheckpointWriter(
        tmp_path,
        Snapshot(Manifest(2, 1, {}, config={}, state={"steps_done": 2}), model.store, [], {}),
        Hanging(),
    )
    model.save_state(writer, background=True)
    for seed in (3, 4, 5):
        take_step(model, seed), take_step(twin, seed)
    assert writer.was_abandoned and not model.is_saving
    gate.set()
    model.flush(), twin.flush()
    assert regions(model) == regions(twin)
    again = save(tmp_path, model, 5)
    assert again.outcome is not None and again.outcome.error is None
    assert [c.manifest.step for c in list_checkpoints(tmp_path)[0]] == [5]
