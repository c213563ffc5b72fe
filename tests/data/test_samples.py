"""Pairs and labelled samples: truncation, packing, micro-batches, order. Samples stay whole throughout.

The authorities are TRL's collators (`DataCollatorForPreference`, `DataCollatorForUnpairedPreference`) after
its `_prepare_dataset`'s filter of prompts that fill max_length.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import config, write_rows
from horizon_lm.config.data import IGNORED
from horizon_lm.config.preference import DataKind
from horizon_lm.data import TokenLoader, load_training_data, train_tokenizer
from horizon_lm.data.collate import StepSize, collate, in_order
from horizon_lm.data.encode import Encoded
from horizon_lm.data.mismatched import with_mismatched
from horizon_lm.data.packing import make_rows, split_off, weighted
from horizon_lm.data.rows import Rows
from horizon_lm.data.tokens import TokenStore, TokenWriter
from horizon_lm.errors import ConfigError, DataError

Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected
PAD = 0


def pairs_of(shapes: list[tuple[int, int, int]]) -> list[Pair]:
    """Pairs of unlike tokens; shapes: tokens of prompt, chosen and rejected."""
    found, at = [], 1
    for shape in shapes:
        parts = []
        for size in shape:
            parts.append(list(range(at, at + size)))
            at += size
        found.append(tuple(parts))
    return found  # type: ignore[return-value]


def encoded(prompt: list[int], completion: list[int], label: bool | None = None, dataset: int = 0) -> Encoded:
    ids = np.array(prompt + completion, np.uint16)
    return Encoded(ids, np.arange(len(ids)) >= len(prompt), "here", dataset, False, label)


def store_of(documents: list[Encoded], kind: DataKind, sides: int, datasets: int = 1) -> TokenStore:
    with TokenWriter(None, np.dtype(np.uint16), kind, sides) as writer:
        writer.add(documents)
        return writer.finish(num_empty=0, num_bad=0, bad_rows=[], formats=["preference"] * datasets)


def pair_store(pairs: list[Pair], datasets: list[int] | None = None) -> TokenStore:
    numbers = datasets or [0] * len(pairs)
    documents = [
        encoded(prompt, side, None, n)
        for (prompt, *sides), n in zip(pairs, numbers, strict=True)
        for side in sides
    ]
    return store_of(documents, "pairs", 2, max(numbers) + 1)


def rows_of(store: TokenStore, max_length: int, strategy: str = "none", truncation: str = "drop") -> Rows:
    numbers = np.arange(store.num_samples)
    return make_rows(store, numbers, max_length=max_length, strategy=strategy, truncation=truncation)


def all_of(rows: Rows, size: int = 100) -> list[dict[str, torch.Tensor]]:
    return list(in_order(rows, size, PAD))


# ---- TRL's collators -----------------------------------------------------------------------------

SHAPES = [(3, 2, 4), (5, 6, 1), (2, 9, 3), (7, 1, 2), (9, 3, 4), (1, 1, 1), (4, 8, 8), (12, 2, 2)]


def of_trl(pairs: list[Pair], max_length: int, truncation: str) -> dict[str, torch.Tensor]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    kept = [p for p in pairs if truncation != "keep_start" or len(p[0]) < max_length]
    collator = DataCollatorForPreference(PAD, max_length=max_length, truncation_mode=truncation)
    return collator([dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), p, strict=True)) for p in kept])


def assert_equal_to_trl(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], name: str = ""
) -> None:
    assert torch.equal(ours[f"{name}input_ids"], theirs[f"{name}input_ids"])
    assert torch.equal(ours[f"{name}attention_mask"], theirs[f"{name}attention_mask"])
    labels, mask = ours[f"{name}labels"][:, 1:], theirs[f"{name}completion_mask"][:, 1:].bool()
    assert torch.equal(labels, ours[f"{name}input_ids"][:, 1:].masked_fill(~mask, IGNORED))


@pytest.mark.parametrize("max_length", [8, 9, 12, 100])
def test_pairs_are_collated_as_by_trl(max_length: int) -> None:
    pairs = pairs_of(SHAPES)
    rows = rows_of(pair_store(pairs), max_length, truncation="keep_start")
    (batch,) = all_of(rows)
    assert_equal_to_trl(batch, of_trl(pairs, max_length, "keep_start"))
    fitting = [p for p in pairs if len(p[0]) + max(len(p[1]), len(p[2])) <= max_length]
    (batch,) = all_of(rows_of(pair_store(pairs), max_length))
    assert_equal_to_trl(batch, of_trl(fitting, max_length, "keep_start"))


def test_a_mask_that_is_off_by_one_differs() -> None:
    """The control of the comparison."""
    pairs = pairs_of(SHAPES)
    (batch,) = all_of(rows_of(pair_store(pairs), 100))
    theirs = of_trl([(p[:-1], p[-1:] + c, p[-1:] + r) for p, c, r in pairs], 100, "keep_start")
    assert torch.equal(batch["input_ids"], theirs["input_ids"])
    with pytest.raises(AssertionError):
        assert_equal_to_trl(batch, theirs)


@pytest.mark.parametrize("max_length", [6, 9, 100])
def test_labelled_samples_are_collated_as_by_trl(max_length: int) -> None:
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    pairs = [p for p in pairs_of(SHAPES) if len(p[0]) < max_length]
    labels = [n % 3 == 0 for n in range(len(pairs))]
    own = [
        encoded(prompt, completion, label)
        for (prompt, completion, _), label in zip(pairs, labels, strict=True)
    ]
    (documents,) = with_mismatched([own], 100)
    store = store_of(documents, "labelled", 2)
    (batch,) = all_of(rows_of(store, max_length, truncation="keep_start"))
    theirs = DataCollatorForUnpairedPreference(PAD, max_length=max_length)(
        [
            {
                "prompt_ids": prompt,
                "completion_ids": completion,
                "KL_completion_ids": pairs[n - 1][1],
                "label": labels[n],
            }
            for n, (prompt, completion, _) in enumerate(pairs)
        ]
    )
    assert_equal_to_trl(batch, theirs)
    assert_equal_to_trl(batch, theirs, "KL_")
    assert torch.equal(batch["label"], theirs["label"])
    # Without a KL term there is nothing with its name.
    (plain,) = all_of(rows_of(store_of(own, "labelled", 1), max_length, truncation="keep_start"))
    assert_equal_to_trl(plain, theirs)
    assert set(batch) - set(plain) == {f"KL_{key}" for key in plain if key not in ("samples", "label")}


# ---- truncation ----------------------------------------------------------------------------------


def sides_of(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """(chosen, rejected) ids of each pair."""
    found = []
    for number in range(len(rows)):
        row = rows.row(number)
        ends = np.cumsum(row.lengths)
        pieces = [row.ids[end - size : end].tolist() for end, size in zip(ends, row.lengths, strict=True)]
        found += list(zip(pieces[::2], pieces[1::2], strict=True))
    return found


def test_drop_leaves_out_a_pair_of_which_one_side_is_too_long() -> None:
    pairs = pairs_of([(3, 2, 4), (3, 2, 5), (3, 5, 2)])
    rows = rows_of(pair_store(pairs), 7)
    assert sides_of(rows) == [(pairs[0][0] + pairs[0][1], pairs[0][0] + pairs[0][2])]
    assert (rows.left.documents, rows.left.too_long, rows.left.tokens) == (2, 2, 26)
    with pytest.raises(DataError, match="no usable pair: all 3 are longer than max_length=4") as caught:
        rows_of(pair_store(pairs), 4)
    assert "truncation" in (caught.value.hint or "")


def test_keep_end_keeps_one_context_for_both_sides() -> None:
    """Both lose the tokens that the longer has too many. TRL cuts each by itself."""
    pairs = pairs_of([(5, 2, 4), (2, 6, 1), (1, 9, 2), (3, 1, 1)])
    rows = rows_of(pair_store(pairs), 7, truncation="keep_end")
    (p, c, r), (p2, c2, r2), _, (p4, c4, r4) = pairs
    assert sides_of(rows) == [(p[2:] + c, p[2:] + r), (p2[1:] + c2, p2[1:] + r2), (p4 + c4, p4 + r4)]
    assert (rows.left.documents, rows.left.full, rows.left.truncated) == (1, 1, 2)
    theirs = of_trl([(p, c, r)], 7, "keep_end")["input_ids"]
    assert theirs[0, :7].tolist() == p + c and theirs[1, :7].tolist() == p[2:] + r  # the control


def test_pairs_that_are_equal_once_cut_are_left_out() -> None:
    prompt, same = [1, 2, 3], [4, 5]
    pairs = [(prompt, [*same, 6], [*same, 7]), (prompt, [6], [7])]
    rows = rows_of(pair_store(pairs), 5, truncation="keep_start")
    assert sides_of(rows) == [([1, 2, 3, 6], [1, 2, 3, 7])]
    assert (rows.left.documents, rows.left.equal) == (1, 1)
    assert rows_of(pair_store(pairs), 6, truncation="keep_start").left.documents == 0


def test_a_side_without_a_target_is_left_out() -> None:
    rows = rows_of(pair_store([([], [1], [2, 3]), ([4], [5], [6])]), 5)
    assert sides_of(rows) == [([4, 5], [4, 6])] and rows.left.documents == 1


def test_mismatched_documents_are_cut_and_never_drop_a_sample() -> None:
    own = [encoded([1, 2, 3], [4], True), encoded([5, 6], [7, 8, 9, 10], False)]
    (documents,) = with_mismatched([own], 9)
    for truncation in ("drop", "keep_start", "keep_end"):
        rows = rows_of(store_of(documents, "labelled", 2), 6, truncation=truncation)
        (batch,) = all_of(rows)
        assert batch["KL_input_ids"].tolist() == [[1, 2, 3, 7, 8, 9], [5, 6, 4, 0, 0, 0]]
        assert rows.left.documents == 0
    rows = rows_of(store_of(documents, "labelled", 2), 5, truncation="keep_end")
    (batch,) = all_of(rows)  # the second loses a token of its prompt, in both documents
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 0], [6, 7, 8, 9, 10]]
    assert batch["KL_input_ids"].tolist() == [[1, 2, 3, 7, 8], [6, 4, 0, 0, 0]]


# ---- micro-batches and their order ---------------------------------------------------------------

shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=14)


def documents_in(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document, sliced out of a micro-batch."""
    return [
        tuple(batch[key][row, first : first + tokens].tolist() for key in ("input_ids", "labels"))
        for row, first, tokens in batch["documents"].tolist()
    ]  # type: ignore[misc]


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, size=st.integers(1, 4))
def test_packed_documents_are_the_unpacked_ones(shapes: list[tuple[int, int, int]], size: int) -> None:
    store = pair_store(pairs_of(shapes))
    found: dict[str, dict[int, Any]] = {}
    for strategy in ("none", "bfd"):
        rows = rows_of(store, 11, strategy)
        found[strategy] = {}
        for batch in all_of(rows, size):
            documents, samples = documents_in(batch), batch["samples"].tolist()
            assert len(documents) == 2 * len(samples) and batch["input_ids"].shape[1] <= 22
            for n, sample in enumerate(samples):
                assert sample not in found[strategy]
                found[strategy][sample] = (documents[n], documents[n + len(samples)])
            if strategy == "bfd":
                for row, first, tokens in batch["documents"].tolist():
                    assert batch["position_ids"][row, first : first + tokens].tolist() == list(range(tokens))
                assert int(batch["position_ids"].max()) < 11  # in the padding, too
    assert found["none"] == found["bfd"] and sorted(found["none"]) == list(range(len(shapes)))
    for n, (prompt, *sides) in enumerate(pairs_of(shapes)):
        expected = [(prompt + side, [IGNORED] * len(prompt) + side) for side in sides]
        assert list(found["none"][n]) == expected


