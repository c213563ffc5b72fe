"""Where units live, rounds, sums, update modes and activation policies change no bit, in any combination.

Ten steps with clipping that acts on some, or without, of twelve architectures, against the same steps in
place with nothing resident and in one round; in program order, or in random orders with poisoned buffers.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from horizon_lm.engine.updates import Updates
from horizon_lm.optim import optimizer, reference
from horizon_lm.optim.kernel import Progress
from horizon_lm.optim.optimizer import Optimizer
from horizon_lm.optim.rules import Tensors
from horizon_lm.schedule import Op
from placements import (
    CLIPPED_AT,
    NUMBERS,
    SOURCES,
    Numbers,
    model,
    plain,
    sampled,
    trained,
)
from sizes import SOAK, times

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("key", SOURCES)
def test_no_placement_changes_a_bit(key: str, request: pytest.FixtureRequest) -> None:
    """Two random placements each; in `make soak` 60, other ones each time."""
    source = SOURCES[key]
    seed = request.config.getoption("--hypothesis-seed") if SOAK else 0
    rng = random.Random(f"{key} {seed}")
    first = list(SOURCES).index(key)
    for i in range(times(2, 60)):
        # Of one kind of numbers in the suite, since each has a plain run of its own.
        numbers = rng.choice(NUMBERS) if SOAK else NUMBERS[first % len(NUMBERS)]
        settings, order = sampled(rng, source, numbers, parts=True), rng.randrange(1 << 30)
        found = trained(model(source, numbers, seed=order, **settings), source)
        different = plain(key, numbers).differences(found)
        assert not different, f"{numbers}, {settings}, order {order} (sample {i}): {different[:9]}"


def test_clipping_acts_on_some_steps() -> None:
    clips = {key: NUMBERS[i % len(NUMBERS)] for i, key in enumerate(SOURCES)}
    norms = [plain(key, numbers).norms for key, numbers in clips.items() if numbers.clips]
    assert sum(min(found) < CLIPPED_AT < max(found) for found in norms) > len(norms) // 2


# Negative controls.


def differences(numbers: Numbers = NUMBERS[0], **settings: Any) -> list[str]:
    source = SOURCES["tied"]
    return plain("tied", numbers).differences(trained(model(source, numbers, **settings), source))


def test_sums_in_another_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host adds up the gradients of micro-batches from the last one down."""
    honest, parked = Updates._add, {}

    def add(self: Updates, step: Any, op: Op) -> None:
        given = step.parked[op.sum_slab]
        mine = parked.setdefault(op.unit, [])
        if op.first:
            mine.clear()
        mine.append(self._in_slab(op.sum_slab, given).float().clone())
        honest(self, step, op)
        self.store.sum_run(op.unit).copy_(functools.reduce(torch.add, reversed(mine)))

    assert differences(rounds=5, round_sums="add") == []
    monkeypatch.setattr(Updates, "_add", add)
    assert differences(rounds=5, round_sums="add")


def test_sums_of_rounds_added_up_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """(a + b) + (c + d) in place of ((a + b) + c) + d."""
    before: dict[int, torch.Tensor] = {}

    def get_back(self: Updates, step: Any, op: Op) -> None:
        before[op.unit] = self.store.sum_run(op.unit).clone()
        step.gradients[op.unit].written.clear()

    def adding(honest: Any) -> Any:
        def with_sum(self: Updates, step: Any, op: Op) -> None:
            if op.unit in before:
                step.gradients[op.unit].complete()
                step.gradients[op.unit].run.add_(before.pop(op.unit))
            honest(self, step, op)

        return with_sum

    assert differences(rounds=3, round_sums="host") == []
    monkeypatch.setattr(Updates, "_get_back", get_back)
    monkeypatch.setattr(Updates, "_park", adding(Updates._park))
    monkeypatch.setattr(Updates, "_download", adding(Updates._download))
    assert differences(rounds=3, round_sums="host")


Compute = Callable[..., None]
honest_compute: Compute = reference._compute


def with_device_kernel(monkeypatch: pytest.MonkeyPatch, compute: Compute) -> None:
    """Resident units are updated by torch operations."""
    update_run, update_unit, resident = optimizer.update_run, Optimizer.update_unit, [False]

    def of_unit(self: Optimizer, store: Any, unit: int, *args: Any) -> None:
        resident[0] = store.is_resident(unit)
        update_unit(self, store, unit, *args)

    def of_run(tensors: Tensors, numbers: Any, *, threads: int, progress: Progress) -> None:
        if not resident[0]:
            update_run(tensors, numbers, threads=threads, progress=progress)
            return
        new = tensors.copied()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "_compute", compute)
            reference.update(new, numbers)
        progress.copy(list(zip(tensors.written(), new.written(), strict=True)))

    monkeypatch.setattr(Optimizer, "update_unit", of_unit)
    monkeypatch.setattr(optimizer, "update_run", of_run)


def reordered(rule: str, c: Any, master: Any, grad: Any, m: Any, v: Any) -> None:
    """AdamW with (grad * grad) * take2 in place of (grad * take2) * grad."""
    master.mul_(c.decay)
    reference._lerp_(m, grad, c.take1)
    v.mul_(c.beta2).add_((grad * grad).mul_(c.take2))
    root = torch.from_numpy(np.sqrt(v.numpy()))
    master.sub_((m * c.step_size).div_(root.mul_(c.rescale2).add_(c.epsilon)))


@pytest.mark.parametrize("numbers", [NUMBERS[0], NUMBERS[2]], ids=str)
def test_an_operation_in_another_order_is_noticed(numbers: Numbers, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the kernel that updates resident units, one product."""
    with_device_kernel(monkeypatch, honest_compute)
    assert differences(numbers, resident=2) == []
    with_device_kernel(monkeypatch, reordered)
    assert differences(numbers, resident=2)
