"""The loaders: every token once in an epoch, and the same order with any workers and after any resume."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_helpers import config, dataset, write_rows
from horizon_lm.data import StreamLoader, TokenLoader, load_training_data, train_tokenizer
from horizon_lm.data.encode import Encoder
from horizon_lm.data.packing import Layout
from horizon_lm.data.streaming import Stream
from horizon_lm.errors import DataError
from loaded_rows import loader_of, make_rows

SIZES = {
    "lengths": st.lists(st.integers(2, 9), min_size=1, max_size=30),
    "strategy": st.sampled_from(["wrapped", "bfd", "none"]),
    "micro_batch": st.integers(1, 4),
    "micro_batches": st.integers(1, 3),
    "seed": st.integers(0, 2**63 - 1),
    "workers": st.sampled_from([0, 1, 3]),
}


def steps_of(loader: Any, count: int) -> list[list[list[int]]]:
    """The real ids of each row of each of the next steps."""
    return [
        [[id for id in row.tolist() if id] for batch in step for row in batch["input_ids"]]
        for step in islice(loader, count)
    ]


@settings(max_examples=60, deadline=None)
@given(**SIZES)
def test_each_epoch_holds_every_token_once(
    lengths: list[int], strategy: str, micro_batch: int, micro_batches: int, seed: int, workers: int
) -> None:
    rows = make_rows(lengths, strategy)
    loader = loader_of(rows, micro_batch, micro_batches, seed, workers)
    an_epoch = -(-len(rows) // loader.rows_per_step)
    assert loader.end_after(3.0, -1) == 3 * an_epoch
    once = Counter(id for row in range(len(rows)) for id in rows.row(row).ids.tolist())
    assert set(once.values()) == {1} and sum(once.values()) >= sum(lengths) - 1
    for number in (1, 2, 3):
        steps = steps_of(loader, an_epoch)
        assert [len(step) for step in steps[:-1]] == [loader.rows_per_step] * (an_epoch - 1)
        assert Counter(id for step in steps for row in step for id in row) == once
        assert loader.epoch == number  # exactly: evaluation and checkpoints by epoch go by it


@settings(max_examples=60, deadline=None)
@given(**SIZES, before=st.integers(0, 20))
def test_any_workers_and_a_resume_at_any_step_give_the_same_order(
    lengths: list[int],
    strategy: str,
    micro_batch: int,
    micro_batches: int,
    seed: int,
    workers: int,
    before: int,
) -> None:
    rows = make_rows(lengths, strategy)
    straight = steps_of(loader_of(rows, micro_batch, micro_batches, seed), before + 10)
    stopped = loader_of(rows, micro_batch, micro_batches, seed, workers)
    assert steps_of(stopped, before) == straight[:before]
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = loader_of(rows, micro_batch, micro_batches, 0, workers)
    steps_of(resumed, 3)  # it may have begun already
    resumed.load_state_dict(state)
    assert steps_of(resumed, 10) == straight[before:]
    assert steps_of(stopped, 10) == straight[before:]
    assert resumed.state_dict() == stopped.state_dict()


def test_orders_differ_by_epoch_and_seed() -> None:
    rows = make_rows([4] * 50, "none")
    one = steps_of(loader_of(rows, 1, 1, 1), 100)
    assert one[:50] != one[50:]
    assert one != steps_of(loader_of(rows, 1, 1, 2), 100)


def test_a_step_is_micro_batches_and_knows_its_size() -> None:
    loader = loader_of(make_rows([4, 3, 2, 4, 3, 2, 9], "none"), 2, 3, 0)
    step = next(loader)
    assert len(step) == 3 and loader.rows_per_step == 6
    real = sum(int(batch["attention_mask"].sum()) for batch in step)
    assert loader.size.tokens == real
    assert loader.size.positions == sum(batch["input_ids"].numel() for batch in step) >= real
    assert all(batch["input_ids"].dtype == torch.int64 for batch in step)


def test_the_last_step_of_an_epoch_is_smaller() -> None:
    """11 rows, 2 x 3 a step: 6, then 3 + 2 in two micro-batches; a step larger than the data is an epoch."""
    rows = make_rows([4] * 11, "none")
    shapes = [[len(b["input_ids"]) for b in step] for step in islice(loader_of(rows, 3, 2, 0), 4)]
    assert shapes == [[3, 3], [3, 2], [3, 3], [3, 2]]
    loader = loader_of(rows, 4, 250, 0)
    assert [[len(b["input_ids"]) for b in step] for step in islice(loader, 2)] == [[4, 4, 3]] * 2
    assert loader.epoch == 2 and loader.end_after(3, -1) == 3


@pytest.mark.parametrize(
    ("epochs", "per_step", "sizes"),
    [
        (1.0, 4, [4, 4, 3]),
        (0.5, 4, [4, 2]),  # 5.5 rows are 6
        (0.4, 4, [4]),  # 4.4 are 4
        (1.5, 4, [4, 4, 3, 4, 2]),  # 16.5 are 17
        (0.001, 4, [1]),
        (2.0, 1000, [11, 11]),
        (1.1, 1000, [11, 1]),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_asked_are_epochs_given(epochs: float, per_step: int, sizes: list[int], workers: int) -> None:
    rows = make_rows([4] * 11, "none")
    loader = loader_of(rows, per_step, 1, 0, workers)
    steps = loader.end_after(epochs, -1)
    given = steps_of(loader, steps)
    assert [len(step) for step in given] == sizes
    assert loader.epoch == pytest.approx(epochs, abs=0.5 / 11) or epochs < 1 / 11
    counts = Counter(tuple(row) for step in given for row in step)
    assert max(counts.values()) == -(-sum(sizes) // 11) and sum(counts.values()) == sum(sizes)
    # Beyond the end (a run that went back to a checkpoint) there is more, the rest of the epoch first.
    rest = -sum(sizes) % 11
    assert sum(map(len, steps_of(loader, -(-rest // per_step)))) == rest and loader.epoch == int(loader.epoch)
    assert loader.end_after(epochs, 7) == 7  # max_steps decides


def order_of_before(count: int, per_step: int, seed: int, steps: int) -> list[list[int]]:
    """The row numbers of each step by the rule of versions before: permutations without a gap."""
    epochs = -(-steps * per_step // count)
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(count) for e in range(epochs)])
    return [order[s * per_step : (s + 1) * per_step].tolist() for s in range(steps)]


@pytest.mark.parametrize(("micro_batch", "micro_batches"), [(3, 2), (5, 5), (1, 1)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_of_before_goes_on_with_its_rule(micro_batch: int, micro_batches: int, workers: int) -> None:
    rows = make_rows([4] * 11, "none")
    numbers = {tuple(rows.row(n).ids.tolist()): n for n in range(11)}
    size = micro_batch * micro_batches
    expected = order_of_before(11, size, 5, 12)
    for done in (0, 1, 2, 5):
        epoch, position = divmod(done * size, 11)
        state = {
            **{"epoch": epoch, "position": position, "seed": 5},
            **{"rows": 11, "fingerprint": rows.fingerprint},
        }
        loader = loader_of(rows, micro_batch, micro_batches, 0, workers)
        loader.load_state_dict(state)
        assert loader.end_after(2.5, -1) == -(-int(2.5 * 11 * 2) // (2 * size))  # 27.5 rows, rounded up
        found = [[numbers[tuple(row)] for row in step] for step in steps_of(loader, 4)]
        assert found == expected[done : done + 4]
        again = loader_of(rows, micro_batch, micro_batches, 0, workers)
        again.load_state_dict(json.loads(json.dumps(loader.state_dict())))  # and so do those saved by it
        found = [[numbers[tuple(row)] for row in step] for step in steps_of(again, 3)]
        assert found == expected[done + 4 : done + 7]
    now = loader_of(rows, micro_batch, micro_batches, 5)  # the control: a new run has another order
    found = [[numbers[tuple(row)] for row in step] for step in steps_of(now, 12)]
    assert (found == expected) == (size == 1)


def test_a_place_in_other_data_is_refused() -> None:
    state = loader_of(make_rows([4, 5, 6], "none"), 1, 1, 0).state_dict()
    for other in (make_rows([4, 6, 5], "none"), make_rows([4, 5, 6], "bfd"), make_rows([4, 5], "none")):
        with pytest.raises(DataError, match="the data has changed"):
            loader_of(other, 1, 1, 0).load_state_dict(state)
    loader_of(make_rows([4, 5, 6], "none"), 1, 1, 0).load_state_dict(state)  # the control


def test_what_has_changed_is_said(tmp_path: Path) -> None:
    """Never two equal numbers: the part that is another is named."""
    tokenizer = train_tokenizer([], 257)
    rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(8)]

    def load(**changes: Any) -> TokenLoader:
        path = str(write_rows(tmp_path / "a.jsonl", changes.pop("rows", rows)))
        values = {"datasets": path, "packing": False, "dataset_cache_dir": None, **changes}
        loader = load_training_data(config(**values), tokenizer).loader
        assert isinstance(loader, TokenLoader)
        return loader

    state = json.loads(json.dumps(load().state_dict()))
    load().load_state_dict(state)  # the control
    before = {key: value for key, value in state.items() if key != "made_from"}  # of an earlier version
    load().load_state_dict(before)
    other = [{**rows[0], "completion": "b0"}, *rows[1:]]
    more = [*rows, {"prompt": "q", "completion": "a"}]
    for saved, now, message, hint in [
        (state, load(rows=other), r"the tokens differ, though not in number \(40 in 8 documents\)$", "files"),
        (state, load(rows=more), "differ: 40 in 8 documents then, 43 in 9 now$", "data files"),
        (
            state,
            load(loss_on="all"),
            "same, but the loss mask differs: 24 trained on then, 40 now$",
            "loss_on",
        ),
        (state, load(packing=True), "cut or packed differently: 8 sequences then, 3 now$", "packing"),
        (
            before,
            load(rows=other),
            "still 8 sequences, but with different tokens or",
            "earlier version",
        ),
        (before, load(rows=more), "8 sequences then, 9 now$", "start a new run"),
    ]:
        with pytest.raises(DataError) as caught:
            now.load_state_dict(saved)
        assert re.search(message, caught.value.message), caught.value.message
        assert hint in (caught.value.hint or "")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_tokenizer([], 257))  # a token a byte


def files(folder: Path, sizes: list[int]) -> Path:
    """A file of so many rows each; a row is a text of its own."""
    number = 0
    for i, size in enumerate(sizes):
        rows = []
        for _ in range(size):
            rows.append({"text": f"<{number}>" * (1 + number % 3)})
            number += 1
        write_rows(folder / f"{i}.jsonl", rows)
    return folder


def stream(folder: Path, encoder: Encoder, strategy: str = "bfd", **options: Any) -> StreamLoader:
    values = {"micro_batch_size": 2, "seed": 7, "pad_id": 0, **options}
    reading = {"buffer_size": values.pop("buffer_size", 5), "on_bad_row": values.pop("on_bad_row", "raise")}
    layout = Layout(max_length=24, strategy=strategy, truncation="split")
    return StreamLoader(Stream([dataset(folder)], encoder, lambda is_text: layout, **reading), **values)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    strategy=st.sampled_from(["wrapped", "bfd", "none"]),
    buffer_size=st.integers(1, 12),
    before=st.integers(0, 12),
    workers=st.sampled_from([0, 1]),
)
def test_a_stream_resumes_at_any_step_and_does_not_depend_on_workers(
    sizes: list[int],
    strategy: str,
    buffer_size: int,
    before: int,
    workers: int,
    encoder: Encoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = files(tmp_path_factory.mktemp("stream"), sizes)
    straight = steps_of(stream(folder, encoder, strategy, buffer_size=buffer_size), before + 8)
    stopped = stream(folder, encoder, strategy, buffer_size=buffer_size, num_workers=workers)
    assert steps_of(stopped, before) == straight[:before]
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = stream(folder, encoder, strategy, buffer_size=buffer_size, num_workers=workers, seed=0)
    resumed.load_state_dict(state)
    assert steps_of(resumed, 8) == straight[before:]
    assert steps_of(stopped, 8) == straight[before:]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    strategy=st.sampled_from(["wrapped", "bfd", "none"]),
    buffer_size=st.integers(1, 12),
)
def test_an_epoch_of_a_stream_holds_every_document_once(
    sizes: list[int],
    strategy: str,
    buffer_size: int,
    encoder: Encoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = files(tmp_path_factory.mktemp("stream"), sizes)
    loader = stream(folder, encoder, strategy, buffer_size=buffer_size, micro_batch_size=1)
    epochs: dict[int, list[str]] = {}
    while (epoch := loader.epoch) < 3:  # before the row: the last one of an epoch ends it
        ids = next(loader)[0]["input_ids"][0]
        text = encoder.tokenizer.decode([int(id) for id in ids if id])  # 0: padding, and the end of a text
        epochs.setdefault(int(epoch), []).append(text)
    expected = "".join(sorted("".join(f"<{n}>" * (1 + n % 3) for n in range(sum(sizes)))))
    orders = [epochs[number] for number in (0, 1, 2)]
    for order in orders:
        assert "".join(sorted("".join(order))) == expected


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("size", "buffer_size"), [(4, 5), (4, 100), (3, 3), (1000, 5)])
def test_a_step_of_a_stream_ends_with_the_epoch(
    size: int, buffer_size: int, workers: int, encoder: Encoder, tmp_path: Path
) -> None:
    """Also one that is larger than the stream: no document twice in a step, and epochs end exactly."""
    folder = files(tmp_path, [6, 4])
    options = {"buffer_size": buffer_size, "micro_batch_size": size, "num_workers": workers}
    loader = stream(folder, encoder, "none", **options)
    for epoch in (1, 2, 3):
        steps = steps_of(loader, -(-10 // size))
        assert [len(step) for step in steps] == [*[size] * (10 // size), *[10 % size] * bool(10 % size)]
        texts = {tuple(row) for step in steps for row in step}
        assert len(texts) == 10 and loader.epoch == epoch
        assert loader.state_dict()["epoch"] == epoch  # what a checkpoint at the border says
        resumed = stream(folder, encoder, "none", **options)
        resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert resumed.epoch == epoch
        assert steps_of(resumed, 3) == steps_of(stream_at(loader, folder, encoder, options), 3)


def stream_at(loader: StreamLoader, folder: Path, encoder: Encoder, options: dict[str, Any]) -> StreamLoader:
    """A stream that was read up to the end of the same epoch, not resumed."""
    straight = stream(folder, encoder, "none", **options)
    while straight.epoch < loader.epoch:
        next(straight)
    return straight


@pytest.mark.parametrize("workers", [0, 1])
def test_a_state_of_a_stream_of_before_goes_on_with_its_rule(
    workers: int, encoder: Encoder, tmp_path: Path
) -> None:
    """Steps that cross the end of the stream: the rows follow each other as one by one, without a gap."""
    folder = files(tmp_path, [6, 4])
    rows = [row for step in steps_of(stream(folder, encoder, "none", micro_batch_size=1), 40) for row in step]
    old = stream(folder, encoder, "none", micro_batch_size=2, micro_batches_per_step=2, num_workers=workers)
    state = old.state_dict()
    del state["crosses_epochs"]
    old.load_state_dict(state)
    assert steps_of(old, 4) == [rows[s : s + 4] for s in range(0, 16, 4)]
    again = stream(folder, encoder, "none", micro_batch_size=2, micro_batches_per_step=2, num_workers=workers)
    again.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert steps_of(again, 4) == [rows[s : s + 4] for s in range(16, 32, 4)]
    now = stream(folder, encoder, "none", micro_batch_size=4)
    assert steps_of(now, 4) != [rows[s : s + 4] for s in range(0, 16, 4)]  # the control


def test_a_stream_is_shuffled_by_seed_and_epoch(encoder: Encoder, tmp_path: Path) -> None:
    folder = files(tmp_path, [10, 10, 10])

    def order(seed: int) -> list[Any]:
        return steps_of(stream(folder, encoder, "none", seed=seed, micro_batch_size=1), 60)

    assert order(1) == order(1) and order(1) != order(2)
    assert order(1)[:30] != order(1)[30:60]


def test_a_place_in_a_stream_of_other_settings_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    folder = files(tmp_path, [10])
    state = stream(folder, encoder).state_dict()
    with pytest.raises(DataError, match="saved with buffer_size=5, not 6"):
        stream(folder, encoder, buffer_size=6).load_state_dict(state)
    with pytest.raises(DataError, match="saved with another tokenizer"):
        stream(folder, Encoder(encoder.tokenizer, loss_on="all")).load_state_dict(state)


def test_a_stream_of_before_resumes_unless_it_holds_pairs(encoder: Encoder, tmp_path: Path) -> None:
    """Format 1 gave other masks to pairs alone: the place of a stream of text is still good."""
    folder = files(tmp_path, [10])
    begun = stream(folder, encoder)
    steps_of(begun, 2)
    state = {**begun.state_dict(), "encoder": encoder.key(1)}
    resumed = stream(folder, encoder)
    resumed.load_state_dict(state)
    assert steps_of(resumed, 5) == steps_of(begun, 5)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    write_rows(pairs / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 10)
    with pytest.raises(DataError, match="other tokens of prompt and completion"):
        stream(pairs, encoder).load_state_dict(state)


def test_a_stream_with_nothing_to_train_on_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": 5}] * 3)
    with pytest.raises(DataError, match="holds no text|nothing to train on"):
        stream(tmp_path, encoder, on_bad_row="skip")
    with pytest.raises(DataError, match="holds a number"):
        stream(tmp_path, encoder)


def test_sizes_of_steps_add_up_over_a_stream(encoder: Encoder, tmp_path: Path) -> None:
    loader = stream(files(tmp_path, [9]), encoder, "none", micro_batches_per_step=2)
    step = next(loader)
    assert loader.size.tokens == sum(int(batch["attention_mask"].sum()) for batch in step)
    assert np.isfinite(loader.epoch)
