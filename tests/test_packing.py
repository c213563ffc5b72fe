"""Packing: nothing is lost, documents do not see each other, and packed equals one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import horizon_lm as hz
import zoo
from horizon_lm.data.batches import collate, in_order
from horizon_lm.data.encode import Encoded
from horizon_lm.data.packing import IGNORED, Rows, make_rows, split_off
from horizon_lm.data.tokens import TokenStore, TokenWriter
from horizon_lm.errors import DataError

Document = tuple[list[int], list[bool] | None]


def store_of(documents: Sequence[Document], dtype: Any = np.uint16) -> TokenStore:
    with TokenWriter(None, np.dtype(dtype)) as writer:
        for ids, trained in documents:
            mask = None if trained is None else np.array(trained, bool)
            writer.add([Encoded(np.array(ids, dtype), mask, "here", 0, trained is None)])
        return writer.finish(num_empty=0, num_bad=0, bad_rows=[], formats=["text"])


def rows_of(documents: Sequence[Document], strategy: str, max_length: int, **options: Any) -> Rows:
    store = store_of(documents)
    return make_rows(store, np.arange(len(documents)), strategy=strategy, max_length=max_length, **options)


def numbered(lengths: Sequence[int], masked: bool = False) -> list[Document]:
    """Documents of unlike tokens, so that each can be told from where it came."""
    documents, at = [], 1
    for length in lengths:
        ids = list(range(at, at + length))
        documents.append((ids, [i % 2 == 1 for i in range(length)] if masked else None))
        at += length
    return documents


def segments(rows: Rows) -> list[list[int]]:
    """The ids of each segment of each row."""
    found = []
    for number in range(len(rows)):
        row = rows.row(number)
        edges = np.cumsum(row.lengths)
        found += [row.ids[end - size : end].tolist() for end, size in zip(edges, row.lengths, strict=True)]
    return found


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths, max_length=st.integers(2, 12))
def test_wrapped_is_all_documents_in_one_row_cut_up(lengths: list[int], max_length: int) -> None:
    documents = numbered(lengths)
    whole = [id for ids, _ in documents for id in ids]
    try:
        rows = rows_of(documents, "wrapped", max_length)
    except DataError as error:
        assert len(whole) < max_length and "less than one sequence" in error.message
        return
    found = [rows.row(r).ids.tolist() for r in range(len(rows))]
    assert all(len(ids) == max_length for ids in found)
    assert [id for ids in found for id in ids] == whole[: len(found) * max_length]
    assert rows.left.tokens == len(whole) % max_length
    kept = rows_of(documents, "wrapped", max_length, keep_rest=True)
    tail = len(whole) % max_length
    assert kept.num_tokens == len(whole) - (tail if tail == 1 else 0)  # one token alone has no target


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, max_length=st.integers(2, 12), strategy=st.sampled_from(["bfd", "none"]))
def test_split_documents_come_once_each_and_in_whole_pieces(
    lengths: list[int], max_length: int, strategy: str
) -> None:
    documents = numbered(lengths, masked=False)
    pieces = [ids[b : b + max_length] for ids, _ in documents for b in range(0, len(ids), max_length)]
    expected = sorted(piece for piece in pieces if len(piece) > 1)
    if not expected:
        return
    rows = rows_of(documents, strategy, max_length, truncation="split")
    assert sorted(segments(rows)) == expected
    assert max(rows.lengths) <= max_length
    assert rows.num_tokens + rows.left.tokens == sum(lengths)
    assert strategy == "bfd" or len(rows) == len(expected)
    again = rows_of(documents, strategy, max_length, truncation="split")
    assert again.fingerprint == rows.fingerprint


@pytest.mark.parametrize(
    ("truncation", "expected", "left"),
    [
        ("drop", [[1, 2, 3]], (1, 6, 0)),
        ("keep_start", [[1, 2, 3], [4, 5, 6, 7]], (0, 2, 1)),
        ("keep_end", [[1, 2, 3], [6, 7, 8, 9]], (0, 2, 1)),
        ("split", [[1, 2, 3], [4, 5, 6, 7], [8, 9]], (0, 0, 1)),
    ],
)
def test_documents_that_are_too_long(truncation: str, expected: list[list[int]], left: Any) -> None:
    rows = rows_of(numbered([3, 6]), "none", 4, truncation=truncation)
    assert segments(rows) == expected
    assert (rows.left.documents, rows.left.tokens, rows.left.truncated) == left


def test_a_document_that_is_cut_to_nothing_trained_is_left_out() -> None:
    documents: list[Document] = [
        ([1, 2, 3, 4, 5, 6], [False, False, False, False, True, True]),
        ([7, 8, 9], [False, True, True]),
        ([10, 11], [True, False]),  # a first token is nothing's target
    ]
    rows = rows_of(documents, "none", 4, truncation="keep_start")
    assert segments(rows) == [[7, 8, 9]] and rows.left.documents == 2
    assert segments(rows_of(documents[:2], "none", 4, truncation="keep_end")) == [[3, 4, 5, 6], [7, 8, 9]]
    with pytest.raises(DataError, match="no document fits: all 1 are longer than max_length=4") as caught:
        rows_of(documents[:1], "bfd", 4)
    assert "truncation" in (caught.value.hint or "")


def test_best_fit_fills_sequences() -> None:
    rng = np.random.default_rng(0)
    rows = rows_of(numbered(rng.integers(5, 100, 600).tolist()), "bfd", 128)
    assert rows.fill > 0.97
    padded = rows_of(numbered(rng.integers(5, 100, 600).tolist()), "none", 128)
    assert padded.fill < 0.5  # the control


def test_labels_are_the_trained_tokens_and_never_a_first_one() -> None:
    documents: list[Document] = [([1, 2, 3], [True, False, True]), ([4, 5], [True, True])]
    rows = rows_of(documents, "bfd", 8)
    row = rows.row(0)
    assert row.ids.tolist() == [1, 2, 3, 4, 5]
    # The model shifts, so that the first label of a row is never used and stays as it is.
    assert row.labels.tolist() == [1, IGNORED, 3, IGNORED, 5]


def test_a_batch_in_each_way() -> None:
    documents = numbered([3, 2, 4])
    rows = rows_of(documents, "bfd", 5)
    batch, size = collate([rows.row(r) for r in range(len(rows))], "bfd", 99)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 99]] or batch[
        "input_ids"
    ].tolist() == [[6, 7, 8, 9, 99], [1, 2, 3, 4, 5]]
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    positions = {
        tuple(ids): p
        for ids, p in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True)
    }
    assert positions == {(1, 2, 3, 4, 5): [0, 1, 2, 0, 1], (6, 7, 8, 9, 99): [0, 1, 2, 3, 0]}
    assert (size.tokens, size.positions, size.squares) == (9, 10, 9 + 4 + 16)

    rows = rows_of(documents, "none", 5)
    batch, size = collate([rows.row(r) for r in range(3)], "none", 99)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 99], [4, 5, 99, 99], [6, 7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[1, 2, 3, -100], [4, 5, -100, -100], [6, 7, 8, 9]]
    assert (size.tokens, size.positions) == (9, 12)

    rows = rows_of(documents, "wrapped", 4)
    batch, size = collate([rows.row(0), rows.row(1)], "wrapped", 99)
    assert set(batch) == {"input_ids", "labels"} and (size.tokens, size.squares) == (8, 32)
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_evaluation_sees_every_row_once_in_order() -> None:
    rows = rows_of(numbered([3, 2, 4]), "none", 5)
    batches = list(in_order(rows, 2, 0))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    assert batches[1]["input_ids"].tolist() == [[6, 7, 8, 9]]


@pytest.mark.parametrize("size", [0.25, 2])
def test_a_part_is_held_out_by_seed(size: float) -> None:
    train, held = split_off(8, size, 5)
    assert len(held) == 2 and sorted([*train, *held]) == list(range(8))
    assert split_off(8, size, 5)[1].tolist() == held.tolist()
    assert any(split_off(8, size, seed)[1].tolist() != held.tolist() for seed in range(5))
    for bad in (8, 9, 0.01):
        with pytest.raises(DataError, match="leaves"):
            split_off(8, bad, 5)


def test_wide_vocabularies_get_wide_tokens() -> None:
    store = store_of([([1, 70_000], None)], np.uint32)
    assert store.ids.tolist() == [1, 70_000]


# ---- packed equals one by one ---------------------------------------------------------------

LENGTHS = [7, 12, 3, 9, 2, 16, 5]


def gradients(
    model: hz.HostModel, batches: list[dict[str, torch.Tensor]]
) -> tuple[float, int, dict[str, torch.Tensor]]:
    out = model.forward_backward(batches)
    return out.loss, out.num_tokens, {name: grad.float().clone() for name, grad in model.named_gradients()}


def documents_for(vocabulary: int) -> list[Document]:
    rng = np.random.default_rng(3)
    return [(rng.integers(0, vocabulary, n).tolist(), (rng.random(n) < 0.7).tolist()) for n in LENGTHS]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_packed_has_the_gradients_and_losses_of_its_documents_one_by_one(name: str, attention: str) -> None:
    """fp32, 1e-5. Several rows in a micro-batch, so that there is padding, which is a document of its own."""
    documents = documents_for(zoo.VOCAB)
    rows = rows_of(documents, "bfd", 20)
    packed = [collate([rows.row(r) for r in range(len(rows))], "bfd", 0)[0]]
    alone = rows_of(documents, "none", 20)
    single = [collate([alone.row(r)], "none", 0)[0] for r in range(len(alone))]
    wrong = [{key: value for key, value in packed[0].items() if key != "position_ids"}]
    model = hz.HostModel.from_pretrained(
        zoo.build(name), device="cpu", dtype="float32", attn_implementation=attention
    )
    loss, count, grads = gradients(model, packed)
    expected_loss, expected_count, expected = gradients(model, single)
    assert count == expected_count and loss == pytest.approx(expected_loss, abs=1e-5)
    for key, value in expected.items():
        torch.testing.assert_close(grads[key], value, rtol=1e-4, atol=1e-5)
    wrong_loss, _, _ = gradients(model, wrong)  # the control: with attention across documents
    assert abs(wrong_loss - expected_loss) > 1e-4


def test_packed_has_the_per_token_losses_of_its_documents() -> None:
    documents = documents_for(zoo.VOCAB)
    model = hz.HostModel.from_pretrained(zoo.build("llama"), device="cpu", dtype="float32")
    rows, alone = rows_of(documents, "bfd", 20), rows_of(documents, "none", 20)
    batch = collate([rows.row(r) for r in range(len(rows))], "bfd", 0)[0]
    found = model.evaluate([batch], return_log_probs=True).log_probs
    assert found is not None
    single = [collate([alone.row(r)], "none", 0)[0] for r in range(len(alone))]
    expected = model.evaluate(single, return_log_probs=True).log_probs
    assert expected is not None
    by_ids = {tuple(s["input_ids"][0].tolist()): e[0] for s, e in zip(single, expected, strict=True)}
    compared = 0
    for r in range(len(rows)):
        row, at = rows.row(r), 0
        for length in row.lengths.tolist():
            ids = tuple(row.ids[at : at + length].tolist())
            torch.testing.assert_close(found[0][r, at : at + length - 1], by_ids[ids], rtol=0, atol=1e-5)
            at += length
            compared += 1
    assert compared == len(documents)
