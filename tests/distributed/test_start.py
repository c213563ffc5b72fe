"""Ranks find each other however they were started, each on a device of its own; one rank makes no group."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import horizon_lm.machine.device as device_module
from horizon_lm.distributed.start import device_problem
from horizon_lm.errors import ConfigError
from horizon_lm.machine.device import resolve_device
from lost_ranks import Nursery
from rank_pool import PATH, RankPool, free_port

SECONDS = 120


def call(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def test_torchrun_with_restarts(tmp_path: Path) -> None:
    """A rank is killed in the first attempt. The second one, through the same store, knows nothing of it."""
    where = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    where += ["--nproc-per-node", "2", "--max-restarts", "1", "--no-python"]
    code = "import lost_ranks; lost_ranks.restarted(who=1)"
    ended = call(
        [sys.executable, "-m", "torch.distributed.run", *where, sys.executable, "-c", code], tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "exchanged [0, 1]\n" * 2
    assert "exitcode: -9" in ended.stderr  # the first one


def test_srun(nursery: Nursery) -> None:
    """Its variables alone."""
    ended = nursery.run("under_srun", world=3)
    assert [one.output for one in ended] == ["exchanged [0, 1, 2]\n"] * 3


def test_a_process_group_that_exists(nursery: Nursery) -> None:
    """As in Ray Train and accelerate: it is used, and is still there afterwards."""
    ended = nursery.run("in_a_group", world=2)
    assert [one.output for one in ended] == ["exchanged [0, 1]\nstill there\n"] * 2
    assert [one.code for one in ended] == [0, 0]


def test_joining_again(nursery: Nursery) -> None:
    """The same ranks while joined; new connections after leaving."""
    ended = nursery.run("joined_twice", world=2)
    assert [one.output for one in ended] == ["True False [0, 1] [0, 1]\n"] * 2


def test_places_on_the_machine(four_ranks: RankPool) -> None:
    found = four_ranks.run("collective_cases:place")
    assert found == [(rank, 4, rank, 4, 4) for rank in range(4)]


def test_ranks_with_cores_of_their_own(nursery: Nursery) -> None:
    """As srun gives them to tasks: nobody else runs on them."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    assert [one.output for one in nursery.run("bound", world=2)] == ["sharers 1\n"] * 2


def test_one_rank_makes_no_process_group(tmp_path: Path) -> None:
    code = """if True:
        import sys
        import torch
        import zoo
        import horizon_lm as hz
        batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
        with hz.HostModel(zoo.build("llama"), hz.ModelSettings(device="cpu")) as model:
            model.train_step([batch], lr=1e-3)
            assert model.ranks.world == 1
        assert not torch.distributed.is_initialized()
        names = [name for name in sys.modules if name.startswith("horizon_lm.distributed.")]
        print(sorted(name.rpartition(".")[2] for name in names))
    """
    ended = call([sys.executable, "-c", code], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert not {"torch_ranks", "rendezvous"} & set(re.findall(r"\w+", ended.stdout))


# Devices


def gpu(number: int, uuid: str) -> dict[str, Any]:
    return {"name": f"cuda:{number}", "gpu": uuid, "error": "", "hint": None}


CPU = {"name": "cpu", "gpu": "", "error": "", "hint": None}


@pytest.mark.parametrize(
    ("hosts", "devices", "message"),
    (
        (["a", "a"], [CPU, CPU], None),
        (["a", "a", "b"], [gpu(0, "x"), gpu(1, "y"), gpu(0, "z")], None),
        (["a", "a"], [gpu(0, "x"), gpu(0, "y")], None),  # each sees only its own
        (["a", "b", "b"], [gpu(0, "x"), gpu(0, "z"), gpu(0, "z")], "ranks 1 and 2 on b use the same GPU"),
        (["a", "b"], [gpu(0, "x"), CPU], "rank 1 on b uses cpu, rank 0 on a cuda:0"),
        (["a", "b"], [CPU, CPU | {"error": "no device", "hint": "buy one"}], "rank 1 on b: no device"),
    ),
)
def test_device_problems(hosts: list[str], devices: list[dict[str, Any]], message: str | None) -> None:
    found = device_problem(hosts, devices)
    assert (found is None) == (message is None)
    assert found is None or (message is not None and message in found.message and found.hint)


@pytest.mark.parametrize(
    ("name", "local_rank", "count", "expected"),
    (
        ("auto", 1, 4, "cuda:1"),
        ("cuda", 3, 4, "cuda:3"),
        ("cuda", 3, 1, "cuda:0"),  # each sees only its own
        ("cpu", 3, 4, "cpu"),
        ("cuda", 4, 4, "ranks of this machine: at least 5, CUDA devices: 4"),
        ("cuda:1", 1, 4, "is one GPU for several ranks"),
        ("cuda", None, 4, "cuda:2"),
    ),
)
def test_each_rank_takes_its_gpu(
    name: str, local_rank: int | None, count: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: count, current_device=lambda: min(2, count - 1)
    )
    monkeypatch.setattr(device_module, "torch", SimpleNamespace(cuda=fake, device=torch.device))
    if expected.startswith("c"):
        assert resolve_device(name, local_rank) == torch.device(expected)
        return
    with pytest.raises(ConfigError, match=expected) as error:
        resolve_device(name, local_rank)
    assert error.value.hint


def test_an_error_of_one_device_is_raised_on_all_ranks(nursery: Nursery) -> None:
    """Rank 1 asks for a GPU, and here is none."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for one in nursery.run("without_gpu", world=2):
        assert one.code == 2
        assert re.fullmatch(
            r"error: rank 1 on .*: device='cuda', but torch sees no CUDA device\n", one.output
        )
