"""The activation policy of each layer, from the settings."""

from __future__ import annotations

from ..config import ModelSettings, per_layer
from ..errors import ConfigError


def layer_policies(settings: ModelSettings, num_layers: int) -> tuple[frozenset[int], frozenset[int]]:
    """(units that keep their activations, units whose stored input is spilled to the host).

    Raises ConfigError when a list does not name each layer once.
    """
    kept = _chosen(settings.activations, ("recompute", "keep"), "activations", num_layers)
    spilled = _chosen(settings.boundaries, ("device", "host"), "boundaries", num_layers)
    return kept, spilled


def _chosen(value: str | list[str], words: tuple[str, str], key: str, num_layers: int) -> frozenset[int]:
    """Units (layer numbers from 1) for which the setting says `words[1]`."""
    listed = per_layer(value, words)
    if listed is None:
        listed = [value] * num_layers  # type: ignore[list-item]
    if len(listed) != num_layers:
        raise ConfigError(
            f"{key} names {len(listed)} layers, the model has {num_layers}",
            hint=f'for example {key}: ["{words[0]}*{num_layers}"]',
        )
    return frozenset(i + 1 for i, word in enumerate(listed) if word == words[1])
