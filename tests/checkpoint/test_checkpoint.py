"""A checkpoint is whole or absent, and what is damaged is refused by name: every write position, every
kind of damage, every file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import zoo
from horizon_lm import cli
from horizon_lm.checkpoint import folder as checkpoints
from horizon_lm.checkpoint import manifest as manifests
from horizon_lm.checkpoint import units
from horizon_lm.checkpoint.disk import Disk, HashedFile, checksum
from horizon_lm.checkpoint.folder import candidates, list_checkpoints, open_checkpoint
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.reader import verify
from horizon_lm.checkpoint.writer import CheckpointWriter
from horizon_lm.errors import CheckpointError
from horizon_lm.run.host_model import HostModel
from horizon_lm.run.resume import load_checkpoint, saved_buffers

DAMAGES = 560


pytestmark = pytest.mark.usefixtures("one_thread")


def new_model(dtype: str = "bfloat16", seed: int = 0, **settings: Any) -> HostModel:
    config = zoo.CASES["llama"].config()
    source = zoo._from_config(config, torch.float32, seed=seed, attn="sdpa")
    settings = {"skip_memory_check": True, **settings}
    return HostModel.from_pretrained(source, device="cpu", dtype=dtype, **settings)


def take_step(model: HostModel, seed: int) -> None:
    model.train_step([zoo.batch("llama", batch_size=1, length=8, seed=seed)], lr=1e-2)


@pytest.fixture(scope="module")
def model() -> HostModel:
    model = new_model()
    take_step(model, 1)
    model.flush()
    return model


def save(run: Path, model: HostModel, step: int, disk: Disk | None = None, **keep: Any) -> CheckpointWriter:
    found, _ = list_checkpoints(run)
    serial = 1 + max((c.manifest.serial for c in found), default=0)
    writer = CheckpointWriter(
        run,
        model.store,
        Manifest(step, serial, {}, config={"seed": 42}, state={"steps_done": model.steps_done}),
        small_files={"config.json": b"{}", "tokenizer.json": b"[]", "templates/chat.jinja": b"x"},
        buffers=saved_buffers(model),
        disk=disk or Disk(),
        **keep,
    )
    model.save_state(writer)
    return writer


def regions(model: HostModel) -> dict[str, bytes]:
    """Everything that is saved, as bytes. The padding between parameters is zero and not compared."""
    return {
        key: bytes(units.as_bytes(tensor))
        for unit in range(len(model.store.units))
        for key, tensor in units.entries(model.store, unit)
    }


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
    save(tmp_path, model, 2, Listening(), keep_last=1)
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


# A disk that fails: at every write position, with every error.


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
import test_checkpoint as t
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


# Damage.


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def zero_page(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = rng.randrange(max(1, len(data) - 64))
    end = min(len(data), start + 4096)
    if not any(data[start:end]):
        data[start] = 1
    else:
        data[start:end] = bytes(end - start)
    file.write_bytes(data)


def lengthen(file: Path, rng: random.Random) -> None:
    with file.open("ab") as end:
        end.write(rng.randbytes(rng.randrange(1, 100)))


def remove(file: Path, rng: random.Random) -> None:
    file.unlink()


def empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def link(file: Path, rng: random.Random) -> None:
    data = file.with_suffix(".elsewhere")
    file.rename(data)
    file.symlink_to(data)


def folder_instead(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def noise(file: Path, rng: random.Random) -> None:
    file.write_bytes(rng.randbytes(file.stat().st_size))


def swap(file: Path, rng: random.Random) -> None:
    """With another unit of the same size: layers are alike in all but their numbers."""
    other = file.with_name("unit-00002.safetensors" if "00001" in file.name else "unit-00001.safetensors")
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


FILE_DAMAGES = [flip, flip, truncate, zero_page, lengthen, remove, empty, link, folder_instead, noise, swap]


def resealed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that somebody altered and whose own checksum is right."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    values[manifests._SEAL] = manifests._seal(values)
    path.write_text(json.dumps(values))


def header_of(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Another header, with size and checksum of the file put right in the manifest."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    table = change(table) or table
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    data = len(text).to_bytes(8, "little") + text + data[8 + size :]
    file.write_bytes(data)
    resealed(file.parent, lambda v: v["files"].update({file.name: [len(data), checksum(data)]}))


def first(table: dict[str, Any]) -> dict[str, Any]:
    return table[next(iter(table))]


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dtype": lambda t: first(t).update(dtype="I32"),
    "wrong shape": lambda t: first(t).update(shape=[n + 1 for n in first(t)["shape"]]),
    "transposed": lambda t: first(t).update(shape=[*first(t)["shape"][::-1], 1]),
    "huge shape": lambda t: first(t).update(shape=[1 << 62, 1 << 62]),
    "negative": lambda t: first(t).update(shape=[-1]),
    "offsets": lambda t: first(t).update(data_offsets=[1 << 40, 1 << 41]),
    "overlap": lambda t: [row.update(data_offsets=[0, 4]) for row in t.values()] and None,
    "renamed": lambda t: t.update({"../../evil": t.pop(next(iter(t)))}),
    "missing": lambda t: t.pop(next(iter(t))) and None,
    "extra": lambda t: t.update({"weights.extra": dict(first(t))}),
    "no table": lambda t: b"[]",
    "no json": lambda t: b"{" * 1000,
    "deep": lambda t: b'{"a":' * 20000 + b"1" + b"}" * 20000,
    "null": lambda t: first(t).update(shape=None),
    "text": lambda t: first(t).update(shape="abc"),
    "empty": lambda t: b"",
}
MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "parent folder": lambda v: v["files"].update({"../evil": v["files"].pop("config.json")}),
    "absolute": lambda v: v["files"].update({"/etc/passwd": v["files"].pop("config.json")}),
    "deep": lambda v: v["files"].update({"a/b/c": v["files"].pop("config.json")}),
    "hidden": lambda v: v["files"].update({".ssh": v["files"].pop("config.json")}),
    "nul": lambda v: v["files"].update({"a\0b": v["files"].pop("config.json")}),
    "itself": lambda v: v["files"].update({"manifest.json": v["files"]["config.json"]}),
    "option": lambda v: v["files"].update({"-rf": v["files"].pop("config.json")}),
    "dots": lambda v: v["files"].update({"a/..": v["files"].pop("config.json")}),
    "size": lambda v: v["files"].update({"config.json": [-1, v["files"]["config.json"][1]]}),
    "size is true": lambda v: v["files"].update({"config.json": [True, v["files"]["config.json"][1]]}),
    "checksum": lambda v: v["files"].update({"config.json": [2, "xyz"]}),
    "no pair": lambda v: v["files"].update({"config.json": 5}),
    "files": lambda v: v.update(files=[1, 2]),
    "step": lambda v: v.update(step="5"),
    "negative step": lambda v: v.update(step=-5),
    "step is true": lambda v: v.update(step=True),
    "serial": lambda v: v.update(serial=None),
    "state": lambda v: v.update(state=[]),
    "config": lambda v: v.update(config=None),
    "version": lambda v: v.update(version=2),
    "format": lambda v: v.update(format="other"),
    "parent": lambda v: v.update(parent=["x"]),
    "missing unit": lambda v: v["files"].pop("unit-00001.safetensors") and None,
    "extra unit": lambda v: v["files"].update({"unit-00099.safetensors": v["files"]["config.json"]}),
    "no state": lambda v: v.update(state={}),
}


@pytest.fixture(scope="module")
def sound(model: HostModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sound")
    save(run, model, 1)
    return run / "checkpoint-1"


def refused(folder: Path, target: HostModel) -> CheckpointError:
    """Reading it as a run does is refused; the error names the folder or a file in it."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(open_checkpoint(folder), target)
    assert str(folder) in caught.value.message and caught.value.exit_code == 5
    return caught.value


