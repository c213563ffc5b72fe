"""Random numbers of a forward pass: the same again whenever a part of it is computed again.

A model's noise (dropout, jitter, an adapter's dropout, noise on embeddings) is known from its configuration
and its modules. What neither shows is seen as it happens: an op that moved the generator draws noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..model.skeleton import Skeleton

State = tuple[torch.Tensor, torch.Tensor | None]  # of the generator of the CPU, and of the device


@contextmanager
def random_state(
    skeleton: Skeleton, device: torch.device, base: int, unit: int, micro_batch: int
) -> Iterator[None]:
    """Random numbers that depend on (seed and step, unit, micro-batch) alone, so that a recompute
    draws the same dropout masks whatever ran in between. The caller's generators are left as they
    were. Does nothing for a model without dropout or other noise."""
    if not skeleton.has_noise:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(hash((base, unit, micro_batch)) & 0x7FFF_FFFF_FFFF_FFFF)
        yield


def generator_state(device: torch.device) -> State:
    """Where the generators are now; reading it does not wait for the device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_generator_state(device: torch.device, state: State) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def has_moved(device: torch.device, state: State) -> bool:
    """Whether random numbers were drawn since `generator_state` gave `state`."""
    now = generator_state(device)
    if not torch.equal(now[0], state[0]):
        return True
    return now[1] is not None and state[1] is not None and not torch.equal(now[1], state[1])
