"""Data: every fault is named with its place, nothing is lost in packing, and the order can be resumed."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon_lm.data import (
    Documents,
    TokenLoader,
    load_tokenizer,
    load_training_data,
    packing,
    train_tokenizer,
)
from horizon_lm.errors import ConfigError, DataError


def dataset(path, **settings):
    return SimpleNamespace(path=str(path), **settings)


def read(*paths, max_bytes=None, **settings):
    return list(Documents([dataset(path, **settings) for path in paths], max_bytes))


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, columns: dict) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(islice(Documents([dataset("python-stdlib")], 300_000), 40), 500)


# ---- sources ------------------------------------------------------------------------------


def test_every_kind_of_file_and_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "sub" / "b.md").write_text("three")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    write_rows(tmp_path / "d.jsonl", [{"text": "four"}, {"text": "five", "n": 1}])
    (tmp_path / "e.json").write_text('\n [{"text": "six"},\n {"text": "seven"}]')
    (tmp_path / "f.json").write_text('{"text": "eight"}\n\n{"text": "nine"}\n')
    write_parquet(tmp_path / "g.parquet", {"text": ["ten", "eleven"], "id": [1, 2]})
    documents = ["one\r\ntwo", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "three"]
    assert read(tmp_path) == documents
    assert read(tmp_path / "**" / "*") == documents
    assert read(tmp_path / "*.txt", tmp_path / "g.parquet") == ["one\r\ntwo", "ten", "eleven"]


def test_the_text_column_can_be_named_or_renamed(tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    table = write_parquet(tmp_path / "a.parquet", {"text": ["no"], "body": ["yes"]})
    for path in (rows, table):
        assert read(path, text_column="body") == ["yes"]
        assert read(path, text_column="text", columns={"body": "text"}) == ["yes"]


def test_max_bytes_cuts_the_document_that_crosses_it(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "dé€"}, {"text": "never"}])
    sizes = {size: "".join(read(path, max_bytes=size)) for size in (2, 3, 6, 8, 9, 11, 100)}
    expected = {2: "ab", 3: "abc", 6: "abcdé", 8: "abcdé", 9: "abcdé€", 11: "abcdé€ne", 100: "abcdé€never"}
    assert sizes == expected


def test_empty_texts_are_counted(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": ""}, {"text": "x"}, {"text": ""}])
    documents = Documents([dataset(path)])
    for _ in range(2):  # iterating again starts again
        assert list(documents) == ["x"]
        assert documents.num_empty == 2


FAULTS = {
    "broken line": ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a\.jsonl:2 is not valid JSON"),
    "not an object": ("a.jsonl", b'{"text": "x"}\n\n["y"]\n', r"a\.jsonl:3 holds a list, not an object"),
    "missing column": (
        "a.jsonl",
        b'{"body": "x", "id": 1}',
        r"a\.jsonl:1 has no column 'text'.*'body', 'id'",
    ),
    "null": ("a.jsonl", b'{"text": "x"}\n{"text": null}', r"a\.jsonl:2: 'text' holds null, not text"),
    "number": ("a.jsonl", b'{"text": 1.5}', r"a\.jsonl:1: 'text' holds a number"),
    "bytes in a line": ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl:2 is not UTF-8: byte 0xff"),
    "deep": ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not"),
    "huge number": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"a\.jsonl:1 is not usable JSON"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: .*surrogate"),
    "array": ("a.json", b'[{"text": "x"},\n {"text": 3}]', r"a\.json: row 2: 'text' holds a number"),
    "broken array": ("a.json", b'[{"text": "x"},\n {"text": }]', r"a\.json:2 is not valid JSON"),
    "no rows": ("a.jsonl", b"\n\n", r"a\.jsonl holds no text"),
    "empty rows": ("a.jsonl", b'{"text": ""}', r"a\.jsonl holds no text"),
    "empty text": ("a.txt", b"", r"a\.txt holds no text"),
    "bytes in text": ("a.txt", b"abc\xfe", r"a\.txt is not UTF-8: byte 0xfe at offset 3"),
    "not parquet": ("a.parquet", b"PAR1 no PAR1", r"a\.parquet is not a readable parquet file"),
    "unknown type": ("a.bin", b"x", r"a\.bin: unknown file type '\.bin'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_place(fault, tmp_path):
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_faults_of_parquet_columns(tmp_path):
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text'; it has 'a', 'b'"):
        read(write_parquet(tmp_path / "a.parquet", {"a": ["x"], "b": ["y"]}))
    with pytest.raises(DataError, match=r"b\.parquet: row 2: 'text' holds null"):
        read(write_parquet(tmp_path / "b.parquet", {"text": ["x", None]}))
    with pytest.raises(DataError, match=r"c\.parquet: row 1: 'text' holds a number"):
        read(write_parquet(tmp_path / "c.parquet", {"text": [1, 2]}))


def test_faults_of_paths(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.bin").write_bytes(b"x")
    for path, message in [
        (tmp_path / "none.txt", "does not exist"),
        (tmp_path / "*.txt", "matches no file"),
        (tmp_path / "folder", "matches no file"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            read(path)
        assert caught.value.exit_code == 4 and caught.value.hint
    with pytest.raises(DataError, match="no dataset"):
        read()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_gives_a_data_error_or_text(tmp_path_factory, data):
    """300 bytes of JSONL with any bytes overwritten: never another exception, never other types."""
    rows = [{"text": "a line of text", "n": number} for number in range(8)]
    content = bytearray("".join(json.dumps(row) + "\n" for row in rows).encode())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.jsonl"
    path.write_bytes(content)
    try:
        assert all(isinstance(text, str) and text for text in read(path))
    except DataError as error:
        assert f"{path}:" in error.message


def test_the_standard_library_is_source_text_in_a_fixed_mixed_order():
    first, again = (read("python-stdlib", max_bytes=1_000_000) for _ in range(2))
    assert first == again
    assert sum(len(text.encode()) for text in first) == 1_000_000
    assert len(first) > 20
    assert sum("import " in text for text in first) > len(first) / 2


# ---- tokenizer ----------------------------------------------------------------------------


def test_a_trained_tokenizer_is_deterministic_exact_and_reloads(tokenizer, tmp_path, monkeypatch):
    again = train_tokenizer(islice(Documents([dataset("python-stdlib")], 300_000), 40), 500)
    assert again.get_vocab() == tokenizer.get_vocab() and len(tokenizer) == 500
    tokenizer.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(socket.socket, "connect", None)  # a local folder needs no network
    loaded = load_tokenizer(str(tmp_path / "saved"))
    assert loaded.eos_token == "<|endoftext|>" and loaded.eos_token_id == tokenizer.eos_token_id
    for text in ["  def f( x ):\n\treturn 'é😀' , 1 .\n", "\x00\x7f\n\n \t", "日本語"]:
        ids = loaded(text).input_ids
        assert ids == tokenizer(text).input_ids
        assert loaded.decode(ids) == text


def test_a_vocabulary_too_small_for_all_bytes_is_refused():
    with pytest.raises(ConfigError, match="256 is too small"):
        train_tokenizer(["x"], 256)
    assert len(train_tokenizer([], 257)) == 257


def test_a_folder_without_a_tokenizer_is_refused(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="holds no tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "tokenizer_name_or_path" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="is not a folder"):
        load_tokenizer(str(tmp_path / "missing"))
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "no-end")
    settings_file = tmp_path / "no-end" / "tokenizer_config.json"
    settings_file.write_text(json.dumps({**json.loads(settings_file.read_text()), "eos_token": None}))
    with pytest.raises(ConfigError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path / "no-end"))


# ---- packing ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.text("ab \né€", min_size=1, max_size=40), min_size=1, max_size=12),
    max_length=st.integers(2, 9),
    piece=st.integers(1, 15),
)
def test_packing_loses_and_invents_nothing(tokenizer, documents, max_length, piece):
    """Whatever the limits on pieces and batches: the blocks decode to the documents, in order."""
    limits = packing._PIECE_CHARACTERS, packing._BATCH_CHARACTERS
    packing._PIECE_CHARACTERS, packing._BATCH_CHARACTERS = piece, 2 * piece
    try:
        packed = packing.pack_documents(documents, tokenizer, max_length)
    except DataError as error:
        assert "less than one sequence" in error.message
        return
    finally:
        packing._PIECE_CHARACTERS, packing._BATCH_CHARACTERS = limits
    assert packed.blocks.shape[1] == max_length and packed.blocks.dtype == np.uint16
    assert packed.num_documents == len(documents)
    assert packed.num_tokens == packed.blocks.size + packed.dropped_tokens
    assert 0 <= packed.dropped_tokens < max_length
    whole = "".join(text + "<|endoftext|>" for text in documents).encode()
    if packed.dropped_tokens == 0:
        assert tokenizer.decode(packed.blocks.ravel()).encode() == whole
    assert whole.startswith(tokenizer.decode(packed.blocks.ravel()).rstrip("\ufffd").encode())


def test_packing_equals_one_call_of_the_tokenizer_per_document(tokenizer):
    documents = read("python-stdlib", max_bytes=200_000)
    packed = packing.pack_documents(documents, tokenizer, 64)
    expected = [id for text in documents for id in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    assert packed.num_tokens == len(expected)
    assert packed.blocks.ravel().tolist() == expected[: packed.blocks.size]


def test_a_tokenizer_that_begins_texts_has_its_token_once_per_document(tokenizer, monkeypatch):
    from tokenizers import processors

    begins = train_tokenizer(["some text"], 300)
    begins.add_special_tokens({"bos_token": "<s>"})
    begin = begins.bos_token_id
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    monkeypatch.setattr(packing, "_PIECE_CHARACTERS", 5)
    row = packing.pack_documents(["some text\nof two lines"] * 2, begins, 2).blocks.ravel().tolist()
    assert row.count(begin) == 2 and row[0] == begin
    assert row[row.index(begins.eos_token_id) + 1] == begin


def test_a_text_shorter_than_a_sequence_is_refused_with_its_length(tokenizer):
    with pytest.raises(DataError, match=r"holds 2 tokens, less than one sequence of 8") as caught:
        packing.pack_documents(["a"], tokenizer, 8)
    assert "max_length=2" in (caught.value.hint or "")


def test_wide_vocabularies_get_wide_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 1 << 16)
    assert packing.pack_documents(["abc"], tokenizer, 2).blocks.dtype == np.uint16
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: (1 << 16) + 1)
    assert packing.pack_documents(["abc"], tokenizer, 2).blocks.dtype == np.uint32


# ---- loader -------------------------------------------------------------------------------

SIZES = {
    "rows": st.integers(1, 40),
    "micro_batch": st.integers(1, 5),
    "micro_batches": st.integers(1, 4),
    "seed": st.integers(0, 2**63 - 1),
}


def make_loader(rows, micro_batch, micro_batches, seed):
    blocks = np.arange(rows * 3, dtype=np.uint16).reshape(rows, 3)  # row r begins with 3 r
    return TokenLoader(blocks, micro_batch_size=micro_batch, micro_batches_per_step=micro_batches, seed=seed)


def take_rows(loader, steps):
    """The row numbers of the next `steps` steps."""
    return [
        int(ids[0]) // 3 for step in islice(loader, steps) for batch in step for ids in batch["input_ids"]
    ]


@settings(max_examples=100, deadline=None)
@given(**SIZES)
def test_each_epoch_holds_every_row_once(rows, micro_batch, micro_batches, seed):
    loader = make_loader(rows, micro_batch, micro_batches, seed)
    steps = 3 * loader.steps_per_epoch
    order = take_rows(loader, steps)
    for begin in range(0, len(order) - rows + 1, rows):
        assert Counter(order[begin : begin + rows]) == Counter(range(rows))
    assert loader.epoch == pytest.approx(steps * loader.rows_per_step / rows)
    assert order == take_rows(make_loader(rows, micro_batch, micro_batches, seed), steps)


@settings(max_examples=100, deadline=None)
@given(**SIZES, before=st.integers(0, 30))
def test_resuming_at_any_step_gives_the_same_order(rows, micro_batch, micro_batches, seed, before):
    straight = make_loader(rows, micro_batch, micro_batches, seed)
    take_rows(straight, before)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = make_loader(rows, micro_batch, micro_batches, 0)
    resumed.load_state_dict(state)
    assert take_rows(resumed, 12) == take_rows(straight, 12)
    assert resumed.state_dict() == straight.state_dict()


def test_orders_differ_by_epoch_and_seed():
    one = take_rows(make_loader(100, 1, 1, 1), 200)
    assert one[:100] != one[100:]
    assert one != take_rows(make_loader(100, 1, 1, 2), 200)


def test_a_step_is_micro_batches_of_aligned_labels():
    loader = make_loader(7, 2, 3, 0)
    step = next(loader)
    assert len(step) == 3 and loader.rows_per_step == 6 and loader.tokens_per_step == 18
    for batch in step:
        assert batch["input_ids"].shape == (2, 3) and batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["labels"], batch["input_ids"])


def test_a_place_in_other_data_is_refused():
    state = make_loader(7, 2, 3, 0).state_dict()
    other = np.arange(21, dtype=np.uint16).reshape(7, 3)
    other[3, 1] += 1
    with pytest.raises(DataError, match="the data has changed"):
        TokenLoader(other, micro_batch_size=2, micro_batches_per_step=3, seed=0).load_state_dict(state)
    with pytest.raises(DataError, match="not empty"):
        TokenLoader(np.empty((0, 4), np.uint16), micro_batch_size=1)


# ---- all together -------------------------------------------------------------------------


def make_config(**changes):
    from horizon_lm.config import load_config

    config, _ = load_config(None, [f"{key}={value}" for key, value in changes.items()])
    return config


def test_training_data_from_a_configuration(tmp_path, tokenizer):
    write_rows(tmp_path / "a.jsonl", [{"text": f"def f{n}():\n    return {n}\n"} for n in range(50)])
    common = {"datasets": tmp_path / "a.jsonl", "max_length": 16, "init_model.model_type": "llama"}
    trained = load_training_data(make_config(**common, train_tokenizer_vocab_size=300))
    assert trained.num_documents == 50 and trained.num_empty_documents == 0
    assert trained.blocks.max() < len(trained.tokenizer) <= 300
    assert trained.num_tokens == trained.blocks.size + trained.dropped_tokens
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_training_data(make_config(**common, tokenizer_name_or_path=tmp_path / "tokenizer"))
    given_one = load_training_data(make_config(**common), tokenizer)
    assert np.array_equal(loaded.blocks, given_one.blocks)
    with pytest.raises(ConfigError, match="no tokenizer is named"):
        load_training_data(make_config(**common))
    cut = load_training_data(make_config(**common, max_train_bytes=500), tokenizer)
    assert cut.num_documents < 50


@pytest.mark.parametrize("name", sorted(os.listdir(Path(__file__).parent.parent / "configs")))
def test_shipped_configurations_are_valid_and_explain_every_key(name):
    from horizon_lm.config import load_config

    path = Path(__file__).parent.parent / "configs" / name
    overrides = [] if name == "quickstart.yaml" else ["model_name_or_path=PATH", "datasets=FILE.jsonl"]
    config, notes = load_config(str(path), overrides)
    assert config.datasets and not notes
    for line in path.read_text().splitlines():
        assert not line or "#" in line, f"{name}: a key without a comment: {line}"
