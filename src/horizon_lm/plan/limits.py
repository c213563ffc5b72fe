"""What a run may take: memory of host and device, pinned memory, disk; of this machine or of a profile."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from horizon_lm.machine.memory import available_host_bytes
from horizon_lm.machine.profile import Profile
from horizon_lm.memory.arena import pinnable_bytes

# Of device memory, for what allocators lose between blocks and kernels take for themselves: neither is
# predicted, and how much it is has not been measured on a GPU yet.
_DEVICE_SHARE = 0.95


@dataclass(frozen=True)
class Limits:
    """Bytes; None where nothing is known or nothing limits. host counts from what the process holds now where
    `here`, from nothing otherwise."""

    host: int
    device: int | None = None
    pinned: int | None = None
    disk: int | None = None
    here: bool = False

    @classmethod
    def of_profile(cls, profile: Profile) -> Limits:
        device = None if profile.device == "cpu" else int(profile.device_bytes * _DEVICE_SHARE)
        return cls(int(profile.host_bytes), device)

    @classmethod
    def of_this_machine(cls, device: str, folder: str) -> Limits:
        """device: cpu or cuda[:N]. folder: where the run will write; it need not exist yet."""
        import torch

        free = None
        if device.startswith("cuda"):
            free = int(torch.cuda.mem_get_info(torch.device(device))[0] * _DEVICE_SHARE)
        place = Path(folder).expanduser().absolute()
        while not place.exists():
            place = place.parent
        pinned = pinnable_bytes() if device.startswith("cuda") else None
        return cls(available_host_bytes(), free, pinned, shutil.disk_usage(place).free, here=True)
