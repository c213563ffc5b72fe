"""Adversarial lanes: real copies into slots, ready ops in random order, released buffers filled with NaN.

Whatever the order, the bits are those of in-order execution on lanes that alias the store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from adversarial import AdversarialLanes
from horizon_lm.engine import lanes as lanes_module
from horizon_lm.engine.lanes import InlineLanes
from horizon_lm.host_model import HostModel
from horizon_lm.schedule import Buffer, Lane, Op, derive_waits
from random_orders import (
    MODELS,
    VARIANTS,
    Reset,
    adversarial,
    batches,
    bits,
    differences,
    gradient_bits,
    host_model,
    is_wrong,
    outcome,
    same,
)
from sizes import times

ORDERS = times(20, 200)

pytestmark = pytest.mark.usefixtures("one_thread")


def two_steps(model: HostModel, name: str) -> list[Any]:
    """Everything that two steps compute: losses, gradients, norms, and the masters they end with."""
    found: list[Any] = []
    for step in range(2):
        out = model.forward_backward(batches(name, step))
        found += [out.loss, gradient_bits(model), model.step(lr=1e-2, max_grad_norm=0.5).grad_norm]
    return [*found, {key: bits(value) for key, value in model.named_parameters()}]


@pytest.mark.parametrize("name", MODELS)
def test_random_orders_give_the_bits_of_program_order(name: str) -> None:
    expected = two_steps(host_model(name, "inline"), name)
    assert all(value == value for value in expected if isinstance(value, float))
    model = host_model(name, "adversarial")
    assert model.engine.ops.weight_slots.num_bytes > 0, "slots must be real copies"
    reset, orders = Reset(model), set()
    for seed in range(ORDERS):
        reset()
        adversarial(model).random.seed(seed)
        ran: list[int] = []
        run = adversarial(model).run

        def recording(*args: Any, run: Any = run, ran: list[int] = ran, **kwargs: Any) -> None:
            run(*args, **kwargs)
            ran += adversarial(model).order

        model.engine.lanes.run = recording  # type: ignore[method-assign]
        found = two_steps(model, name)
        del model.engine.lanes.run  # the method of the class again
        assert not differences(found, expected), f"seed {seed}: {differences(found, expected)}"
        orders.add(tuple(ran))
    print(f"\n{name}: {len(orders)} different orders of {len(ran)} ops in {ORDERS} runs, all the same bits")
    assert len(orders) > ORDERS // 2


FROZEN = [
    ("llama", ("embed_tokens",)),
    ("llama", ("lm_head", "layers.0", "layers.1")),
    ("llama", ("layers", "norm", "embed_tokens")),
    ("llama", ("mlp", "k_proj", "norm.")),
    ("gpt2", ("wpe", "ln_")),
    ("gpt2", ("wte", "wpe")),  # a tied table that is frozen beside a final norm that is not
    ("mixtral-aux", ("experts", "layers.2")),
]


@pytest.mark.parametrize(("name", "frozen"), FROZEN)
def test_frozen_parameters(name: str, frozen: tuple[str, ...]) -> None:
    """The others get the gradients that they get when nothing is frozen, in any order; frozen ones stay."""
    free = host_model(name, "inline")
    free.forward_backward(batches(name, 0))
    everything = gradient_bits(free)
    expected = two_steps(host_model(name, "inline", frozen), name)
    model = host_model(name, "adversarial", frozen)
    before = {key: bits(value) for key, value in model.named_parameters()}
    reset = Reset(model)
    for seed in range(times(3, 10)):
        reset()
        adversarial(model).random.seed(seed)
        assert not differences(two_steps(model, name), expected)
    trained = {key for key in before if not any(part in key for part in frozen)}
    assert expected[1].keys() == trained
    assert same(expected[1], {key: everything[key] for key in trained})
    assert {key for key, value in expected[-1].items() if not torch.equal(value, before[key])} == trained


def test_inline_lanes_alias_the_store() -> None:
    model = host_model("llama", "inline")
    model.forward_backward(batches("llama", 0)[:1])
    assert model.engine.ops.weight_slots.num_bytes == 0
    assert model.engine.ops.gradient_slots.num_bytes == 0  # one micro-batch, one dtype: in the store


# What ops touch is what they declare.


class Recorder(dict):
    """A step's transient buffers, with a note of who reads and writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[Buffer] = set()
        self.written: set[Buffer] = set()

    def __getitem__(self, buffer: Buffer) -> Any:
        self.read.add(buffer)
        return super().__getitem__(buffer)

    def __setitem__(self, buffer: Buffer, value: Any) -> None:
        self.written.add(buffer)
        super().__setitem__(buffer, value)


