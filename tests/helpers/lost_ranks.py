"""Ranks that fail, are stopped, killed or end early: processes for `tests/distributed/test_faults.py`.

    with Nursery() as nursery:
        ended = nursery.run("killed", who=1)

One process imports torch and forks the ranks of each run. Each calls a function of this module and ends as an
interpreter does. Watches are ten times as fast as in production.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rank_pool import PATH, free_port

LIMIT = 40.0  # seconds of a run


class Ended(NamedTuple):
    """How a rank ended: exit code (-N: killed by signal N), output, and seconds since the fault."""

    code: int
    output: str
    seconds: float


class Nursery:
    """The process that forks ranks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def run(
        self, scenario: str, world: int = 3, variables: Mapping[str, str] | None = None, **keywords: Any
    ) -> list[Ended]:
        """Call SCENARIO(**keywords) of this module on all ranks; what is left after a while is killed."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "import lost_ranks; lost_ranks.serve()()"],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True},  # type: ignore[call-overload]
                env={**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"},
            )
        with tempfile.TemporaryDirectory() as folder:
            request = [scenario, keywords, world, _common(world) | dict(variables or {}), folder]
            print(json.dumps(request), file=self._process.stdin, flush=True)
            codes, ends = json.loads(self._process.stdout.readline())
            outputs = [_log(folder, rank).read_text(errors="replace") for rank in range(world)]
            fault = Path(folder, "fault")
            began = float(fault.read_text()) if fault.exists() else time.time()
        late = [rank for rank, code in enumerate(codes) if code is None]
        assert not late, f"ranks {late} did not end\n" + "\n".join(outputs)
        return [Ended(*one) for one in zip(codes, outputs, (end - began for end in ends), strict=True)]


def _common(world: int) -> dict[str, str]:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    return where | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


def _log(folder: str, rank: int) -> Path:
    return Path(folder, f"rank-{rank}.log")


def serve() -> Callable[[], None]:
    """Fork the ranks that are asked for; in a rank, return what it is to do."""
    from horizon_lm.distributed import start, torch_ranks, watch  # noqa: F401

    watch.TIMES = start.TIMES = watch.Times(*(seconds / 10 for seconds in watch.TIMES))
    for line in sys.stdin:
        scenario, keywords, world, variables, folder = json.loads(line)
        if scenario == "step_failing":
            import horizon_lm.host_model  # noqa: F401  # once, for all ranks
        pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **variables}
                return lambda: _begin(scenario, keywords, own, folder)  # noqa: B023
            pids.append(pid)
        print(json.dumps(_await(pids)), flush=True)
    return lambda: None


def _await(pids: list[int]) -> tuple[list[int | None], list[float]]:
    """Return exit codes, None for processes that had to be killed, and when they ended. A stopped process is
    killed once the others have ended."""
    codes: dict[int, int | None] = {}
    ends: dict[int, float] = {}
    stopped: set[int] = set()
    deadline = time.monotonic() + LIMIT
    while len(ends) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if pid and os.WIFSTOPPED(status):
            stopped.add(pid)
        elif pid and os.WIFCONTINUED(status):
            stopped.discard(pid)
        elif pid:
            codes.setdefault(pid, os.waitstatus_to_exitcode(status))
            ends[pid] = time.time()
        left = [each for each in pids if each not in ends]
        is_late = time.monotonic() > deadline
        if left and (is_late or (ends and stopped.issuperset(left))):
            for each in left:
                if is_late:
                    codes[each] = None
                os.kill(each, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids], [ends[pid] for pid in pids]


def _begin(scenario: str, keywords: dict[str, Any], variables: Mapping[str, str], folder: str) -> None:
    os.environ.update(variables)
    log = os.open(_log(folder, int(variables["RANK"])), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    globals()[scenario](**keywords)


# Scenarios


def _fault(act: Callable[[], Any]) -> None:
    """Note the time, and fail."""
    Path("fault").write_text(str(time.time()))
    act()


def _signal(name: str) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), getattr(signal, name))


def _raise(error: BaseException) -> None:
    raise error


def _until_failure(ranks: Any, who: int, act: Callable[[], Any]) -> None:
    """Exchange values step by step; rank `who` fails at the third."""
    for step in range(100_000):
        ranks.at(f"J5 of step {step}")
        if ranks.rank == who and step == 3:
            time.sleep(0.3)  # a heartbeat tells the op
            _fault(act)
        ranks.exchange(step)


def _command(work: Callable[[Any], None]) -> None:
    """Join, work and report errors as the command line does."""
    from horizon_lm.distributed.start import joined
    from horizon_lm.errors import HorizonError

    try:
        with joined("cpu") as ranks:
            work(ranks)
    except HorizonError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)


def signalled(who: int, name: str) -> None:
    _command(lambda ranks: _until_failure(ranks, who, _signal(name)))


def failing(who: int, is_ours: bool) -> None:
    """Rank `who` has an error of a user's or of a programmer's."""
    from horizon_lm.errors import DataError

    error = DataError("row 7 is empty", hint="remove it") if is_ours else ZeroDivisionError("no tokens")
    _command(lambda ranks: _until_failure(ranks, who, lambda: _raise(error)))


def script_failing(who: int) -> None:
    """A script, which knows nothing of ranks that fail."""
    from horizon_lm.distributed.start import join

    _until_failure(join("cpu"), who, lambda: _raise(ZeroDivisionError("no tokens")))


def script_ending(who: int) -> None:
    """Rank `who` believes that it is done."""
    from horizon_lm.distributed.start import join

    _until_failure(join("cpu"), who, lambda: sys.exit(0))


def step_failing(who: int, kind: str) -> None:
    """A loss function fails on rank `who` in the second step; the script catches everything and goes on."""
    import torch

    import horizon_lm as hz

    values = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = hz.HostModel.from_config(values, dtype="float32", device="cpu")
    ids = torch.arange(16).view(2, 8)
    calls = 0

    def loss_fn(log_probs: torch.Tensor, batch: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if model.ranks.rank == who and calls == 2:
            Path("fault").write_text(str(time.time()))
            raise {"error": ValueError, "interrupt": KeyboardInterrupt}[kind]("of the script")
        return -log_probs.sum()

    for step in range(3):
        try:
            model.train_step(
                [{"input_ids": ids + m, "labels": ids + m} for m in range(3)], 0.1, loss_fn=loss_fn
            )
            print("step", step, "done")
        except BaseException as error:
            print("step", step, type(error).__name__, error, flush=True)


def failing_alone(who: int) -> None:
    """Rank `who` fails, others compute without any collective."""
    from horizon_lm.errors import DataError

    def work(ranks: Any) -> None:
        ranks.at("F3.1")
        ranks.barrier()
        if ranks.rank == who:
            _fault(lambda: _raise(DataError("row 7 is empty")))
        time.sleep(30)

    _command(work)


def caught_everywhere() -> None:
    """An error of all ranks, told at the same place; rank 2 takes long to end."""
    from horizon_lm.errors import DataError

    def work(ranks: Any) -> None:
        ranks.barrier()
        error = DataError("row 7 is empty")
        error.is_shared = True
        raise error

    try:
        _command(work)
    finally:
        time.sleep(2 if os.environ["RANK"] == "2" else 0)
        print("ended by itself")


def ending(leaves: bool, slow: int) -> None:
    """All end in good order, at different times; rank `slow` works alone in between and in the end."""
    from horizon_lm.distributed import start

    ranks = start.join("cpu")
    ranks.exchange(1)
    time.sleep(2.8 if ranks.rank == slow else 0)  # the others wait
    ranks.barrier()
    if leaves:
        start.leave()
    time.sleep(2.8 if ranks.rank == slow else 0)
    print("ended by itself")


def paused(who: list[int], seconds: float) -> None:
    """Ranks are stopped for a while, as by a job's scheduler or a debugger, and go on."""
    from horizon_lm.distributed import start

    ranks = start.join("cpu")
    ranks.barrier()
    if ranks.rank in who:
        own = os.getpid()
        if os.fork() == 0:
            time.sleep(seconds)
            os.kill(own, signal.SIGCONT)
            os._exit(0)
        os.kill(own, signal.SIGSTOP)
    ranks.exchange(1)
    time.sleep(0.5)
    start.leave()
    print("ended by itself")


