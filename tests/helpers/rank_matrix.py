"""Faults of runs on several ranks: the cases, what each must leave, and the check of one.

A run of 6 steps with a checkpoint of every second one, in the background, meets a fault in step 5, or while
the checkpoint of step 4 is written. All ranks end in time and with the right exit codes, checkpoints of
before are whole, and a resumed run on another number of ranks ends with the bits of an undisturbed one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horizon_lm.checkpoint.folder import list_checkpoints
from horizon_lm.checkpoint.reader import verify
from rank_runs import Ended, write_settings
from rank_server import RankServer
from rank_states import State, logical_state
from small_runs import losses_of, settings, write_text

STEPS = 6
KILLED = -9
SECONDS = 30.0  # from the start of the processes to the end of the last one
OPS = ("forward", "backward", "exchange")
SAVES = ("write", "fsync", "before_rename", "after_rename")


@dataclass(frozen=True)
class Case:
    """A fault.

    faults: by rank. code: of the ranks that have none of their own; own: of single ranks. whole: steps whose
    checkpoints must be there, whatever was being written. said: what rank 0, or another rank by number, must
    say. goes_on: the run ends as if nothing had happened. changes: other settings of single ranks.
    seconds: in which all ranks end.
    """

    name: str
    kind: str
    world: int
    faults: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    code: int = 1
    own: Mapping[int, int] = field(default_factory=dict)
    whole: tuple[int, ...] = (2,)
    said: Mapping[int, str] = field(default_factory=dict)
    goes_on: bool = False
    changes: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    seconds: float = SECONDS


def _kills() -> list[Case]:
    found = []
    for world, places in ((2, (*OPS, *SAVES)), (4, (*OPS, "write", "before_rename", "after_rename"))):
        for at in places:
            for rank in range(world):
                step = 5 if at in OPS else 4
                whole = (2, 4) if at == "after_rename" else (2,)
                speaker = 1 if rank == 0 else 0
                found.append(
                    Case(
                        f"kill -9 of rank {rank} of {world}, {at}",
                        "kill",
                        world,
                        {rank: {"kind": "kill", "at": at, "step": step}},
                        own={rank: KILLED},
                        whole=whole,
                        said={speaker: f"rank {rank} was lost"},
                    )
                )
    return found


def _numbers() -> list[Case]:
    found = []
    for world in (2, 4):
        for rank in range(world):
            found.append(
                Case(
                    f"NaN on rank {rank} of {world}",
                    "nan",
                    world,
                    {rank: {"kind": "nan", "step": 5}},
                    code=6,
                    whole=(2, 4),
                    said={0: "the loss of step 5 is nan"},
                )
            )
            fault = {"kind": "no_targets", "step": 5, "of": rank, "world": world}
            found.append(
                Case(
                    f"no target tokens on rank {rank} of {world}",
                    "no targets",
                    world,
                    dict.fromkeys(range(world), fault),
                    code=0,
                    whole=(2, 4, 6),
                    goes_on=True,
                )
            )
    return found


def _disks() -> list[Case]:
    return [
        Case(
            f"disk full on rank {rank} of {world}",
            "disk full",
            world,
            {rank: {"kind": "full", "at": "write", "step": 4}},
            code=0,
            whole=(2, 6),
            said={0: f"no checkpoint of step 4: rank {rank}: No space left on device"},
            goes_on=True,
        )
        for world in (2, 4)
        for rank in range(world)
    ]


def _signals() -> list[Case]:
    found = []
    for kind, code in (("term", 75), ("int", 130), ("usr1", 75)):
        name = {"term": "SIGTERM", "int": "SIGINT", "usr1": "SIGUSR1"}[kind]
        for world, ranks in ((2, (0,)), (2, (1,)), (2, (0, 1)), (4, (3,))):
            found.append(
                Case(
                    f"{name} to {ranks} of {world}",
                    "signal",
                    world,
                    {rank: {"kind": kind, "step": 5} for rank in ranks},
                    code=code,
                    whole=(2, 4, 5),
                    said={0: f"stopped by {name} after step 5: saved"},
                )
            )
    return found


def _hangs() -> list[Case]:
    """A rank that is stopped, not killed: its heartbeats end, its connections do not."""
    return [
        Case(
            f"SIGSTOP of rank {rank} of 2",
            "hang",
            2,
            {rank: {"kind": "stop", "at": "forward", "step": 5}},
            own={rank: KILLED},
            said={1 - rank: f"rank {rank} was lost"},
            seconds=2 * SECONDS,
        )
        for rank in range(2)
    ]


def _errors() -> list[Case]:
    """Errors of one rank alone: it says so itself, and all end with its exit code."""
    found = []
    for kind, code, message in (
        ("raise", 1, "injected"),
        ("memory", 3, "the host is out of memory"),
        ("data", 4, "row 7 is damaged"),
    ):
        for world, rank in ((2, 0), (2, 1), (4, 2)):
            found.append(
                Case(
                    f"{kind} on rank {rank} of {world}",
                    "error",
                    world,
                    {rank: {"kind": kind, "at": "backward", "step": 5}},
                    code=code,
                    said={rank: message, 0: message},
                )
            )
    return found


def _differences() -> list[Case]:
    found = []
    for world, rank in ((2, 0), (2, 1), (4, 3)):
        odd = 1 if world == 2 else rank  # of two, either could be meant
        for key, value in (("learning_rate", 1e-3), ("seed", 7)):
            found.append(
                Case(
                    f"other {key} on rank {rank} of {world}",
                    "difference",
                    world,
                    code=2,
                    whole=(),
                    said={0: f"rank {odd} differs from rank 0 in settings: {key}"},
                    changes={rank: {key: value}},
                )
            )
        found.append(
            Case(
                f"other data on rank {rank} of {world}",
                "difference",
                world,
                {rank: {"kind": "other_data"}},
                code=2,
                whole=(),
                said={0: f"rank {odd} differs from rank 0 in data"},
            )
        )
    return found


def cases() -> list[Case]:
    return [*_kills(), *_hangs(), *_numbers(), *_disks(), *_signals(), *_errors(), *_differences()]


class Matrix:
    """Runs cases, and knows how an undisturbed run ends."""

    def __init__(self, server: RankServer, place: Path) -> None:
        self._server, self._place = server, place
        self._text = write_text(place / "text.txt")
        self._resumed_on = 0
        self._ends: dict[str, Any] = {}

    def _settings(self, run: Path, **changes: Any) -> Any:
        values = {
            "gradient_accumulation_steps": 4,
            "max_steps": STEPS,
            "save_steps": 2,
            "reduction": "exact",
            "dataset_cache_dir": str(self._place / "cache"),
            **changes,
        }
        return settings(self._text, run, **values)

    def end_of(self, faults: Mapping[int, Mapping[str, Any]]) -> tuple[State, Any]:
        """How one rank alone ends, with the same change of its data."""
        fault = next((one for one in faults.values() if one["kind"] == "no_targets"), None)
        key = json.dumps(fault)
        if key not in self._ends:
            run = self._place / f"straight-{len(self._ends)}"
            file = write_settings(self._settings(run), run.with_suffix(".yaml"))
            ended = self._server.run(1, ["train", str(file)], faults={} if fault is None else {0: fault})
            assert ended.codes == [0], ended.said()
            self._ends[key] = logical_state(run / f"checkpoint-{STEPS}"), losses_of(run)
        return self._ends[key]

    def check(self, case: Case, run: Path) -> float:
        """Run a case in the folder `run`, check what it leaves, and resume it; return its seconds."""
        ended = self._ended(case, run)
        for rank, code in enumerate(ended.codes):
            assert code == case.own.get(rank, case.code), (case.name, ended.said())
        assert ended.seconds < case.seconds, (case.name, ended.said())
        for rank, text in case.said.items():
            assert text in ended.errors[rank] + ended.outputs[rank], (case.name, text, ended.said())
        self._check_silence(case, ended)
        self._check_folder(case, run)
        if case.kind == "difference":
            assert not run.exists(), (case.name, ended.said())
            return ended.seconds
        if not case.goes_on:
            self._resume(run)
        state, losses = self.end_of(case.faults)
        assert losses_of(run) == losses, case.name
        assert logical_state(run / f"checkpoint-{STEPS}") == state, case.name
        shutil.rmtree(run)
        return ended.seconds

    def _ended(self, case: Case, run: Path) -> Ended:
        def command(name: str, changes: Mapping[str, Any]) -> list[str]:
            file = run.with_name(f"{run.name}{name}.yaml")
            return ["train", str(write_settings(self._settings(run, **changes), file))]

        return self._server.run(
            case.world,
            command("", {}),
            commands={rank: command(f"-{rank}", changes) for rank, changes in case.changes.items()},
            faults=case.faults,
            variables={"RANK_FAULTS_RUN": str(run)},
        )

    def _check_silence(self, case: Case, ended: Ended) -> None:
        """Ranks but the first say nothing, unless it is their own fault, or rank 0 is gone."""
        for rank in range(1, case.world):
            if rank in case.said or rank in case.own:
                continue
            assert not ended.outputs[rank] and not ended.errors[rank], (case.name, ended.said())

    def _check_folder(self, case: Case, run: Path) -> None:
        found, rejected = list_checkpoints(run)
        assert not rejected, (case.name, rejected)
        steps = {checkpoint.manifest.step for checkpoint in found}
        assert steps >= set(case.whole), (case.name, steps)
        for checkpoint in found:
            assert not verify(checkpoint).faults, case.name

    def _resume(self, run: Path) -> None:
        """Go on with the next number of ranks, and no fault."""
        self._resumed_on = (self._resumed_on + 1) % 3
        world = (1, 2, 4)[self._resumed_on]
        ended = self._server.run(world, ["resume", str(run)])
        assert ended.codes == [0] * world, ended.said()
        assert not list(run.glob(".tmp-*")) and not list(run.glob(".del-*"))
