"""Ranks of a machine share its cores and memory; OMP_NUM_THREADS=1, which torchrun sets, limits no update."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import zoo
from horizon_lm import ModelSettings
from horizon_lm.engine.policies import make_optimizer
from horizon_lm.machine import cores, memory
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.optim.optimizer import Optimizer
from optimizer_runs import needs_kernel
from rank_pool import PATH

GB = 10**9


@pytest.mark.parametrize(("sharers", "usable"), ((1, 16), (2, 8), (3, 5), (16, 1), (40, 1)))
def test_cores(sharers: int, usable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "affinity", lambda: set(range(16)))
    monkeypatch.setattr(cores, "_cgroup_quotas", lambda *_: [17.5])
    assert cores.usable_cores(sharers=sharers) == usable
    assert cores.choose_threads(sharers=sharers) == usable
    assert cores.choose_threads(100, sharers=sharers) == usable
    assert Optimizer(core_sharers=sharers, spare_cores=3)._threads == max(1, usable - 3)


def test_quotas_are_shared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "affinity", lambda: set(range(16)))
    monkeypatch.setattr(cores, "_cgroup_quotas", lambda *_: [8.5])
    assert (cores.usable_cores(), cores.usable_cores(sharers=4)) == (8, 2)


def test_a_model_takes_its_part_of_the_cores() -> None:
    skeleton = Skeleton(zoo.build("llama"), torch.float32)
    for sharers in (1, 4):
        made = make_optimizer(skeleton, ModelSettings(), torch.device("cpu"), sharers)
        assert made.core_sharers == sharers


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAM and limits of groups are shared, limits of the process are its own."""
    monkeypatch.setattr(
        memory,
        "psutil",
        SimpleNamespace(
            virtual_memory=lambda: SimpleNamespace(available=100 * GB),
            Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GB)),
        ),
    )
    headrooms, limits = [80 * GB], [30 * GB]
    monkeypatch.setattr(memory, "_cgroup_headrooms", lambda: headrooms)
    monkeypatch.setattr(memory, "_process_limits", lambda: limits)
    assert memory.available_host_bytes() == 30 * GB
    assert memory.available_host_bytes(sharers=4) == 20 * GB
    headrooms.clear()
    assert memory.available_host_bytes(sharers=4) == 25 * GB
    assert memory.available_host_bytes(60 * GB, sharers=4) == 14 * GB
    limits.clear()
    assert memory.available_host_bytes(60 * GB) == 59 * GB


@needs_kernel
def test_omp_num_threads_does_not_limit_the_update() -> None:
    """Threads that the kernel starts stay in the process: three next to the one that calls it."""
    code = """if True:
        import os
        import torch
        from horizon_lm.machine.cores import choose_threads, usable_cores
        from optimizer_runs import make_run
        assert torch.get_num_threads() == 1
        assert choose_threads() == usable_cores() == len(os.sched_getaffinity(0))
        run = make_run(1 << 20)
        before = len(os.listdir("/proc/self/task"))
        run.update("adamw", threads=4)
        print(len(os.listdir("/proc/self/task")) - before)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert found.stdout == "3\n", found.stderr
