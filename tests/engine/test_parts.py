"""Units in parts: the trainable part on the device, the frozen one streamed, plain or packed. No bit changes.

The same adapter on the same weights, unpacked, in place and with nothing resident, is what all is held to.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch

from adversarial import AdversarialLanes
from emulated_cuda import EmulatedCuda, watch_ops
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.engine.step import Schedule
from horizon_lm.errors import NonFiniteError
from horizon_lm.host_model import HostModel
from horizon_lm.memory import packed
from horizon_lm.schedule import Buffer
from parts import MODELS, batches, bits, dequantised, differences, host, sampled, trained
from policy_models import Stashing
from random_orders import Reset
from sizes import SOAK, times

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("auto", "int8", "nf4")


@cache
def plain(name: str, kind: str, dtype: str, clips: bool = True) -> Any:
    """In place, whole units in host memory, the weights that a packed base has when it is unpacked."""
    values = None if kind == "auto" else dequantised(name, kind, dtype)
    settings = {"resident": 0, "max_grad_norm": 1.0 if clips else None}
    return trained(host(name, values, dtype=dtype, **settings), name)


@pytest.mark.parametrize("name", MODELS)
def test_parts_change_no_bit(name: str, request: pytest.FixtureRequest) -> None:
    """Two random ways of each kind; in `make soak` 40, other ones each time."""
    rng = random.Random(f"{name} {request.config.getoption('--hypothesis-seed') if SOAK else 2}")
    for i in range(times(2, 40)):
        for kind in KINDS:
            dtype, clips = rng.choice(["bfloat16", "float32"]) if SOAK else "bfloat16", rng.random() < 0.6
            settings = sampled(rng, clips)
            model = host(name, dtype=dtype, base_dtype=kind, **settings)
            if settings["lanes"] == "adversarial":
                model.engine.lanes.random.seed(i)
            found = differences(plain(name, kind, dtype, clips), trained(model, name))
            assert not found, f"{kind}, {dtype}, {settings}: {found[:9]}"


def test_an_fp32_base_is_packed_too() -> None:
    for kind in ("int8", "nf4"):
        model = host("llama", dtype="float32", base_dtype=kind, resident="trainable", lanes="adversarial")
        assert not differences(plain("llama", kind, "float32"), trained(model, "llama"))


def test_weights_unpacked_with_another_scale_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: one scale in a thousand is off by half a percent."""
    honest = packed._scales

    def scales(*args: Any) -> torch.Tensor:
        found = honest(*args).clone()
        found[::1000] *= 1.005
        return found

    expected = plain("llama", "nf4", "bfloat16")
    monkeypatch.setattr(packed, "_scales", scales)
    assert differences(expected, trained(host("llama", base_dtype="nf4"), "llama"))


# Waits and releases.


class Late(random.Random):
    """Chooses so that op `late` runs as late as it can."""

    def __init__(self, late: int) -> None:
        super().__init__(0)
        self.late = late

    def choice(self, ready: Any) -> Any:
        return super().choice([i for i in ready if i != self.late] or ready)


def lanes_of(model: HostModel) -> AdversarialLanes:
    assert isinstance(model.engine.lanes, AdversarialLanes)
    return model.engine.lanes


def outcome(model: HostModel) -> Any:
    """The gradients of one step, or what went wrong."""
    try:
        loss = model.forward_backward(batches("llama", 0, 2)).loss
    except (KeyError, AssertionError, RuntimeError, AttributeError, TypeError) as error:
        return str(error)
    return [loss, {name: bits(value) for name, value in model.named_gradients()}]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, str) or isinstance(two, str) or one[0] != two[0]:
        return False
    return all(torch.equal(value, two[1][name]) for name, value in one[1].items())


