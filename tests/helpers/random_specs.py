"""Random step specs, and steps of one in which pending updates are made up for by halves."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from horizon_lm.schedule import (
    Op,
    StepSpec,
    build,
    build_flush,
    build_steps,
    check,
    derive_waits,
    last_uses,
)
from schedule_authorities import random_order
from symbolic_steps import STEPS, run_symbolically


def random_spec(rng: random.Random, **most: int) -> StepSpec:
    """The same with split units and packed ones."""
    spec = whole_spec(rng, **most)
    uploaded = spec.uploaded | _some(rng, spec.resident, [0.0, 0.0, 0.5, 1.0])
    return replace(spec, uploaded=uploaded, packed=_some(rng, uploaded, [0.0, 0.0, 0.5, 1.0]))


def whole_spec(rng: random.Random, *, layers: int = 6, micro_batches: int = 6) -> StepSpec:
    """Any combination of settings; at most this many layers and micro-batches."""
    layers, micro_batches = rng.randint(1, layers), rng.randint(1, micro_batches)
    head = layers + 1
    embedding = rng.choice([head, head + 1])
    units = frozenset({*range(rng.randint(0, 1), head + 1), embedding})
    if rng.random() < 0.1 and embedding != head:
        units -= {head}  # a head without weights
    trainable = _some(rng, units, [1.0, 1.0, 0.7]) or frozenset({rng.choice(sorted(units))})
    resident = _some(rng, units, [0.0, 0.3, 0.7, 1.0])
    block = rng.choice([1, 1, 2, 3])
    policies = [rng.choice(_WORDS) for _ in range(layers)]
    sums = rng.choice(["device", "host", "add"])
    asked = rng.randint(1, micro_batches)
    return StepSpec(
        layers,
        units - resident,
        trainable,
        embedding,
        micro_batches,
        slots=rng.randint(max(2, block), max(2, block) + 2),
        grad_slots=rng.randint(block, block + 2),
        embedding_frozen=embedding == head and rng.random() < 0.3,  # the final norm is trained
        update=rng.choice(["sync", "deferred", "eager"]),
        grad_slabs=rng.randint(1, 3),
        checkpoint_interval=block,
        spilled=frozenset(_some(rng, frozenset(range(1, head)), [0.0, 0.5, 1.0])),
        boundary_slots=rng.randint(1, 3),
        saved=_some(rng, units, [0.0, 0.0, 0.5, 1.0]),
        resident=resident,
        rounds=StepSpec.round_count(micro_batches, asked),
        sums=sums,
        **{  # type: ignore[arg-type]
            name: frozenset(u + 1 for u, word in enumerate(policies) if word == name)
            for name in ("kept", "attention", "products")
        },
    )


def random_world_spec(rng: random.Random, **most: int) -> StepSpec:
    """The same for shared steps: of several ranks, or of one with `exact`."""
    spec, world = whole_spec(rng, **most), rng.choice([1, 2, 3, 4, 8])
    return replace(spec, world=world, reduction=rng.choice(["exact", "fast"]) if world > 1 else "exact")


_WORDS = ["recompute", "recompute", "recompute", "kept", "attention", "products"]


def _some(rng: random.Random, units: frozenset[int], shares: list[float]) -> frozenset[int]:
    share = rng.choice(shares)
    return frozenset(u for u in sorted(units) if rng.random() < share)


def random_steps(spec: StepSpec, rng: random.Random) -> list[Op]:
    """Two steps; of deferred updates some are flushed between them, as for an evaluation that failed."""
    if spec.update != "deferred":
        return build_steps(spec, STEPS)
    early = _some(rng, spec.trainable, [0.0, 0.0, 0.5, 1.0])
    flush = [op for op in build_flush(spec, 0, early)]
    ops = [*build(spec, 0), *flush, *build(spec, 1, spec.trainable - early)]
    return ops + build_flush(spec, 1, spec.trainable)


def described(spec: StepSpec) -> dict[str, Any]:
    """A spec to be read in a failure."""
    return {
        name: sorted(v) if isinstance(v, frozenset) else v for name, v in vars(spec).items() if name[0] != "_"
    }


def check_by_running(spec: StepSpec, ops: list[Op], rng: random.Random) -> None:
    """Assert that steps are sound, and give the values of a plain loop in program order and in a random one
    with poisoned buffers."""
    waits, ends = derive_waits(ops), last_uses(ops)
    assert check(ops, spec, waits) == [], described(spec)
    assert run_symbolically(spec, ops)[0], described(spec)
    same, order = run_symbolically(spec, ops, random_order(ops, waits, rng), ends)
    assert same, f"{described(spec)} in the order {' '.join(str(ops[i]) for i in order)}"
