"""The bytes of exported weights."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from faulty_runs import losses as losses


def weights(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in sorted(tensors.items())}


def exported(run: Path) -> dict[str, bytes]:
    return weights(run / "model")