@pytest.fixture
def changed() -> Any:
    """A packed, split model that is reset before each run; a function that runs it on another schedule."""
    model = host("llama", base_dtype="nf4", resident="trainable", lanes="adversarial", update="sync")
    reset, spec = Reset(model), model.engine.spec(2)
    honest = model.engine.schedule(spec)

    def run(schedule: Schedule, late: int = -1) -> Any:
        reset()
        model.engine._schedules[spec, False] = schedule
        lanes_of(model).random = Late(late)
        return outcome(model)

    run.honest = honest  # type: ignore[attr-defined]
    return run


def test_every_wait_that_is_removed_gives_other_bits(changed: Any) -> None:
    honest = changed.honest
    expected, removed = changed(honest), set()
    assert not isinstance(expected, str), expected
    for i, targets in enumerate(honest.waits):
        for j in targets if honest.ops[i].kind not in "NOA" else ():
            fewer = [tuple(k for k in one if (n, k) != (i, j)) for n, one in enumerate(honest.waits)]
            found = changed(honest._replace(waits=fewer), late=j)
            assert not same(found, expected), f"{honest.ops[i]} need not wait for {honest.ops[j]}"
            removed.add(honest.ops[i].kind + honest.ops[j].kind)
    assert same(changed(honest), expected)
    assert removed >= {"QU", "UQ", "FU", "LU", "BD", "DB"}, removed


def test_a_release_one_op_too_early_is_caught_by_poison(changed: Any) -> None:
    honest = changed.honest
    ops, ends, regions = honest.ops, honest.ends, set()
    expected = changed(honest)
    for i, buffers in enumerate(ends):
        for buffer in buffers:
            if buffer.region not in ("slot", "staging") or buffer in regions:
                continue
            j = max(j for j in range(i) if buffer in ops[j].reads | ops[j].writes)
            early = [list(one) for one in ends]
            early[i].remove(buffer)
            early[j].append(buffer)
            found = changed(honest._replace(ends=[tuple(one) for one in early]), late=i)
            assert not same(found, expected), f"{buffer} after {ops[j]}, before {ops[i]}"
            regions.add(buffer)
    assert {Buffer("slot", 0), Buffer("staging", 0), Buffer("staging", 1)} <= regions
    assert same(changed(honest), expected)


def test_updates_of_trainable_parts_wait_for_their_readers() -> None:
    """Two steps with deferred updates; without any one wait of an update, other bits."""
    model = host("llama", resident="trainable", lanes="adversarial", update="deferred")
    reset, spec = Reset(model), model.engine.spec(2)

    def two_steps() -> Any:
        try:
            losses = [model.train_step(batches("llama", s, 2), lr=1e-2).loss for s in range(2)]
        except (NonFiniteError, KeyError, AssertionError, RuntimeError) as error:
            return str(error)
        return [losses, {name: bits(value) for name, value in model.named_parameters()}]

    expected = two_steps()
    honest, pairs = model.engine.schedule(spec, pending=True), set()
    for i, targets in enumerate(honest.waits):
        for j in targets:
            if "A" in (kinds := honest.ops[i].kind + honest.ops[j].kind):
                fewer = [tuple(k for k in one if (n, k) != (i, j)) for n, one in enumerate(honest.waits)]
                reset()
                model.engine._schedules[spec, True] = honest._replace(waits=fewer)
                lanes_of(model).random = Late(j)
                assert not same(two_steps(), expected), f"{honest.ops[i]} need not wait for {honest.ops[j]}"
                pairs.add(kinds)
    model.engine._schedules[spec, True] = honest
    reset()
    assert same(two_steps(), expected)
    assert pairs == {"FA"}  # no upload waits for an update


# Steps that fail, and layers that put weights aside.


