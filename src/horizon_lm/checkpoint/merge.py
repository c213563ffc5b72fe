"""Add an adapter to the weights of its base and write a plain model, one unit at a time.

The base is mapped from its files, and the sums are PEFT's own (`merge` of its layers) in fp32, rounded once
to the dtype that is written. So it takes the memory of the adapter and of one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from horizon_lm.checkpoint.model import Group, Tensors
from horizon_lm.checkpoint.units import persistent_buffers
from horizon_lm.config import ModelSettings
from horizon_lm.engine.policies import DTYPES
from horizon_lm.model.adapters import Adapter, base_name, prepare
from horizon_lm.model.fingerprint import Fingerprint, Fingerprinter, saved_names
from horizon_lm.model.loading import load_model_of
from horizon_lm.model.pretrained import quiet_transformers
from horizon_lm.model.skeleton import Skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Merged(NamedTuple):
    """A model without values, its weights with an adapter in them (a group per unit), and their dtype."""

    hollow: PreTrainedModel
    groups: list[Group]
    dtype: torch.dtype


def merged(
    settings: ModelSettings, base: str, dtype: str | None, check: Callable[[Fingerprint], None]
) -> Merged:
    """Add the adapter of `settings` to a base.

    base: folder or Hub name. dtype: of the weights; None for that of the base. check: gets the fingerprint of
    the base, and raises if it is another. Raises ConfigError, DataError.
    """
    with quiet_transformers():
        model: Any = load_model_of(base, settings)
    if dtype is None:
        dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    hollow = _hollow(model)
    own, adapter = prepare(model, settings)
    assert adapter is not None
    skeleton = Skeleton(own, DTYPES[dtype], adapter=adapter)
    check(_fingerprint(skeleton, saved_names(skeleton.units, adapter) or ()))
    return Merged(hollow, _Merger(skeleton, adapter).groups, DTYPES[dtype])


def _hollow(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same model without adapter and values, which knows how its files were read."""
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        hollow: PreTrainedModel = type(model)(model.config)
    hollow.tie_weights()
    hollow.generation_config = model.generation_config
    vars(hollow)["_weight_conversions"] = getattr(model, "_weight_conversions", None)
    return hollow


def _fingerprint(skeleton: Skeleton, saved: Collection[str]) -> Fingerprint:
    """saved: parameters that the checkpoint has."""
    found, named = Fingerprinter(), dict(skeleton.model.named_parameters())
    for number, unit in enumerate(skeleton.units):
        for parameter in unit.parameters:
            if parameter.name not in saved:
                found.add(number, unit.name, parameter.name, named[parameter.name])
    return found.of_all()


class _Merger:
    """Weights of the base with the adapter in them."""

    def __init__(self, skeleton: Skeleton, adapter: Adapter) -> None:
        self._skeleton, self._adapter = skeleton, adapter
        self._named = {
            base_name(n): p for n, p in skeleton.model.named_parameters() if not adapter.is_part(n)
        }

    @property
    def groups(self) -> list[Group]:
        """The units, and the persistent buffers."""
        groups = []
        for unit in self._skeleton.units:
            names = [p.name for p in unit.parameters if not self._adapter.is_part(p.name)]
            wide = {base_name(p.name) for p in unit.parameters if p.compute_dtype == torch.float32}
            hollow = {base_name(name): self._described(base_name(name), wide) for name in names}
            groups.append(Group(hollow, partial(self._load, hollow)))
        buffers = {base_name(name): buffer for name, buffer in persistent_buffers(self._skeleton.model)}
        hollow = {name: torch.empty_like(buffer, device="meta") for name, buffer in buffers.items()}
        return [*groups, Group(hollow, lambda: buffers)]

    def _described(self, name: str, wide: set[str]) -> torch.Tensor:
        dtype = torch.float32 if name in wide else self._skeleton.dtype
        return torch.empty(self._named[name].shape, dtype=dtype, device="meta")

    def _load(self, hollow: Tensors) -> Tensors:
        """Return the merged weights of a unit."""
        changed: Tensors = {}
        for path, module in self._layers.items():
            prefix = f"{path}."
            if any(name.startswith(prefix) for name in hollow):
                with merged_layer(module, self._adapter.name) as weights:
                    for local, value in weights.items():
                        name = prefix + local
                        if name in hollow:
                            changed[name] = value.to(hollow[name].dtype)
        return {
            name: changed[name] if name in changed else self._named[name].detach().to(tensor.dtype)
            for name, tensor in hollow.items()
        }

    @cached_property
    def _layers(self) -> dict[str, Any]:
        return outermost_layers(self._skeleton.model)


def outermost_layers(model: nn.Module) -> dict[str, Any]:
    """Return the outermost layers of PEFT by the paths of the modules in the base that they are in place
    of."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    found: dict[str, Any] = {}
    within = ""
    for path, module in model.named_modules():
        if within and path.startswith(within):
            continue
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            found[path] = module
            within = f"{path}."
    return found


@contextmanager
def merged_layer(layer: Any, adapter: str) -> Iterator[Tensors]:
    """Yield the weights of a layer of PEFT with its adapter in them, by their names in the base's module; the
    layer is as before afterwards."""
    if hasattr(layer, "modules_to_save"):
        yield {name: p.detach() for name, p in layer.modules_to_save[adapter].named_parameters()}
        return
    inner: nn.Module = layer.get_base_layer()
    own = {p: p.data for p in inner.parameters()}
    try:
        for parameter, value in own.items():
            parameter.data = value.to(torch.float32, copy=True)
        for one in _nested(layer):
            one.merge(safe_merge=False, adapter_names=[adapter])
        merged: nn.Module = layer.get_base_layer()  # of LN_TUNING another module takes the place of `inner`
        yield {name: p.detach() for name, p in merged.named_parameters()}
    finally:
        if layer.get_base_layer() is not inner:
            layer.unmerge()
        for parameter, value in own.items():
            parameter.data = value
        for module in layer.modules():
            if hasattr(module, "merged_adapters"):
                module.merged_adapters.clear()


def _nested(layer: Any) -> list[Any]:
    """Return a layer of PEFT and those in it, one for each parameter of fused experts, innermost first."""
    found = []
    while hasattr(layer, "base_layer"):
        found.append(layer)
        layer = layer.base_layer
    return found[::-1]
