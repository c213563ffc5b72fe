"""A whole model on the device for the length of a rollout, and its weights one by one for another engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from horizon_lm.checkpoint.merge import merged_layer, outermost_layers
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.host_model import HostModel
from horizon_lm.machine.device import free_memory_bytes
from horizon_lm.memory.layout import Parameter
from horizon_lm.memory.slots import WeightSlots
from horizon_lm.memory.staging import StagingSlots, staged_bytes
from horizon_lm.model.adapters import base_name, is_adapters
from horizon_lm.model.kernels import patched
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.outputs import bytes_of_slots
from horizon_lm.words import count, size


@contextmanager
def resident(host: HostModel) -> Iterator[Any]:
    """While open, yield the transformers model with all its weights on the device, ready to `generate`.

    The weights are those after the last step, in the compute dtype; on the CPU they are views of the store.
    The model is in evaluation mode. Afterwards, also after an error, the copy is freed and mode and buffers
    are restored.
    Raises DoesNotFitError before anything is copied if the device has too little free memory, and ConfigError
    at the end if the model was trained meanwhile.
    """
    host.flush()
    steps_done, skeleton = host.steps_done, host.skeleton
    check_device_memory(host)
    with ExitStack() as stack:
        stack.enter_context(_unchanged(skeleton))
        stack.enter_context(_without_router_loss(skeleton.model.config))
        stack.enter_context(patched(skeleton.patches))
        slots, staging = _slots_for_all(host, alias=host.device.type == "cpu")
        try:
            for unit, layout in enumerate(skeleton.units):
                if layout.packed_numel:
                    staging.upload(0, unit)
                    staging.unpack(0, unit, slots.buffer(unit))
                else:
                    slots.upload(unit, unit)
                stack.enter_context(skeleton.bound(unit, slots.unit(unit, unit), grad=False))
            yield skeleton.model.eval()
        finally:
            del slots, staging  # the frame may live on in a traceback
    if host.steps_done != steps_done:
        raise ConfigError(
            f"the model was trained while it generated: {count(steps_done, 'step')} done at first, "
            f"{host.steps_done:,} now",
            hint="close resident(model) before the next step",
        )


def _slots_for_all(host: HostModel, *, alias: bool) -> tuple[WeightSlots, StagingSlots]:
    """A slot for each unit, and one staging slot for the packed ones in turn."""
    store = host.store
    numels = [unit.packed_numel if alias else store.streamed_numel(u) for u, unit in enumerate(store.units)]
    staged = [
        staged_bytes(unit, store.is_split(u), store.dtype, store.spec.packing)
        for u, unit in enumerate(store.units)
        if unit.packed_numel
    ]
    slots = WeightSlots(store, numels, host.device, alias)
    return slots, StagingSlots(store, [max(staged)] if staged else [], host.device, alias)


@contextmanager
def _unchanged(skeleton: Skeleton) -> Iterator[None]:
    """Restore the mode and the buffers of every module: a cast of the model would leave them cast."""
    kept = [(module, module.training, dict(module._buffers)) for module in skeleton.model.modules()]
    try:
        yield
    finally:
        for module, training, buffers in kept:
            module.training = training
            module._buffers.update(buffers)


@contextmanager
def _without_router_loss(config: Any) -> Iterator[None]:
    """Have routers return no logits: transformers computes their loss of a prompt's padding in each forward
    pass, and fails as soon as a cache makes that pass shorter than the prompt."""
    configs = [config, config.get_text_config()]
    kept = [(one, one.output_router_logits) for one in configs if hasattr(one, "output_router_logits")]
    try:
        for one, _ in kept:
            one.output_router_logits = False
        yield
    finally:
        for one, value in kept:
            one.output_router_logits = value


def copy_bytes(host: HostModel) -> int:
    """Return the device bytes of all weights in the compute dtype, without those that live there; parameters
    kept in fp32 are joined."""
    units, itemsize = host.skeleton.units, host.store.dtype.itemsize
    wide = [p for unit in units for p in unit.parameters if p.compute_dtype != host.store.dtype]
    copied = sum(host.store.streamed_numel(unit) for unit in range(len(units)))
    return copied * itemsize + sum(p.numel for p in wide) * 4


def check_device_memory(host: HostModel, free_bytes: int | None = None) -> None:
    """Raise DoesNotFitError unless a copy of all weights fits on the device beside what is there.

    free_bytes: for tests; measured by default, with what torch has reserved and does not use.
    """
    if free_bytes is None:
        if host.device.type != "cuda":
            return  # the store itself is used
        free_bytes = free_memory_bytes(host.device)
    needed = copy_bytes(host)
    if needed <= free_bytes:
        return
    slots = bytes_of_slots(host.memory_bytes())
    raise DoesNotFitError(
        f"generation needs all weights on the device: {size(needed)}, but only {size(free_bytes)} are free "
        f"beside {size(slots)} of slots: short by {size(needed - free_bytes)}",
        hint="set use_vllm=True, vllm_mode=server to generate on another GPU; fewer slots, dtype=bfloat16 or "
        "a smaller model take less",
    )


def named_weights(host: HostModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, weight in the compute dtype on the device), one at a time.

    The weights are those after the last step, with an adapter those of the base with the adapter added. Each
    is copied when it is asked for, and kept by the caller alone. A tied weight comes once, under its first
    name.
    """
    host.flush()
    merger = None if host.skeleton.adapter is None else _Merger(host)
    for name, parameter in _sent(host):
        wide = parameter.compute_dtype != host.store.dtype
        value = None if merger is None else merger.weight(name)
        if value is None:
            value = host.store.master(name) if wide else host.store.weight_view(name)
        value = value.to(parameter.compute_dtype).to(host.device, copy=host.device.type != "cpu")
        yield base_name(name), value
        del value


