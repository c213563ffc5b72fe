"""Damaged and forged checkpoints of several ranks: found by the ranks that read what is damaged."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from horizon_lm import cli
from horizon_lm.checkpoint.disk import checksum
from horizon_lm.checkpoint.folder import open_checkpoint
from horizon_lm.checkpoint.reader import load_units, verify
from horizon_lm.errors import CheckpointError
from horizon_lm.memory.shards import Shard
from horizon_lm.memory.store import HostStore
from rank_checkpoints import bits, content, load, save
from rank_checkpoints import empty as empty_store
from saved_models import empty, flip, lengthen, link, noise, remove, resealed, truncate

DAMAGES = 300

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole() -> HostStore:
    return content("bf16")


@pytest.fixture(scope="module")
def sound(whole: HostStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sound")
    save(run, whole, 3)
    return run / "checkpoint-1"


def of_another_rank(file: Path, rng: random.Random) -> None:
    """The same name of another rank, which may have a file of the same size."""
    if file.parent.name.startswith("rank-"):
        others = [p for p in file.parents[1].glob(f"rank-*/{file.name}") if p != file]
        file.write_bytes(rng.choice(others).read_bytes() if others else b"")
    else:
        noise(file, rng)


def linked_folder(file: Path, rng: random.Random) -> None:
    folder = file.parent
    if folder.name.startswith("rank-"):
        folder.rename(folder.with_suffix(".elsewhere"))
        folder.symlink_to(folder.with_suffix(".elsewhere"))
    else:
        link(file, rng)


DAMAGE = [flip, flip, flip, truncate, remove, empty, noise, lengthen, link, of_another_rank, linked_folder]


def test_random_damage_is_found_or_harmless(
    whole: HostStore, sound: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    rng, expected, found = random.Random(3), bits([whole]), Counter[str]()
    names = sorted(str(p.relative_to(sound)) for p in sound.rglob("*") if p.is_file())
    for case in range(DAMAGES):
        copy = shutil.copytree(sound, tmp_path / f"checkpoint-{case}")
        name = rng.choice(names)
        DAMAGE[case % len(DAMAGE)](copy / name, rng)
        try:
            read = bits(load(open_checkpoint(copy), whole, rng.choice((1, 2, 3, 4))))
        except CheckpointError as error:
            assert str(copy) in error.message and error.exit_code == 5
            found["found"] += 1
        else:
            assert read == expected and "unit" not in name and "index" not in name, name
            found["harmless"] += 1
        shutil.rmtree(copy)
    assert found["found"] > 200 and found["harmless"] > 5  # what a run needs besides is read elsewhere
    record_property("cases", DAMAGES)
    print(f"{DAMAGES} damaged checkpoints of three ranks: {found['found']} refused, the others read whole")


def test_damage_is_found_by_the_rank_that_reads_it_alone(
    whole: HostStore, sound: Path, tmp_path: Path
) -> None:
    """The others cannot know: they tell each other (`training.together`)."""
    copy = shutil.copytree(sound, tmp_path / "checkpoint-1")
    file = copy / "rank-00002" / "unit-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = []
    for rank in range(3):
        try:
            load_units(open_checkpoint(copy), empty_store(whole, Shard(rank, 3)))
        except CheckpointError as error:
            assert f"{file}: corrupt" in error.message
            found.append(rank)
    assert found == [2]


def test_verify_finds_damage_of_any_file(sound: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    assert cli.main(["verify", str(sound)]) == 0
    for name in sorted(str(p.relative_to(sound)) for p in sound.rglob("*") if p.is_file()):
        copy = shutil.copytree(sound, tmp_path / "checkpoint-1")
        flip(copy / name, rng)
        assert cli.main(["verify", str(copy)]) == 5, name
        shutil.rmtree(copy)
    copy = shutil.copytree(sound, tmp_path / "checkpoint-1")
    (copy / "rank-00001" / "stranger.bin").write_bytes(b"x")
    assert cli.main(["verify", str(copy)]) == 5


def test_verify_finds_numbers_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = content("fp32")
    store.run("exp_avg", 2)[8195:8197] = torch.inf  # past the share of rank 0
    save(tmp_path, store, 2)
    assert cli.main(["verify", str(tmp_path)]) == 5
    assert "rank-00001/unit-00002.safetensors: exp_avg." in capsys.readouterr().err


# Forged: every checksum is right.

FIRST = "rank-00000/unit-00001.safetensors"
Values = dict[str, Any]


def rename(values: Values, old: str, new: str) -> None:
    values["files"][new] = values["files"].pop(old)


MANIFESTS: dict[str, Callable[[Values], Any]] = {
    **{
        f"ranks {value!r}": lambda v, value=value: v.update(ranks=value)
        for value in (0, 1, 2, 4, -1, True, "3", None, 3.0, [], 10**30, 10**6)
    },
    "version 1": lambda v: v.update(version=1),
    "version 3": lambda v: v.update(version=3),
    "version true": lambda v: v.update(version=True),
    "no index": lambda v: v["files"].pop("rank-00001/index.json") and None,
    "no unit": lambda v: v["files"].pop(FIRST) and None,
    "unit of no rank": lambda v: rename(v, FIRST, "unit-00001.safetensors"),
    "unit in another folder": lambda v: rename(v, FIRST, "templates/unit-00001.safetensors"),
    "another file of a rank": lambda v: rename(v, "templates/chat.jinja", "rank-00001/chat.jinja"),
    "rank beyond": lambda v: rename(v, FIRST, "rank-00007/unit-00001.safetensors"),
    "two folders": lambda v: rename(v, FIRST, "rank-00000/a/unit-00001.safetensors"),
    "parent folder": lambda v: rename(v, FIRST, "rank-00000/../unit-00001.safetensors"),
}


def first(values: Values) -> Values:
    return values["files"]["unit-00001.safetensors"]


def piece(values: Values, **changes: Any) -> None:
    first(values)["pieces"][0].update(changes)


def shift(values: Values, by: int) -> None:
    """Another place of as many elements."""
    found = first(values)["pieces"][0]
    found.update(start=found["start"] + by, stop=found["stop"] + by)


INDEXES: dict[str, Callable[[Values], Any]] = {
    "no blocks": lambda v: first(v)["blocks"].clear(),
    "a block too many": lambda v: first(v)["blocks"].append("0" * 32),
    "another block": lambda v: first(v)["blocks"].__setitem__(0, "0" * 32),
    "blocks swapped": lambda v: first(v)["blocks"].reverse(),
    "no checksum": lambda v: first(v)["blocks"].__setitem__(0, "0" * 31 + "\n"),
    **{f"block_bytes {n}": lambda v, n=n: v.update(block_bytes=n) for n in (0, -1, 1, 8192, 1 << 40, "x")},
    "no files": lambda v: v.update(files={}),
    "files is a list": lambda v: v.update(files=[]),
    "unknown key": lambda v: v.update(more=1),
    "a file too many": lambda v: v["files"].update({"unit-00099.safetensors": first(v)}),
    "another name": lambda v: v["files"].update({"../x": v["files"].pop("unit-00001.safetensors")}),
    "no pieces": lambda v: first(v)["pieces"].clear(),
    "a piece twice": lambda v: first(v)["pieces"].append(first(v)["pieces"][0]),
    "pieces swapped": lambda v: first(v)["pieces"].reverse(),
    "another key": lambda v: piece(v, key="weights.other"),
    "another region": lambda v: piece(v, key="other.all.f1"),
    "dtype": lambda v: piece(v, dtype="F32"),
    "odd dtype": lambda v: piece(v, dtype="BOOL"),
    "shape": lambda v: piece(v, shape=[51, 97]),
    "huge shape": lambda v: piece(v, shape=[1 << 52, 1 << 52]),
    "negative shape": lambda v: piece(v, shape=[-97, -51]),
    "shape is text": lambda v: piece(v, shape="ab"),
    "many sides": lambda v: piece(v, shape=[1] * 10_000),
    "later": lambda v: shift(v, 1),
    "earlier": lambda v: shift(v, -1),
    "longer": lambda v: piece(v, stop=first(v)["pieces"][0]["stop"] + 1),
    "shorter": lambda v: piece(v, stop=first(v)["pieces"][0]["stop"] - 1),
    "backwards": lambda v: piece(v, start=9, stop=3),
    "a fraction": lambda v: piece(v, start=0.5),
    "true": lambda v: piece(v, start=False),
}


def with_index(copy: Path, rank: int, change: Callable[[Values], Any]) -> None:
    name = f"rank-{rank:05}/index.json"
    values = json.loads((copy / name).read_text())
    change(values)
    data = json.dumps(values).encode()
    (copy / name).write_bytes(data)
    resealed(copy, lambda v: v["files"].update({name: [len(data), checksum(data)]}))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_forged_manifest_is_refused(name: str, whole: HostStore, sound: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sound, tmp_path / "checkpoint-1")
    resealed(copy, MANIFESTS[name])
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        load(open_checkpoint(copy), whole, 2)


@pytest.mark.parametrize("name", INDEXES)
def test_a_forged_index_is_refused_and_found_by_verify(
    name: str, whole: HostStore, sound: Path, tmp_path: Path
) -> None:
    for rank in (0, 1):
        copy = shutil.copytree(sound, tmp_path / f"checkpoint-{rank}")
        with_index(copy, rank, INDEXES[name])
        with pytest.raises(CheckpointError, match=f"checkpoint-{rank}"):
            load(open_checkpoint(copy), whole, 2)
        with pytest.raises(CheckpointError, match=f"checkpoint-{rank}"):
            load(open_checkpoint(copy), whole, 1)
        assert verify(open_checkpoint(copy)).faults


def test_other_text_in_place_of_an_index(whole: HostStore, sound: Path, tmp_path: Path) -> None:
    for number, data in enumerate((b"", b"[]", b"\xff", b"[" * 100_000, b"{" * 1000, b'{"files": 1e999}')):
        copy = shutil.copytree(sound, tmp_path / f"checkpoint-{number}")
        (copy / "rank-00001" / "index.json").write_bytes(data)
        entry = [len(data), checksum(data)]
        resealed(copy, lambda v, entry=entry: v["files"].update({"rank-00001/index.json": entry}))
        with pytest.raises(CheckpointError, match=r"rank-00001/index\.json"):
            load(open_checkpoint(copy), whole, 2)


def test_the_same_index_again_is_read(whole: HostStore, sound: Path, tmp_path: Path) -> None:
    """The control: it is the change that is refused."""
    copy = shutil.copytree(sound, tmp_path / "checkpoint-1")
    with_index(copy, 1, lambda values: None)
    resealed(copy, lambda values: None)
    assert bits(load(open_checkpoint(copy), whole, 2)) == bits([whole])
    assert not verify(open_checkpoint(copy)).faults


def test_a_header_that_differs_from_the_index_is_refused(
    whole: HostStore, sound: Path, tmp_path: Path
) -> None:
    """A file of other tensors of the same sizes, with blocks and checksums that fit it."""
    copy = shutil.copytree(sound, tmp_path / "checkpoint-1")
    file = copy / FIRST
    data = file.read_bytes().replace(b"weights.all.f1", b"weights.all.f9", 1)
    file.write_bytes(data)
    blocks = [checksum(data[start : start + 4096]) for start in range(0, len(data), 4096)]
    with_index(copy, 0, lambda v: first(v).update(blocks=blocks))
    resealed(copy, lambda v: v["files"].update({FIRST: [len(data), checksum(data)]}))
    with pytest.raises(CheckpointError, match=r"has no tensor weights\.all\.f1"):
        load(open_checkpoint(copy), whole, 3)
    assert any("has no tensor weights.all.f1" in fault for fault in verify(open_checkpoint(copy)).faults)
