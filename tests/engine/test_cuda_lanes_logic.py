"""The threads, waits and failures of `CudaLanes`, without a GPU: CUDA's streams are replaced."""

from __future__ import annotations

import _thread
import gc
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from fake_cuda import Watch
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.engine import lanes
from horizon_lm.engine.lanes import CudaLanes, InlineLanes, choose_lanes
from horizon_lm.errors import ConfigError
from horizon_lm.schedule import Lane, StepSpec, build, derive_waits
from sizes import SOAK

CPU = torch.device("cpu")
PLAN = StepSpec(
    layers=4,
    uploaded=frozenset(range(1, 6)),
    trainable=frozenset(range(1, 6)),
    embedding_unit=5,
    micro_batches=3,
)
OPS = build(PLAN)
WAITS = derive_waits(OPS)

pytestmark = pytest.mark.usefixtures("fake_cuda")


def _threads() -> list[str]:
    """Lane threads that are left a moment after their lanes were collected."""
    names, deadline = {f"horizon-{lane}" for lane in Lane}, time.monotonic() + 5
    gc.collect()  # an error refers to the run that raised it
    while (
        left := [t.name for t in threading.enumerate() if t.name in names]
    ) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


@pytest.mark.parametrize("seed", range(5))
def test_order(seed: int) -> None:
    chance = random.Random(seed)
    done: list[int] = []

    def execute(i: int) -> None:
        assert threading.current_thread().name == f"horizon-{OPS[i].lane}"
        assert all(j in done for j in WAITS[i])
        time.sleep(chance.random() * 1e-3)
        done.append(i)

    CudaLanes(CPU).run(OPS, WAITS, range(len(OPS)), execute)
    assert sorted(done) == list(range(len(OPS)))
    for lane in Lane:
        mine = [i for i in done if OPS[i].lane is lane]
        assert mine == sorted(mine)
    assert not _threads()


def test_two_ranges_and_their_spans() -> None:
    middle = next(i for i, op in enumerate(OPS) if op.kind == "N")
    both = CudaLanes(CPU)
    for indices in (range(middle), range(middle, len(OPS))):
        both.run(OPS, WAITS, indices, lambda i: time.sleep(1e-4), record=True)
        assert {span[0] for span in both.spans} == {OPS[i] for i in indices}
        assert all(0 <= start < end for _, start, end in both.spans)
    both.run(OPS, WAITS, range(middle), lambda i: None)
    assert both.spans == []


@pytest.mark.parametrize("kind", "UFLBDNO")
@pytest.mark.parametrize("last", [False, True])
def test_failure_surfaces(kind: str, last: bool) -> None:
    """Whichever lane fails, the caller gets that error soon, and no lane goes on."""
    places = [i for i, op in enumerate(OPS) if op.kind == kind]
    victim = places[-1 if last else 0]
    started = []

    def execute(i: int) -> None:
        started.append(i)
        if i == victim:
            raise ValueError(f"op {OPS[i]} failed")

    begin = time.perf_counter()
    with pytest.raises(ValueError, match=f"op {OPS[victim]} failed"):
        CudaLanes(CPU).run(OPS, WAITS, range(len(OPS)), execute)
    assert time.perf_counter() - begin < 5
    assert not _threads()
    later = [i for i in started if OPS[i].lane is OPS[victim].lane and i > victim]
    assert not later
    # The same object runs the next step.
    CudaLanes(CPU).run(OPS, WAITS, range(len(OPS)), lambda i: None)


def test_interrupt_stops_all_lanes() -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only a main thread is interrupted")
    started = []

    def execute(i: int) -> None:
        started.append(i)
        if len(started) == 20:
            _thread.interrupt_main()
        time.sleep(5e-3)

    # A process that was started in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            CudaLanes(CPU).run(OPS, WAITS, range(len(OPS)), execute)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not _threads()
    assert len(started) < len(OPS)


def test_all_threads_failing_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == f"horizon-{Lane.COMPUTE}":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        CudaLanes(CPU).run(OPS, WAITS, range(len(OPS)), lambda i: None)
    assert not _threads()