def test_pairs_are_packed_whole() -> None:
    shapes = [(1, n % 7 + 1, n % 5 + 1) for n in range(200)]
    rows = rows_of(pair_store(pairs_of(shapes)), 16, "bfd")
    assert rows.fill > 0.95 and int(rows.lengths.max()) <= 32 and (np.diff(rows.offsets) % 2 == 0).all()
    assert sorted(rows.samples.tolist()) == list(range(200))


def loader_of(
    rows: Rows, micro_batch: int, micro_batches: int, seed: int = 0, workers: int = 0
) -> TokenLoader:
    return TokenLoader(
        rows,
        micro_batch_size=micro_batch,
        micro_batches_per_step=micro_batches,
        seed=seed,
        pad_id=PAD,
        num_workers=workers,
    )


@settings(max_examples=40, deadline=None)
@given(
    shapes=shapes,
    strategy=st.sampled_from(["none", "bfd"]),
    cut=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    taken=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_every_sample_comes_once_per_epoch_and_a_resume_goes_on(
    shapes: list[tuple[int, int, int]], strategy: str, cut: tuple[int, int], taken: int, seed: int
) -> None:
    rows = rows_of(pair_store(pairs_of(shapes)), 11, strategy)
    loader = loader_of(rows, *cut, seed)
    steps, sizes, states = [], [], []
    while loader.epoch < 2:
        states.append(loader.state_dict())
        batches = next(loader)
        steps.append([sample for batch in batches for sample in batch["samples"].tolist()])
        sizes.append(loader.size)
        assert loader.size.samples == len(steps[-1]) and loader.size.rows <= cut[0] * cut[1]
    assert Counter(sample for step in steps for sample in step) == dict.fromkeys(range(len(shapes)), 2)
    assert sum(size.rows for size in sizes) == 2 * len(rows) and loader.epoch == 2
    whole = sum(2 * p + c + r for p, c, r in shapes)
    assert sum(size.tokens for size in sizes) == 2 * whole == 2 * rows.num_tokens
    at = min(taken, len(steps) - 1)
    again = loader_of(rows, *cut, seed)
    again.load_state_dict(json.loads(json.dumps(states[at])))
    rest = [[s for batch in next(again) for s in batch["samples"].tolist()] for _ in steps[at:]]
    assert rest == steps[at:]


def test_labelled_rows_and_their_size() -> None:
    own = [encoded([n + 1] * (n + 1), [50 + n], n % 2 == 0) for n in range(5)]
    (documents,) = with_mismatched([own], 9)
    loader = loader_of(rows_of(store_of(documents, "labelled", 2), 20), 2, 3, workers=1)
    batches = next(loader)
    loader.close()
    samples = torch.cat([batch["samples"] for batch in batches])
    assert sorted(samples.tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), samples % 2 == 0)
    for batch in batches:
        assert (batch["documents"][:, 1] == 0).all() and batch["documents"].dtype == torch.int64
        for sample, (ids, _) in zip(batch["samples"].tolist(), documents_in(batch), strict=True):
            assert ids == own[sample].ids.tolist()
        kl = {key.removeprefix("KL_"): value for key, value in batch.items() if key.startswith("KL_")}
        for sample, (ids, labels) in zip(batch["samples"].tolist(), documents_in(kl), strict=True):
            assert ids == [sample + 1] * (sample + 1) + [50 + (sample - 1) % 5]
            assert labels == [IGNORED] * (sample + 1) + [50 + (sample - 1) % 5]
    # Nothing is trained on documents of the KL term: they do not count.
    size = loader.size
    assert size == StepSize(20, size.positions, size.lengths, 5, 5, size.forward_lengths)
    assert sum(size.forward_lengths) == 20
    assert sorted(loader.size.lengths) == [2, 3, 4, 5, 6]


