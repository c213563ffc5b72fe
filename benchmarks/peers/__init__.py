"""Systems to compare, each behind `build(case)` (horizon_lm.bench.protocol.System), with a `check()` of the
installed package's interface that needs no GPU (`python -m benchmarks.peers.check`).

An adapter uses the installed package or, if it is not on PyPI, a checkout that an environment variable
names. A missing one raises AbsentError with the reason, which becomes a row of the table. Adapters were
written from documentation and public sources; we have not run those that need a GPU so far (the results
file of a GPU run says which have).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from horizon_lm.bench.protocol import AbsentError, Case


@dataclass(frozen=True)
class Peer:
    """A system. target: `module:function`. note: what a reader of its row must know. exact: AdamW with fp32
    masters and moments. gpu: needs CUDA."""

    target: str
    note: str
    exact: bool = True
    gpu: bool = True


PEERS: dict[str, Peer] = {
    "torch": Peer("horizon_lm.bench.plain:build", "transformers in memory, fused AdamW", gpu=False),
    "hf-trainer": Peer("benchmarks.peers.hf_trainer:build", "bf16 autocast over fp32 weights", gpu=False),
    "fsdp2-offload": Peer("benchmarks.peers.fsdp2:build", "CPUOffloadPolicy, one rank, fused CPU AdamW"),
    "zero3-offload": Peer(
        "benchmarks.peers.deepspeed_zero:build_zero3", "parameters and optimizer on the CPU"
    ),
    "superoffload": Peer(
        "benchmarks.peers.deepspeed_zero:build_superoffload", "rolls back when clipping acts"
    ),
    "zenflow": Peer(
        "benchmarks.peers.deepspeed_zero:build_zenflow", "approximate: late updates", exact=False
    ),
    "torchao-offload": Peer("benchmarks.peers.torchao_offload:build", "pure bf16, no masters", exact=False),
    "trainstream": Peer("benchmarks.peers.trainstream_wrap:build", "autocast over fp32 weights"),
    "offload-adam": Peer("benchmarks.peers.offload_adam:build", "fp32 masters, bf16 moments", exact=False),
    "megatrain": Peer("benchmarks.peers.megatrain:build", "bf16 weights without masters", exact=False),
    "llmq": Peer(
        "benchmarks.peers.llmq:build", "CUDA/C++, qwen2 only; masters and moments on the host; own weights"
    ),
    "roundpipe": Peer("benchmarks.peers.roundpipe:build", "fp32 masters on the CPU; its synchronous step"),
}


def installed(name: str) -> ModuleType:
    """Import an installed package. Raises AbsentError with the reason if that fails."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AbsentError(f"{name.partition('.')[0]} is not installed ({error})") from error
    except Exception as error:  # packages that build or look for a device as they are imported
        raise AbsentError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def from_checkout(variable: str, name: str, subfolder: str = "") -> ModuleType:
    """Import a package of the checkout that an environment variable names. Raises AbsentError."""
    folder = os.environ.get(variable)
    if not folder:
        raise AbsentError(f"not on PyPI, and {variable} names no checkout")
    place = Path(folder).expanduser() / subfolder
    if not place.is_dir():
        raise AbsentError(f"{variable}: {place.name!r} is not a folder")
    sys.path.insert(0, str(place))
    return installed(name)


def check_takes(function: Callable[..., Any], *names: str) -> None:
    """Raise TypeError unless `function` has parameters of these names."""
    _check_names(function.__qualname__, inspect.signature(function).parameters, names)


def check_source_takes(package: str, file: str, name: str, *names: str) -> None:
    """`check_takes` for a package that cannot be imported without a GPU, from its source.

    file: inside the package's folder. name: a function, or `Class.method`.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise AbsentError(f"{package} is not installed")
    body: Any = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        # The last of one name counts: overloads stand before it.
        body = [n for n in body.body if isinstance(n, kinds) and n.name == part][-1]
    arguments = body.args
    known = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    _check_names(name, known, names)


def _check_names(what: str, known: Iterable[str], names: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise TypeError(f"{what} takes no {', '.join(unknown)}")


def need_equal_micro_batches(case: Case) -> int:
    """Return the rows of each micro-batch. Raises AbsentError unless all have as many."""
    rows = case.rows or case.sequences
    if case.sequences % rows:
        raise AbsentError("takes micro-batches of equal size only")
    return rows


def need_cuda(case: Case) -> torch.device:
    """Make the case's device current and return it. Raises AbsentError unless it is an available CUDA
    device."""
    if not torch.cuda.is_available():
        raise AbsentError("needs a CUDA device, and torch sees none")
    if not case.device.startswith("cuda"):
        raise AbsentError(f"needs a CUDA device, and the case is for {case.device}")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def device_of_rank(case: Case) -> torch.device:
    """Return `need_cuda`'s device, or the CPU for one of several ranks whose case is for the CPU."""
    if world() > 1 and case.device == "cpu":
        return torch.device("cpu")
    return need_cuda(case)


def world() -> int:
    """Return the number of ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share_of(micro_batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return this rank's micro-batches of a step. Raises AbsentError unless all ranks have as many."""
    if len(micro_batches) % world():
        raise AbsentError("takes as many micro-batches on each rank")
    return micro_batches[int(os.environ.get("RANK", "0")) :: world()]


def open_group(backend: str) -> None:
    """Open a process group: that of the launcher's ranks, or one of this process alone, without a network."""
    import tempfile

    import torch.distributed as dist

    os.environ.setdefault("LOCAL_RANK", "0")
    if dist.is_initialized():
        return
    if world() > 1:
        dist.init_process_group(backend if torch.cuda.is_available() else "gloo")
        return
    place = Path(tempfile.mkdtemp()) / "rendezvous"
    dist.init_process_group(backend, init_method=f"file://{place}", rank=0, world_size=1)
