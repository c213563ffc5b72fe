"""The embedding table is uploaded as a unit; rows are looked up and their gradients summed on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from horizon_lm.config.data import IGNORED
from horizon_lm.engine import ends
from horizon_lm.engine.ops import Ops
from horizon_lm.schedule import Lane, build
from plain_gradients import relative
from schedule_authorities import EVERY

pytestmark = pytest.mark.usefixtures("one_thread")

# llama: untied; gemma3_text: tied, its embedding module scales; gpt2: tied, its prologue adds positions
NAMES = ("llama", "llama-tied", "gemma3_text", "gpt2")
PADDING = 3


def streamed(
    name: str, dtype: str = "float32", *, lanes: str = "adversarial", **settings: Any
) -> hz.HostModel:
    model = zoo.build(name)
    model.get_input_embeddings().padding_idx = PADDING
    return from_pretrained(model, device="cpu", dtype=dtype, lanes=lanes, skip_memory_check=True, **settings)


def batches_of(name: str, count: int) -> list[dict[str, torch.Tensor]]:
    found = [zoo.batch(name, seed=seed) for seed in range(count)]
    for batch in found:
        batch["input_ids"][:, 0] = PADDING
    return found


def plain_table_gradient(name: str, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """That of the mean loss over all targets, by transformers and autograd; fp64, so that sums are exact."""
    model = zoo.build(name).double()
    embedding = model.get_input_embeddings()
    embedding.padding_idx = PADDING
    targets = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
    for batch in batches:
        model(**batch, num_items_in_batch=targets).loss.backward()
    return embedding.weight.grad


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_summed_over_micro_batches(name: str, count: int) -> None:
    """Against transformers in fp64, within 1e-5; without one micro-batch it is another gradient. The row of
    padding has a gradient only from a head that shares it."""
    batches = batches_of(name, count)
    wanted = plain_table_gradient(name, batches)
    for settings in (
        {},
        {"loss_chunk_tokens": 7},
        {"grad_slots": 1, "update": "eager", "max_grad_norm": None},
    ):
        model = streamed(name, **{"update": "sync"} | settings)
        if "grad_slots" in settings:
            before = model.store.master(model.skeleton.anatomy.embedding)
            model.train_step(batches, lr=1e-3)
            after = model.store.master(model.skeleton.anatomy.embedding)
            assert ((after != before).any(1) >= (wanted.abs() > 1e-6).any(1)).all()
            continue
        model.forward_backward(batches)
        found = dict(model.named_gradients())[model.skeleton.anatomy.embedding]
        assert relative(found.double(), wanted) < 1e-5
        assert bool(found[PADDING].any()) == model.skeleton.anatomy.tied
    if count > 1:  # the negative control
        assert relative(plain_table_gradient(name, batches[1:]).float(), wanted) > 0.1


def test_a_sum_that_loses_rows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Ops._add_rows

    def last_alone(self: Ops, step: Any, op: Any) -> None:
        total = step.tensor("row_grads", -1, -1)
        total.zero_()
        honest(self, step, op)

    batches = batches_of("llama", 3)
    wanted = plain_table_gradient("llama", batches)
    monkeypatch.setattr(Ops, "_add_rows", last_alone)
    model = streamed("llama")
    model.forward_backward(batches)
    assert relative(dict(model.named_gradients())[model.skeleton.anatomy.embedding].double(), wanted) > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_slots_and_orders_give_the_bits_of_the_store_itself(name: str, frozen: bool, dtype: str) -> None:
    """With copies in slots, in a random order, and in place on the CPU; frozen or not, evaluation too."""
    freeze = {"freeze": ["embed_tokens|wte"]} if frozen else {}
    results = []
    for lanes in ("inline", "adversarial"):
        model = streamed(name, dtype, lanes=lanes, update="sync", loss_chunk_tokens=7, **freeze)
        model.forward_backward(batches_of(name, 3))
        gradients = {key: gradient.clone() for key, gradient in model.named_gradients()}
        norm = model.step(lr=1e-3).grad_norm
        results.append((gradients, norm, model.evaluate(batches_of(name, 2)).loss))
    (first, norm, loss), (second, *others) = results
    assert [norm, loss] == others and first.keys() == second.keys()
    assert all(torch.equal(gradient, second[key]) for key, gradient in first.items())


# What an upload, a lane, and a prologue cost.


def test_only_uploads_and_updates_touch_the_table_on_the_host() -> None:
    assert "host" not in set(Lane)
    for plan in EVERY[::40]:
        home = {"weights", "grads", "state"}
        touching = {
            op.kind
            for op in build(plan)
            for buffer in op.reads | op.writes
            if buffer.region in home and buffer.index == plan.embedding_unit
        }
        assert touching <= set("UDNO")


@pytest.mark.parametrize(("name", "uploads"), [("llama", 2), ("llama-tied", 1)])
def test_a_tied_table_and_its_head_are_one_upload_and_one_download(name: str, uploads: int) -> None:
    model = streamed(name, lanes="inline")
    model.forward_backward(batches_of(name, 3), record=True)
    head = model.skeleton.head
    counts = Counter(op.kind for op, _, _ in model.timeline if op.unit >= head and op.kind in "UD")
    assert counts == {"U": uploads, "D": uploads}


@pytest.mark.parametrize(
    ("name", "noise", "again"),
    [("llama", None, 0), ("gemma3_text", None, 0), ("llama", 5.0, 1), ("gpt2", None, 1)],
)
def test_a_prologue_that_changes_nothing_has_no_backward(
    name: str, noise: float | None, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, runs = ends.run_prologue, []

    def counted(*arguments: Any) -> Any:
        runs.append(1)
        return honest(*arguments)

    monkeypatch.setattr(ends, "run_prologue", counted)
    model = streamed(name, neftune_noise_alpha=noise)
    model.forward_backward(batches_of(name, 2))
    assert len(runs) == 2 * (1 + again)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._overloadpacket.__name__)
        if func._overloadpacket is torch.ops.aten.index:
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            self.seen |= {"nonzero"} if masks else set()
        return func(*args, **kwargs or {})


# Each makes the host wait for the device: its result, or the size of its result, depends on values.
WAITING = {"_unique2", "unique_dim", "nonzero", "masked_select", "_local_scalar_dense", "is_nonzero"}


@contextmanager
def operations_of_ends(model: hz.HostModel) -> Iterator[_Operations]:
    """What the ops of the prologue do, apart from the prologue itself."""
    mode, functions = _Operations(), dict(model.engine.ops.functions)

    def watched(kind: str) -> Any:
        def run(step: Any, op: Any) -> None:
            if op.unit:
                functions[kind](step, op)
                return
            with mode:
                functions[kind](step, op)

        return run

    model.engine.ops.functions = functions | {kind: watched(kind) for kind in "FB"}
    yield mode
    model.engine.ops.functions = functions


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_nothing_on_the_device_depends_on_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows a step uses is found on the host before it begins: with padding, several micro-batches."""
    model, batches, honest = streamed(name), batches_of(name, 3), ends.run_prologue

    def unseen(*arguments: Any) -> Any:
        with _disable_current_modes():
            return honest(*arguments)

    monkeypatch.setattr(ends, "run_prologue", unseen)
    with operations_of_ends(model) as mode:
        model.forward_backward(batches)
    assert {"index_select", "embedding", "embedding_dense_backward", "index_copy_"} <= mode.seen
    assert not mode.seen & WAITING
    with _Operations() as host:  # the negative control
        ends.Rows.of([batch["input_ids"] for batch in batches], model.skeleton, model.engine.pinned)
    assert host.seen & WAITING