def test_documents_have_no_names_of_samples() -> None:
    with TokenWriter(None, np.dtype(np.uint16)) as writer:
        writer.add([encoded([1, 2], [3])])
        store = writer.finish(num_empty=0, num_bad=0, bad_rows=[], formats=["text"])
    batch, size = collate([rows_of(store, 9).row(0)], "none", PAD)
    assert set(batch) == {"input_ids", "labels", "attention_mask"} and size.samples == 0


# ---- splits and weights --------------------------------------------------------------------------


def test_splits_and_weights_are_by_samples() -> None:
    store = pair_store(pairs_of([(2, 1, 1)] * 12), datasets=[0] * 8 + [1] * 4)
    train, held = split_off(store.num_samples, 0.25, 0, store.noun)
    assert sorted([*train, *held]) == list(range(12)) and len(held) == 3
    with pytest.raises(DataError, match="val_size=12 of 12 pairs leaves 12 to evaluate"):
        split_off(store.num_samples, 12, 0, store.noun)
    found = weighted(store, np.arange(12), [0.5, 2], 0)
    counts = Counter(found.tolist())
    assert sum(counts[n] for n in range(8)) == 4 and all(counts[n] == 2 for n in range(8, 12))
    rows = make_rows(store, found, max_length=4, strategy="bfd", truncation="drop")
    assert Counter(rows.samples.tolist()) == counts
    with pytest.raises(IndexError):  # the control: numbers of documents are none of samples
        weighted(store, np.arange(len(store.lengths)), [0.5, 2], 0)


