"""Pinned memory: whole units in one registration each, nothing left behind, nothing pinned in later steps."""

from __future__ import annotations

import _thread
import errno
import gc
import random
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from fake_cuda import fake_cuda as fake_cuda
from fake_pinning import CUDA, Runtime
from fake_pinning import pinning as pinning
from horizon_lm.engine.lanes import CudaLanes
from horizon_lm.errors import DoesNotFitError
from horizon_lm.memory import arena, registration
from horizon_lm.memory.layout import UnitLayout, lay_out
from horizon_lm.memory.pinned import PinnedPool
from horizon_lm.memory.regions import StoreSpec, predict_bytes
from horizon_lm.memory.store import HostStore

BF16, FP32 = torch.bfloat16, torch.float32
KB = 1 << 10

pytestmark = pytest.mark.usefixtures("one_thread")


def units_of(*sizes: int, wide: int = 0) -> list[UnitLayout]:
    rows = [("w", (wide,), True, FP32)] if wide else []
    return [
        lay_out(f"u{i}", [*rows, ("p", (size,), True, BF16)] if size else [], BF16)
        for i, size in enumerate(sizes)
    ]


# Registrations of a store.

SIZES = (3000, 20_000, 0, 70_000, 128, 128, 31_000)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "_PIECE_BYTES", 64 * KB)


@pytest.mark.usefixtures("small_pieces")
def test_each_unit_lies_in_one_registration(pinning: Runtime) -> None:
    """No copy crosses two; what is not copied to the device is not pinned; sizes are those predicted."""
    store = HostStore(units_of(*SIZES), StoreSpec(BF16), pin_for=CUDA)
    assert store.num_bytes == predict_bytes(store.units, store.spec)
    copied = [store.run(region, u) for region in ("weights", "grads") for u, size in enumerate(SIZES) if size]
    assert {pinning.holding(run) for run in copied} == {1} == {pinning.touching(run) for run in copied}
    others = [store.run(r, u) for r in ("residual", "exp_avg", "exp_avg_sq") for u in range(len(SIZES))]
    assert not any(pinning.touching(run) for run in others)
    blocks = {run.untyped_storage().data_ptr(): run.untyped_storage().nbytes() for run in copied}
    assert len(blocks) == len(pinning.registered) == 2 * 3 and set(blocks) == set(pinning.registered)
    assert sum(blocks.values()) == sum(store.num_bytes[region] for region in ("weights", "grads"))
    assert all(size == blocks[a] + -blocks[a] % 4096 for a, size in pinning.registered.items())


def test_a_unit_that_is_cut_would_be_seen(pinning: Runtime) -> None:
    """The negative control: pieces of a fixed size cut units."""
    block = arena.allocate(256 * KB)
    registration.pin(list(block.split(64 * KB)), CUDA)
    run = block[60 * KB : 70 * KB]
    assert (pinning.holding(run), pinning.touching(run)) == (0, 2)


def test_on_the_cpu_nothing_is_pinned(pinning: Runtime) -> None:
    for device in (None, torch.device("cpu")):
        HostStore(units_of(*SIZES, wide=128), StoreSpec(BF16), pin_for=device)
    assert not pinning.pins


def test_residuals_of_wide_parameters_are_pinned(pinning: Runtime) -> None:
    """Their pages alone: those of neighbours that share a page are one registration."""
    sizes = (100_000, 128, 128, 100_000)
    store = HostStore(units_of(*sizes, wide=256), StoreSpec(BF16), pin_for=CUDA)
    wide = [store.wide_residual(unit) for unit in range(len(sizes))]
    assert {w.numel() for w in wide} == {256} and {pinning.holding(w) for w in wide} == {1}
    residual = store.run("residual", 0).untyped_storage()
    places = range(residual.data_ptr(), residual.data_ptr() + residual.nbytes())
    pages = [size for address, size in pinning.registered.items() if address in places]
    assert len(pages) == 2  # of the first unit, and of the others, which begin in one page
    assert sum(pages) < 0.1 * residual.nbytes()
    # The control: a model without such parameters.
    plain = HostStore(units_of(*sizes), StoreSpec(BF16), pin_for=CUDA)
    assert not any(pinning.touching(plain.run("residual", unit)) for unit in range(len(sizes)))


