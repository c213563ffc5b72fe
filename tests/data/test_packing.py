"""Packing: nothing is lost, documents do not see each other, and packed equals one by one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import horizon_lm as hz
import zoo
from horizon_lm.config import ModelSettings
from horizon_lm.config.data import IGNORED
from horizon_lm.data.collate import collate, in_order
from horizon_lm.data.packing import split_off
from horizon_lm.data.rows import Rows
from horizon_lm.errors import DataError
from horizon_lm.plan.outline import Outline
from packed_rows import Document, documents_for, gradients, numbered, rows_of, store_of


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
    with pytest.raises(DataError, match="no usable document: all 1 are longer than max_length=4") as caught:
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


LIMIT = 8  # tokens from which on the frequencies are others
_PAIRS = 4  # of a head
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1.0 + 0.1 * i for i in range(_PAIRS)],
    "long_factor": [3.0 + i for i in range(_PAIRS)],
}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"max_position_embeddings": LIMIT, "rope_parameters": _DYNAMIC}),
    "dynamic in some layers": (
        "gemma3_text",
        {
            "max_position_embeddings": LIMIT,
            "rope_parameters": {
                "full_attention": _DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": LIMIT,
            "rope_parameters": _LONG,
        },
    ),
    "longrope with scales": (
        "phimoe",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": LIMIT,
            "rope_parameters": _LONG | {"short_mscale": 1.0, "long_mscale": 1.2},
        },
    ),
}


def rope_model(kind: str) -> Any:
    name, changes = ROPES[kind]
    config = zoo.CASES[name].config()
    for key, value in changes.items():
        setattr(config, key, copy.deepcopy(value))
    return zoo._from_config(config, torch.float32, 0, "sdpa").train()


def one_by_one(model: Any, documents: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss by transformers, each document in a copy that has seen no other."""
    total = sum(len(ids) - 1 for ids in documents)
    found: dict[str, torch.Tensor] = {}
    for ids in documents:
        fresh = copy.deepcopy(model)
        logits = fresh(input_ids=ids[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").div(total).backward()
        for name, parameter in fresh.named_parameters():
            if parameter.grad is not None:
                found[name] = found.get(name, 0) + parameter.grad
    return found


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    parts = [(found[name] - value).norm() for name, value in expected.items()]
    return float(torch.stack(parts).norm() / torch.stack([v.norm() for v in expected.values()]).norm())


def host_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return gradients(
        hz.HostModel.from_pretrained(copy.deepcopy(model), device="cpu", dtype="float32"), batches
    )[2]


@pytest.mark.parametrize("kind", ROPES)
def test_each_document_has_the_frequencies_of_its_own_length(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of up to three times the length from which on frequencies are others, two rows of them and
    padding; and one by one, short ones after long ones. The control: the longest position of a call counts
    for all that is in it."""
    lengths = [24, 5, LIMIT, 13]
    rng = np.random.default_rng(3)
    documents: list[Document] = [(rng.integers(3, zoo.VOCAB, n).tolist(), None) for n in lengths]
    rows, alone = rows_of(documents, "bfd", 32), rows_of(documents, "none", 32)
    packed = collate([rows.row(r) for r in range(len(rows))], "bfd", 0)[0]
    assert len(packed["input_ids"]) == 2
    single = [collate([alone.row(r)], "none", 0)[0] for r in range(len(alone))]
    model = rope_model(kind)
    expected = one_by_one(model, [torch.tensor(ids) for ids, _ in documents])
    assert distance(host_gradients(model, [packed]), expected) < 2e-6
    assert distance(host_gradients(model, single), expected) < 2e-6
    monkeypatch.setattr("horizon_lm.model.skeleton.separate_documents", lambda model: None)
    assert distance(host_gradients(model, [packed]), expected) > 1e-3


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_documents_below_the_limit_and_lone_ones_are_left_to_transformers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: packed rows of short documents, and rows without positions, padded or of any length."""
    model, generator = rope_model(kind), torch.Generator().manual_seed(0)
    ids = torch.randint(3, zoo.VOCAB, (2, 20), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    places = torch.cat([torch.arange(LIMIT), torch.arange(LIMIT), torch.arange(4)]).expand(2, 20)
    batches = [{"input_ids": ids, "labels": ids, "attention_mask": mask}]
    batches += [{"input_ids": ids, "labels": ids, "position_ids": places.contiguous()}]
    batches += [{"input_ids": ids, "labels": ids}]
    found = [host_gradients(model, [batch]) for batch in batches]
    monkeypatch.setattr("horizon_lm.model.skeleton.separate_documents", lambda model: None)
    for batch, grads in zip(batches, found, strict=True):
        as_it_is = host_gradients(model, [batch])
        assert all(torch.equal(grads[name], value) for name, value in as_it_is.items())


@pytest.mark.parametrize("kind", ["dynamic in some layers", "longrope with scales"])
def test_frequencies_that_depend_on_the_length_can_be_planned(kind: str) -> None:
    config = rope_model(kind).config
    before = copy.deepcopy(config.rope_parameters)
    outline = Outline(config, ModelSettings(device="cpu"))
    assert outline.measures(1, 4 * LIMIT, 128).layers
    assert config.rope_parameters == before
