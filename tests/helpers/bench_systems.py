"""Systems for tests of the harness: each does one thing that a real one may do, in worker processes too."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from horizon_lm.bench.protocol import AbsentError, Case

ORDER: list[str] = []  # of steps, where the systems live in one process


class Toy:
    """Sums its tokens; extra: `name` for ORDER, `allocate` bytes in each step, `most_rows` it can take."""

    def __init__(self, case: Case) -> None:
        self.case = case
        if case.rows > case.extra.get("most_rows", case.rows):
            raise torch.OutOfMemoryError(f"{case.rows} rows are too many")

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        ORDER.append(self.case.extra.get("name", ""))
        if self.case.extra.get("allocate"):
            torch.ones(self.case.extra["allocate"], dtype=torch.uint8)
        return float(sum(int(ids.sum()) for ids in micro_batches))

    def describe(self) -> dict[str, Any]:
        return {"recomputed": 0.0}

    def close(self) -> None:
        pass


class Killed(Toy):
    def step(self, micro_batches: list[torch.Tensor]) -> float:
        os.kill(os.getpid(), 9)
        return 0.0


class Slow(Toy):
    def step(self, micro_batches: list[torch.Tensor]) -> float:
        time.sleep(600)
        return 0.0


class Talkative(Toy):
    """Prints where the answers would go."""

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        print("hello", flush=True)
        os.write(1, b"hello\n")
        return super().step(micro_batches)


def absent(case: Case) -> Toy:
    raise AbsentError("no such package")


def broken(case: Case) -> Toy:
    raise ValueError("a fault\nand more of it")