@pytest.mark.usefixtures("small_pieces")
def test_what_is_released_is_unregistered(pinning: Runtime) -> None:
    store = HostStore(units_of(*SIZES, wide=128), StoreSpec(BF16), pin_for=CUDA)
    kept = store.run("weights", 3)[5:9]
    del store
    gc.collect()
    assert len(pinning.registered) == 1 and pinning.holding(kept) == 1
    del kept
    gc.collect()
    assert not pinning.registered and pinning.unknown == 0


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("victim", [1, 3])
def test_a_refusal_leaves_nothing_registered(pinning: Runtime, victim: int) -> None:
    pinning.refuses = lambda call: call == victim
    message = r"refused to pin .* \(cudaHostRegister: out of memory\)"
    with pytest.raises(DoesNotFitError, match=message) as caught:
        HostStore(units_of(*SIZES), StoreSpec(BF16), pin_for=CUDA)
    assert caught.value.exit_code == 3 and caught.value.hint is not None
    assert len(pinning.pins) >= victim and not pinning.registered
    pinning.refuses = lambda call: False
    del caught
    gc.collect()  # nothing is unregistered twice
    assert pinning.unknown == 0
    # The control: the call itself is sound.
    store = HostStore(units_of(*SIZES), StoreSpec(BF16), pin_for=CUDA)
    assert len(pinning.registered) == 6 and store.has("grads")


