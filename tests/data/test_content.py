"""Kept tokens are known by the content of data and tokenizers, saved places in a stream by their window."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import xxhash

from data_helpers import dataset, write_rows
from horizon_lm.data import Documents, file_content, load_tokenizer, sources, train_tokenizer
from horizon_lm.data.encode import Encoder
from horizon_lm.data.file_content import FileHashes
from horizon_lm.data.hf_datasets import open_dataset
from horizon_lm.data.loader import TokenLoader
from horizon_lm.data.packing import Layout
from horizon_lm.data.streaming import Stream, StreamLoader
from horizon_lm.data.tokens import tokenise
from horizon_lm.errors import DataError
from loaded_rows import loader_of, make_rows


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_tokenizer([], 257))


def saved(folder: Path, texts: list[str]) -> Path:
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder))
    return folder


def tokens(path: Path, encoder: Encoder, cache: Path) -> tuple[str, bool]:
    store, was_cached = tokenise(Documents([dataset(path)]), encoder, cache_dir=str(cache), num_proc=1)
    return encoder.tokenizer.decode(store.ids.tolist(), skip_special_tokens=True), was_cached


def test_a_forged_fingerprint_of_a_saved_dataset_changes_nothing(encoder: Encoder, tmp_path: Path) -> None:
    one, other = saved(tmp_path / "one", ["first"] * 3), saved(tmp_path / "other", ["other"] * 3)
    state = json.loads((other / "state.json").read_text())
    state["_fingerprint"] = json.loads((one / "state.json").read_text())["_fingerprint"]
    (other / "state.json").write_text(json.dumps(state))
    cache = tmp_path / "cache"
    assert tokens(one, encoder, cache) == ("first" * 3, False)
    assert tokens(other, encoder, cache) == ("other" * 3, False)
    state["_fingerprint"] = "another"
    (other / "state.json").write_text(json.dumps(state))
    assert tokens(other, encoder, cache) == ("other" * 3, True)  # nor does an honest one
    assert tokens(other.rename(tmp_path / "moved"), encoder, cache) == ("other" * 3, True)


def test_what_is_read_of_a_saved_dataset_is_part_of_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    datasets.Dataset.from_dict({"text": ["a"], "b": ["c"]}).save_to_disk(str(folder))

    def content() -> bytes:
        return b"".join(open_dataset(dataset(folder)).content(FileHashes(None)))

    first = content()
    assert first == content()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_format_columns": ["text"]}))
    assert first != content()


def test_a_dataset_of_the_hub_is_known_by_the_files_of_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's fingerprint is of names: another content of its cache has the same."""
    monkeypatch.setattr("horizon_lm.data.hf_datasets.require_reachable", lambda *_, **__: None)
    rows = write_rows(tmp_path / "a.jsonl", [{"text": f"{n}"} for n in range(8)])
    load = datasets.load_dataset

    def load_dataset(path: str, **options: Any) -> Any:
        return load("json", data_files={"train": str(rows)}, cache_dir=str(tmp_path / "hf"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = Documents([dataset("someone/things")])
    first = documents.fingerprint()
    assert first == documents.fingerprint()
    halves = [Documents([dataset("someone/things", split=s)]) for s in ("train[:4]", "train[4:]")]
    assert len({first, *(half.fingerprint() for half in halves)}) == 3
    (file,) = (tmp_path / "hf").rglob("*.arrow")
    content = file.read_bytes()
    file.write_bytes(content.replace(b"01234567", b"01234568"))
    assert file.read_bytes() != content and documents.fingerprint() != first


def test_a_file_is_known_as_before(tmp_path: Path) -> None:
    """Tokens that earlier versions kept of files are found: the hash is of the type and the bytes."""
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    (found,) = FileHashes(tmp_path).of([path])
    assert found == xxhash.xxh3_128(b".jsonl" + path.read_bytes()).digest()
    expected = xxhash.xxh3_128(repr((["auto", [], "text"], None, False)).encode() + found).hexdigest()
    assert Documents([dataset(path)]).fingerprint() == expected


# ---- hashes that are kept -------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"a" * file_content._SMALL)
    return path


def hashed(path: Path, folder: Path) -> bytes:
    hashes = FileHashes(folder)
    (found,) = hashes.of([path])
    hashes.save()
    return found


def settle(monkeypatch: pytest.MonkeyPatch, seconds: float = 61.0) -> None:
    """As if time had passed since the files were written."""
    now = time.time
    monkeypatch.setattr(file_content.time, "time", lambda: now() + seconds)


def forbid_reading(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(file_content.xxhash, "xxh3_128", None)


def test_a_file_that_was_left_alone_is_not_read_again(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    first = hashed(large, tmp_path)
    with monkeypatch.context() as patch:
        forbid_reading(patch)
        assert hashed(large, tmp_path) == first
    (tmp_path / "hashes.json").write_text("[damaged")
    assert hashed(large, tmp_path) == first


@pytest.mark.parametrize("seconds", [0.0, 59.0])
def test_a_file_that_was_just_written_is_read_again(
    seconds: float, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the tick of a clock, or through a mapping, it may be written again with the same times."""
    settle(monkeypatch, seconds)
    hashed(large, tmp_path)
    assert not (tmp_path / "hashes.json").exists()


def test_a_rewrite_of_the_same_size_and_time_is_seen(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    first, before = hashed(large, tmp_path), large.stat()
    assert (tmp_path / "hashes.json").exists()
    with large.open("r+b") as file:  # the same inode and size
        file.write(b"b")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = large.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )
    assert hashed(large, tmp_path) != first


def test_data_that_changes_while_it_is_tokenised_is_not_kept(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_rows(tmp_path / "a.jsonl", [{"text": "first"}]), tmp_path / "cache"
    read = sources.read_file

    def read_changed(file: Path) -> Any:
        write_rows(path, [{"text": "other"}])
        return read(file)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_file", read_changed)
        assert tokens(path, encoder, cache) == ("other", False)
    write_rows(path, [{"text": "first"}])
    assert tokens(path, encoder, cache) == ("first", False)  # not what the other was kept under
    assert tokens(path, encoder, cache) == ("first", True)


# ---- tokenizers -----------------------------------------------------------------------------


def test_a_tokenizer_in_python_is_known_by_its_vocabulary(tmp_path: Path) -> None:
    """Its name and size are the same; its files are not."""
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>"}
    settings = {"tokenizer_class": "Wav2Vec2CTCTokenizer", "word_delimiter_token": "|", **special}
    keys = []
    for letters in ("ABC", "CBA", "ABC"):
        names = [*special.values(), "|", *letters]
        (tmp_path / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(str(tmp_path))
        assert not tokenizer.is_fast
        keys.append((Encoder(tokenizer).key(), Encoder(tokenizer).key(by_name=True)))
    assert keys[0] == keys[2] and keys[0][0] != keys[1][0]
    assert keys[0][1] == keys[1][1]  # as it was


def test_a_tokenizer_that_splits_special_tokens_is_another() -> None:
    tokenizer: Any = train_tokenizer([], 257)
    before = Encoder(tokenizer).key()
    assert before == Encoder(tokenizer).key(by_name=True)  # what was kept is found
    tokenizer.split_special_tokens = True
    assert Encoder(tokenizer).key() != before == Encoder(tokenizer).key(by_name=True)


# ---- saved places ---------------------------------------------------------------------------


def stream(path: Path, encoder: Encoder) -> StreamLoader:
    layout = Layout(max_length=8, strategy="bfd", truncation="split")
    return StreamLoader(Stream([dataset(path)], encoder, lambda _: layout, 4), micro_batch_size=1)


def test_a_place_in_a_stream_of_other_data_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    rows = [{"text": f"row {n}"} for n in range(12)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    loader = stream(path, encoder)
    for _ in range(6):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    old = {key: value for key, value in state.items() if key != "window"}  # of an earlier version
    expected = next(loader)[0]["input_ids"].tolist()
    for good in (state, old, {**old, "encoder": encoder.key(by_name=True)}):
        again = stream(path, encoder)
        again.load_state_dict(good)
        assert next(again)[0]["input_ids"].tolist() == expected
    write_rows(path, [*rows[:5], {"text": "rOw 5"}, *rows[6:]])
    again = stream(path, encoder)
    with pytest.raises(DataError, match="the data has changed .* the stream differs from document 4 on"):
        again.load_state_dict(state)


ABSURD = [10**18, 10**30, -1, 1.5, "0", None, True, [0]]


@pytest.mark.parametrize("key", ["epoch", "position", "seed", "counted"])
def test_absurd_places_are_refused(key: str, encoder: Encoder, tmp_path: Path) -> None:
    """A place beyond the end of an epoch was looked for without end."""
    loader: TokenLoader = loader_of(make_rows([4, 5, 6], "none"), 1, 1, 0)
    state = loader.state_dict()
    loader.load_state_dict(state)  # the control
    values: list[Any] = [v if key != "counted" else [0, v] for v in ABSURD] + [3 if key == "position" else -5]
    for value in values:
        if value in (10**18, [0, 10**18]) and key != "position":  # far, and a number
            loader.load_state_dict({**state, key: value})
            next(loader)
            continue
        with pytest.raises(DataError, match=f"invalid saved data position: {key}") as caught:
            loader.load_state_dict({**state, key: value})
        assert caught.value.exit_code == 4 and caught.value.hint
    for broken in ({}, {**state, "fingerprint": 5, "made_from": {"files": 1}}, [], 5):
        with pytest.raises(DataError):
            loader.load_state_dict(broken)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["epoch", "document", "position", "seed", "buffer_size"])
def test_absurd_places_in_a_stream_are_refused(key: str, encoder: Encoder, tmp_path: Path) -> None:
    loader = stream(write_rows(tmp_path / "a.jsonl", [{"text": f"row {n}"} for n in range(6)]), encoder)
    state = loader.state_dict()
    for value in ABSURD:
        if value == 10**18 and key in ("epoch", "seed"):
            loader.load_state_dict({**state, key: value})
            next(loader)
            continue
        with pytest.raises(DataError):
            loader.load_state_dict({**state, key: value})
