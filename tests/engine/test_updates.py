"""When the optimizer runs and on what: update modes give the same bits, skipped steps leave no trace."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from horizon_lm.engine.updates import Updates
from horizon_lm.errors import ConfigError, NonFiniteError
from horizon_lm.schedule import Lane, Op, StepSpec, build, simulate
from horizon_lm.schedule.draw import busy_seconds
from sizes import times

# an untied table, a tied one with a prologue, a mixture of experts with the router's auxiliary loss
MODELS = {"llama": "float32", "gpt2": "bfloat16", "mixtral-aux": "bfloat16"}
State = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def host(name: str, **settings: Any) -> hz.HostModel:
    values = {"device": "cpu", "dtype": MODELS[name], "skip_memory_check": True} | settings
    return from_pretrained(zoo.build(name), **values)


def batches(name: str, step: int, micro_batches: int) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(name, batch_size=1, length=8, seed=10 * step + m + 1) for m in range(micro_batches)]


def masters(model: hz.HostModel) -> State:
    return dict(model.named_parameters())


def same(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def store_bytes(model: hz.HostModel) -> State:
    """Every region that outlives a step, as bytes."""
    kept = {r: runs for r, runs in model.store._runs.items() if r not in ("grads", "grad_slabs")}
    return {
        f"{region}.{unit}": run.clone().view(torch.uint8)
        for region, runs in kept.items()
        for unit, run in enumerate(runs)
    }


def trained(
    name: str, steps: int, micro_batches: int, max_grad_norm: float | None, **settings: Any
) -> tuple[list[float], State]:
    """Losses and norms of each step, and the masters at the end."""
    model = host(name, max_grad_norm=max_grad_norm, **settings)
    found = []
    for step in range(steps):
        out = model.train_step(batches(name, step, micro_batches), lr=3e-3, weight_decay=0.01)
        found += [out.loss, out.grad_norm]
    return found, masters(model)


# Modes.


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_modes_give_the_same_bits(name: str, micro_batches: int) -> None:
    """Many steps, in program order and in random orders; with clipping that acts on some of them only."""
    steps = times(8, 30)
    free = trained(name, steps, micro_batches, None, update="sync")
    for update in ("deferred", "eager"):
        for lanes in ("inline", "adversarial"):
            found = trained(name, steps, micro_batches, None, update=update, lanes=lanes)
            assert found[0] == free[0] and same(found[1], free[1]), (update, lanes)
    limit = statistics.median(free[0][1::2])
    clipped = trained(name, steps, micro_batches, limit, update="sync")
    norms = clipped[0][1::2]
    few = min(3, steps // 4)
    assert few < sum(norm > limit for norm in norms) < steps - few, "clipping acts on some steps only"
    assert not same(clipped[1], free[1])
    for lanes in ("inline", "adversarial"):
        found = trained(name, steps, micro_batches, limit, update="deferred", lanes=lanes)
        assert found[0] == clipped[0] and same(found[1], clipped[1]), lanes


def test_a_clipping_factor_of_the_wrong_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: deferred updates that take the scale of nothing but 1."""
    expected = trained("llama", 3, 1, 0.1, update="sync")
    monkeypatch.setattr(Updates, "_norm", lambda self, step, op: None)
    assert not same(trained("llama", 3, 1, 0.1, update="deferred")[1], expected[1])


def test_the_default_mode_follows_clipping() -> None:
    assert host("llama").settings.update_mode == "deferred"
    assert host("llama", max_grad_norm=None).settings.update_mode == "eager"
    assert host("llama", max_grad_norm=0).settings.update_mode == "eager"
    assert host("llama", max_grad_norm=None, nonfinite="skip").settings.update_mode == "deferred"
    assert host("llama", update="sync", max_grad_norm=None).settings.update_mode == "sync"


@pytest.mark.parametrize(
    ("settings", "hint"),
    [({"max_grad_norm": 1.0}, "max_grad_norm=null"), ({"nonfinite": "skip"}, "nonfinite=raise")],
)
def test_eager_refuses_what_needs_all_gradients(settings: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match="update: eager") as caught:
        host("llama", **({"update": "eager", "max_grad_norm": None} | settings))
    assert hint in (caught.value.hint or "")


