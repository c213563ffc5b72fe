"""Wrapper that profiles one more step of a system: the longest kernels, and a trace file.

`case.extra` names the system and the file: {"system": "module:function", "trace": path}. Other keys are
passed to the system. The step is profiled after all timed steps, so it does not affect them.
"""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from horizon_lm.bench.protocol import Case
from horizon_lm.bench.worker import build as build_system

MOST_KERNELS = 25
_WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Traced:
    def __init__(self, case: Case) -> None:
        extra = dict(case.extra)
        target, self._trace = extra.pop("system"), Path(extra.pop("trace"))
        self._system: Any = build_system(target, case.replace(extra=extra))
        self._cuda = case.device.startswith("cuda")

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        return float(self._system.step(micro_batches))

    def describe(self) -> dict[str, Any]:
        return dict(self._system.describe()) if hasattr(self._system, "describe") else {}

    def breakdown(self, micro_batches: list[torch.Tensor]) -> dict[str, Any]:
        """Return the system's own breakdown, with `profile`: kernels, and calls that wait for the device."""
        found = self._system.breakdown(micro_batches) if hasattr(self._system, "breakdown") else {}
        try:
            return found | {"profile": self._profiled(micro_batches)}
        except Exception as error:  # a broken profiler must not lose the finished measurement
            return found | {"profile": {"failed": f"{type(error).__name__}: {error}"}}

    def _profiled(self, micro_batches: list[torch.Tensor]) -> dict[str, Any]:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        with profile(activities=kinds, experimental_config=_every_thread()) as found:
            self.step(micro_batches)
            if self._cuda:
                torch.cuda.synchronize()
        _write(found, self._trace)
        events = found.key_averages()
        return {
            "kernels": longest(events, self._cuda),
            "waits": {e.key: e.count for e in events if e.key.startswith(_WAITS)},
            "trace": self._trace.name,
        }

    def close(self) -> None:
        self._system.close()


def _every_thread() -> Any:
    """Return the option to record our lanes' threads too; None if torch has none."""
    try:
        from torch._C._profiler import _ExperimentalConfig

        return _ExperimentalConfig(profile_all_threads=True)
    except (ImportError, TypeError):
        return None


def longest(events: Any, cuda: bool) -> list[list[Any]]:
    """Return [name, calls, milliseconds on the device] of the kernels with the most total time."""
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    if cuda:  # only kernels' own events; operations that launch them would count them twice
        events = [e for e in events if "CUDA" in str(e.device_type)]
    ranked = sorted(events, key=lambda e: -getattr(e, name))[:MOST_KERNELS]
    return [[e.key[:90], e.count, round(getattr(e, name) / 1e3, 3)] for e in ranked]


def _write(found: profile, path: Path) -> None:
    """Write the trace, gzipped."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        found.export_chrome_trace(str(plain))
        path.write_bytes(gzip.compress(plain.read_bytes(), 6))


def build(case: Case) -> Traced:
    return Traced(case)
