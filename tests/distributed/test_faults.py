"""A rank that fails or is lost ends all others, with its number and op; nothing else ends a rank."""

from __future__ import annotations

import re
import socket

import pytest

from horizon_lm.distributed.watch import TIMES
from lost_ranks import Ended, Nursery
from sizes import SOAK, paired

# Watches of these tests are ten times as fast; ends of processes on a busy machine are not.
ALL_SECONDS = 3 + 17
NAMED = r"rank {who} {what}, at J5 of step 3; rank {rank} was at J5 of step 3 \(gather on main\)"


def check_others(ended: list[Ended], who: int, what: str, code: int = 1) -> None:
    """All others ended in time with an error that names the rank, what happened to it, and both ops, and with
    the exit code of the rank that told its error."""
    for rank, one in enumerate(ended):
        if rank != who:
            assert one.code == code, one.output
            assert re.search(NAMED.format(who=who, what=what, rank=rank), one.output), one.output
            assert one.output.count("error:") == 1, one.output
            assert one.seconds < ALL_SECONDS


def test_times_end_all_ranks_within_30_seconds() -> None:
    silent = TIMES.lost + 2 * TIMES.beat + TIMES.probe + TIMES.beat + TIMES.grace
    told = TIMES.probe + 3 * TIMES.beat + TIMES.patience
    assert max(silent, told) < 30


@pytest.mark.parametrize("who", (0, 1, 2) if SOAK else (0, 2))
def test_killed(nursery: Nursery, who: int) -> None:
    ended = nursery.run("signalled", who=who, name="SIGKILL")
    assert ended[who].code == -9
    what = r"was lost \(its rendezvous store does not answer\)" if who == 0 else r"was lost \(killed\?\)"
    check_others(ended, who, what)


@pytest.mark.parametrize("who", (0, 2))
def test_stopped(nursery: Nursery, who: int) -> None:
    """Nothing is closed, so others are blocked in a collective, and the watch ends them."""
    ended = nursery.run("signalled", who=who, name="SIGSTOP")
    what = "its rendezvous store does not answer" if who == 0 else "no sign of life for 1.8 s"
    check_others(ended, who, rf"was lost \({what}\)")


@pytest.mark.parametrize("who", (0, 1) if SOAK else (1,))
def test_errors_are_told(nursery: Nursery, who: int) -> None:
    ended = nursery.run("failing", who=who, is_ours=True)
    assert ended[who].code == 4 and "error: row 7 is empty" in ended[who].output
    check_others(ended, who, "failed: row 7 is empty", code=4)
    ended = nursery.run("failing", who=who, is_ours=False)
    assert ended[who].code == 1 and "Traceback" in ended[who].output
    check_others(ended, who, "failed: ZeroDivisionError: no tokens")


@pytest.mark.parametrize("who", (0, 1) if SOAK else (0,))
def test_scripts_that_know_nothing_of_it(nursery: Nursery, who: int) -> None:
    ended = nursery.run("script_failing", who=who)
    assert "ZeroDivisionError" in ended[who].output
    for rank in {0, 1, 2} - {who}:
        assert f"RankError: rank {who} failed: ZeroDivisionError: no tokens" in ended[rank].output
    ended = nursery.run("script_ending", who=who)
    assert ended[who] == (0, "", ended[who].seconds)
    for rank in {0, 1, 2} - {who}:
        assert f"rank {who} has ended before others, at J5 of step 3" in ended[rank].output
        assert ended[rank].code == 1


@pytest.mark.parametrize("kind", ("error", "interrupt"))
def test_a_step_that_fails_on_one_rank_is_over_on_all(nursery: Nursery, kind: str) -> None:
    """Also if the script catches the error, which could be met with the next step's data."""
    ended = nursery.run("step_failing", who=1, kind=kind)
    own = "ValueError" if kind == "error" else "KeyboardInterrupt"
    for rank, one in enumerate(ended):
        assert one.output.count("done") == 1, one.output
        assert f"step 1 {own}" in one.output if rank == 1 else "rank 1 failed" in one.output, one.output
        assert one.seconds < ALL_SECONDS
    assert "step 2 RankError rank 1 failed" in ended[1].output, ended[1].output


def test_ranks_that_never_come_to_a_collective_are_ended(nursery: Nursery) -> None:
    ended = nursery.run("failing_alone", who=1)
    assert ended[1].code == 4
    for rank in (0, 2):
        assert ended[rank].code == 4 and ended[rank].seconds < ALL_SECONDS
        assert f"rank {rank}: error: rank 1 failed: row 7 is empty, at F3.1" in ended[rank].output


def test_errors_of_all_ranks_end_nobody_else(nursery: Nursery) -> None:
    for one in nursery.run("caught_everywhere"):
        assert one.code == 4 and one.output == "error: row 7 is empty\nended by itself\n"


@pytest.mark.parametrize(("leaves", "slow"), paired((True, False), (0, 2)))
def test_ordinary_ends_and_long_work_of_one_rank(nursery: Nursery, leaves: bool, slow: int) -> None:
    for one in nursery.run("ending", leaves=leaves, slow=slow):
        assert one[:2] == (0, "ended by itself\n")


@pytest.mark.parametrize(("who", "seconds"), (([1], 1.0), ([0], 1.0), ([0, 1, 2], 3.0)))
def test_pauses(nursery: Nursery, who: list[int], seconds: float) -> None:
    """A short pause of one rank, and a long one of all."""
    for one in nursery.run("paused", who=who, seconds=seconds):
        assert one[:2] == (0, "ended by itself\n")


def test_ranks_that_do_not_start(nursery: Nursery) -> None:
    ended = nursery.run("started", absent=[1])
    for rank in (0, 2):
        assert ended[rank].code == 1
        late = "1 of 3 ranks did not start within 1 s: 1\n" in ended[rank].output
        assert late or (rank == 2 and "rank 0 ended before all ranks had started" in ended[rank].output)
    ended = nursery.run("started", absent=[0])
    for rank in (1, 2):
        assert ended[rank].code == 2
        assert "cannot connect to rank 0 at 127.0.0.1:" in ended[rank].output
    ended = nursery.run("started", twice=1)
    assert any("two processes are rank 1 of 3" in one.output for one in ended[1:])
    assert "1 of 3 ranks did not start within 1 s: 2\n" in ended[0].output


def test_a_port_that_is_taken(nursery: Nursery) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = nursery.run("started", absent=[1, 2], variables={"MASTER_PORT": port})
    assert ended[0].code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended[0].output
