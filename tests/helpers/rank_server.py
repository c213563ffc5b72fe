"""Runs of several ranks, many after another: one process imports all, and forks the ranks of each run.

    with RankServer() as server:
        ended = server.run(2, settings_file, faults={1: {"kind": "kill", "at": "forward", "step": 3}})

A rank is a process of its own, with the variables of torchrun, that calls the command line, or a function by
["call", "module:function", argument, ...]. Faults are those of `rank_faults`.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rank_runs import PATH, SECONDS, Ended, free_port

Fault = Mapping[str, Any]


class RankServer:
    """The process that forks; started by the first run."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="rank-server-")

    def __enter__(self) -> RankServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(30)
        self._folder.cleanup()

    def run(
        self,
        world: int,
        command: Sequence[str],
        *,
        faults: Mapping[int, Fault] | None = None,
        commands: Mapping[int, Sequence[str]] | None = None,
        variables: Mapping[str, str] | None = None,
        seconds: float = SECONDS,
    ) -> Ended:
        """Run `horizon COMMAND` on all ranks, or commands[r] on rank r, and wait.

        seconds: a rank that is still there after this time is killed, and the test fails. One whose fault was
        to stop is killed after the others.
        """
        port = str(free_port())
        ranks = []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            variable = {name: str(value) for name, value in place.items()} if world > 1 else {}
            variable |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(variables or {})}
            out, err = (str(Path(self._folder.name, f"{rank}.{kind}")) for kind in ("out", "err"))
            ranks.append(
                {
                    "variables": variable,
                    "command": list((commands or {}).get(rank, command)),
                    "fault": (faults or {}).get(rank),
                    "out": out,
                    "err": err,
                }
            )
        stopped = [rank for rank, fault in (faults or {}).items() if fault["kind"] == "stop"]
        answer = self._ask({"ranks": ranks, "seconds": seconds, "stopped": stopped})
        outputs, errors = ([Path(one[kind]).read_text() for one in ranks] for kind in ("out", "err"))
        ended = Ended(answer["codes"], outputs, errors, answer["seconds"])
        assert not answer["late"], f"ranks {answer['late']} hang\n{ended.said()}"
        return ended

    def _ask(self, request: Any) -> Any:
        process = self._process
        if process is None:
            environment = {
                **os.environ,
                **{"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                **{"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
                "TORCH_CPP_LOG_LEVEL": "ERROR",  # as the command line sets it before it imports torch
            }
            process = self._process = subprocess.Popen(
                [sys.executable, "-c", "import rank_server; rank_server.serve()"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())


def serve() -> None:
    """Fork the ranks of each request from standard input, wait for them, and answer with their codes."""
    _get_ready()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        children = [_forked(rank, one) for rank, one in enumerate(request["ranks"])]
        codes: dict[int, int] = {}
        late: list[int] = []
        while len(codes) < len(children):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in children:
                codes[children.index(pid)] = os.waitstatus_to_exitcode(status)
            elif pid == 0:
                time.sleep(0.01)
                left = set(range(len(children))) - set(codes)
                if left == set(request["stopped"]):
                    for rank in left:
                        os.kill(children[rank], signal.SIGKILL)
                if time.monotonic() - started > request["seconds"] and not late:
                    late = [rank for rank in range(len(children)) if rank not in codes]
                    for rank in late:
                        os.kill(children[rank], signal.SIGKILL)
        answer = {"codes": [codes[r] for r in range(len(children))], "late": late}
        print(json.dumps({**answer, "seconds": time.monotonic() - started}), flush=True)


def _get_ready() -> None:
    """Import what a run needs. Nothing here starts a thread, so that forking is safe."""
    import torch

    torch.set_num_threads(1)
    import torch.distributed
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import horizon_lm.training.train  # noqa: F401
    from horizon_lm import plan
    from horizon_lm.training import sample

    plan.models_are_stock = True
    sample.reason_to_skip = lambda *_: "tests"  # type: ignore[assignment]


def _forked(rank: int, one: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)  # a session of its own, as torchrun gives it
        for number, path in ((1, one["out"]), (2, one["err"])):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.environ.update(one["variables"])
        import rank_faults
        from horizon_lm import cli

        if one["fault"] is not None:
            rank_faults.install(one["fault"], rank)
        verb, *arguments = one["command"]
        if verb == "call":
            module, _, name = arguments[0].partition(":")
            code = getattr(importlib.import_module(module), name)(*arguments[1:])
        else:
            code = cli.main(one["command"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # as at the end of any process: a rank tells the others how it ended
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
