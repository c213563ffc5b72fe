"""Runs by the Python interface, for the ranks of a `RankServer`: each prints what it got, as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import horizon_lm as hz
from horizon_lm.errors import HorizonError


def _told(work: Any) -> int:
    """Print the result of a run, or the error, and return the exit code."""
    try:
        result = asdict(work())
    except HorizonError as error:
        print(json.dumps({"error": type(error).__name__, "message": error.message}))
        return error.exit_code
    print(json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in result.items()}))
    return 0


class Watch:
    """Writes what it is told; stops the run or fails at a step."""

    def __init__(self, place: str, stop_at: int = 0, fail_at: int = 0) -> None:
        self._place, self._stop_at, self._fail_at = Path(place), stop_at, fail_at

    def _note(self, event: str, state: Any, control: Any) -> None:
        with self._place.open("a") as file:
            print(os.environ["RANK"], event, state.step, file=file)
        control.should_training_stop = event == "on_step_end" and state.step == self._stop_at
        if event == "on_step_end" and state.step == self._fail_at:
            raise KeyError("a")

    def on_step_end(self, state: Any, control: Any) -> None:
        self._note("on_step_end", state, control)

    def on_log(self, state: Any, control: Any) -> None:
        self._note("on_log", state, control)

    def on_evaluate(self, state: Any, control: Any) -> None:
        self._note("on_evaluate", state, control)

    def on_save(self, state: Any, control: Any) -> None:
        self._note("on_save", state, control)


def plain(settings: str) -> int:
    return _told(lambda: hz.train(settings))


def watched(settings: str, place: str, stop_at: str, fail_at: str) -> int:
    watch = Watch(place, int(stop_at), int(fail_at))
    return _told(lambda: hz.train(settings, callbacks=[watch]))


def fails_to_save(settings: str, place: str) -> int:
    class Bad:
        def on_save(self, state: Any, control: Any) -> None:
            raise ValueError("no room in here")

    return _told(lambda: hz.train(settings, callbacks=[Bad()]))


def in_a_group_of_torch(settings: str) -> int:
    """As under Ray Train: the process group exists already, and stays."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    code = _told(lambda: hz.train(settings))
    dist.barrier()
    dist.destroy_process_group()
    return code
