"""What is damaged is refused by name: every kind of damage, every file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from horizon_lm import cli
from horizon_lm.checkpoint.disk import checksum
from horizon_lm.checkpoint.folder import open_checkpoint
from horizon_lm.errors import CheckpointError
from horizon_lm.host_model import HostModel
from horizon_lm.training.resume import load_checkpoint
from saved_models import (
    empty,
    flip,
    lengthen,
    link,
    new_model,
    noise,
    regions,
    remove,
    resealed,
    save,
    truncate,
)
from saved_models import model as model
from saved_models import sound as sound

DAMAGES = 560


pytestmark = pytest.mark.usefixtures("one_thread")


def zero_page(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = rng.randrange(max(1, len(data) - 64))
    end = min(len(data), start + 4096)
    if not any(data[start:end]):
        data[start] = 1
    else:
        data[start:end] = bytes(end - start)
    file.write_bytes(data)


def folder_instead(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def swap(file: Path, rng: random.Random) -> None:
    """With another unit of the same size: layers are alike in all but their numbers."""
    other = file.with_name("unit-00002.safetensors" if "00001" in file.name else "unit-00001.safetensors")
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)


FILE_DAMAGES = [flip, flip, truncate, zero_page, lengthen, remove, empty, link, folder_instead, noise, swap]


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


@pytest.mark.parametrize(
    ("name", "moments", "expected"),
    [
        ("checkpoint-v1", "float32", "3cf15b228b777a4e98904941a16da742"),
        ("checkpoint-v2", "bfloat16", "8104257bf18e781eeac8bffb67884aa8"),  # of two ranks
    ],
)
def test_checkpoints_of_all_versions_can_be_read_for_ever(
    name: str, moments: str, expected: str, tmp_path: Path
) -> None:
    """Those that the first code of each version wrote. If this fails, the format has changed: add a version
    to `manifest`, read all, and add a fixture."""
    folder = Path(__file__).parents[1] / "fixtures" / name
    config = AutoConfig.from_pretrained(folder)
    source = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    target = HostModel.from_pretrained(
        source, device="cpu", dtype="bfloat16", moment_dtype=moments, skip_memory_check=True
    )
    load_checkpoint(open_checkpoint(folder), target)
    masters = b"".join(tensor.numpy().tobytes() for _, tensor in target.named_parameters())
    assert checksum(masters) == expected and target.steps_done == 2
    assert cli.main(["verify", str(folder)]) == 0
    assert cli.main(["export", str(folder), str(tmp_path / "out")]) == 0