# ---- from a file ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["a b c yes no question"], 300)


def loaded(path: Path, tokenizer: Any, folder: Path, **changes: Any) -> Any:
    values = {"datasets": str(path), "max_length": 32, "dataset_cache_dir": str(folder)}
    return load_training_data(config(**values, **changes), tokenizer)


def test_tokens_are_kept_by_what_decides_them(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n} ", "completion": "yes", "label": n % 2} for n in range(4)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    stores = {}
    for name, chosen in {
        "with a KL term": {"method": "kto"},
        "without": {"method": "kto", "loss_type": "apo_zero_unpaired"},
        "documents": {"method": "auto"},  # a number is no label, unless the method takes labels
    }.items():
        data = loaded(path, tokenizer, tmp_path / "kept", **chosen)
        assert not data.was_cached
        again = loaded(path, tokenizer, tmp_path / "kept", **chosen)
        assert again.was_cached and again.store.fingerprint == data.store.fingerprint
        assert (again.store.kind, again.store.sides) == (data.store.kind, data.store.sides)
        stores[name] = again.store
    assert [(s.kind, s.sides) for s in stores.values()] == [
        ("labelled", 2),
        ("labelled", 1),
        ("documents", 1),
    ]
    assert stores["without"].labels.tolist() == stores["with a KL term"].labels.tolist() == [0, 1, 0, 1]
    folder = stores["with a KL term"].folder
    (folder / "labels.bin").write_bytes(bytes([1, 1, 0, 1]))
    with pytest.raises(DataError, match=r"labels\.bin is damaged"):
        TokenStore(folder)
    assert not loaded(path, tokenizer, tmp_path / "kept", method="kto").was_cached  # made anew
    # Tokens of documents are what they were before there were others.
    assert json.loads((stores["documents"].folder / "meta.json").read_text()).keys() == {
        *("dtype", "counts", "files", "hash")
    }
    assert set(stores["documents"].hashes) == {"tokens.bin", "trained.bin", "documents.bin"}