def test_an_interrupt_leaves_nothing_registered(pinning: Runtime) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only a main thread is interrupted")

    def interrupt(call: int) -> bool:
        if call == 3:
            _thread.interrupt_main()
        return False

    pinning.refuses = interrupt
    blocks = [arena.allocate(KB) for _ in range(64)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            registration.pin(blocks, CUDA)
            threading.Event().wait(5)  # it may come as the call returns
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(thread.name.startswith("horizon-pin") for thread in threading.enumerate())
    del blocks
    gc.collect()
    assert not pinning.registered and len(pinning.pins) >= 3


def test_pieces_are_registered_at_once(pinning: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls meet: one after the other, the first would wait in vain."""
    monkeypatch.setattr(registration, "usable_cores", lambda: 2)
    both = threading.Barrier(2, timeout=30)
    register = pinning.cudaHostRegister

    def meet(address: int, num_bytes: int, flags: int) -> int:
        both.wait()
        return register(address, num_bytes, flags)

    monkeypatch.setattr(pinning, "cudaHostRegister", meet)
    arena.allocate_runs([1 << 30, KB], pin_for=torch.device("cpu"))  # the control: nothing registers
    blocks = [arena.allocate(KB) for _ in range(2)]
    registration.pin(blocks, CUDA)
    monkeypatch.setattr(registration, "usable_cores", lambda: 1)
    both = threading.Barrier(2, timeout=0.2)
    with pytest.raises(threading.BrokenBarrierError):
        registration.pin([arena.allocate(KB) for _ in range(2)], CUDA)


# Touching.


def test_pages_are_touched_only_if_they_are_pinned(pinning: Runtime) -> None:
    def resident() -> int:
        return psutil.Process().memory_info().rss

    before = resident()
    lazy = arena.allocate(64 << 20)
    assert resident() - before < 8 << 20
    pinned = arena.allocate(64 << 20, pin_for=CUDA)
    assert resident() - before >= 60 << 20
    assert lazy.numel() == pinned.numel() and not pinned.any()


def test_an_older_kernel_has_its_pages_written(pinning: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_MADV_POPULATE_WRITE", 99)
    before = psutil.Process().memory_info().rss
    block = arena.allocate(32 << 20, pin_for=CUDA)
    assert psutil.Process().memory_info().rss - before >= 30 << 20 and not block.any()


def test_memory_that_is_not_there_is_one_line(pinning: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_madvise", lambda *_: False)
    monkeypatch.setattr(registration.ctypes, "get_errno", lambda: errno.ENOMEM)
    with pytest.raises(DoesNotFitError, match=r"refused 32\.8 kB of host memory") as caught:
        arena.allocate(32 * KB, pin_for=CUDA)
    assert caught.value.hint is not None and not pinning.pins


def test_chunks_cover_each_page_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_TOUCHED_BYTES", 4 * 4096)
    pieces = [registration._Piece(4096 * a, 4096 * b, []) for a, b in ((1, 2), (3, 16), (16, 23))]
    chunks = list(registration._chunks(pieces))
    pages = [page for start, size in chunks for page in range(start // 4096, (start + size) // 4096)]
    assert pages == [1, *range(3, 23)]
    assert max(size for _, size in chunks) == 4 * 4096


# The pool.


def bytes_of(pool: PinnedPool) -> list[int]:
    pool.give_back()
    return [block.nbytes for block in pool._free]


def take(pool: PinnedPool, *sizes: int) -> list[torch.Tensor]:
    pool.give_back()
    return [pool.reserve(torch.Size([size]), torch.uint8) for size in sizes]


def test_blocks_are_exact_and_best_fit_is_chosen(pinning: Runtime) -> None:
    pool = PinnedPool(CUDA)
    first = take(pool, 1000, 5000, 12_345)
    assert bytes_of(pool) == [1000, 5000, 12_345] and len(pinning.pins) == 3
    again = take(pool, 4999, 12_345, 3)
    assert [t.data_ptr() for t in again] == [first[1].data_ptr(), first[2].data_ptr(), first[0].data_ptr()]
    assert len(pinning.pins) == 3
    take(pool, 6000, 6000)  # the second replaces the 5000
    assert bytes_of(pool) == [1000, 6000, 12_345] and len(pinning.pins) == 4
    del first, again
    gc.collect()
    assert len(pinning.registered) == 3


@pytest.mark.parametrize("recycled", [True, False])
def test_recycled_blocks_are_freed_no_sooner_than_they_are_given_back(
    recycled: bool, pinning: Runtime
) -> None:
    """A copy may still read the block that a larger one replaces. The control: blocks that are given back."""
    pool = PinnedPool(CUDA)
    pool.reserve(torch.Size([1000]), torch.uint8)
    (pool.recycle if recycled else pool.give_back)()
    pool.reserve(torch.Size([2000]), torch.uint8)
    assert len(pinning.registered) == (2 if recycled else 1)
    assert pool.num_bytes == (3000 if recycled else 2000)
    assert bytes_of(pool) == [2000] and len(pinning.registered) == 1


def test_taken_tensors_are_copies_of_their_own(pinning: Runtime) -> None:
    pool = PinnedPool(CUDA)
    rows = torch.arange(12).view(3, 4)
    values = [rows, rows.T, rows[:0], torch.tensor(2.5), rows.bool()]
    found = [pool.take(value) for value in values]
    for value, copy in zip(values, found, strict=True):
        assert torch.equal(value, copy) and value.dtype == copy.dtype and value.shape == copy.shape
        assert copy.is_contiguous() and (not copy.numel() or pinning.holding(copy) == 1)
    rows.zero_()
    assert int(found[0].sum()) == 66


def test_on_the_cpu_the_pool_gives_what_it_was_given(pinning: Runtime) -> None:
    value = torch.arange(3)
    assert PinnedPool(torch.device("cpu")).take(value) is value and not pinning.pins


@pytest.mark.parametrize("seed", range(5))
def test_a_ragged_stream_does_not_grow_the_pool(seed: int, pinning: Runtime) -> None:
    """As many blocks as one step took at most, none larger than the largest; what was seen is served."""
    chance = random.Random(seed)
    steps = [[chance.randint(1, 9000) for _ in range(chance.randint(1, 6))] for _ in range(30)]
    pool = PinnedPool(CUDA)
    for number, step in enumerate(steps):
        found = take(pool, *step)
        places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in found)
        assert all(end <= start for (_, end), (start, _) in zip(places, places[1:], strict=False))
        seen = steps[: number + 1]
        assert len(bytes_of(pool)) == max(map(len, seen))
        assert max(bytes_of(pool)) == max(max(s) for s in seen)
        del found
    before = len(pinning.pins)
    assert before < sum(map(len, steps)) / 2
    chance.shuffle(steps)
    for step in steps:
        chance.shuffle(step)
        take(pool, *step)
    assert len(pinning.pins) == before
    gc.collect()
    assert len(pinning.registered) == max(map(len, steps))
    take(pool, 9001)  # the negative control: a size never seen
    assert len(pinning.pins) == before + 1


# The engine.


@pytest.fixture
def pinned_model(pinning: Runtime, fake_cuda: list[str]) -> Iterator[Any]:
    """Build a model on the CPU that runs CudaLanes and pins as for a CUDA device."""

    def build(**settings: Any) -> hz.HostModel:
        model = from_pretrained(
            zoo.build("llama"), device="cpu", dtype="bfloat16", lanes="adversarial", **settings
        )
        model.engine.lanes = CudaLanes(torch.device("cpu"))
        model.engine.pinned = PinnedPool(CUDA)
        model.engine.ops.boundary_slots._pool = PinnedPool(CUDA)
        return model

    yield build


def batches_of(*lengths: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch("llama", length=length, seed=seed + m) for m, length in enumerate(lengths)]


LENGTHS = [(8, 5), (5, 8), (6, 7), (8, 8), (5,)]


@pytest.mark.parametrize("policy", [{}, {"boundaries": "host"}, {"update": "eager", "max_grad_norm": None}])
def test_nothing_is_pinned_in_later_steps(
    policy: dict[str, Any], pinned_model: Any, pinning: Runtime
) -> None:
    """Gradient accumulation, and lengths that were seen before in another order."""
    model = pinned_model(**policy)
    model.train_step(batches_of(8, 8), lr=1e-3)
    first = len(pinning.pins)
    # Ids, labels, targets and rows of the table for each micro-batch, and the numbers of these rows.
    assert first >= 2 * 4 + 1
    if policy.get("boundaries") == "host":
        assert first > 2 * 4 + 1 + 2
        assert model.memory_bytes()["boundaries"] > 0
    for step, lengths in enumerate(LENGTHS):
        model.train_step(batches_of(*lengths, seed=step), lr=1e-3)
    model.evaluate(batches_of(7, 4))
    model.flush()
    assert len(pinning.pins) == first


def test_a_planted_pin_is_counted(
    pinned_model: Any, pinning: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: an op that pins for itself, and a length that is new."""
    model = pinned_model()
    model.train_step(batches_of(8, 8), lr=1e-3)
    first = len(pinning.pins)
    upload = model.engine.ops.functions["U"]

    def pins(step: Any, op: Any) -> None:
        torch.zeros(1).pin_memory()
        torch.empty(1, pin_memory=True)
        upload(step, op)

    with monkeypatch.context() as patch:
        patch.setitem(model.engine.ops.functions, "U", pins)
        model.train_step(batches_of(8, 8), lr=1e-3)
    planted = len(pinning.pins)
    assert planted > first and set(pinning.pins[first:]) == {"pin_memory", "empty"}
    model.train_step(batches_of(9, 8), lr=1e-3)
    assert len(pinning.pins) > planted


@pytest.mark.parametrize("policy", [{}, {"boundaries": "host"}])
def test_gradients_are_those_of_unpinned_steps(policy: dict[str, Any], pinned_model: Any) -> None:
    model, plain = (
        pinned_model(**policy),
        hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", dtype="bfloat16", **policy),
    )
    for step, lengths in enumerate(LENGTHS):
        batches = batches_of(*lengths, seed=step)
        assert model.forward_backward(batches).loss == plain.forward_backward(batches).loss
        both = zip(model.named_gradients(), plain.named_gradients(), strict=True)
        assert all(torch.equal(one, two) for (_, one), (_, two) in both)
        model.evaluate(batches_of(8))  # takes the blocks of the step whose gradients wait
        for each in (model, plain):
            each.step(lr=1e-3)
    both = zip(model.named_parameters(), plain.named_parameters(), strict=True)
    assert all(torch.equal(one, two) for (_, one), (_, two) in both)


@pytest.mark.parametrize("recycle", [PinnedPool.recycle, PinnedPool.give_back])
def test_no_block_is_freed_between_rounds(
    recycle: Any, pinned_model: Any, pinning: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later round has longer inputs. The control: blocks that are given back between rounds."""
    model = pinned_model(boundaries="host", rounds=2)
    monkeypatch.setattr(PinnedPool, "recycle", recycle)
    honest, counts = PinnedPool.reserve, list[int]()

    def reserve(pool: PinnedPool, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        found = honest(pool, shape, dtype)
        counts.append(len(pinning.registered))
        return found

    monkeypatch.setattr(PinnedPool, "reserve", reserve)
    model.forward_backward(batches_of(4, 4, 8, 8))
    registered = counts[-1]
    assert (registered == len(pinning.pins)) == (recycle is not PinnedPool.give_back)


def test_blocks_given_back_too_early_would_be_seen(
    pinned_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the micro-batches of a step in one and the same block."""
    model, plain = pinned_model(), hz.HostModel.from_pretrained(zoo.build("llama"), "cpu", "bfloat16")
    honest = PinnedPool.reserve

    def hasty(pool: PinnedPool, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        found = honest(pool, shape, dtype)
        pool.give_back()
        return found

    monkeypatch.setattr(PinnedPool, "reserve", hasty)
    batches, found = batches_of(8, 8), None
    with suppress(IndexError):  # where targets overwrite ids: -100 is no token
        found = model.forward_backward(batches).loss
    assert found != plain.forward_backward(batches).loss


def test_no_source_pins_outside_of_the_arena() -> None:
    """torch's own pinned memory is rounded to powers of two, and allocated inside of steps."""
    package = Path(hz.__file__).parent
    users = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"\bpin_memory\b|\bcudaHostRegister\(", path.read_text(encoding="utf-8"))
    }
    assert users == {"memory/registration.py"}
