"""The optimizer's library is optional, and its threads are those that this process may use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from horizon_lm.config import ModelSettings
from horizon_lm.engine.policies import make_optimizer
from horizon_lm.machine import cores as machine_cores
from horizon_lm.machine.cores import choose_threads, lane_cores, usable_cores
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.optim.optimizer import Optimizer

ROOT = Path(__file__).parents[2]


def test_the_package_builds_without_a_compiler(tmp_path):
    """As `pip install` does: the extension is optional, so its failure is a warning."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    missing = {**os.environ, "CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    done = subprocess.run(command, cwd=ROOT, env=missing, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed" in done.stderr and not list(tmp_path.rglob("_optimizer*"))
    required = {**missing, "HORIZON_REQUIRE_KERNEL": "1"}  # as wheels are built that are to be published
    done = subprocess.run(command, cwd=ROOT, env=required, capture_output=True, text=True)
    assert done.returncode != 0 and "/nowhere/c" in done.stderr


def test_threads_follow_affinity_and_cgroup_quotas(tmp_path):
    root, listing = tmp_path / "cgroup", tmp_path / "self"
    affinity = len(os.sched_getaffinity(0))

    def cores(own: str, files: dict[str, str]) -> int:
        shutil.rmtree(root, ignore_errors=True)
        listing.write_text(own)
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return usable_cores(root, listing)

    assert cores("0::/a/b\n", {}) == affinity
    assert cores("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}) == affinity
    assert cores("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}) == 1
    v1 = {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"}
    assert cores("4:cpu,cpuacct:/a\n3:memory:/b\n", v1) == 1
    assert cores("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}) == affinity
    assert cores("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "x"}) == affinity
    assert choose_threads(10_000) == choose_threads() == usable_cores()
    assert choose_threads(1) == 1
    with pytest.raises(ValueError, match="hint"):
        choose_threads(0)


@pytest.mark.parametrize(
    ("device", "update", "cores", "expected"),
    [
        ("cpu", "deferred", 16, 16),
        ("cuda", "deferred", 16, 13),
        ("cuda", "eager", 16, 13),
        ("cuda", "sync", 16, 16),  # between steps, when the lanes idle
        ("cuda", "deferred", 2, 1),
    ],
)
def test_updates_leave_cores_to_the_lanes(device, update, cores, expected, monkeypatch):
    """By default; a setting pins the number."""
    monkeypatch.setattr(machine_cores, "usable_cores", lambda **places: cores)
    assert choose_threads(spare=lane_cores(device, update)) == expected
    assert Optimizer(spare_cores=lane_cores(device, update))._threads == expected
    assert Optimizer(threads=cores, spare_cores=3)._threads == cores


def test_a_model_takes_its_threads_from_its_settings_and_device():
    skeleton = Skeleton(zoo.build("llama"), torch.float32)
    for device, settings, expected in [
        ("cpu", {}, (None, 0)),
        ("cuda", {}, (None, 3)),
        ("cuda", {"update": "sync"}, (None, 0)),
        ("cuda", {"optimizer_threads": 5}, (5, 3)),
    ]:
        made = make_optimizer(skeleton, ModelSettings(**settings), torch.device(device))
        assert (made.threads, made.spare_cores) == expected
