"""Horizon-LM: train language models on one device, with the weights in host memory.

    import horizon_lm as hz

    result = hz.train("run.yaml", max_steps=100)  # a whole run, like `horizon train`

    model = hz.HostModel.from_pretrained("path/to/model", device="cuda", dtype="bfloat16")
    for micro_batches in loader:  # a loop of your own
        out = model.train_step(micro_batches, lr=1e-5)
    model.save_pretrained("tuned", tokenizer=tokenizer)

`horizon_lm.errors` has the errors that a user can act on; docs/guides/python.md describes the interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from horizon_lm import errors
from horizon_lm.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from horizon_lm.config import ModelSettings, TrainConfig
    from horizon_lm.engine.loss import TokenLoss, TokenValues
    from horizon_lm.host_model import HostModel
    from horizon_lm.training.describe import TrainResult
    from horizon_lm.training.train import train

_HOME = {
    "HostModel": "host_model",
    "ModelSettings": "config",
    "TokenLoss": "engine.loss",
    "TokenValues": "engine.loss",
    "TrainConfig": "config",
    "TrainResult": "training.describe",
    "train": "training.train",
}

__all__ = [
    "HostModel",
    "ModelSettings",
    "TokenLoss",
    "TokenValues",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "errors",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import horizon_lm` must not load torch (for the command's help)."""
    if name not in _HOME:
        raise AttributeError(f"module 'horizon_lm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the public names, imported yet or not."""
    return sorted({*__all__, "__doc__", "__file__", "__name__", "__path__"})
