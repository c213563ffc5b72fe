"""Checkpoints of several ranks: any number of ranks reads what any number has written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from horizon_lm.checkpoint import sources, units
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import Retention, list_checkpoints, open_checkpoint
from horizon_lm.checkpoint.reader import load_units, verify
from horizon_lm.errors import CheckpointError
from horizon_lm.memory.shards import Shard
from rank_checkpoints import KINDS, SMALL, SmallBlocks, bits, content, empty, load, save, share
from threaded_ranks import ThreadedRanks

WORLDS = (1, 2, 3, 4)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_reads_what_any_number_wrote(kind: str, tmp_path: Path) -> None:
    """Every byte of weights, residuals and moments, for 16 pairs."""
    whole = content(kind)
    expected = bits([whole])
    assert len({part.shape for unit in whole.units for part in unit.parameters}) > 2
    for world in WORLDS:
        assert bits([share(whole, Shard(rank, world)) for rank in range(world)]) == expected
        run = tmp_path / str(world)
        run.mkdir()
        (outcome, *others) = save(run, whole, world)
        assert outcome.error is None and outcome.path == run / "checkpoint-1"
        assert all(other == outcome for other in others)
        checkpoint = open_checkpoint(run / "checkpoint-1")
        assert checkpoint.manifest.ranks == world
        assert outcome.num_bytes == sum(p.stat().st_size for p in outcome.path.rglob("*") if p.is_file())
        assert not verify(checkpoint).faults
        for other in WORLDS:
            assert bits(load(checkpoint, whole, other)) == expected, (world, other)
    # The control: another store is not equal to what was read.
    next(view for unit in range(1, 3) for _, view in units.entries(whole, unit)).reshape(-1)[0] += 1
    assert bits(load(checkpoint, whole, 3)) != bits([whole])


def test_files_are_plain_and_hold_each_element_once(tmp_path: Path) -> None:
    whole = content("bf16")
    save(tmp_path, whole, 3)
    folder = tmp_path / "checkpoint-1"
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"manifest.json", "buffers.safetensors", *SMALL} < names
    assert {name.partition("/")[0] for name in names if name.startswith("rank")} == {
        "rank-00000",
        "rank-00001",
        "rank-00002",
    }
    assert "rank-00000/index.json" in names and "rank-00002/unit-00001.safetensors" in names
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["version"], manifest["ranks"]) == (2, 3)
    found: dict[str, list[torch.Tensor]] = {}
    for name in sorted(name for name in names if "/unit-" in name):
        for key, tensor in load_file(folder / name).items():  # the library's own reader, which maps the file
            found.setdefault(key, []).append(tensor)
    joined = {key: torch.cat(parts).view(torch.uint8).numpy().tobytes() for key, parts in found.items()}
    assert joined == bits([whole])
    sizes = sum((folder / name).stat().st_size for name in names if "/unit-" in name)
    payload = sum(len(value) for value in joined.values())
    assert payload < sizes < 1.2 * payload  # headers, and no padding


def test_one_rank_writes_version_1_and_no_index(tmp_path: Path) -> None:
    save(tmp_path, content("fp32"), 1)
    manifest = json.loads((tmp_path / "checkpoint-1" / "manifest.json").read_text())
    assert manifest["version"] == 1 and "ranks" not in manifest
    assert not [name for name in manifest["files"] if "rank" in name or "index" in name]


class Counted:
    """Bytes that are read from files of units."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.num_bytes = self.largest = 0
        honest = sources._read_exactly

        def read(file: int, target: Any, begin: int) -> memoryview:
            found = honest(file, target, begin)
            self.num_bytes += len(found)
            self.largest = max(self.largest, len(found))
            return found

        patch.setattr(sources, "_read_exactly", read)


def test_a_rank_reads_what_it_holds_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = content("experts")
    total = sum(len(value) for value in bits([whole]).values())
    save(tmp_path, whole, 4)
    counted = Counted(monkeypatch)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    many = open_checkpoint(tmp_path / "checkpoint-1")
    store = empty(whole, Shard(1, 3))
    load_units(many, store)
    held = sum(view.nbytes for unit in range(len(store.units)) for _, view in units.entries(store, unit))
    blocks = 2 * 4096 * sum(len(units.parts(u, store.spec, Shard(1, 3))) for u in store.units)
    assert held <= counted.num_bytes <= held + blocks and counted.num_bytes < 0.7 * total
    assert counted.largest < 4096  # pieces of 1,000 bytes, and headers by blocks
    # The control: a file of one rank has one checksum, for which all of it is read.
    save(tmp_path, whole, 1, step=2)
    counted.num_bytes = 0
    load_units(open_checkpoint(tmp_path / "checkpoint-2"), empty(whole, Shard(1, 3)))
    assert counted.num_bytes > total