def steps_of(model: HostModel, name: str, micro_batches: int) -> list[Any]:
    """Losses and norms of two steps, and the masters they end with; in any update mode."""
    found: list[Any] = []
    for step in range(2):
        out = model.train_step(batches(name, step)[:micro_batches], lr=1e-2)
        found += [out.loss, out.grad_norm]
    return [*found, {key: bits(value) for key, value in model.named_parameters()}]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_ops_touch_what_they_declare(
    name: str, variant: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waits are derived from declared reads and writes; here they are compared with what the engine does."""
    model = host_model(name, "adversarial", **VARIANTS[variant])
    engine, store = model.engine, model.store
    memory = Recorder()
    of_unit = {
        key: unit for unit, layout in enumerate(store.units) for key in (p.name for p in layout.parameters)
    }
    # every other region is optimizer state
    kinds = {"weights": "weights", "grads": "grads", "grad_slabs": "slab"}
    kinds |= {"sums": "sum", "sum_slabs": "sum_slab"}

    def note(target: Any, method: str, buffer: Callable[..., Buffer]) -> None:
        original = getattr(target, method)

        def noting(*args: Any) -> Any:
            memory.read.add(buffer(*args))
            return original(*args)

        monkeypatch.setattr(target, method, noting)

    note(store, "run", lambda region, unit: Buffer(kinds.get(region, "state"), unit))
    note(store, "weight", lambda key: Buffer("weights", of_unit[key]))
    note(
        engine.ops.weight_slots,
        "unit",
        lambda slot, unit: Buffer("weights", unit) if slot < 0 else Buffer("slot", slot),
    )
    note(engine.ops.weight_slots, "upload", lambda slot, unit: Buffer("slot", slot))
    note(engine.ops.gradient_slots, "run", lambda slot, unit, dtype: Buffer("grad_slot", slot))
    note(engine.ops.boundary_slots, "restore", lambda slot, home: Buffer("boundary_slot", slot))
    note(engine.ops.boundary_slots, "held", lambda slot: Buffer("boundary_slot", slot))
    seen = set()

    def watch(kind: str, function: Callable[..., None]) -> Callable[..., None]:
        def watched(step: Any, op: Op) -> None:
            if step.memory is not memory:
                memory.clear()
                step.memory = memory
            memory.read, memory.written = set(), set()
            function(step, op)
            assert memory.written <= op.writes, f"{op} writes {memory.written - op.writes}"
            touched = memory.read | memory.written
            # A view of a gradient slot is kept with the unit's gradient.
            through_others = {"grad_slot", "loss", "sqnorm", "clip"} | ({"grads"} if kind == "N" else set())
            undeclared = touched - op.reads - op.writes
            assert not undeclared, f"{op} touches {sorted(map(str, undeclared))}"
            idle = {b for b in (op.reads | op.writes) - touched if b.region not in through_others}
            assert not idle, f"{op} declares {sorted(map(str, idle))} and does not touch it"
            seen.add(kind)

        return watched

    engine.ops.functions = {kind: watch(kind, function) for kind, function in engine.ops.functions.items()}
    steps_of(model, name, micro_batches)
    extra = {"spilled": "XR", "mixed": "XR", "blocks": "XRC", "resident": "A", "resident-eager": "A"}
    if micro_batches > 1:
        extra |= {"rounds-host": "XRPG", "rounds-add": "PSG"}
    else:
        extra["rounds-host"] = "XR"
    assert seen == set("UFLBDNO") | set(extra.get(variant, ""))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_variant_gives_the_bits_of_sync_in_any_order(
    name: str, variant: str, micro_batches: int
) -> None:
    settings = VARIANTS[variant]
    reference = {"update": "sync", "max_grad_norm": settings.get("max_grad_norm", 1.0)}
    expected = steps_of(host_model(name, "inline", **reference), name, micro_batches)
    assert not differences(steps_of(host_model(name, "inline", **settings), name, micro_batches), expected)
    model = host_model(name, "adversarial", **settings)
    reset = Reset(model)
    for seed in range(times(2, 10)):
        reset()
        adversarial(model).random.seed(seed)
        assert not differences(steps_of(model, name, micro_batches), expected), f"seed {seed}"


# The lanes by themselves.


def chain() -> list[Op]:
    """Upload, forward, upload into the same slot, forward."""
    slot, given = Buffer("slot", 0), Buffer("input", 1, 0)
    upload = Op("U", 1, writes=frozenset({slot}), slot=0)
    forward = Op("F", 1, 0, frozenset({slot, given}), frozenset({given}), 0)
    return [upload, forward, upload, forward]


@pytest.mark.parametrize("lanes", [InlineLanes(), AdversarialLanes(3)])
def test_an_error_in_an_op_surfaces_unchanged(lanes: Any) -> None:
    ops, error, ran = chain(), OSError("disk on fire"), []

    def execute(i: int) -> None:
        ran.append(i)
        if i == 2:
            raise error

    with pytest.raises(OSError, match="disk on fire") as caught:
        lanes.run(ops, derive_waits(ops), range(4), execute)
    assert caught.value is error
    assert ran == [0, 1, 2]
    lanes.run(ops, derive_waits(ops), range(4), lambda i: None)  # they can be used again


@pytest.mark.parametrize("lanes", ["inline", "adversarial"])
def test_an_error_in_a_step_surfaces_and_leaves_a_usable_model(lanes: str, monkeypatch: Any) -> None:
    model = host_model("llama", lanes)
    expected = outcome(model, "llama")
    error = OverflowError("too much")

    def fail(step: Any, op: Op) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setitem(model.engine.ops.functions, "D", fail)
        with pytest.raises(OverflowError) as caught:
            model.forward_backward(batches("llama", 0))
    assert caught.value is error
    with pytest.raises(ValueError, match="without gradients"):
        model.step(lr=1.0)
    assert not is_wrong(outcome(model, "llama"), expected)


def test_inline_lanes_record_what_ran_when() -> None:
    ops, lanes = chain(), InlineLanes()
    lanes.run(ops, derive_waits(ops), range(1, 4), lambda i: None, record=True)
    assert [op for op, _, _ in lanes.spans] == ops[1:]
    times = [t for _, start, end in lanes.spans for t in (start, end)]
    assert times == sorted(times)
    lanes.run(ops, derive_waits(ops), range(4), lambda i: None)
    assert lanes.spans == []


def test_adversarial_lanes_keep_waits_and_lane_order() -> None:
    ops = [Op("U", 1), Op("F", 0, 0), Op("U", 2), Op("F", 1, 0), Op("N")]
    waits: list[tuple[int, ...]] = [(), (), (), (2,), ()]
    lanes, orders = AdversarialLanes(0), set()
    for _ in range(300):
        lanes.run(ops, waits, range(5), lambda i: None)
        order = lanes.order
        assert order.index(0) < order.index(2) < order.index(3) > order.index(1)
        orders.add(tuple(order))
    assert len(orders) == 15  # F0 in 3 places beside U1 U2, then F1; and N in any of 5 places
    assert {ops[i].lane for i in range(5)} == {Lane.UPLOAD, Lane.COMPUTE, Lane.UPDATE}


def test_adversarial_lanes_notice_a_deadlock() -> None:
    ops = [Op("U", 1), Op("F", 1, 0)]
    with pytest.raises(AssertionError, match="deadlock"):
        AdversarialLanes(0).run(ops, [(1,), (0,)], range(2), lambda i: None)


def test_choice_of_lanes() -> None:
    cpu = torch.device("cpu")
    assert isinstance(lanes_module.choose_lanes("auto", cpu), InlineLanes)
    assert isinstance(lanes_module.choose_lanes("inline", cpu), InlineLanes)