def _sent(host: HostModel) -> Iterator[tuple[str, Parameter]]:
    """Yield name and layout of the parameters that a model without adapter has."""
    adapter = host.skeleton.adapter
    adapters = () if adapter is None else tuple(adapter.peft_model.peft_config)  # the trained one and others
    for name in list(host.store.names()):
        if not any(is_adapters(name, one) for one in adapters):
            yield name, host.store.locate(name)[1]


class _Merger:
    """Weights of an adapter's layers with the adapter added, in host memory: one layer of PEFT at a time."""

    def __init__(self, host: HostModel) -> None:
        assert host.skeleton.adapter is not None
        self._host, self._adapter = host, host.skeleton.adapter
        self._layers = outermost_layers(host.skeleton.model)
        self._ready: dict[str, torch.Tensor] = {}

    def weight(self, name: str) -> torch.Tensor | None:
        """Return a parameter in fp32; None if no layer of PEFT has it."""
        parts = base_name(name).split(".")
        path = next((p for n in range(len(parts)) if (p := ".".join(parts[:n])) in self._layers), None)
        if path is None:
            return None
        if base_name(name) not in self._ready:
            self._ready |= self._merged(path)
        return self._ready.pop(base_name(name))

    def _merged(self, path: str) -> dict[str, torch.Tensor]:
        skeleton, store = self._host.skeleton, self._host.store
        masters = {name: store.master(name) for name in store.names() if name.startswith(f"{path}.")}
        with (
            skeleton.holding(masters),
            merged_layer(self._layers[path], self._adapter.name) as weights,
        ):
            return {f"{path}.{local}": value for local, value in weights.items()}


def describe_weights(host: HostModel) -> list[tuple[str, str, list[int]]]:
    """Return (name, dtype, shape) of what `named_weights` yields, without a copy."""
    dtypes = {name: str(p.compute_dtype).removeprefix("torch.") for name, p in _sent(host)}
    return [(base_name(name), dtypes[name], list(p.shape)) for name, p in _sent(host)]