def started(absent: Sequence[int] = (), twice: int | None = None) -> None:
    """Ranks `absent` never start; another process claims the number `twice`."""
    from horizon_lm.distributed import start

    start._START_SECONDS = 1.0
    if int(os.environ["RANK"]) in absent:
        return
    if twice is not None and os.environ["RANK"] == "2":
        os.environ["RANK"] = str(twice)
    _command(lambda ranks: ranks.barrier())


def _exchange(ranks: Any) -> None:
    text = f"exchanged {ranks.exchange(ranks.rank)}\n"
    sys.stdout.write(text)  # at once: under torchrun all ranks write to the same pipe


def restarted(who: int) -> None:
    """Under torchrun: rank `who` is killed the first time."""
    with suppress(KeyError):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            signalled(who, "SIGKILL")
    _command(_exchange)


def under_srun() -> None:
    """With srun's variables only."""
    given = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    os.environ |= {"SLURM_PROCID": given["RANK"], "SLURM_NTASKS": given["WORLD_SIZE"], "SLURM_STEP_ID": "0"}
    os.environ |= {"SLURM_LOCALID": given["LOCAL_RANK"], "SLURM_JOB_ID": "17"}
    _command(_exchange)


def in_a_group() -> None:
    """Others have made the process group, without a word on local ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    del os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]
    _command(_exchange)
    dist.barrier()
    print("still there")
    dist.destroy_process_group()


def joined_twice() -> None:
    from horizon_lm.distributed import start

    first = start.join("cpu")
    is_same = start.join("auto") is first
    before = first.exchange(first.rank)
    start.leave()
    second = start.join("cpu")
    print(is_same, second is first, before, second.exchange(second.rank))
    start.leave()


def bound() -> None:
    """Each rank on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"])]})
    _command(lambda ranks: print("sharers", ranks.core_sharers))


def without_gpu() -> None:
    from horizon_lm.distributed.start import joined
    from horizon_lm.errors import HorizonError

    try:
        with joined("cuda" if os.environ["RANK"] == "1" else "cpu"):
            pass
    except HorizonError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
