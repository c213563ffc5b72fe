"""Random numbers of a model's forward and backward passes: the same again whenever a part is computed again.

Every pass of a unit over a micro-batch begins at a generator state of its own, whether it draws anything or
not. So no name of a setting and no kind of module has to tell that a model has noise (dropout, jitter,
stochastic depth, an adapter's dropout), in which layers, or for which inputs. These are torch's generators;
no model of the list draws from those of Python or numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

# Opens the random state of one pass; each time the same.
Draws = Callable[[], AbstractContextManager[None]]


@contextmanager
def random_state(device: torch.device, base: int, unit: int, micro_batch: int) -> Iterator[None]:
    """While open, random numbers depend on (seed and step, unit, micro-batch) alone, so that a recompute
    draws the same dropout masks whatever ran in between. The caller's generators are left as they were.

    The generators are set one by one: torch.manual_seed asks every kind of device there is, which takes a
    hundred times as long. None of this waits for the device.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    seed = hash((base, unit, micro_batch)) & 0x7FFF_FFFF_FFFF_FFFF
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
