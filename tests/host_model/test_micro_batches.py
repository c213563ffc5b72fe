"""Micro-batches of every usual form give the same bits; what is none is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import zoo
from horizon_lm.errors import DataError
from python_calls import HALVES, MODEL, ROWS, host

pytestmark = pytest.mark.usefixtures("one_thread")


def loader() -> torch.utils.data.DataLoader:
    rows = [{name: value[i] for name, value in ROWS.items()} for i in range(4)]
    return torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


def each(convert: Callable[[torch.Tensor], Any]) -> list[dict[str, Any]]:
    return [{name: convert(value) for name, value in half.items()} for half in HALVES]


FORMS: dict[str, Callable[[], Any]] = {
    "a tuple": lambda: tuple(HALVES),
    "a generator": lambda: (half for half in HALVES),
    "an iterator": lambda: iter(HALVES),
    "a DataLoader": loader,
    "BatchEncodings": lambda: [BatchEncoding(half) for half in HALVES],
    "BatchEncodings with lists": lambda: [BatchEncoding(half) for half in each(torch.Tensor.tolist)],
    "nested lists": lambda: each(torch.Tensor.tolist),
    "tuples": lambda: each(lambda value: tuple(map(tuple, value.tolist()))),
    "lists of rows": lambda: each(list),
    "lists of arrays": lambda: each(lambda value: [row.numpy() for row in value]),
    "arrays": lambda: each(torch.Tensor.numpy),
    "read-only arrays": lambda: each(lambda value: np.broadcast_to(value.numpy(), value.shape)),
    "int32": lambda: each(torch.Tensor.int),
    "int16 arrays": lambda: each(lambda value: value.numpy().astype(np.int16)),
    "no mask": lambda: [half | {"attention_mask": None, "position_ids": None} for half in HALVES],
    "a mask of int64": lambda: [half | {"attention_mask": torch.ones(2, 20).long()} for half in HALVES],
    "a mask of bool": lambda: [half | {"attention_mask": torch.ones(2, 20).bool()} for half in HALVES],
    "a mask of lists": lambda: [half | {"attention_mask": [[1] * 20] * 2} for half in HALVES],
    "not contiguous": lambda: each(lambda value: value.t().contiguous().t()),
    "a column nobody gave": lambda: [half | {"token_type_ids": None} for half in HALVES],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_bits(form: str) -> None:
    """Of training, of gradients and of an evaluation."""
    plain, model = host(), host()
    assert ROWS.keys() == {"input_ids", "labels"}
    assert model.forward_backward(FORMS[form]()) == plain.forward_backward(HALVES)
    gradients = dict(plain.named_gradients())
    assert gradients and all(torch.equal(g, gradients[name]) for name, g in model.named_gradients())
    assert model.train_step(FORMS[form](), lr=1e-3) == plain.train_step(HALVES, lr=1e-3)
    assert model.evaluate(FORMS[form]()) == plain.evaluate(HALVES)
    masters = dict(plain.named_parameters())
    assert all(torch.equal(value, masters[name]) for name, value in model.named_parameters())


def test_one_micro_batch_needs_no_list() -> None:
    plain, model = host(), host()
    for one in (ROWS, BatchEncoding(ROWS)):
        assert model.forward_backward(one) == plain.forward_backward([ROWS])
        assert model.train_step(one, lr=1e-3) == plain.train_step([ROWS], lr=1e-3)
        assert model.evaluate(one) == plain.evaluate([ROWS])
    assert model.evaluate(HALVES) != plain.evaluate([HALVES[0]]), "the forms are told apart"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2", "mixtral", "falcon"])
def test_a_mask_of_booleans_is_one_of_numbers(name: str) -> None:
    """Padding on the left, in models that make something else of a mask."""
    mask, labels = torch.ones(2, 20).long(), HALVES[0]["labels"].clone()
    mask[1, :5], labels[1, :5] = 0, -100
    one = {"input_ids": HALVES[0]["input_ids"], "labels": labels, "attention_mask": mask}
    losses = [
        host(name).train_step(one | {"attention_mask": m}, lr=1e-3)
        for m in (mask, mask.bool(), mask.int(), mask.float())
    ]
    assert all(out == losses[0] for out in losses)
    assert host(name).train_step({n: v for n, v in one.items() if n[0] != "a"}, lr=1e-3) != losses[0]


def test_a_loss_function_gets_what_was_given() -> None:
    """Tensors of any name, made of lists and arrays; a mask keeps its type, as it may be an index."""
    seen: list[dict[str, torch.Tensor]] = []

    def loss_fn(log_probs: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(given)
        return -(log_probs * given["advantage"][:, None]).mean()

    extra = {
        "advantage": [0.5, 1.5],
        "flags": np.array([True, False]),
        "attention_mask": torch.ones(2, 20).bool(),
    }
    host().train_step([HALVES[0] | extra, HALVES[1] | extra], lr=1e-3, loss_fn=loss_fn)
    (given, _) = seen
    assert given["advantage"].dtype == torch.float32 and given["flags"].dtype == torch.bool
    assert given["attention_mask"].dtype == torch.bool


def bad(**changes: Any) -> list[dict[str, Any]]:
    return [HALVES[0] | changes]


REFUSED: dict[str, tuple[Any, str, str]] = {
    "nothing": (None, "micro_batches is None, not a list of dicts", "input_ids"),
    "text": ("batch", "micro_batches is 'batch'", "input_ids"),
    "a tensor": (ROWS["input_ids"], r"micro_batches is a Tensor of shape \(4, 20\)", "labels"),
    "a number": (3, "micro_batches is 3", "labels"),
    "an empty generator": (iter(()), "no micro-batch", "at least one"),
    "a list of tensors": (list(HALVES[0].values()), "micro-batch 0 is a Tensor of shape", "labels"),
    "pairs": ([(1, 2)], "micro-batch 0 is a tuple", "labels"),
    "a loader that never ends": (itertools.repeat(HALVES), "micro-batch 0 is a list", "labels"),
    "no dict": ([HALVES[0], None], "micro-batch 1 is None", "labels"),
    "no labels": ([{"input_ids": HALVES[0]["input_ids"]}], "micro-batch 0 has no labels", "mlm=False"),
    "labels of None": (bad(labels=None), "has no labels: it is None", "-100"),
    "no input_ids": ([{"labels": HALVES[0]["labels"]}], "has no input_ids", "token numbers"),
    "ragged lists": (bad(labels=[[1, 2, 3], [1, 2]]), "labels has rows of 2, 3 tokens", "pad the rows"),
    "ragged tensors": (bad(labels=[torch.ones(3), torch.ones(2)]), "rows of 2, 3 tokens", "pad the rows"),
    "one row": (
        [{name: value[0] for name, value in ROWS.items()}],
        r"input_ids of shape \(20,\)",
        r"input_ids\[None\]",
    ),
    "text for a tensor": (bad(labels="abc"), "labels is 'abc'", "nested lists"),
    "lists of text": (bad(labels=[["a", "b"]]), "labels is no array of numbers", "nested lists"),
    "objects": (bad(labels=np.array([[None]])), "labels is no array of numbers", "nested lists"),
    "float labels": (bad(labels=HALVES[0]["labels"].double()), "labels are torch.float64", "int64"),
    "boolean ids": (bad(input_ids=HALVES[0]["input_ids"].bool()), "input_ids are torch.bool", "int64"),
    "float positions": (bad(position_ids=torch.zeros(2, 20)), "position_ids are torch.float32", "int64"),
    "negative positions": (bad(position_ids=-torch.ones(2, 20).long()), "hold -1", "count from 0"),
    "an additive mask": (
        bad(attention_mask=torch.full((2, 20), -1e9)),
        "other values than 0 and 1",
        "padding",
    ),
    "a mask of halves": (
        bad(attention_mask=torch.full((2, 20), 0.5)),
        "other values than 0 and 1",
        "padding",
    ),
    "a meta tensor": (bad(labels=torch.ones(2, 20, device="meta")), "a meta tensor", "dense"),
    "a sparse tensor": (bad(labels=HALVES[0]["labels"].to_sparse()), "torch.sparse_coo tensor", "dense"),
    "an unknown key": (bad(advantage=[1.0, 2.0]), r"unknown keys \['advantage'\]", "loss_fn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_micro_batch_is_refused_by_all_calls(case: str) -> None:
    given, message, hint = REFUSED[case]
    model = MODEL[0] if MODEL else MODEL.append(host()) or MODEL[0]  # type: ignore[func-returns-value]
    calls: list[Callable[[], object]] = [
        lambda: model.forward_backward(given),
        lambda: model.train_step(given, lr=1e-3),
        lambda: model.evaluate(given),
    ]
    for call in calls:
        with pytest.raises(DataError, match=message) as caught:
            call()
        assert hint.replace("\\", "") in (caught.value.hint or "") and "hint:" not in caught.value.message
    assert model.steps_done == 0


def test_positions_beyond_the_table_are_refused_where_there_is_one() -> None:
    """A GPU answers them with an error that ends the process. llama has no table: 70 tokens are no fault."""
    long = torch.arange(70)[None] % zoo.VOCAB
    one = {"input_ids": long, "labels": long}
    with pytest.raises(DataError, match="reaches position 69, .*max_position_embeddings is 64") as caught:
        host("gpt2").train_step(one, lr=1e-3)
    assert caught.value.hint == "cut the sequences to 64 tokens"
    short = {name: value[:, :64] for name, value in one.items()}
    assert host("gpt2").train_step(short, lr=1e-3).num_tokens == 63
    assert host("llama").train_step(one, lr=1e-3).num_tokens == 69