def test_writes_hold_a_buffer_and_are_synced_before_the_rename(tmp_path: Path) -> None:
    calls: list[tuple[int, str, str]] = []

    class Listening(SmallBlocks):
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def before(self, what: str, path: Path) -> None:
            calls.append((self.rank, what, str(path.relative_to(tmp_path))))

        def write(self, file: int, path: Path, data: memoryview) -> None:
            assert len(data) <= self.buffer_bytes
            super().write(file, path, data)

    whole = content("bf16")
    save(tmp_path, whole, 3, disks={rank: Listening(rank) for rank in range(3)})
    staging = ".tmp-checkpoint-1"
    names = {str(p.relative_to(tmp_path / "checkpoint-1")) for p in (tmp_path / "checkpoint-1").rglob("*")}
    rename = calls.index((0, "rename", "checkpoint-1"))
    manifest = calls.index((0, "create", f"{staging}/manifest.json"))
    synced = {path for _, what, path in calls[:manifest] if what == "fsync"}
    folders = {f"{staging}/rank-{rank:05}" for rank in range(3)}
    assert synced == {f"{staging}/{name}" for name in names - {"manifest.json", "templates"}}
    assert folders < synced
    late = {path for _, what, path in calls[manifest:rename] if what == "fsync"}
    assert {f"{staging}/manifest.json", staging} <= late
    assert {rank for rank, *_ in calls[manifest:]} == {0}  # the others are done
    for rank, _, path in calls:
        assert rank == 0 or path.startswith((f"{staging}/rank-{rank:05}", "."))
    assert calls[rename + 1] == (0, "fsync", ".")


def test_old_checkpoints_are_pruned_by_rank_0_and_named_on_all(tmp_path: Path) -> None:
    whole = content("fp32")
    for step in (1, 2, 3):
        outcomes = save(tmp_path, whole, 2, step, keep=Retention(last=2))
    assert outcomes[0] == outcomes[1] and outcomes[0].pruned == (tmp_path / "checkpoint-1",)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3"}


def test_the_staging_folder_may_become_visible_late(tmp_path: Path) -> None:
    """As on a network file system whose clients remember what was not there."""

    class Late(SmallBlocks):
        tries = 0

        def make_folder(self, path: Path) -> None:
            Late.tries += 1
            if Late.tries < 4:
                raise FileNotFoundError(2, "No such file or directory", str(path))
            super().make_folder(path)

    outcomes = save(tmp_path, content("fp32"), 2, disks={1: Late()})
    assert outcomes[1].error is None and Late.tries == 4


def test_names_are_those_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank may not see yet that the plain name is taken."""
    whole = content("fp32")
    save(tmp_path, whole, 2)

    def stale(rank: int, writer: Any) -> None:
        assert writer._target == tmp_path / "checkpoint-1-2"
        if rank == 1:
            writer._target = tmp_path / "checkpoint-1"

    outcomes = save(tmp_path, whole, 2, on=stale)
    assert outcomes[0] == outcomes[1] and outcomes[1].path == tmp_path / "checkpoint-1-2"
    assert [c.manifest.serial for c in list_checkpoints(tmp_path)[0]] == [2, 1]


def test_another_models_store_is_refused(tmp_path: Path) -> None:
    save(tmp_path, content("bf16"), 3)
    checkpoint = open_checkpoint(tmp_path / "checkpoint-1")
    for kind, said in (
        ("fp32", "weights.all.f1 is BF16 [97, 51], expected F32 [97, 51]"),
        ("one moment", "exp_avg.all.tw is BF16 [4500], expected F32 [4500]"),
        ("tied", "unit-00000.safetensors is in no file"),
    ):
        with pytest.raises(CheckpointError, match="checkpoint-1") as error:
            load(checkpoint, content(kind), 2)
        assert said in error.value.message, error.value.message
    load(checkpoint, content("bf16"), 2)


def test_a_rank_without_anything_writes_an_index_and_no_more(tmp_path: Path) -> None:
    """16 ranks over units of a few blocks: most ranks hold little, many nothing of a unit."""
    whole = content("one moment")
    outcomes = save(tmp_path, whole, 16, disks={rank: Disk() for rank in range(16)})
    assert outcomes[0].error is None
    checkpoint = open_checkpoint(tmp_path / "checkpoint-1")
    last = [name for name in checkpoint.manifest.files if name.startswith("rank-00015/")]
    assert last == ["rank-00015/index.json"]
    assert bits(load(checkpoint, whole, 5)) == bits([whole])


def test_ranks_as_threads_refuse_what_is_not_json() -> None:
    """Of the helper: what ranks tell each other must survive the trip between processes."""
    with pytest.raises(TypeError):
        ThreadedRanks(0, 1, {}).exchange(object())


def test_a_checkpoint_without_the_files_of_a_rank_is_none(tmp_path: Path) -> None:
    whole = content("bf16")
    save(tmp_path, whole, 2)
    folder = tmp_path / "checkpoint-1"
    for path in (folder / "rank-00001").glob("unit-*"):
        os.rename(path, path.with_suffix(".away"))
    checkpoint = list_checkpoints(tmp_path)
    assert not checkpoint[0] and "is missing" in checkpoint[1][0].reason