def test_eager_is_one_call() -> None:
    model = host("llama", max_grad_norm=None)
    with pytest.raises(ConfigError, match="train_step"):
        model.forward_backward(batches("llama", 0, 1))
    with pytest.raises(ConfigError, match="keeps no gradients"):
        next(model.named_gradients())
    with pytest.raises(ConfigError, match="max_grad_norm=0.5"):
        model.train_step(batches("llama", 0, 1), lr=1e-3, max_grad_norm=0.5)
    model.train_step(batches("llama", 0, 1), lr=1e-3)


def test_one_call_equals_two() -> None:
    one, two = host("llama"), host("llama")
    for step in range(3):
        out = one.train_step(batches("llama", step, 2), lr=1e-2, weight_decay=0.1)
        loss = two.forward_backward(batches("llama", step, 2)).loss
        norm = two.step(lr=1e-2, weight_decay=0.1).grad_norm
        assert (out.loss, out.grad_norm) == (loss, norm)
    assert same(masters(one), masters(two))


# Deferred updates are made before anybody looks.


def read_masters(model: hz.HostModel, folder: Path) -> None:
    masters(model)


def read_evaluation(model: hz.HostModel, folder: Path) -> None:
    model.evaluate(batches("llama", 7, 1))


def read_export(model: hz.HostModel, folder: Path) -> None:
    model.save_pretrained(folder / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert same(masters(model), {n: p.detach() for n, p in loaded.named_parameters()})


@pytest.mark.parametrize("read", [read_masters, read_evaluation, read_export, lambda m, f: m.flush()])
def test_whoever_reads_parameters_gets_updated_ones(
    read: Callable[[hz.HostModel, Path], None], tmp_path: Path
) -> None:
    expected = trained("llama", 1, 1, 1.0, update="sync")[1]
    model = host("llama", update="deferred")
    before = store_bytes(model)
    model.train_step(batches("llama", 0, 1), lr=3e-3, weight_decay=0.01)
    assert same(store_bytes(model), before), "nothing is updated until it is needed"
    assert model.engine.has_pending
    read(model, tmp_path)
    assert not model.engine.has_pending
    assert same({name: model.store.master(name) for name in model.store.names()}, expected)


def test_an_evaluation_between_gradients_and_step_changes_nothing() -> None:
    plain, looked = host("llama"), host("llama")
    for step in range(2):
        for model in (plain, looked):
            model.forward_backward(batches("llama", step, 2))
            if model is looked:
                looked.evaluate(batches("llama", 9, 1))
            model.step(lr=1e-2)
    assert same(masters(plain), masters(looked))


@pytest.mark.parametrize("kind", ["F", "L", "B", "D"])
def test_a_step_that_fails_half_way_leaves_the_update_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the deferred updates have been made when a later op fails; the rest is made up for."""
    expected = trained("llama", 1, 1, 1.0, update="sync")[1]
    model = host("llama", update="deferred")
    model.train_step(batches("llama", 0, 1), lr=3e-3, weight_decay=0.01)

    def fail(step: Any, op: Op) -> None:
        raise OverflowError("half-way")

    with monkeypatch.context() as patch:
        patch.setitem(model.engine.ops.functions, kind, fail)
        with pytest.raises(OverflowError):
            model.train_step(batches("llama", 1, 1), lr=3e-3)
    assert same(masters(model), expected)
    # And from there as if nothing had happened.
    second = trained("llama", 2, 1, 1.0, update="sync")[1]
    model.train_step(batches("llama", 1, 1), lr=3e-3, weight_decay=0.01)
    assert same(masters(model), second)


# Numbers that are not finite.


def spoil(model: hz.HostModel, monkeypatch: pytest.MonkeyPatch, kind: str, value: float) -> None:
    """One element of a middle layer's gradient, or the loss, is not finite in the next step."""
    op_kind = {"gradient": "B", "loss": "L"}[kind]
    honest = model.engine.ops.functions[op_kind]

    def wrapped(step: Any, op: Op) -> None:
        honest(step, op)
        if kind == "loss":
            step.losses[op.micro_batch] = torch.tensor(value)
        elif op.unit == 2:
            step.gradients[op.unit].run[0] = value

    monkeypatch.setitem(model.engine.ops.functions, op_kind, wrapped)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["gradient", "loss"])
