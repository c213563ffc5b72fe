"""Facts about a machine and its software that are needed to interpret the other benchmarks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import psutil
import torch

from horizon_lm.machine.cores import usable_cores
from horizon_lm.machine.memory import available_host_bytes, lockable_bytes
from horizon_lm.optim import kernel
from horizon_lm.words import size

_SMI = "name,memory.total,driver_version,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current"
_PACKAGES = ("transformers", "triton", "accelerate", "datasets", "trl", "pydantic", "liger-kernel", "kernels")


def rows() -> list[list[str]]:
    """Return name and value of each fact, or the reason why it is unknown."""
    return [[name, _found(find)] for name, find in FACTS.items()]


def _found(find: Callable[[], str]) -> str:
    try:
        return find()
    except Exception as error:  # a missing fact must not hide the others
        return f"unknown: {type(error).__name__}: {error}".splitlines()[0]


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not found"
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return ((done.stdout or done.stderr).strip().splitlines() or ["no answer"])[-1]


def _versions() -> str:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _device() -> str:
    if not torch.cuda.is_available():
        return "none"
    free, total = torch.cuda.mem_get_info()
    facts = torch.cuda.get_device_properties(0)
    capability = f"compute capability {facts.major}.{facts.minor}, {facts.multi_processor_count} processors"
    return f"{facts.name}, {size(free)} of {size(total)} free, {capability}"


def _attention() -> str:
    """Name the kernels that scaled_dot_product_attention may use, and its choice for a causal layer."""
    cuda = torch.backends.cuda
    allowed = {"flash": cuda.flash_sdp_enabled(), "cuDNN": cuda.cudnn_sdp_enabled()}
    allowed |= {"efficient": cuda.mem_efficient_sdp_enabled(), "math": cuda.math_sdp_enabled()}
    names = ", ".join(name for name, on in allowed.items() if on)
    if not torch.cuda.is_available():
        return f"{names} allowed"
    q = torch.randn(1, 32, 1024, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.enable_grad():
        chosen = torch._fused_sdp_choice(q, q, q, is_causal=True)
    kinds = {0: "math", 1: "flash", 2: "efficient", 3: "cuDNN", 4: "overrideable"}
    return f"{names} allowed; bf16 causal 1024 x 128 takes {kinds.get(int(chosen), chosen)}"


def _memory() -> str:
    found = psutil.virtual_memory()
    return f"{size(found.total)}, {size(found.available)} available, {size(available_host_bytes())} for us"


def _locked() -> str:
    limit = lockable_bytes()
    return "no limit" if limit is None else size(limit)


def _pages() -> str:
    return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()


def _nodes() -> str:
    return str(max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))))


FACTS: dict[str, Callable[[], str]] = {
    "device": _device,
    "driver and link": lambda: _first_line("nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"),
    "torch": lambda: (
        f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    ),
    "Python": platform.python_version,
    "packages": _versions,
    "attention kernels": _attention,
    "cores": lambda: f"{os.cpu_count()}, {usable_cores()} usable, NUMA nodes: {_nodes()}",
    "host memory": _memory,
    "locked memory": _locked,
    "transparent huge pages": _pages,
    "C++ compiler": lambda: _first_line("sh", "-c", "c++ --version | head -n 1"),
    "CUDA compiler": lambda: _first_line("nvcc", "--version"),
    "update runs on": kernel.describe,
}
