"""Horizon-LM: train language models whose weights live in host memory, on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import TrainConfig
    from .run.host_model import HostModel
    from .run.train import train

_HOME = {"HostModel": "run.host_model", "TrainConfig": "config", "train": "run.train"}

__all__ = ["HostModel", "TrainConfig", "__version__", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use: `import horizon_lm` must not load torch (the command line's help)."""
    if name not in _HOME:
        raise AttributeError(f"module 'horizon_lm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