@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_tokens_do_not_depend_on_workers(
    kind: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of few rows and blocks of a few more, a bad row among them."""
    rows = [
        {"prompt": f"question {n} ", "chosen": f"yes {n}", "rejected": "no" if n != 20 else "yes 20"}
        if kind == "pairs"
        else {"prompt": f"question {n} ", "completion": f"yes {n}" if n != 20 else "", "label": n % 2 == 0}
        for n in range(60)
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr("horizon_lm.data.tokens._BATCH_CHARACTERS", 60)
    monkeypatch.setattr("horizon_lm.data.training_data.BLOCK", 7)
    found = [
        load_training_data(
            config(datasets=str(path), dataset_cache_dir=None, on_bad_row="skip", dataset_num_proc=workers),
            tokenizer,
        )
        for workers in (1, 2)
    ]
    assert found[0].store.fingerprint == found[1].store.fingerprint
    assert found[0].store.num_samples == 59 and found[0].store.counts.num_bad == 1
    monkeypatch.setattr("horizon_lm.data.training_data.BLOCK", 8)  # the control
    other = load_training_data(
        config(datasets=str(path), dataset_cache_dir=None, on_bad_row="skip"), tokenizer
    )
    assert (other.store.fingerprint != found[0].store.fingerprint) is (kind == "labelled")


def test_a_run_takes_what_the_data_is(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n} ", "chosen": "yes", "rejected": "no " * (n + 1)} for n in range(30)]
    path = write_rows(tmp_path / "a.jsonl", [*rows, {"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(DataError, match=r"a\.jsonl:31: 'chosen' and 'rejected' are equal"):
        loaded(path, tokenizer, tmp_path / "kept")
    data = loaded(path, tokenizer, tmp_path / "kept", on_bad_row="skip", val_size=4)
    assert data.store.counts.num_bad == 1 and data.store.num_samples == 30
    assert data.rows.strategy == "bfd" and data.eval_rows is not None
    held, trained = set(data.eval_rows.samples.tolist()), set(data.rows.samples.tolist())
    assert len(held) <= 4 and not held & trained
    lengths = data.store.lengths.reshape(-1, 2).max(1)
    assert held | trained == set(np.flatnonzero(lengths <= 32).tolist())
    assert data.rows.left.documents + data.eval_rows.left.documents == (lengths > 32).sum() > 0
    with pytest.raises(DataError, match="is a preference pair"):
        loaded(path, tokenizer, tmp_path / "kept", method="sft")
    plain = loaded(path, tokenizer, tmp_path / "kept", on_bad_row="skip", packing=False)
    assert plain.was_cached and plain.rows.strategy == "none"


def test_a_stream_of_pairs_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}])
    with pytest.raises(ConfigError, match="streaming: true is for method: sft, not dpo") as caught:
        loaded(path, tokenizer, tmp_path / "kept", streaming=True, max_steps=1)
    assert "streaming=false" in (caught.value.hint or "")


def test_a_changed_label_is_named(tokenizer: Any, tmp_path: Path) -> None:
    def rows_with(label: bool) -> Any:
        row = {"prompt": "a", "completion": " b", "label": True}
        path = write_rows(tmp_path / "a.jsonl", [row, {**row, "label": label}])
        return loaded(path, tokenizer, tmp_path / "kept").loader

    state = rows_with(True).state_dict()
    rows_with(True).load_state_dict(state)
    with pytest.raises(DataError, match="the tokens are the same, but the labels of samples differ"):
        rows_with(False).load_state_dict(state)