def test_the_rows_of_a_step() -> None:
    model = streamed("llama")
    pool = model.engine.pinned
    ids = [torch.tensor([[5, 3, 5]]), torch.tensor([[9, 0, 3]])]
    rows = ends.Rows.of(ids, model.skeleton, pool)
    assert rows.numbers.tolist() == [0, 3, 5, 9] and rows.padding == 1
    assert all(
        torch.equal(rows.numbers[places], given) for places, given in zip(rows.places, ids, strict=True)
    )
    assert ends.Rows.of(ids[:1], model.skeleton, pool).padding == 0
    assert ends.Rows.of([torch.tensor([[5]])], model.skeleton, pool).padding is None


def test_on_the_cpu_the_tables_gradient_is_summed_at_home() -> None:
    """In the store's own memory: no slot is allocated for it, whatever the number of micro-batches."""
    for name, dtype in (("llama", "float32"), ("llama-tied", "float32"), ("llama", "bfloat16")):
        model = streamed(name, dtype, lanes="inline")
        model.forward_backward(batches_of(name, 3))
        slots, ops = model.engine.ops.gradient_slots, model.engine.ops
        assert ops.weight_slots.num_bytes == 0
        if dtype == "float32":
            assert slots.num_bytes == 0
        else:  # of layers and head, whose gradients are sums
            assert slots.num_bytes > 0
            run = ops.updates.new_gradient(model.engine.gradients, model.skeleton.embedding_unit, -1)
            assert run.at_home