@pytest.mark.parametrize("lanes", ["inline", "adversarial"])
def test_a_step_that_is_not_finite_changes_nothing(lanes: str) -> None:
    model = host("llama", base_dtype="int8", resident="trainable", lanes=lanes)
    before = {name: bits(value) for name, value in model.named_parameters()}

    def spoiled(log_probs: torch.Tensor, batch: Any) -> torch.Tensor:
        return log_probs.sum() * torch.nan

    with pytest.raises(NonFiniteError):
        model.train_step(batches("llama", 0, 2), lr=1e-2, loss_fn=spoiled)
    assert all(torch.equal(before[name], bits(value)) for name, value in model.named_parameters())
    assert not differences(plain("llama", "int8", "bfloat16"), trained(model, "llama"))


def test_a_frozen_weight_put_aside_is_seen_in_its_slot() -> None:
    """One layer keeps its frozen weight where it cannot be replaced: it is recomputed, with the same bits."""

    def built(**settings: Any) -> HostModel:
        model = host("llama", activations="keep", lanes="adversarial", update="sync", **settings)
        layer = model.skeleton.layers[0].mlp.down_proj.base_layer
        layer.forward = lambda x: Stashing.apply(x, layer.weight)
        return model

    whole, split = built(resident=0), built(resident="trainable")
    assert not differences(trained(whole, "llama"), trained(split, "llama"))
    for model in (whole, split):
        (note,) = model.take_notes()
        assert note.startswith("layer 0 is recomputed from now on")
        assert model.engine.ops.policies.kept == {2, 3}


# On a device with memory of its own.


def first_step(model: HostModel) -> Any:
    """The gradients of one step. (Norms are summed in another order on a device.)"""
    loss = model.forward_backward(batches(model.skeleton.model_type, 0, 3)).loss
    return [loss, {name: bits(value.cpu()) for name, value in model.named_gradients()}]


def test_an_adapter_is_resident_on_a_device_by_default(emulated_cuda: EmulatedCuda) -> None:
    """The trainable parts of all units are there, the frozen ones stream; the bits are those of the CPU."""
    model = host("llama", device="cuda")
    watch_ops(model.engine, emulated_cuda)
    store, spec = model.store, model.engine.spec(1)
    assert spec.resident == spec.trainable == {1, 2, 3} == spec.split and not spec.packed
    assert spec.uploaded == {1, 2, 3, 4, 5}
    for unit in spec.resident:
        for region in ("weights", "residual", "exp_avg", "exp_avg_sq", "grads"):
            assert emulated_cuda.is_on_device(store.run(region, unit)), region
        assert emulated_cuda.is_pinned(store.run("frozen", unit))
    emulated_cuda.waits.clear()
    assert same(first_step(model), first_step(host("llama")))
    assert not emulated_cuda.on_compute_lane() and not emulated_cuda.mixed


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_packed_base_on_a_device(kind: str, emulated_cuda: EmulatedCuda) -> None:
    model = host("gpt2", device="cuda", base_dtype=kind)
    watch_ops(model.engine, emulated_cuda)
    assert model.engine.spec(1).packed == {1, 2, 3}
    assert all(emulated_cuda.is_pinned(model.store.run("packed", unit)) for unit in (1, 2, 3))
    emulated_cuda.waits.clear()
    found = first_step(model)
    assert not emulated_cuda.on_compute_lane() and not emulated_cuda.mixed
    assert same(found, first_step(host("gpt2", dequantised("gpt2", kind, "bfloat16"))))


def test_nothing_is_split_that_was_not(emulated_cuda: EmulatedCuda) -> None:
    """Without an adapter all is as before; with one, if whole units are asked for."""
    frozen = {"adapter": "none", "freeze": ["mlp"], "device": "cuda"}
    for settings in (frozen, frozen | {"freeze": []}, {"device": "cuda", "resident": 0}):
        model = host("llama", **settings)
        assert not model.engine.spec(1).resident and "frozen" not in model.memory_bytes()
    model = host("llama", **(frozen | {"resident": "trainable"}))
    assert model.engine.spec(1).split == {1, 2, 3} and model.engine.spec(1).resident == {1, 2, 3, 4, 5}