def test_inline_lanes_settle_before_host_ops(fake_cuda: list[str]) -> None:
    """On CUDA, the CPU's own ops come after all copies that were issued; on the CPU nothing waits."""
    seen: list[tuple[str, int]] = []
    device = torch.device("cuda", 0)
    InlineLanes(device).run(OPS, WAITS, range(len(OPS)), lambda i: seen.append((str(OPS[i]), len(fake_cuda))))
    norm = [op.kind for op in OPS].index("N")
    assert seen[norm][1] > seen[norm - 1][1]
    fake_cuda.clear()
    InlineLanes().run(OPS, WAITS, range(len(OPS)), lambda i: None)
    InlineLanes(CPU).run(OPS, WAITS, range(len(OPS)), lambda i: None, record=True)
    assert fake_cuda == []


def test_lanes_that_a_device_cannot_have() -> None:
    with pytest.raises(ConfigError, match="lanes='cuda' do not run on device='cpu'"):
        choose_lanes("cuda", CPU)


# Real models.


def _threaded(name: str, dtype: str = "float32", **settings: Any) -> hz.HostModel:
    """A model that is run by CudaLanes on the CPU, with slots of their own as on a GPU."""
    model = from_pretrained(zoo.build(name), device="cpu", dtype=dtype, lanes="adversarial", **settings)
    model.engine.lanes = CudaLanes(CPU)
    return model


def _step(model: hz.HostModel, batches: list[dict]) -> tuple[float, float, dict[str, torch.Tensor]]:
    out = model.forward_backward(batches)
    gradients = {name: g.clone() for name, g in model.named_gradients()}
    return out.loss, model.step(lr=1e-3, max_grad_norm=0.5).grad_norm, gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3_text", "mixtral-aux", "gpt2"])
def test_same_bits_as_in_order(name: str, dtype: str) -> None:
    batches = [zoo.batch(name, seed=seed) for seed in range(3)]
    inline = hz.HostModel.from_pretrained(zoo.build(name), device="cpu", dtype=dtype, lanes="inline")
    threaded = _threaded(name, dtype, slots=3 if name == "gpt2" else 2)
    for _ in range(3):
        loss, norm, gradients = _step(inline, batches)
        other_loss, other_norm, other_gradients = _step(threaded, batches)
        assert (loss, norm) == (other_loss, other_norm)
        for key, gradient in gradients.items():
            assert torch.equal(gradient, other_gradients[key]), key
    for (key, one), (_, two) in zip(inline.named_parameters(), threaded.named_parameters(), strict=True):
        assert torch.equal(one, two), key


