"""Runs and models in which something fails when a test says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from adversarial import from_pretrained
from horizon_lm.engine.lanes import CudaLanes
from horizon_lm.engine.ops import Ops
from horizon_lm.host_model import HostModel
from horizon_lm.schedule import Op
from small_runs import write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def model_on(lanes: str, **settings: Any) -> HostModel:
    config = zoo.CASES["llama"].config()
    source = zoo._from_config(config, torch.float32, seed=0, attn="sdpa")
    common = {"dtype": "float32", "skip_memory_check": True, "boundaries": "host", "checkpoint_interval": 2}
    return from_pretrained(source, device="cpu", lanes=lanes, **{**common, **settings})


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


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Makes the losses of some calls other ones."""

    def spoil(calls: dict[int, float]) -> None:
        honest, count = Ops._loss, iter(range(1, 10_000))

        def loss(self: Ops, step: Any, op: Op) -> None:
            honest(self, step, op)
            number = next(count)
            if number in calls:
                step.losses[op.micro_batch] = torch.tensor(calls[number])

        monkeypatch.setattr(Ops, "_loss", loss)

    return spoil