def test_every_damaged_checkpoint_is_refused_by_name(
    sound: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    target, rng = new_model(seed=5), random.Random(11)
    before = regions(target)
    cases = 0
    names = sorted(p.name for p in sound.iterdir() if p.is_file())
    needed = [name for name in names if name.startswith(("unit-", "buffers", "manifest"))]
    assert len(needed) >= 5
    while cases < DAMAGES - len(HEADERS) - len(MANIFESTS):
        damage = FILE_DAMAGES[cases % len(FILE_DAMAGES)]
        name = rng.choice(needed)
        if damage is swap:
            name = rng.choice(["unit-00001.safetensors", "unit-00002.safetensors"])
        copy = tmp_path / f"checkpoint-{cases}"
        shutil.copytree(sound, copy)
        original = (copy / name).read_bytes()
        damage(copy / name, rng)
        if (copy / name).is_file() and not (copy / name).is_symlink():
            assert (copy / name).read_bytes() != original
        error = refused(copy, target)
        told = name in error.message or damage is swap or name == "manifest.json"
        assert told, (damage, name, error.message)
        shutil.rmtree(copy)
        cases += 1
    for change in HEADERS.values():
        copy = shutil.copytree(sound, tmp_path / f"checkpoint-{cases}")
        header_of(copy / "unit-00001.safetensors", change)
        assert "unit-00001.safetensors" in refused(copy, target).message
        cases += 1
    for change in MANIFESTS.values():
        copy = shutil.copytree(sound, tmp_path / f"checkpoint-{cases}")
        resealed(copy, change)
        refused(copy, target)
        cases += 1
    assert cases == DAMAGES
    load_checkpoint(open_checkpoint(sound), target)  # the control: it is the damage that is refused
    assert regions(target) != before
    record_property("cases", cases)
    print(f"{cases} damaged checkpoints: all refused with the file named")


def test_damage_of_any_file_is_found_by_verify(sound: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    for name in sorted(str(p.relative_to(sound)) for p in sound.rglob("*") if p.is_file()):
        copy = shutil.copytree(sound, tmp_path / "checkpoint-1")
        flip(copy / name, rng)
        assert cli.main(["verify", str(copy)]) == 5, name
        shutil.rmtree(copy)
    copy = shutil.copytree(sound, tmp_path / "checkpoint-1")
    assert cli.main(["verify", str(copy)]) == 0
    (copy / "stranger.bin").write_bytes(b"x")
    assert cli.main(["verify", str(copy)]) == 5


def test_numbers_that_are_not_finite_are_found_by_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = new_model("float32")
    model.store.run("exp_avg", 1)[3] = torch.nan
    model.store.run("exp_avg", 2)[3:5] = torch.inf
    save(tmp_path, model, 1)
    assert cli.main(["verify", str(tmp_path)]) == 5
    shown = capsys.readouterr().err
    assert "has 2 values that are not finite" in shown and "exp_avg." in shown


def test_a_checkpoint_of_version_1_can_be_read_for_ever(tmp_path: Path) -> None:
    """One that the first version wrote. If this fails, the format has changed: raise `manifest.VERSION`, read
    both, and add a fixture."""
    folder = Path(__file__).parents[1] / "fixtures" / "checkpoint-v1"
    config = AutoConfig.from_pretrained(folder)
    source = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    target = HostModel.from_pretrained(source, device="cpu", dtype="bfloat16", skip_memory_check=True)
    load_checkpoint(open_checkpoint(folder), target)
    masters = b"".join(tensor.numpy().tobytes() for _, tensor in target.named_parameters())
    assert checksum(masters) == "3cf15b228b777a4e98904941a16da742" and target.steps_done == 2
    assert cli.main(["verify", str(folder)]) == 0
    assert cli.main(["export", str(folder), str(tmp_path / "out")]) == 0


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
        model.store,
        Manifest(2, 1, {}, config={}, state={"steps_done": 2}),
        small_files={},
        buffers=[],
        disk=Hanging(),
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
