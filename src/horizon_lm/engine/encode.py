"""Compute the features of pictures with the vision unit, which no step uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from horizon_lm.distributed.ranks import Ranks
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.memory.slots import UnitWeights
from horizon_lm.memory.store import HostStore
from horizon_lm.model.features import encode
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.picture_batches import refuse_other_media


def encode_images(
    skeleton: Skeleton, store: HostStore, ranks: Ranks, inputs: Mapping[str, Any]
) -> list[dict[str, torch.Tensor]]:
    """Features of each image in host memory (`HostModel.encode_images`). Between steps only."""
    names = skeleton.picture_inputs
    if names is None or skeleton.vision is None:
        raise ConfigError(
            f"encode_images(): {skeleton.model_type} is a text-only model",
            hint="load a vision-language model, such as llava or gemma3",
        )
    refuse_other_media("encode_images()", list(inputs))
    given = {name: inputs[name] for name in (*names.pixels, *names.per_image) if inputs.get(name) is not None}
    if names.pixels[0] not in given:
        raise DataError(
            f"encode_images(): no {names.pixels[0]}", hint="pass what the model's processor returned"
        )
    tensors = {name: torch.as_tensor(value).to(store.device) for name, value in given.items()}
    tensors = {n: t.to(skeleton.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    weights = _weights(store, skeleton.vision, ranks)
    with torch.no_grad(), skeleton.bound(skeleton.vision, weights, grad=False):
        found = encode(skeleton, tensors)
    return [{name: tensor.cpu().contiguous() for name, tensor in image.items()} for image in found]


def _weights(store: HostStore, unit: int, ranks: Ranks) -> UnitWeights:
    """The unit's whole weights on the device."""
    whole = store.whole("weights", unit, ranks, everywhere=True)
    assert whole is not None
    wide = torch.empty(0, dtype=torch.int16)
    if store.units[unit].wide_numel and store.has("residual"):
        found = store.whole("residual", unit, ranks, everywhere=True)
        assert found is not None
        wide = found[: store.units[unit].wide_numel]
    return UnitWeights(whole.to(store.device), wide.to(store.device))
