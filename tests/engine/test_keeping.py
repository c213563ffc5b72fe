"""Layers that keep their activations go on keeping them, whatever else uses the store meanwhile; those that
cannot are recomputed, and the run says so."""

from __future__ import annotations

import gc
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import horizon_lm as hz
from horizon_lm.engine import layers
from horizon_lm.report.html import write_report
from horizon_lm.report.metrics import read_lines
from horizon_lm.training import train as run_train
from horizon_lm.training.train import train
from policy_models import Stashing, batches, gradients, same, source
from small_runs import LLAMA, settings, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 6
ALL = frozenset(range(1, LAYERS + 1))


def keeping(**changes: Any) -> hz.HostModel:
    values = {"device": "cpu", "dtype": "bfloat16", "skip_memory_check": True, "activations": "keep"}
    return hz.HostModel.from_pretrained(source("llama", layers=LAYERS), **(values | changes))


def weights(model: hz.HostModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def hold_views(model: hz.HostModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's forward pass begins without and ends with more users of its memory than it made: as when
    the disk lane, or a caller, takes views of the store meanwhile."""
    held: list[torch.Tensor] = []
    run_layer = layers.run_layer

    def run(skeleton: Any, layer: int, call: Any, hidden: torch.Tensor) -> torch.Tensor:
        held.extend(model.store.run("weights", layer + 1).split(4))
        return run_layer(skeleton, layer, call, hidden)

    monkeypatch.setattr(layers, "run_layer", run)


@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_other_users_of_the_store_do_not_end_keeping(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: counted over the storage that all share, every layer is given up."""
    data = batches("llama", 2)
    quiet = keeping(activations=policy)
    quiet.forward_backward(data)
    model = keeping(activations=policy)
    kept = model.engine.ops.policies.kept
    hold_views(model, monkeypatch)
    model.forward_backward(data)
    assert model.engine.ops.policies.kept == kept and not model.engine.ops.reruns
    assert same(gradients(model), gradients(quiet))
    monkeypatch.setattr(layers, "_private", lambda run: run)
    model.forward_backward(data)
    assert set(model.engine.ops.reruns) == ALL


class SlowDisk:
    """Takes views of each unit, holds them for a random time, and lets go of them bit by bit."""

    def __init__(self, store: Any, seed: int) -> None:
        self._store, self._random = store, random.Random(seed)
        self.finished = threading.Event()

    def write_unit(self, unit: int) -> None:
        runs = [self._store.run(region, unit) for region in ("weights", "exp_avg")]
        views = [piece for run in runs if run.numel() for piece in run.split(1 + run.numel() // 7)]
        while views:
            time.sleep(self._random.random() * 4e-4)
            views.pop(self._random.randrange(len(views)))
            again = self._store.run("weights", unit)  # noqa: F841  (one more for a moment)

    def finish(self) -> None:
        self.finished.set()

    def abandon(self) -> None:
        raise AssertionError("no step failed")


def test_many_background_saves_end_no_keeping(caplog: pytest.LogCaptureFixture) -> None:
    """At random times; the weights are bitwise those of a run without saves."""
    data = batches("llama", 1)
    model, quiet = keeping(), keeping()
    for step in range(30):
        if step % 2 == 0:
            saving = SlowDisk(model.store, step)
            model.save_state(saving, background=True)
        for each in (model, quiet):
            each.train_step(data, lr=1e-3)
    model.finish_saving()
    assert saving.finished.is_set()
    assert model.engine.ops.policies.kept == ALL and not model.engine.ops.notes and not caplog.records
    assert same(weights(model), weights(quiet))


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_garbage_in_a_cycle_is_not_a_weight_put_aside(no_collections: None) -> None:
    """It would be gone a moment later. The negative control: without the collection the layer is given up."""

    def littering(model: hz.HostModel) -> hz.HostModel:
        module = model.skeleton.layers[1].mlp.down_proj
        plain = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            cycle: list[Any] = [module.weight]
            cycle.append(cycle)
            return plain(x)

        module.forward = forward  # type: ignore[method-assign]
        return model

    data = batches("llama", 1)
    model = littering(keeping())
    model.forward_backward(data)
    assert model.engine.ops.policies.kept == ALL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers.gc, "collect", lambda: 0)
        model.forward_backward(data)
    assert model.engine.ops.policies.kept == ALL - {2}


def test_a_layer_given_up_is_in_the_metrics_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_samples: None
) -> None:
    """Once, in plain words, also with saves in the background; and no other layer."""
    build = run_train.build_model
    made: list[hz.HostModel] = []

    def build_model(*args: Any) -> hz.HostModel:
        model = build(*args)
        layer = model.skeleton.layers[2].mlp.down_proj
        layer.forward = lambda x: Stashing.apply(x, layer.weight)  # type: ignore[method-assign]
        made.append(model)
        return model

    monkeypatch.setattr(run_train, "build_model", build_model)
    config = settings(
        write_text(tmp_path / "text.txt"),
        tmp_path / "run",
        init_model=LLAMA | {"num_hidden_layers": 4},
        activations="keep",
    )
    train(config)
    assert made[0].engine.ops.policies.kept == {1, 2, 4}
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    (note,) = [line for line in lines if line.get("event") == "note"]
    text = "layer 2 is recomputed from now on because its forward pass stores a weight"
    assert note["step"] == 1 and note["text"].startswith(text) and "one more forward" in note["text"]
    assert f"warning: step 1: {text}" in capsys.readouterr().out
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "note" for line in steps) == 1
    page = write_report(tmp_path / "run").written[0].read_text()
    assert "layer 2 is recomputed from now on" in page
