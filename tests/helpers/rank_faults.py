"""Faults of one rank, installed in its process before it runs.

    {"kind": "kill", "at": "forward", "step": 3}

at: forward, backward, update (an op of that step), write, fsync, before_rename, after_rename (of the
checkpoint of that step), exchange (the meeting of that step).
kinds: kill (SIGKILL), stop (SIGSTOP), term, int, usr1 (to itself); raise (a bug), memory (MemoryError); full
(ENOSPC, from the disk); nan (the rank's loss); data (DataError from the loader); no_targets (every rank: the
micro-batches of rank `of` have no target in that step); other_data (at the same path as on other ranks).
"""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr1": signal.SIGUSR1,
}
_KINDS = {"forward": "F", "backward": "B"}
_step = 0  # that is being trained
_visits: Counter[int] = Counter()  # of each step: a rollback brings one back


def install(fault: Mapping[str, Any], rank: int) -> None:
    """Make the fault happen in this process."""
    _count_steps()
    kind, at, step = fault["kind"], fault.get("at", "forward"), fault.get("step", 1)
    if kind == "no_targets":
        return _without_targets(step, fault["of"], fault["world"])
    if kind == "other_data":
        return _read_other_data()
    if kind == "nan":
        return _spoil_loss(step, fault.get("value", math.nan))
    act = _action(kind)
    if kind == "data":
        _in_loader(step, act)
    elif at in ("forward", "backward"):
        _in_op(_KINDS[at], step, act)
    elif at == "exchange":
        _in_exchange(step, act)
    else:
        _on_disk(at, step, act, rank)


def _action(kind: str) -> Callable[[], None]:
    if kind in SIGNALS:
        return lambda: os.kill(os.getpid(), SIGNALS[kind])

    def fail() -> None:
        if kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")
        if kind == "memory":
            raise MemoryError
        if kind == "data":
            from horizon_lm.errors import DataError

            raise DataError("row 7 is damaged", hint="correct it")
        raise RuntimeError("injected")

    return fail


def _count_steps() -> None:
    from horizon_lm.training import loop

    honest = loop._step

    def step(run: Any) -> Any:
        global _step
        _step = run.state.step + 1
        _visits[_step] += 1
        return honest(run)

    loop._step = step


def _in_op(kind: str, step: int, act: Callable[[], None]) -> None:
    """Act once, in the first op of this kind."""
    from horizon_lm.engine.engine import Engine

    honest, done = Engine._execute, []

    def execute(self: Engine, running: Any, *arguments: Any, **others: Any) -> Any:
        function = self.ops.functions[kind]

        def acting(given: Any, op: Any) -> Any:
            if _step == step and not done:
                done.append(True)
                act()
            return function(given, op)

        self.ops.functions = {**self.ops.functions, kind: acting}
        try:
            return honest(self, running, *arguments, **others)
        finally:
            self.ops.functions = {**self.ops.functions, kind: function}

    Engine._execute = execute  # type: ignore[method-assign]


def _in_exchange(step: int, act: Callable[[], None]) -> None:
    from horizon_lm.training.decisions import Decisions

    honest = Decisions.meet

    def meet(self: Decisions, at: str, **others: Any) -> None:
        if _step == step:
            act()
        honest(self, at, **others)

    Decisions.meet = meet  # type: ignore[method-assign]


def _in_loader(step: int, act: Callable[[], None]) -> None:
    from horizon_lm.data.loader import TokenLoader

    honest = TokenLoader.__next__

    def following(self: TokenLoader) -> Any:
        if _step == step:
            act()
        return honest(self)

    TokenLoader.__next__ = following  # type: ignore[method-assign]


def _without_targets(step: int, of: int, world: int) -> None:
    from horizon_lm.data.loader import TokenLoader

    honest = TokenLoader.__next__

    def following(self: TokenLoader) -> Any:
        batches = honest(self)
        if _step == step:
            for number in range(of, len(batches), world):
                batches[number]["labels"].fill_(-100)
        return batches

    TokenLoader.__next__ = following  # type: ignore[method-assign]


def _read_other_data() -> None:
    from horizon_lm.training import prepare

    honest = prepare.load_training_data

    def load(config: Any) -> Any:
        place = Path(config.datasets[0].path).with_suffix(f".{os.environ['RANK']}.txt")
        place.write_text("other words\n" * 300)
        entry = {**config.to_dict()["datasets"][0], "path": str(place)}
        return honest(config.replace(datasets=[entry]))

    prepare.load_training_data = load  # type: ignore[assignment]


def _spoil_loss(step: int, value: float) -> None:
    """Make this rank's losses of a step another value, the first time."""
    import torch

    from horizon_lm.engine.ops import Ops

    honest = Ops._loss

    def loss(self: Ops, given: Any, op: Any) -> None:
        honest(self, given, op)
        if _step == step and _visits[step] == 1:
            given.losses[op.micro_batch] = torch.tensor(value)

    Ops._loss = loss  # type: ignore[method-assign]


def _on_disk(at: str, step: int, act: Callable[[], None], rank: int) -> None:
    """Act while the checkpoint of a step is written: in a call of the disk, or around the rename of the
    folder, which rank 0 does and others see."""
    from horizon_lm.checkpoint.disk import Disk

    name = f"checkpoint-{step}"
    honest_before, honest_rename = Disk.before, Disk.rename

    def before(self: Disk, what: str, path: Path) -> None:
        if what == at and f".tmp-{name}" in str(path):
            act()
        honest_before(self, what, path)

    def rename(self: Disk, source: Path, target: Path) -> None:
        if target.name != name:
            return honest_rename(self, source, target)
        if at == "before_rename":
            act()
        honest_rename(self, source, target)
        if at == "after_rename":
            act()

    Disk.before, Disk.rename = before, rename  # type: ignore[method-assign]
    if rank > 0 and at in ("before_rename", "after_rename"):
        threading.Thread(target=_watch, args=(at, name, act), daemon=True).start()


def _watch(at: str, name: str, act: Callable[[], None]) -> None:
    """Act when rank 0 writes the manifest, or once the checkpoint has its name."""
    run = Path(os.environ["RANK_FAULTS_RUN"])
    wanted = run / name if at == "after_rename" else run / f".tmp-{name}" / "manifest.json"
    while not wanted.exists() and not (run / name).exists():
        time.sleep(0.0005)
    act()
