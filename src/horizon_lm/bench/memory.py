"""How much memory this process has taken at most, on the host and on the device."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Peaks:
    """Bytes. host: most resident memory since the process began (VmHWM), steps: since `begin_steps`, 0 where
    the system does not tell. device: most that torch's allocator gave out during the steps, reserved: most
    that it held. pinned: page-locked by torch's own allocator, which may not count as resident."""

    host: int
    steps: int
    device: int
    reserved: int
    pinned: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def resident_peak() -> int:
    """VmHWM in bytes; not ru_maxrss, which begins with what the parent process held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class Meter:
    """Peaks of a process: made at its start, told when the steps begin, read at the end.

    device: where the system computes; CUDA is not touched for a CPU.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self._before = 0
        self._was_reset = False

    def begin_steps(self) -> None:
        """What came before (building the model) is not counted as part of the steps."""
        self._before = resident_peak()
        with suppress(OSError):  # a kernel or a sandbox that does not have it
            Path("/proc/self/clear_refs").write_text("5")
            self._was_reset = True
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> Peaks:
        now = resident_peak()
        device = reserved = pinned = 0
        if self._cuda:
            device, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            pinned = _pinned()
        steps = now if self._was_reset else 0
        return Peaks(max(now, self._before), steps, device, reserved, pinned)


def _pinned() -> int:
    with suppress(AttributeError, RuntimeError):
        return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))
    return 0
