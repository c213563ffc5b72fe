"""A small model and its checkpoints, for tests of the checkpoint's files."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from horizon_lm.checkpoint import manifest as manifests
from horizon_lm.checkpoint import units
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import Retention, list_checkpoints
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.writer import CheckpointWriter, Snapshot
from horizon_lm.host_model import HostModel


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


def save(
    run: Path, model: HostModel, step: int, disk: Disk | None = None, keep: Retention | None = None
) -> CheckpointWriter:
    found, _ = list_checkpoints(run)
    serial = 1 + max((c.manifest.serial for c in found), default=0)
    writer = CheckpointWriter(
        run,
        Snapshot(
            Manifest(step, serial, {}, config={"seed": 42}, state={"steps_done": model.steps_done}),
            model.store,
            units.copied_buffers(model.skeleton.model),
            {"config.json": b"{}", "tokenizer.json": b"[]", "templates/chat.jinja": b"x"},
        ),
        disk or Disk(),
        keep,
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


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def lengthen(file: Path, rng: random.Random) -> None:
    with file.open("ab") as end:
        end.write(rng.randbytes(rng.randrange(1, 100)))


def link(file: Path, rng: random.Random) -> None:
    data = file.with_suffix(".elsewhere")
    file.rename(data)
    file.symlink_to(data)


def noise(file: Path, rng: random.Random) -> None:
    file.write_bytes(rng.randbytes(file.stat().st_size))


def truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def remove(file: Path, rng: random.Random) -> None:
    file.unlink()


def empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def resealed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that somebody altered and whose own checksum is right."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    values[manifests._SEAL] = manifests._seal(values)
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def sound(model: HostModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sound")
    save(run, model, 1)
    return run / "checkpoint-1"