@pytest.mark.parametrize("update", ["sync", "deferred", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_skipped_step_leaves_every_byte_as_it_was(
    name: str, update: str, kind: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = host(name, update=update, max_grad_norm=None if update == "eager" else 1.0)
    model.train_step(batches(name, 0, 2), lr=1e-3)
    model.flush()
    before = store_bytes(model)
    with monkeypatch.context() as patch:
        spoil(model, patch, kind, value)
        with pytest.raises(NonFiniteError) as caught:
            model.train_step(batches(name, 1, 2), lr=1e-3)
    model.flush()
    error = caught.value
    assert model.steps_done == 1
    assert not math.isfinite(error.loss if kind == "loss" else error.grad_norm)
    if update == "eager" and kind == "gradient":
        # Layers above were updated when this one was met, which the error says; those below were not.
        assert not error.state_intact and "updated already" in error.message
        changed = {key for key, value in store_bytes(model).items() if not torch.equal(value, before[key])}
        assert changed and not any(key.endswith((".0", ".1", ".2")) for key in changed)
        return
    assert error.state_intact and "nothing was updated" in error.message
    assert same(store_bytes(model), before)
    # The next step is as good as any: it equals that of a model that never saw the bad one.
    fresh = host(name, update="sync", max_grad_norm=None if update == "eager" else 1.0)
    for other in (fresh, model):
        if other is fresh:
            fresh.train_step(batches(name, 0, 2), lr=1e-3)
        other.train_step(batches(name, 2, 2), lr=1e-3)
    assert same(masters(model), masters(fresh))


# Groups and rules.


# fp32 on both sides, and five steps of an Adam that divides by roots of tiny gradients.
CLOSE = 1e-3


def plain_steps(source: Any, optimizer: torch.optim.Optimizer, steps: int) -> State:
    source.train()
    for step in range(steps):
        source.zero_grad()
        source(**batches("llama", step, 1)[0]).loss.backward()
        torch.nn.utils.clip_grad_norm_(source.parameters(), 1.0)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in source.named_parameters()}


def distance(one: State, two: State, source: str) -> float:
    """How far two trained models are apart, as a share of how far they came."""
    start = {name: p.detach() for name, p in zoo.build(source).named_parameters()}
    apart = sum(float((one[name] - two[name]).double().square().sum()) for name in start)
    came = sum(float((two[name] - start[name]).double().square().sum()) for name in start)
    return (apart / came) ** 0.5


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_weight_decay_spares_biases_and_norms(decay_embeddings: bool) -> None:
    """Three groups as anybody would write them for torch.optim.AdamW."""
    source = zoo.build("qwen2")  # it has biases
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in source.named_parameters():
        spared = "norm" in name or "bias" in name or ("embed" in name and not decay_embeddings)
        key = (0.0 if spared else 0.5, 1e-2 * (0.1 if "mlp" in name else 1.0))
        groups.setdefault(key, []).append(parameter)
    assert any("bias" in name for name, _ in source.named_parameters()) and len(groups) >= 3
    model = hz.HostModel.from_pretrained(
        zoo.build("qwen2"),
        device="cpu",
        dtype="float32",
        decay_embeddings=decay_embeddings,
        lr_factors={r"layers\.\d+\.mlp": 0.1, "mlp": 7.0},  # the first that is found counts
    )
    rows = [{"params": p, "weight_decay": wd, "lr": lr} for (wd, lr), p in groups.items()]
    expected = plain_steps(source, torch.optim.AdamW(rows), 5)
    for step in range(5):
        model.train_step(batches("llama", step, 1), lr=1e-2, weight_decay=0.5)
    assert distance(masters(model), expected, "qwen2") < CLOSE
    source = zoo.build("qwen2")
    everything = torch.optim.AdamW(source.parameters(), lr=1e-2, weight_decay=0.5)
    uniform = plain_steps(source, everything, 5)
    assert distance(masters(model), uniform, "qwen2") > 0.1


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="'lm_haed' matches no trainable") as caught:
        host("llama", lr_factors={"lm_haed": 0.5})
    assert "model." in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="not a regular expression"):
        host("llama", lr_factors={"(": 0.5})


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_the_rule_is_that_of_torch(rule: str) -> None:
    source = zoo.build("llama")
    expected = plain_steps(source, OPTIMIZERS[rule](source.parameters()), 5)
    model = host("llama", optim=rule, sgd_momentum=0.9)
    for step in range(5):
        model.train_step(batches("llama", step, 1), lr=1e-2)
    assert distance(masters(model), expected, "llama") < CLOSE
    for other in OPTIMIZERS.keys() - {rule}:  # without decay, adam and adamw are the same
        source = zoo.build("llama")
        wrong = plain_steps(source, OPTIMIZERS[other](source.parameters()), 5)
        assert distance(masters(model), wrong, "llama") > 0.1 or {rule, other} == {"adam", "adamw"}


