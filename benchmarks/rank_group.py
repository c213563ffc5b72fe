"""Workers for a system on several ranks of this machine, and for ours in another checkout.

Each rank is a process with torchrun's variables. Requests go to all ranks at once; every rank draws the same
tokens of a step, and an adapter takes its share. A group's seconds are those of its slowest rank, its memory
the sum.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from horizon_lm.bench.figures import Row
from horizon_lm.bench.jobs import Worker, environment_of
from horizon_lm.bench.ours import Ours
from horizon_lm.bench.protocol import Case

RANKS = "benchmarks.rank_group:build"
HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as held:
        held.bind((HOST, 0))
        return int(held.getsockname()[1])


def variables(rank: int, world: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for a rank of this machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    meeting = {"MASTER_ADDR": HOST, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    return {name: str(value) for name, value in (ranks | meeting).items()}


class RankWorker(Worker):
    """One rank of `world`, whose ranks meet at `port`."""

    def __init__(self, system: str, case: Case, *, deadline: float, place: tuple[int, int, int]) -> None:
        """place: rank, world, port."""
        self._place = place
        super().__init__(system, case, deadline=deadline)

    def environment(self) -> dict[str, str]:
        return environment_of(self.case) | variables(*self._place) | {"DS_ACCELERATOR": "cpu"}


class RankGroup(Worker):
    """A system on `world` ranks, in the form of one worker."""

    def __init__(self, system: str, case: Case, *, deadline: float, world: int) -> None:
        self.system, self.case, self.ready = system, case, Row()
        port = free_port()
        places = [(rank, world, port) for rank in range(world)]
        self._workers = [RankWorker(system, case, deadline=deadline, place=place) for place in places]
        self._threads = ThreadPoolExecutor(world)

    def __exit__(self, *details: object) -> None:
        for worker in self._workers:
            worker.__exit__(*details)
        self._threads.shutdown()

    def ask(self, request: Row) -> Row:
        """Ask all ranks; return rank 0's answer with the group's seconds, loss and memory, and `ranks`: all
        answers. Raises WorkerError as soon as one rank fails."""
        asked = [self._threads.submit(worker.ask, request) for worker in self._workers]
        return combined([answer.result() for answer in asked])


def combined(answers: list[Row]) -> Row:
    """Return the answer of a group; see `RankGroup.ask`."""
    found = answers[0] | {"ranks": answers}
    if "loss" in found:
        found["seconds"] = max(answer["seconds"] for answer in answers)
        found["cpu_seconds"] = sum(answer["cpu_seconds"] for answer in answers)
        found["loss"] = sum(answer["loss"] for answer in answers) / len(answers)
    if "peaks" in found:
        found["peaks"] = {key: sum(a["peaks"][key] for a in answers) for key in found["peaks"]}
    return found


class CheckoutWorker(Worker):
    """A worker that imports this project from another checkout."""

    def __init__(self, system: str, case: Case, *, deadline: float, checkout: Path) -> None:
        self._checkout = checkout.resolve()
        super().__init__(system, case, deadline=deadline)

    def environment(self) -> dict[str, str]:
        paths = f"{self._checkout / 'src'}{os.pathsep}{self._checkout}"
        return environment_of(self.case) | {"PYTHONPATH": paths}


def by_threads(total: int) -> Callable[..., Worker]:
    """Return a kind of worker for `measure`: as many ranks as use `total` threads, case.threads each."""

    def make(system: str, case: Case, *, deadline: float) -> Worker:
        world = total // (case.threads or total)
        if world == 1:
            return Worker(system, case, deadline=deadline)
        return RankGroup(system, case, deadline=deadline, world=world)

    return make


def checkouts(folders: Sequence[Path | None]) -> Callable[..., Worker]:
    """Return a kind of worker for `measure`: the n-th one is of the n-th checkout, None is this one."""
    left = iter(folders)

    def make(system: str, case: Case, *, deadline: float) -> Worker:
        folder = next(left)
        if folder is None:
            return Worker(system, case, deadline=deadline)
        return CheckoutWorker(system, case, deadline=deadline, checkout=folder)

    return make


class RankOurs(Ours):
    """Ours on one of several ranks, with what it sent and how long it waited in the recorded step."""

    def breakdown(self, micro_batches: list[torch.Tensor]) -> dict[str, Any]:
        """Return the breakdown of `Ours`, and more of the same step.

        network: (op, seconds) of each collective. sent: bytes. exchanges: seconds in those of small values.
        rows: of the embedding table that the step uses.
        """
        ranks = self.model.ranks
        sent, exchanges = ranks.bytes_sent, sum(ranks.wait_seconds.values())
        found = super().breakdown(micro_batches)
        return found | {
            "network": [(str(op), end - start) for op, start, end in self.model.timeline if op.kind in "JTV"],
            "sent": ranks.bytes_sent - sent,
            "exchanges": sum(ranks.wait_seconds.values()) - exchanges,
            "rows": len(torch.cat([ids.flatten() for ids in micro_batches]).unique()),
        }

    def describe(self) -> dict[str, Any]:
        """Return what `Ours` says, and `units`: a rank's weights and trainable elements of each."""
        shards = self.model.store.shards
        units = [(shard.weights_numel, shard.trainable_share) for shard in shards]
        return super().describe() | {"units": units, "width": self.case.model["hidden_size"]}


def build(case: Case) -> RankOurs:
    return RankOurs(case)
