"""An error in any op surfaces with its name, and a lane that dies is noticed."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import zoo
from fake_cuda import fake_cuda as fake_cuda
from faulty_runs import Injected, NoSaving, model_on, with_cuda_lanes
from faulty_runs import text as text
from horizon_lm import cli
from horizon_lm.engine import lanes as lanes_module
from horizon_lm.engine.updates import Updates
from horizon_lm.schedule import Lane, Op
from small_runs import settings

SECONDS = 10.0  # within which a fault must surface


pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

KINDS = "UFXLRCBDNOW"
# Settings, micro-batches, and kinds of ops that only these have.
PLACEMENTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "streamed": ({}, 1, ""),
    "parked": ({"resident": 2, "rounds": 2, "round_sums": "host"}, 3, "APG"),
    "added": ({"resident": 2, "rounds": 3, "round_sums": "add"}, 3, "APSG"),
}


@pytest.mark.parametrize("lanes", ["inline", "adversarial", "cuda"])
@pytest.mark.parametrize("update", ["sync", "deferred", "eager"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_error_in_any_op_surfaces_with_its_name(
    placement: str,
    lanes: str,
    update: str,
    fake_cuda: list[str],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    limit = {"max_grad_norm": None if update == "eager" else 1.0}
    more, count, kinds = PLACEMENTS[placement]
    model = model_on("adversarial" if lanes == "cuda" else lanes, update=update, **limit, **more)
    if lanes == "cuda":
        with_cuda_lanes(model)
    batch = [zoo.batch("llama", batch_size=1, length=8, seed=1 + m) for m in range(count)]
    for _ in range(2):  # after which every lane has had ops
        model.save_state(NoSaving(), background=True)
        model.train_step(batch, lr=1e-3)
    model.finish_saving()
    threads, honest = threading.active_count(), dict(model.engine.ops.functions)
    cases = 0
    for kind in kinds or KINDS:
        where: list[Op] = []

        def broken(step: Any, op: Op, kind: str = kind, where: list[Op] = where) -> None:
            where.append(op)
            raise Injected(f"in {kind}")

        model.engine.ops.functions = {**honest, kind: broken}
        saving = NoSaving()
        model.save_state(saving, background=True)
        began = time.perf_counter()
        with pytest.raises(Injected) as caught:
            model.train_step(batch, lr=1e-3)
            model.finish_saving()
        assert time.perf_counter() - began < SECONDS
        notes = caught.value.__notes__
        if update == "eager" and len(notes) > 1:  # what was updated before the error
            assert "units were updated already (update: eager)" in notes.pop()
        assert len(notes) == 1 and f"in op {where[0]} ({where[0].lane} lane" in notes[0], (kind, notes)
        model.engine.ops.functions = dict(honest)
        model.state_was_replaced(model.steps_done)
        model.finish_saving()
        out = model.train_step(batch, lr=1e-3)  # usable, and nothing is left over
        assert math.isfinite(out.loss)
        cases += 1
    model.finish_saving()
    deadline = time.monotonic() + SECONDS
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    record_property("cases", cases)
    print(f"{cases} op kinds on {lanes} lanes, update {update}: each error surfaced with the op")


def test_memory_comes_back_after_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty steps that fail in the middle of the backward pass leave no activations behind."""
    model = model_on("inline")
    batch = [zoo.batch("llama", batch_size=4, length=64, seed=1)]
    model.train_step(batch, lr=1e-3)
    honest = model.engine.ops.functions["B"]

    def broken(step: Any, op: Op) -> None:
        if op.unit == 1:
            raise Injected
        honest(step, op)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    model.engine.ops.functions["B"] = broken
    counts, process = [], psutil.Process()
    for i in range(50):
        with pytest.raises(Injected):
            model.train_step(batch, lr=1e-3)
        if i in (9, 49):
            counts.append((tensors(), process.memory_info().rss))
    assert counts[1][0] <= counts[0][0] + 5
    # (Memory of other tests in the same process comes and goes.)
    assert counts[1][1] < counts[0][1] * 1.05


def test_a_lane_that_dies_without_a_word_is_noticed(
    fake_cuda: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread of the update lane is gone; the others would wait for its ops for ever."""
    monkeypatch.setattr(lanes_module, "_LOOK_SECONDS", 0.2)
    honest = lanes_module._CudaRun._lane

    def lane(self: Any, name: Lane, mine: list[int]) -> None:
        if name is not Lane.UPLOAD:
            honest(self, name, mine)

    monkeypatch.setattr(lanes_module._CudaRun, "_lane", lane)
    model = model_on("adversarial")
    with_cuda_lanes(model)
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match="the thread of the lane horizon-upload is gone") as caught:
        model.train_step([zoo.batch("llama", batch_size=1, length=8, seed=1)], lr=1e-3)
    assert time.perf_counter() - began < SECONDS
    assert "in op U6 (upload lane" in caught.value.__notes__[0]


def test_an_error_that_ends_a_run_names_its_op(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Updates, step: Any, op: Op) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Updates, "_download", broken)
    (tmp_path / "run.yaml").write_text(settings(text, tmp_path / "run").to_yaml())
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 1
    assert "oops (in op D" in capsys.readouterr().err
