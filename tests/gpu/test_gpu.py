"""`make gpu-check` as tests: each part in a process of its own, skipped where there is no GPU.

Its dry run is part of that of the whole suite: tests/bench/test_gpu_evidence.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECK = Path(__file__).with_name("check.py")
ROOT = CHECK.parents[2]

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; see make gpu-check"
)


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECK), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.timeout(620)
@pytest.mark.parametrize(
    "part", ["gradients", "determinism", "lanes", "optimizer", "packed", "ranks", "sanitizer", "step"]
)
def test_part(part: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = _check("--part", part, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(out.read_text())["passed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_says_plainly_that_nothing_was_run(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = _check("--out", str(out))
    assert (done.returncode, done.stdout.strip()) == (0, "gpu-check: no CUDA device, nothing was run")
    assert json.loads(out.read_text())["ran"] is False
