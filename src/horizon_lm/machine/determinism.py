"""Kernels that give the same bits in each run on a CUDA device, for `deterministic: true`.

torch's switches apply to all threads of the process. They are set while a model computes and restored
afterwards, so other code in the process keeps its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import MutableMapping
from types import TracebackType
from typing import ClassVar, NamedTuple

import torch

from horizon_lm.errors import ConfigError

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
# A workspace of fixed size per stream; without it cuBLAS may choose kernels by what else is running.
_WORKSPACES = (":4096:8", ":16:8")
_NO_KERNEL = " does not have a deterministic implementation"
_CUBLAS = "not deterministic because it uses CuBLAS"


class _Switches(NamedTuple):
    """torch's switches. fills_memory: whether deterministic mode fills new tensors."""

    algorithms: bool
    warns_only: bool
    fills_memory: bool
    cudnn: bool
    cudnn_benchmark: bool

    @classmethod
    def now(cls) -> _Switches:
        return cls(
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        )

    def apply(self) -> None:
        torch.use_deterministic_algorithms(self.algorithms, warn_only=self.warns_only)
        torch.utils.deterministic.fill_uninitialized_memory = self.fills_memory  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic = self.cudnn
        torch.backends.cudnn.benchmark = self.cudnn_benchmark


# Warnings only would leave attention's backward pass non-deterministic (cuDNN, or flash attention's atomics).
# New memory is not filled, since everything is written before it is read.
_DETERMINISTIC = _Switches(
    algorithms=True, warns_only=False, fills_memory=False, cudnn=True, cudnn_benchmark=False
)


class DeterministicKernels:
    """A context in which CUDA's kernels give the same bits each time, or raise ConfigError.

    is_on: if false, nothing changes.
    Each model has its own context. If several work in threads, the last to leave restores the switches.
    """

    _lock = threading.Lock()
    _inside: ClassVar[set[int]] = set()
    _before: ClassVar[_Switches | None] = None

    def __init__(self, is_on: bool = True) -> None:
        self._is_on = is_on

    @classmethod
    def on(cls, device: torch.device, wanted: bool) -> DeterministicKernels:
        """Return the context for a model with this setting. It is off on the CPU."""
        return cls(wanted and device.type == "cuda")

    def __enter__(self) -> None:
        if not self._is_on:
            return
        shared = DeterministicKernels
        with self._lock:
            if not self._inside:
                shared._before = _Switches.now()
            self._inside.add(id(self))
            _DETERMINISTIC.apply()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        if self._is_on and isinstance(error, RuntimeError):
            _explain(error)

    def leave(self) -> None:
        """Restore the switches unless another model needs them. Safe to call twice, as after an interrupt."""
        shared = DeterministicKernels
        with self._lock:
            if id(self) in self._inside and len(self._inside) == 1 and shared._before is not None:
                shared._before.apply()
            self._inside.discard(id(self))


def _explain(error: RuntimeError) -> None:
    """Raise ConfigError in place of a torch error about determinism."""
    text = str(error)
    if _NO_KERNEL in text:
        name = text.split(_NO_KERNEL)[0].splitlines()[-1].strip()
        found = ConfigError(
            f"deterministic=true, but torch {torch.__version__} has no deterministic kernel for {name}",
            hint="set deterministic=false, or attn_implementation=sdpa if attention uses it",
        )
    elif _CUBLAS in text:
        found = _too_late()
    else:
        return
    for note in getattr(error, "__notes__", ()):
        found.add_note(note)
    raise found from error


def prepare(device: torch.device, environment: MutableMapping[str, str] = os.environ) -> None:
    """Give cuBLAS workspaces of fixed size. Raises ConfigError if cuBLAS has already started without them.

    cuBLAS reads its environment at the process's first matrix product, and never again.
    """
    if device.type != "cuda":
        return
    found = environment.setdefault(_VARIABLE, _WORKSPACES[0])
    if found not in _WORKSPACES:
        raise ConfigError(
            f"deterministic=true, but {_VARIABLE}={found}",
            hint=f"unset {_VARIABLE}, or set it to {_WORKSPACES[0]}",
        )
    if torch.cuda.is_initialized():
        one = torch.ones(1, 1, device=device)
        with DeterministicKernels():
            torch.mm(one, one)


def _too_late() -> ConfigError:
    return ConfigError(
        f"deterministic=true, but this process multiplied matrices on a GPU before {_VARIABLE} was set",
        hint=f"set {_VARIABLE}={_WORKSPACES[0]} in the environment before the process starts",
    )
