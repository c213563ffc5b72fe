"""A small model in one update mode whose states are known, for tests of what disturbs a step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from horizon_lm.errors import TornStateError

MODES = ("deferred", "sync", "eager")
# Modes with residents and rounds of one micro-batch each: settings, micro-batches.
PLACED: dict[str, tuple[dict[str, Any], int]] = {
    "deferred, host sums": ({"resident": 3, "rounds": 2, "round_sums": "host"}, 2),
    "eager, added": ({"resident": 2, "rounds": 2, "round_sums": "add"}, 2),
    "sync, own slots": ({"resident": 3, "rounds": 2, "round_sums": "device"}, 2),
}
SECONDS = 20.0  # within which a thread must come back
Bytes = list[torch.Tensor]


def host(update: str, **more: Any) -> hz.HostModel:
    """Two layers; with parts of a unit that are updated by a call of the kernel each."""
    config = zoo.CASES["llama"].config()
    config.num_hidden_layers = 2
    values: dict[str, Any] = {
        "dtype": "bfloat16",
        "update": update,
        "max_grad_norm": None if update == "eager" else 0.5,
        "lr_factors": {"mlp": 0.5},
        "skip_memory_check": True,
    }
    source = zoo._from_config(config, torch.float32, seed=0, attn="sdpa")
    return from_pretrained(source, device="cpu", **{**values, **more})


def batch(seed: int, count: int = 1) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch("llama", batch_size=1, length=4, seed=seed + 1 + 100 * m) for m in range(count)]


def runs_of(model: hz.HostModel) -> Bytes:
    """Every region that outlives a step."""
    return [run for region, runs in model.store._runs.items() if outlives(region) for run in runs]


def outlives(region: str) -> bool:
    return not region.startswith(("grad", "sum"))


def bytes_of(model: hz.HostModel) -> Bytes:
    return [run.clone().view(torch.uint8) for run in runs_of(model)]


def same(one: Bytes, two: Bytes) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class Copies:
    """A checkpoint in memory."""

    def __init__(self, model: hz.HostModel) -> None:
        self.model, self.units = model, {}  # type: ignore[var-annotated]
        self.ended = self.abandoned = False

    def write_unit(self, unit: int) -> None:
        if not self.abandoned:
            runs = self.model.store._runs.items()
            self.units[unit] = [r[unit].clone().view(torch.uint8) for n, r in runs if outlives(n)]

    def are(self, state: Bytes) -> bool:
        units = len(self.model.store.units)
        wanted = {unit: state[unit::units] for unit in self.units}
        return len(wanted) == 4 and all(same(value, wanted[unit]) for unit, value in self.units.items())

    def finish(self) -> None:
        self.ended = True

    def abandon(self) -> None:
        self.abandoned = True


class Tried:
    """A model in one update mode (of MODES or PLACED), its states after 3 to 5 steps, and a call that leads
    through them."""

    def __init__(self, mode: str) -> None:
        more, self.micro_batches = PLACED.get(mode, ({}, 1))
        self.update, self.torn = mode.partition(",")[0], 0
        self.model = host(self.update, **more)
        for step in range(3):
            self.train(step)
        self.states = [self.state()]
        for step in (3, 4):
            self.train(step)
            self.states.append(self.state())
        self.copies = Copies(self.model)

    def train(self, step: int, **more: Any) -> None:
        self.model.train_step(batch(step, self.micro_batches), lr=1e-2, weight_decay=0.1, **more)

    def state(self) -> Bytes:
        self.model.flush()
        return bytes_of(self.model)

    def begin(self) -> None:
        with self.model._turn:  # a thread that reads the model meanwhile waits
            for run, value in zip(runs_of(self.model), self.states[0], strict=True):
                run.view(torch.uint8).copy_(value)
            self.model.state_was_replaced(3)
        self.model.finish_saving()
        self.copies = Copies(self.model)

    def call(self) -> None:
        """Two steps, an evaluation between them, a checkpoint beside the second."""
        self.train(3)
        self.model.evaluate(batch(9))
        self.model.save_state(self.copies, background=True)
        self.train(4)
        self.model.flush()

    def look(self) -> None:
        """At what an interrupt left; and train on from it."""
        model, copies = self.model, self.copies
        if model.engine.torn:
            assert self.update == "eager" and model.steps_done in (3, 4)
            with pytest.raises(TornStateError):
                self.train(4)
            self.torn += 1
            return
        now, done = self.state(), model.steps_done
        assert same(now, self.states[done - 3]), done
        model.finish_saving()
        if copies.ended and not copies.abandoned:
            assert copies.are(self.states[1])
        for step in range(done, 5):
            self.train(step)
        assert same(self.state(), self.states[2]), "what the interrupt left behind shows later"


def in_thread(call: Callable[[], object]) -> Callable[[], list[BaseException]]:
    """Start it; the answer waits for its end, and returns what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> list[BaseException]:
        thread.join(SECONDS)
        assert not thread.is_alive(), "it hangs"
        return raised

    return wait