@pytest.mark.parametrize(
    ("optim", "moments", "per_parameter"),
    [
        ("adamw", "float32", 14),
        ("adamw", "bfloat16", 10),
        ("lion", "float32", 10),
        ("lion", "bfloat16", 8),
        ("sgd", "bfloat16", 8),
    ],
)
def test_bytes_of_rules_and_moments(optim: str, moments: str, per_parameter: int) -> None:
    """Two moments, or one, of 4 or 2 bytes beside master and gradient (6); and the model learns."""
    model = host("llama", dtype="bfloat16", optim=optim, moment_dtype=moments)
    numel = sum(unit.numel for unit in model.store.units)
    assert sum(model.store.num_bytes.values()) == per_parameter * numel
    assert model.store.has("exp_avg_sq") == (optim == "adamw")
    batch = batches("llama", 0, 1)
    losses = [model.train_step(batch, lr={"sgd": 0.3}.get(optim, 1e-3)).loss for _ in range(8)]
    assert losses[-1] < losses[0] - 0.02, losses


def test_bf16_moments_do_not_depend_on_the_order_of_updates() -> None:
    """Their rounding is random: a function of seed, step and place, not of when or in what pieces."""
    settings = {"moment_dtype": "bfloat16", "lr_factors": {"mlp": 0.5}}
    one = trained("llama", 5, 1, None, update="sync", **settings)
    for update, lanes in (("deferred", "adversarial"), ("eager", "inline")):
        assert same(trained("llama", 5, 1, None, update=update, lanes=lanes, **settings)[1], one[1])
    assert not same(trained("llama", 5, 1, None, update="sync", seed=7, **settings)[1], one[1])


# What overlap is worth, by the schedule's own simulator.


def step_seconds(update: str, optimize: float) -> float:
    """A step of 32 layers on costs of an 8 B model at 16 K tokens: milliseconds of one layer, and of
    head and embedding table beside it."""
    units = frozenset(range(1, 35))
    plan = StepSpec(32, units, units, 34, 1, 3, 2, update=update)
    costs = {"U": 8, "F": 11, "L": 70, "B": 33, "D": 9, "N": 0.1, "O": optimize}
    pending = plan.trainable if update == "deferred" else ()
    return simulate(build(plan, 1, pending), lambda op: costs[op.kind] * 1e-3).seconds


def test_deferred_updates_cost_no_more_than_eager_ones() -> None:
    """With exact clipping, at most 2 % more than without, as long as the update fits inside the forward."""
    for optimize in (2.0, 6.0, 10.0):
        deferred, eager = step_seconds("deferred", optimize), step_seconds("eager", optimize)
        assert deferred <= 1.02 * eager, f"{deferred / eager:.3f} at {optimize} ms a layer"
        assert step_seconds("sync", optimize) > eager + 20 * optimize * 1e-3
    # The negative control: an update of three times the forward pass cannot hide in it.
    assert step_seconds("deferred", 33.0) > 1.2 * step_seconds("eager", 33.0)


def test_a_simulation_follows_lanes_and_waits() -> None:
    plan = StepSpec(2, frozenset({1, 2, 3, 4}), frozenset({1, 2, 3, 4}), 4, 2)
    ops = build(plan)
    done = simulate(ops, lambda op: 1.0)
    lanes: dict[Lane, float] = {}
    for op, start, end in done.spans:
        assert start >= lanes.get(op.lane, 0.0) and end == start + 1.0
        lanes[op.lane] = end
    assert done.seconds == max(lanes.values()) < len(ops)
    assert busy_seconds(done.spans)["compute"] == sum(op.lane is Lane.COMPUTE for op in ops)
    # Inputs of two micro-batches of both layers, kept from forward to backward, and the head's of the one
    # that passes the turn.
    sizes = simulate(
        ops, lambda op: 1.0, num_bytes=lambda b, op: ("device", 10) if b.region == "input" else None
    )
    assert sizes.peaks == {"device": 10 * (2 * 2 + 1)}
    with pytest.raises(ValueError, match="costs are 0 or more"):
        simulate(ops, lambda op: -1.0)
