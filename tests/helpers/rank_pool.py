"""A pool of ranks: processes that wait for calls and run each of them together, with Gloo on 127.0.0.1.

    with RankPool(2) as pool:
        results = pool.run("tests.helpers.x:function", argument)  # the result of each rank

A function reaches the ranks by `ranks()`. Processes are kept from call to call, so cases share their imports.
An exception on any rank, a lost process or a call that takes too long raises `RankPoolError` with the
traceback or the stacks, and the pool is replaced.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from horizon_lm.distributed.ranks import Ranks

ROOT = Path(__file__).resolve().parents[2]
# What processes of ranks import from.
PATH = os.pathsep.join(str(ROOT / folder) for folder in ("src", ".", "tests/helpers"))
_ADDRESS = "RANK_POOL_ADDRESS"
_START_SECONDS = 120
_joined: Ranks | None = None


class RankPoolError(AssertionError):
    """A call failed: what each rank reported."""


class RankPool:
    """`world` processes, started by the first call."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: str, *args: Any, timeout: float = 120, **keywords: Any) -> list[Any]:
        """Call "module:function" on all ranks with these arguments (pickled); return the result of each."""
        return self.run_each(function, [args] * self.world, timeout=timeout, **keywords)

    def run_each(
        self, function: str, args: list[tuple[Any, ...]], *, timeout: float = 120, **keywords: Any
    ) -> list[Any]:
        """Like `run`, with arguments of its own for each rank."""
        self._start()
        for rank, connection in enumerate(self._connections):
            connection.send_bytes(pickle.dumps((function, args[rank], keywords)))
        try:
            return self._results(timeout)
        except BaseException:  # Ctrl-C and pytest's own timeout too: no later call may meet ranks of this one
            self.close()
            raise

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for connection in self._connections:
            connection.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._connections, self._folder = [], [], None

    def _results(self, seconds: float) -> list[Any]:
        results: dict[int, Any] = {}
        problems: dict[int, str] = {}
        deadline = time.monotonic() + seconds
        while len(results) + len(problems) < self.world:
            waiting = {
                c: r for r, c in enumerate(self._connections) if r not in results and r not in problems
            }
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    works, answer = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    code = self._processes[rank].wait()
                    works, answer = False, f"process ended with code {code}\n{self._output(rank)}"
                (results if works else problems)[rank] = answer
            if problems:  # the others may wait for ever
                deadline = min(deadline, time.monotonic() + 1)
        missing = [rank for rank in range(self.world) if rank not in results and rank not in problems]
        if problems or missing:
            why = "an error on another rank" if problems else f"no result after {seconds} s"
            problems |= {rank: f"{why}; at work on:\n{self._stacks(rank)}" for rank in missing}
            raise RankPoolError("\n".join(f"rank {rank}: {problems[rank]}" for rank in sorted(problems)))
        return [results[rank] for rank in range(self.world)]

    def _start(self) -> None:
        if self._processes:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        address = os.path.join(self._folder.name, "pool")
        shared = {
            **os.environ,
            **{"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", _ADDRESS: address},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self.world)},
            "LOCAL_WORLD_SIZE": str(self.world),
        }
        with Listener(address, "AF_UNIX", backlog=self.world) as listener:
            for rank in range(self.world):
                with open(self._log(rank), "wb") as log:
                    self._processes.append(
                        subprocess.Popen(
                            [sys.executable, "-c", "import rank_pool; rank_pool.serve()"],
                            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                            **{"cwd": ROOT, "stdout": log, "stderr": log, "stdin": subprocess.DEVNULL},
                        )
                    )
            listener._listener._socket.settimeout(_START_SECONDS)  # type: ignore[attr-defined]
            found = {}
            for _ in range(self.world):
                connection = listener.accept()
                found[int.from_bytes(connection.recv_bytes(), "little")] = connection
        self._connections = [found[rank] for rank in range(self.world)]

    def _log(self, rank: int) -> Path:
        assert self._folder is not None
        return Path(self._folder.name, f"rank-{rank}.log")

    def _output(self, rank: int) -> str:
        return self._log(rank).read_text(errors="replace")[-6000:]

    def _stacks(self, rank: int) -> str:
        """Make a rank print its stacks, and return the end of its output."""
        self._processes[rank].send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        return self._output(rank)


def ranks() -> Ranks:
    """Return the ranks of this pool, in a process of it. The first call connects them: collective."""
    global _joined
    if _joined is None:
        from horizon_lm.distributed.start import join

        _joined = join("cpu")
    return _joined


def serve() -> None:
    """Run calls in a process of a pool until the pool is gone."""
    sys.modules["tests.helpers.rank_pool"] = sys.modules[__name__]  # one module, however a case imports it
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    connection = Client(os.environ[_ADDRESS], "AF_UNIX")
    connection.send_bytes(int(os.environ["RANK"]).to_bytes(4, "little"))
    while True:
        try:
            function, args, keywords = pickle.loads(connection.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            module, _, name = function.partition(":")
            answer = True, getattr(importlib.import_module(module), name)(*args, **keywords)
            content = pickle.dumps(answer)
        except BaseException:
            content = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(content)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool
