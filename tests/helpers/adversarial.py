"""Adversarial lanes: ready ops in random order, real copies into slots, released buffers filled with NaN.

A missing wait or an early release shows up as wrong numbers, without a GPU.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from horizon_lm import host_model
from horizon_lm.engine.disk_lane import DiskLane
from horizon_lm.engine.lanes import Execute, OnRelease, Span, Waits, in_op
from horizon_lm.host_model import HostModel
from horizon_lm.schedule import Lane, Op

_WITH_OTHERS = (Lane.NETWORK, Lane.UPDATE, Lane.DEVICE_UPDATE)  # lanes that wait for other ranks


def fill_with_nan(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(torch.nan)


class AdversarialLanes:
    """One thread, any order that the waits allow, chosen at random. Slots never alias the store."""

    in_place = False

    def __init__(self, seed: int = 0) -> None:
        self.on_release: OnRelease | None = fill_with_nan
        self.spans: list[Span] = []
        self.origin = 0.0
        self.disk = DiskLane()  # its ops run in the calling thread, like all others
        self.random = random.Random(seed)
        self.order: list[int] = []

    def run(
        self, ops: Sequence[Op], waits: Waits, indices: range, execute: Execute, *, record: bool = False
    ) -> None:
        if any(ops[i].lane is Lane.NETWORK for i in indices):
            self._run_with_others(ops, waits, indices, execute)
            return
        queues: dict[Lane, deque[int]] = defaultdict(deque)
        for i in indices:
            queues[ops[i].lane].append(i)
        pending = set(indices)
        self.order = []
        while pending:
            ready = [q[0] for q in queues.values() if q and not any(j in pending for j in waits[q[0]])]
            assert ready, "the schedule is deadlocked"
            i = self.random.choice(ready)
            self.disk.settle(ops[i].writes)
            try:
                execute(i)
            except BaseException as error:
                in_op(error, ops[i], [ops[j] for j in self.order])
                raise
            queues[ops[i].lane].popleft()
            pending.discard(i)
            self.order.append(i)

    def _run_with_others(self, ops: Sequence[Op], waits: Waits, indices: range, execute: Execute) -> None:
        """The same with several ranks: ops of lanes that wait for other ranks run in a thread of their lane,
        while others go on; two such lanes in one thread could wait for each other."""
        queues: dict[Lane, deque[int]] = defaultdict(deque)
        for i in indices:
            queues[ops[i].lane].append(i)
        pending, running = set(indices), dict[Lane, Future[None]]()
        self.order = []

        def run_one(i: int) -> None:
            self.disk.settle(ops[i].writes)
            try:
                execute(i)
            except BaseException as error:
                in_op(error, ops[i], [ops[j] for j in self.order])
                raise

        with ThreadPoolExecutor(len(_WITH_OTHERS)) as threads:
            while pending:
                for lane in [lane for lane, future in running.items() if future.done()]:
                    running.pop(lane).result()
                    pending.discard(queues[lane].popleft())
                fronts = [q[0] for lane, q in queues.items() if q and lane not in running]
                ready = [i for i in fronts if not any(j in pending for j in waits[i])]
                if not ready:
                    assert running or not pending, "the schedule is deadlocked"
                    wait(running.values(), return_when=FIRST_COMPLETED)
                    continue
                i = self.random.choice(ready)
                self.order.append(i)
                if ops[i].lane in _WITH_OTHERS:
                    running[ops[i].lane] = threads.submit(run_one, i)
                    if self.random.random() < 0.5:  # else the others always go ahead
                        wait(running.values(), timeout=0.001 * self.random.random())
                    continue
                run_one(i)
                pending.discard(queues[ops[i].lane].popleft())

    def join(self) -> None:
        """Do nothing: ops run in the calling thread."""


@contextmanager
def adversarial_lanes(seed: int = 0) -> Iterator[None]:
    """While open, models are built with adversarial lanes, whatever their setting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_model, "choose_lanes", lambda kind, device: AdversarialLanes(seed))
        yield


def from_pretrained(source: Any, *args: Any, lanes: str = "auto", **settings: Any) -> HostModel:
    """`HostModel.from_pretrained`, for which lanes may also be `adversarial`."""
    if lanes != "adversarial":
        return HostModel.from_pretrained(source, *args, lanes=lanes, **settings)
    with adversarial_lanes(settings.get("seed", 0)):
        return HostModel.from_pretrained(source, *args, **settings)


def lanes_of(settings: dict[str, Any]) -> Any:
    """Take `lanes: adversarial` out of the settings of a run, and return the context to run it in."""
    if settings.get("lanes") != "adversarial":
        return nullcontext()
    del settings["lanes"]
    return adversarial_lanes()
