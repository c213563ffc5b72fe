"""Where units live and how micro-batches are cut into rounds changes no bit of losses, norms and weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from emulated_cuda import EmulatedCuda, watch_ops
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.engine.gradient import UnitGradient
from horizon_lm.engine.lanes import CudaLanes
from horizon_lm.engine.updates import Updates
from horizon_lm.errors import NonFiniteError
from horizon_lm.optim import optimizer
from horizon_lm.schedule import Lane
from known_states import Copies, bytes_of
from sizes import paired, times

pytestmark = pytest.mark.usefixtures("one_thread")

MICRO_BATCHES = 5
# name, dtype, parts of the names of frozen parameters
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "untied fp32": ("llama", "float32", ()),
    "untied bf16": ("llama", "bfloat16", ()),
    "tied bf16, prologue": ("gpt2", "bfloat16", ()),
    "experts bf16": ("mixtral-aux", "bfloat16", ()),
    "frozen parts": ("llama", "bfloat16", ("layers.0", "v_proj", "embed_tokens")),
}
# Rounds of 2, 2 and 1 micro-batches, and of one each. A number of residents counts table and head first.
PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident table and head": {"resident": 2},
    "sums on the device": {"rounds": 3, "round_sums": "device"},
    "sums on the host": {"rounds": 3, "round_sums": "host", "boundaries": "host", "checkpoint_interval": 2},
    "added on the host": {"rounds": 5, "round_sums": "add", "resident": 3},
    "keep, residents, rounds": {"rounds": 3, "round_sums": "host", "resident": 3, "activations": "keep"},
}
UPDATES: dict[str, dict[str, Any]] = {
    "deferred": {"update": "deferred", "max_grad_norm": 0.5},
    "sync": {"update": "sync", "max_grad_norm": 0.5},
    "eager": {"update": "eager", "max_grad_norm": None},
}


def host(name: str, frozen: tuple[str, ...] = (), **settings: Any) -> hz.HostModel:
    config = zoo.CASES[name].config()
    config.num_hidden_layers = 3
    source = zoo._from_config(config, torch.float32, seed=0, attn="sdpa")
    for key, parameter in source.named_parameters():
        parameter.requires_grad_(not any(part in key for part in frozen))
    return from_pretrained(source, device="cpu", **({"skip_memory_check": True} | settings))


def batches(name: str, step: int, count: int = MICRO_BATCHES) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(name, batch_size=1, length=6, seed=10 * step + m + 1) for m in range(count)]


def trained(model: hz.HostModel, name: str, steps: int = 2) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and norms, and the masters at the end; an evaluation between the steps."""
    found: list[float] = []
    for step in range(steps):
        out = model.train_step(batches(name, step), lr=1e-2, weight_decay=0.1)
        found += [out.loss, out.grad_norm, model.evaluate(batches(name, 9, 2)).loss]
    return found, dict(model.named_parameters())


def same(one: Any, two: Any) -> bool:
    return one[0] == two[0] and all(torch.equal(value, two[1][name]) for name, value in one[1].items())


@pytest.mark.parametrize(("case", "update"), paired(CASES, UPDATES))
def test_no_bit_depends_on_placement_and_rounds(case: str, update: str) -> None:
    name, dtype, frozen = CASES[case]
    settings = {"dtype": dtype} | UPDATES[update]
    expected = trained(host(name, frozen, **settings), name)
    assert expected[0][0] != expected[0][3], "the first step changed the weights"
    for placement, more in PLACEMENTS.items():
        found = trained(host(name, frozen, **settings, **more), name)
        assert same(expected, found), f"{placement}, in place"
        for seed in range(times(1, 20)):
            model = host(name, frozen, lanes="adversarial", seed=seed, **settings, **more)
            assert same(expected, trained(model, name)), f"{placement}, order {seed}"


