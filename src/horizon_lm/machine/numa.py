"""NUMA: find the memory node of a CUDA device, and prefer pages from it.

If the node is unknown, or the system refuses (as containers often do), the kernel places pages as usual.
"""

from __future__ import annotations

import ctypes
import logging
import platform
from pathlib import Path

import torch

from horizon_lm.machine import cgroup

_log = logging.getLogger(__name__)
_SYS, _PROC = Path("/sys"), Path("/proc")
# (mbind, get_mempolicy) by architecture; libc has no functions for them, and libnuma is seldom installed.
_SYSCALLS = {"x86_64": (237, 239), "aarch64": (235, 236)}
_MPOL_DEFAULT, _MPOL_PREFERRED = 0, 1  # of linux/mempolicy.h
_WORD_BITS = 64


def syscall(number: int, *arguments: int) -> int:
    """Make a system call; -1 if it fails."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return int(call(ctypes.c_long(number), *(ctypes.c_ulong(value) for value in arguments)))


def node_of(device: torch.device, sys: Path = _SYS, proc: Path = _PROC) -> int | None:
    """Return the node of a CUDA device; None if unknown, or if the machine has only one node."""
    nodes = list((sys / "devices/system/node").glob("node[0-9]*"))
    if device.type != "cuda" or len(nodes) < 2:
        return None
    address = _pci_address(torch.cuda.get_device_properties(device), proc)
    text = cgroup.read(sys / "bus/pci/devices" / address / "numa_node").strip() if address else ""
    return int(text) if text.isdigit() else None  # a virtual machine may say -1


def _pci_address(properties: object, proc: Path) -> str | None:
    """Return a device's PCI address as sysfs writes it. Older versions of torch know only the UUID, which is
    looked up in the driver's list."""
    numbers = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if all(isinstance(number, int) for number in numbers):
        domain, bus, slot = numbers
        return f"{domain:04x}:{bus:02x}:{slot:02x}.0"
    uuid = str(getattr(properties, "uuid", "")).lower()
    for folder in (proc / "driver/nvidia/gpus").glob("*"):
        if uuid and uuid in cgroup.read(folder / "information").lower():
            return folder.name.lower()
    return None


def prefer(node: int, address: int, num_bytes: int) -> bool:
    """Ask the kernel to take untouched pages of this range from `node` while it has room, else from any node.

    A policy that the user chose (numactl) stays. Returns whether the kernel agreed.
    """
    numbers = _SYSCALLS.get(platform.machine())
    if numbers is None or platform.system() != "Linux":
        return False
    mbind, get_mempolicy = numbers
    mode = ctypes.c_int(-1)
    if syscall(get_mempolicy, ctypes.addressof(mode), 0, 0, 0, 0) != 0 or mode.value != _MPOL_DEFAULT:
        _log.debug("NUMA: pages go where the process's own memory policy puts them")
        return False
    words = node // _WORD_BITS + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // _WORD_BITS] = 1 << node % _WORD_BITS
    # The kernel reads one bit less than it is told.
    told = words * _WORD_BITS + 1
    agreed = syscall(mbind, address, num_bytes, _MPOL_PREFERRED, ctypes.addressof(mask), told, 0) == 0
    if not agreed:
        _log.debug("NUMA: the system refused to prefer node %d, next to the device", node)
    return agreed
