"""The disk lane writes a checkpoint beside a step, in the state before it."""

from __future__ import annotations

import hashlib
import threading
import time

import pytest

import zoo
from adversarial import AdversarialLanes
from fake_cuda import fake_cuda as fake_cuda
from faulty_runs import Injected, NoSaving, model_on, with_cuda_lanes
from horizon_lm.engine.disk_lane import DiskLane
from horizon_lm.engine.lanes import InlineLanes
from horizon_lm.host_model import HostModel
from horizon_lm.schedule import Buffer

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


def test_an_op_waits_for_the_write_of_what_it_changes_and_for_no_other() -> None:
    disk, gate, order = DiskLane(), threading.Event(), []
    one, two = Buffer("weights", 1), Buffer("weights", 2)
    disk.submit(frozenset({one}), lambda: order.append("one"))
    disk.submit(frozenset({two}), lambda: (gate.wait(5), order.append("two")))
    disk.settle({one})
    disk.settle({Buffer("weights", 3)})
    assert order == ["one"] and not disk.is_idle
    threading.Timer(0.05, gate.set).start()
    disk.settle({two})
    assert order == ["one", "two"]
    disk.drain()
    assert disk.is_idle


def test_a_failure_on_the_disk_lane_surfaces_once_and_forgets_the_rest() -> None:
    disk, later = DiskLane(), []

    def fail() -> None:
        raise Injected

    disk.submit(frozenset({Buffer("weights", 1)}), fail)
    disk.submit(frozenset({Buffer("weights", 2)}), lambda: later.append(1))
    with pytest.raises(Injected):
        disk.drain()
    disk.drain()
    disk.settle({Buffer("weights", 2)})
    assert later == []


@pytest.mark.parametrize("lanes", ["inline", "adversarial", "cuda"])
@pytest.mark.parametrize("update", ["sync", "deferred", "eager"])
def test_what_is_written_beside_a_step_is_the_state_before_it(
    lanes: str,
    update: str,
    fake_cuda: list[str],
) -> None:
    """With a slow disk the next steps run while units are written, and change none of them before that."""
    limit = {"max_grad_norm": None if update == "eager" else 1.0}
    model = model_on("adversarial" if lanes == "cuda" else lanes, update=update, **limit)
    twin = model_on("inline", update="sync", **limit)
    if lanes == "cuda":
        with_cuda_lanes(model)
    batches = [[zoo.batch("llama", batch_size=1, length=8, seed=s)] for s in range(5)]

    def copy_of(model: HostModel, unit: int) -> list[str]:
        store = model.store
        names = [r for r in ("weights", "exp_avg", "exp_avg_sq") if store.has(r)]
        # Digests: the control fails on purpose, and pytest would compare megabytes letter by letter.
        return [hashlib.sha256(store.run(region, unit).numpy().tobytes()).hexdigest() for region in names]

    class Slow(NoSaving):
        seen: dict[int, list[str]] = {}

        def write_unit(self, unit: int) -> None:
            time.sleep(0.03)
            self.seen[unit] = copy_of(model, unit)

    for number in (0, 1):
        model.train_step(batches[number], lr=1e-2)
        twin.train_step(batches[number], lr=1e-2)
    saving = Slow()
    model.save_state(saving, background=True)
    for number in (2, 3, 4):
        model.train_step(batches[number], lr=1e-2)
    model.finish_saving()
    assert saving.ended and not saving.abandoned
    assert saving.seen == {u: copy_of(twin, u) for u, unit in enumerate(twin.store.units) if unit.numel}
    for number in (2, 3, 4):
        twin.train_step(batches[number], lr=1e-2)
    model.flush()
    assert all(copy_of(model, u) == copy_of(twin, u) for u in saving.seen)


def test_a_missing_wait_would_write_a_unit_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    monkeypatch.setattr(DiskLane, "settle", lambda self, writes: None)
    with pytest.raises(AssertionError):
        test_what_is_written_beside_a_step_is_the_state_before_it("inline", "eager", [])


def test_inline_and_adversarial_have_a_disk_lane() -> None:
    assert InlineLanes().disk.is_idle and AdversarialLanes().disk.is_idle