def test_the_order_of_additions_matters() -> None:
    """Negative control: the same micro-batches in another order have other sums."""
    model, given = host("llama", dtype="float32", update="sync"), batches("llama", 0)
    found = []
    for order in (given, [given[1], given[2], given[0], *given[3:]]):
        model.forward_backward(order)
        found.append({name: g.clone() for name, g in model.named_gradients()})
    assert any(not torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("broken", ["_get_back", "_park", "_add"])
def test_a_sum_that_is_lost_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: the gradient of a round does not reach the host, is not added, does not come
    back."""
    sums = "add" if broken == "_add" else "host"
    expected = trained(host("llama", dtype="float32"), "llama", steps=1)
    honest = getattr(Updates, broken)

    def without(self: Updates, step: Any, op: Any) -> None:
        if broken == "_get_back":
            kept = step.gradients[op.unit].run.clone()
            honest(self, step, op)
            step.gradients[op.unit].run.copy_(kept)
            return
        honest(self, step, op)
        self.store.sum_run(op.unit).zero_()

    monkeypatch.setattr(Updates, broken, without)
    model = host("llama", dtype="float32", rounds=5, round_sums=sums, lanes="adversarial")
    try:
        assert not same(expected, trained(model, "llama", steps=1))
    except NonFiniteError:  # what was in the slot
        assert broken == "_get_back"


@pytest.mark.parametrize("sums", ["device", "host", "add"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lanes", ["inline", "adversarial"])
def test_parameters_without_a_gradient_in_some_micro_batches(
    lanes: str, dtype: str, sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As experts without tokens: never, in the first, the middle, the last only; and sums of -0.0. The bits
    of gradients, signs of zeros too, are those of one round; buffers start with NaNs."""
    without = {"up_proj": {0, 1, 2, 3, 4}, "gate_proj": {0}, "down_proj": {1, 2}, "o_proj": {0, 1, 2, 3}}
    honest, calls = UnitGradient.add, Counter[str]()

    def add(self: UnitGradient, parameter: Any, gradient: torch.Tensor) -> None:
        kind = parameter.name.split(".")[-2]
        m = calls[parameter.name] % MICRO_BATCHES
        calls[parameter.name] += 1
        if m not in without.get(kind, ()):
            honest(self, parameter, gradient * -0.0 if kind == "k_proj" else gradient)

    monkeypatch.setattr(UnitGradient, "add", add)
    found = []
    for more in ({}, {"rounds": 5, "round_sums": sums}):
        calls.clear()
        model = host("llama", dtype=dtype, update="deferred", loss_chunk_tokens=64, lanes=lanes, **more)
        for region in ("grads", "sums", "sum_slabs"):
            for run in model.store._runs.get(region, ()):
                run.fill_(torch.nan)
        for slot in model.engine.ops.gradient_slots._buffers:
            if slot is not None:
                slot.view(torch.float32).fill_(torch.nan)
        model.forward_backward(batches("llama", 0))
        found.append({n: g.clone().view(torch.uint8) for n, g in model.named_gradients()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert not any(bool(v.any()) for n, v in found[0].items() if "up_proj" in n)
    assert all(bool(v.any()) for n, v in found[0].items() if "k_proj" in n), "negative zeros"


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("lanes", ["inline", "adversarial", "cuda"])
def test_a_checkpoint_beside_a_step(lanes: str, update: str, fake_cuda: list[str]) -> None:
    """Written in the background while the next step runs in rounds: the state before it."""
    settings = {"dtype": "bfloat16"} | UPDATES[update]
    more = {"rounds": 3, "round_sums": "host", "resident": 3}
    placed = host("llama", lanes="inline" if lanes == "inline" else "adversarial", **settings, **more)
    if lanes == "cuda":
        placed.engine.lanes = CudaLanes(torch.device("cpu"))
    placed.train_step(batches("llama", 0), lr=1e-2)
    copies = Copies(placed)
    placed.save_state(copies, background=True)
    plain = host("llama", **settings)
    plain.train_step(batches("llama", 0), lr=1e-2)
    plain.flush()
    states = bytes_of(plain)
    placed.train_step(batches("llama", 1), lr=1e-2)
    placed.finish_saving()
    assert copies.ended and not copies.abandoned
    units = len(placed.store.units)
    assert len(copies.units) == units - (not placed.store.units[0].numel)
    for unit, runs in copies.units.items():
        assert all(torch.equal(a, b) for a, b in zip(runs, states[unit::units], strict=True))


# Memory.


def test_gradients_in_place_take_no_memory() -> None:
    """fp32 in host memory: sums stay in the store, whatever the rounds."""
    model = host("llama", dtype="float32", update="deferred", rounds=3)
    model.train_step(batches("llama", 0), lr=1e-2)
    loss_chunks = model.engine.ops.gradient_slots.num_bytes
    assert loss_chunks == 0 and "sums" not in model.store.num_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sums", ["device", "host"])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_gradients_wait_for_a_second_one_within_a_round_only(
    rounds: int, sums: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In host memory, those of a unit, or of the units of a joint visit, in their own dtype; an odd number of
    micro-batches leaves none to wait for the next round."""
    honest, most = UnitGradient.add, 0
    gradients: list[UnitGradient] = []

    def add(self: UnitGradient, parameter: Any, gradient: torch.Tensor) -> None:
        nonlocal most
        if not any(self is other for other in gradients):
            gradients.append(self)
        honest(self, parameter, gradient)
        most = max(most, sum(t.nbytes for other in gradients for t in other.waiting.values()))

    monkeypatch.setattr(UnitGradient, "add", add)
    model = host("llama", dtype=dtype, rounds=rounds, round_sums=sums)
    model.train_step(batches("llama", 0), lr=1e-2)
    sizes = [sum(p.numel for p in u.trainable) * model.store.dtype.itemsize for u in model.store.units]
    head, layer = sizes[model.skeleton.num_layers + 1], max(sizes[1:-2])
    assert most == (max(head, layer) if rounds == 5 else head + layer)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lanes", ["inline", "adversarial"])
def test_gradients_that_wait_on_the_device_need_no_ring(lanes: str, dtype: str, update: str) -> None:
    """A shorter step of one round uses the slots of the layers' own too; its bits are those without rounds.
    Sums on the host come and go through a ring."""
    found, sizes = [], []
    for more in ({}, {"rounds": 2, "round_sums": "device"}, {"rounds": 2, "round_sums": "host"}):
        model = host("llama", dtype=dtype, lanes=lanes, **UPDATES[update], **more)
        numbers: list[float] = []
        for step, count in enumerate((4, 1, 3, 1)):
            out = model.train_step(batches("llama", step, count), lr=1e-2, weight_decay=0.1)
            numbers += [out.loss, out.grad_norm]
        found.append((numbers, dict(model.named_parameters())))
        slots = model.engine.ops.gradient_slots
        sizes.append([0 if b is None else b.nbytes for b in slots._buffers])
    assert same(found[0], found[1]) and same(found[0], found[2])
    layers = [4 * unit.trainable_numel for unit in model.store.units[1:-2]]
    one, own, on_host = sizes
    assert own[:2] == [0, 0] and len(one) == len(on_host) == 3
    if lanes == "adversarial":
        assert own[3:] == layers and one[:2] == on_host[:2] == [max(layers)] * 2


def test_blocks_with_fewer_slabs_than_layers() -> None:
    """Gradients of a block's layers add up side by side, so not in slabs that they share."""
    found = []
    for more in ({}, {"checkpoint_interval": 3, "grad_slabs": 1}):
        found.append(trained(host("llama", dtype="float32", **UPDATES["eager"], **more), "llama"))
    assert same(*found)


# On a device.


@pytest.mark.parametrize(
    "more",
    [
        {"resident": 3},
        {"resident": 3, "rounds": 3, "round_sums": "device"},
        {"resident": 2, "rounds": 5, "round_sums": "host", "activations": "keep"},
        {"resident": 3, "rounds": 5, "round_sums": "add"},
        {"reduction": "exact", "loss_chunk_tokens": 8},
        {"reduction": "exact", "resident": 3, "rounds": 3, "round_sums": "host"},
    ],
    ids=lambda more: " ".join(f"{k}={v}" for k, v in more.items()),
)
def test_no_lane_but_the_update_waits_for_the_device(
    more: dict[str, Any], emulated_cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = optimizer.update_run

    def update_run(*args: Any, **kwargs: Any) -> None:  # the host's kernel stands for the device's
        with torch._C.DisableTorchFunction():
            real(*args, **kwargs)

    monkeypatch.setattr(optimizer, "update_run", update_run)
    found = []
    for placed in ({}, more):
        model = hz.HostModel.from_pretrained(
            zoo.build("llama"),
            device="cuda",
            dtype="bfloat16",
            skip_memory_check=True,
            update="deferred",
            max_grad_norm=0.5,
            **placed,
        )
        watch_ops(model.engine, emulated_cuda)
        assert isinstance(model.engine.lanes, CudaLanes)
        model.train_step(batches("llama", 0), lr=1e-2)
        emulated_cuda.waits.clear()
        emulated_cuda.mixed.clear()
        out = model.train_step(batches("llama", 1), lr=1e-2)
        lanes = {op.lane for op, _ in emulated_cuda.waits if op is not None}
        assert lanes <= {Lane.UPDATE}, [w for w in emulated_cuda.waits if w[0] is not None][:5]
        assert not emulated_cuda.mixed
        found.append((out.loss, out.grad_norm, dict(model.named_parameters())))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(value, found[1][2][name]) for name, value in found[0][2].items())