POLICIES: dict[str, dict[str, Any]] = {
    "eager": {"update": "eager", "max_grad_norm": None},
    "keep": {"activations": "keep"},
    "spilled": {"boundaries": "host"},
    "blocks": {"checkpoint_interval": 2, "boundaries": "host"},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_update_modes_and_policies_in_threads(name: str, policy: str) -> None:
    settings = POLICIES[policy]
    inline = hz.HostModel.from_pretrained(zoo.build(name), device="cpu", dtype="bfloat16", **settings)
    threaded = _threaded(name, "bfloat16", **settings)
    for step in range(6):
        batches = [zoo.batch(name, seed=10 * step + m) for m in range(1 + step % 2 * 2)]
        one, two = (model.train_step(batches, lr=1e-3) for model in (inline, threaded))
        assert (one.loss, one.grad_norm) == (two.loss, two.grad_norm)
    for (key, mine), (_, other) in zip(inline.named_parameters(), threaded.named_parameters(), strict=True):
        assert torch.equal(mine, other), key


@pytest.mark.parametrize("kind", "UFLBD")
def test_a_lane_that_fails_leaves_the_last_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deferred updates of the step before run beside the op that fails: each is made once, then or later."""
    model, twin = _threaded("llama"), hz.HostModel.from_pretrained(zoo.build("llama"), "cpu", "float32")
    batches = [[zoo.batch("llama", seed=10 * step + m) for m in range(2)] for step in range(3)]
    for one in (model, twin):
        one.train_step(batches[0], lr=1e-3)
    honest, count = model.engine.ops.functions[kind], 0

    def fail_in_the_third(step: Any, op: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise torch.OutOfMemoryError("no room")
        honest(step, op)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setitem(model.engine.ops.functions, kind, fail_in_the_third)
        model.train_step(batches[1] * 2, lr=1e-3)
    for one in (model, twin):
        one.train_step(batches[2], lr=1e-3)
    for (key, mine), (_, other) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(mine, other), key


# Races: accesses to slots that the waits do not order, whatever a GPU makes of it.


def _watched(
    model: hz.HostModel, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, repeats: int = 2
) -> Watch:
    """What the analysis says of some runs in a row."""
    engine = model.engine
    runs = [*engine.ops.weight_slots._buffers, *engine.ops.gradient_slots._buffers]
    runs += [buffer for buffer in engine.ops.boundary_slots._buffers if buffer.numel()]
    real = lanes._CudaRun._lane
    with Watch(runs) as watch, monkeypatch.context() as patch:

        def lane(this: lanes._CudaRun, name: Lane, mine: list[int]) -> None:
            with watch.lane():
                real(this, name, mine)

        patch.setattr(lanes._CudaRun, "_lane", lane)
        for _ in range(repeats):
            run()
    return watch


def test_no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, policy in [("llama-tied", {}), ("mixtral-aux", {}), *(("llama", p) for p in POLICIES.values())]:
        batches = [zoo.batch(name, seed=seed) for seed in range(2)]
        model = _threaded(name, **policy)
        model.train_step(batches, lr=1e-3)  # boundary slots are made when they are first needed
        watch = _watched(model, lambda m=model, b=batches: m.train_step(b, lr=1e-3), monkeypatch)
        assert not watch.errors, str(watch.errors[0])


def test_every_wait_between_streams_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without any one of the waits, two ops race for a slot, and it is seen.

    The threads still issue in the right order; what is dropped is the wait of the stream alone.
    """
    model = _threaded("llama")
    batches = [zoo.batch("llama", seed=seed) for seed in range(2)]
    model.forward_backward(batches)
    schedules, key = model.engine._schedules, (model.engine.spec(2), False)
    honest = schedules[key]
    ops, waits = honest.ops, honest.waits
    pairs = [
        (i, j)
        for i, targets in enumerate(waits)
        for j in targets
        if Lane.UPDATE not in (ops[i].lane, ops[j].lane)
    ]
    assert len(pairs) >= 20  # the head waits for no slot of the layers
    if not SOAK:  # of each kind of wait the first and the last
        kinds = {(ops[i].kind, ops[j].kind): (i, j) for i, j in pairs}
        firsts = {(ops[i].kind, ops[j].kind): (i, j) for i, j in reversed(pairs)}
        assert len(kinds) >= 6
        pairs = sorted({*kinds.values(), *firsts.values()})
    real = lanes._CudaRun._wait_for
    for later, earlier in pairs:

        def wait(
            run: lanes._CudaRun, i: int, stream: object, later: int = later, earlier: int = earlier
        ) -> bool:
            if i == later:
                run.issued[earlier].wait()
            return real(run, i, stream)

        fewer = list(waits)
        fewer[later] = tuple(j for j in waits[later] if j != earlier)
        schedules[key] = honest._replace(waits=fewer)
        with monkeypatch.context() as patch:
            patch.setattr(lanes._CudaRun, "_wait_for", wait)
            watch = _watched(model, lambda: model.forward_backward(batches), monkeypatch, repeats=1)
        assert watch.errors, f"{ops[later]} without its wait for {ops[earlier]}"


def test_layers_compile_in_the_compute_lane() -> None:
    """In a thread that is not the main one, and under streams; the bits are those of uncompiled layers."""
    data = [zoo.batch("llama", batch_size=1, length=9, seed=m) for m in range(2)]
    found = []
    for compiles in (False, True):
        model = from_pretrained(
            zoo.build("llama"), device="cpu", dtype="float32", lanes="inline", skip_memory_check=True
        )
        model.engine.lanes = CudaLanes(CPU)
        if compiles:
            model.skeleton.compile_layers(True, model.engine.ops, "aot_eager")
        model.forward_backward(data)
        found.append({name: value.clone() for name, value in model.named_gradients()})
        assert not model.engine.ops.notes and len(model.engine.ops.remarks) == compiles
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
