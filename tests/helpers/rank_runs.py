"""Runs of several ranks as processes of their own, as torchrun starts them, on 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horizon_lm.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(ROOT / "tests/helpers")])
SECONDS = 120.0  # in which a run of a tiny model ends, however it ends


@dataclass(frozen=True)
class Ended:
    """codes, outputs, errors: exit code, standard output and standard error of each rank."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]
    seconds: float

    def said(self) -> str:
        """All that any rank printed, for the message of an assertion."""
        return "\n".join(
            f"--- rank {rank}: {code}\n{out}\n{err}"
            for rank, (code, out, err) in enumerate(zip(self.codes, self.outputs, self.errors, strict=True))
        )


class RankRun:
    """One process per rank. command: arguments of `python`; own: variables of single ranks."""

    def __init__(
        self,
        world: int,
        command: Sequence[str],
        *,
        own: Mapping[int, Mapping[str, str]] | None = None,
        commands: Mapping[int, Sequence[str]] | None = None,
        **variables: str,
    ) -> None:
        shared = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RANK_POOL")},
            **{"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            **{"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)},
            **{"LOCAL_WORLD_SIZE": str(world), **variables},
        }
        self.started = time.monotonic()
        self.processes = [
            subprocess.Popen(
                [sys.executable, *(commands or {}).get(rank, command)],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **(own or {}).get(rank, {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    def signal(self, number: signal.Signals, rank: int) -> None:
        self.processes[rank].send_signal(number)

    def wait(self, seconds: float = SECONDS) -> Ended:
        """Wait until all have ended; kill what is left, and fail, when the time is over."""
        deadline = time.monotonic() + seconds
        outputs, errors, late = [], [], []
        for rank, process in enumerate(self.processes):
            try:
                out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(rank)
                process.kill()
                out, err = process.communicate()
            outputs.append(out)
            errors.append(err)
        ended = Ended(
            [p.returncode for p in self.processes], outputs, errors, time.monotonic() - self.started
        )
        assert not late, f"ranks {late} hang\n{ended.said()}"
        return ended


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def write_settings(config: TrainConfig, place: Path) -> Path:
    place.write_text(config.to_yaml())
    return place


def train(world: int, settings: Path, *arguments: str, **keywords: Any) -> RankRun:
    """Start `horizon train SETTINGS` on `world` ranks."""
    return RankRun(world, ["-m", "horizon_lm", "train", str(settings), *arguments], **keywords)


def lines_of(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]
