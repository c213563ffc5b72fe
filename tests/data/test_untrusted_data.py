"""Data from elsewhere: files outside its folder, damaged and absurd files, and columns that are not text.

Each ends in one clear line, in bounded time and memory, or is trained on as what it is.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_helpers import config, dataset, examples, read, write_parquet, write_rows
from horizon_lm.config import TrainConfig
from horizon_lm.data import Documents, file_content, load_training_data, readers, train_tokenizer
from horizon_lm.data.examples import Chat
from horizon_lm.data.packing import _best_fit
from horizon_lm.data.readers import read_file
from horizon_lm.errors import ConfigError, DataError

SECRET = [{"text": "secret"}]
TEXTS = [f"row {n}" for n in range(30)]


def saved(folder: Path, table: Any = None, features: Any = None, **state: Any) -> Path:
    """A folder as `save_to_disk` makes it; state: what its state.json is to say instead."""
    table = pyarrow.table({"text": TEXTS}) if table is None else table
    info = datasets.DatasetInfo(features=None if features is None else datasets.Features(features))
    datasets.Dataset(table, info=info).save_to_disk(str(folder))
    edit(folder / "state.json", **state)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def arrow_of(folder: Path) -> Path:
    return next(folder.glob("*.arrow"))


# ---- outside the folder ---------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "secret.jsonl", SECRET)


def test_a_link_out_of_a_folder_is_refused_or_followed_where_that_is_set(
    tmp_path: Path, outside: Path
) -> None:
    folder, far = tmp_path / "data", tmp_path / "far"
    (folder / "sub").mkdir(parents=True)
    far.mkdir()
    write_rows(folder / "sub" / "a.jsonl", [{"text": "a"}])
    write_rows(far / "z.jsonl", [{"text": "far"}])
    (folder / "b.jsonl").symlink_to("sub/a.jsonl")  # the control: a link that stays inside
    (folder / "far").symlink_to(far)  # a folder, which a walk does not enter
    (folder / "up").symlink_to("..")  # followed, this would be entered for ever
    assert read(folder) == read(folder / "*.jsonl") * 2 == ["a", "a"]
    (folder / "up").unlink()
    for pattern in (folder / "**" / "*.jsonl", folder / "*" / "z.jsonl"):  # which a glob does
        with pytest.raises(DataError, match=r"far/z.jsonl leads out of the data folder .*data, to .*far/z"):
            read(pattern)
    assert read(folder / "far" / "*") == ["far"]  # named by the user, up to the glob
    (folder / "c.jsonl").symlink_to(outside)
    for path in (folder, folder / "*.jsonl"):
        with pytest.raises(DataError, match=r"c.jsonl leads out of the data folder") as caught:
            read(path)
        assert f"{{path: {folder}, follow_links: true}}" in str(caught.value.hint)
    (folder / "up").symlink_to("..")
    followed = read(folder, follow_links=True)
    assert sorted(set(followed)) == ["a", "far", "secret"] and len(followed) < 12
    assert read(folder / "c.jsonl") == ["secret"]  # what is named itself


def test_a_data_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "a.jsonl", [{"text": "a"}])
    (tmp_path / "link").symlink_to("data")
    assert read(tmp_path / "link") == read(tmp_path / "link" / "*.jsonl") == ["a"]


def test_snapshots_of_the_hub_s_cache_are_links_to_their_own_blobs(tmp_path: Path, outside: Path) -> None:
    home = tmp_path / "datasets--a--b"
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    write_rows(home / "blobs" / "1f", [{"text": "a"}])
    (snapshot / "train.jsonl").symlink_to("../../blobs/1f")
    assert read(snapshot) == read(snapshot / "*.jsonl") == ["a"]
    (snapshot / "train-2.jsonl").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of"):
        read(snapshot)


def test_a_saved_dataset_that_names_files_elsewhere(tmp_path: Path, outside: Path) -> None:
    other = saved(tmp_path / "other")
    target = arrow_of(other)
    linked = saved(tmp_path / "linked")
    arrow_of(linked).unlink()
    (linked / target.name).symlink_to(target)
    names = [{"filename": f"../other/{target.name}"}], [{"filename": str(target)}]
    for folder in (
        linked,
        saved(tmp_path / "dots", _data_files=names[0]),
        saved(tmp_path / "absolute", _data_files=names[1]),
    ):
        with pytest.raises(DataError, match="leads out of the data folder"):
            read(folder)
        assert read(folder, follow_links=True) == TEXTS
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["../other"]}')
    with pytest.raises(DataError, match="leads out of the data folder"):
        read(splits, split="../other")
    assert read(saved(tmp_path / "own", _data_files=[{"filename": str(tmp_path / "own" / target.name)}]))


def test_dataset_info_that_names_files_elsewhere(tmp_path: Path, outside: Path) -> None:
    folder = tmp_path / "info"
    folder.mkdir()
    write_rows(folder / "in.jsonl", [{"text": "in"}])
    (folder / "link.jsonl").symlink_to(outside)
    files = {"dots": "../secret.jsonl", "absolute": str(outside), "link": "link.jsonl", "own": "in.jsonl"}
    entries = {name: {"file_name": file, "columns": {"prompt": "text"}} for name, file in files.items()}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    for name in ("dots", "absolute", "link"):
        with pytest.raises(ConfigError, match=rf"json: {name}: file_name leads out of its folder, to"):
            config(datasets=name, dataset_dir=str(folder))
        followed = config(datasets=[{"path": name, "follow_links": True}], dataset_dir=str(folder))
        assert [p.example.text for p in Documents(followed.datasets)] == ["secret"]  # type: ignore[union-attr]
    assert read(config(datasets="own", dataset_dir=str(folder)).datasets[0].path) == ["in"]


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for path, message in (
        (tmp_path, "is a named pipe, not a file"),
        (tmp_path / "*.jsonl", "is a named pipe, not a file"),
        (tmp_path / "a.jsonl", "is a pipe or device, not a file"),
    ):
        with pytest.raises(DataError, match=message):
            read(path)


# ---- columns that are not text --------------------------------------------------------------

STORED = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
MEDIA = pyarrow.array([{"bytes": b"no picture", "path": None}] * 30, STORED)


@pytest.mark.parametrize("kind", ["Image", "Audio", "Video", "Pdf", "Nifti"])
def test_media_beside_text_is_not_decoded(kind: str, tmp_path: Path) -> None:
    feature, text = getattr(datasets, kind)(), datasets.Value("string")
    both = pyarrow.table({"text": TEXTS, "m": MEDIA})
    assert read(saved(tmp_path / "both", both, {"text": text, "m": feature})) == TEXTS
    lists = pyarrow.table(
        {"text": TEXTS, "m": pyarrow.array([[row] for row in MEDIA.to_pylist()], pyarrow.list_(STORED))}
    )
    assert read(saved(tmp_path / "list", lists, {"text": text, "m": datasets.List(feature)})) == TEXTS
    only = saved(tmp_path / "only", pyarrow.table({"m": MEDIA}), {"m": feature})
    with pytest.raises(DataError, match=rf"row 1 fits no known format; its columns are 'm' \({kind}\)"):
        read(only)
    with pytest.raises(DataError, match=f"row 1: 'text' holds {kind}, not text"):
        read(only, columns={"m": "text"})


def test_media_inside_messages_counts_where_there_is_some(tmp_path: Path) -> None:
    part = {"role": datasets.Value("string"), "content": datasets.Value("string"), "image": datasets.Image()}
    turns = [{"role": "user", "content": "a", "image": None}, {"role": "assistant", "content": "b"}]
    made = datasets.Dataset.from_dict(
        {"messages": [turns] * 3}, features=datasets.Features({"messages": datasets.List(part)})
    )
    made.save_to_disk(str(tmp_path / "a"))
    assert [chat.messages for chat in examples(tmp_path / "a") if isinstance(chat, Chat)] == [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ] * 3


def test_a_stream_leaves_media_aside_too() -> None:
    from horizon_lm.data.hf_datasets import ArrowRows

    features = {"text": datasets.Value("string"), "m": datasets.Image(), "j": datasets.Json()}
    table = pyarrow.table(
        {"text": TEXTS, "m": MEDIA, "j": pyarrow.array(['{"a": 1}'] * 30).cast(pyarrow.json_())}
    )
    info = datasets.DatasetInfo(features=datasets.Features(features))
    for made in (
        datasets.Dataset(table, info=info),
        datasets.Dataset(table, info=info).to_iterable_dataset(),
    ):
        row, place = next(iter(ArrowRows(made, "name")))
        assert isinstance(row, dict) and (row["text"], row["j"]) == ("row 0", {"a": 1})
        assert place == "name: row 1" and row["m"].kind == "Image"


@pytest.mark.parametrize("format", ["arrow", "pandas", "numpy", "torch", "jax", "custom", "no such", 5])
def test_formats_of_a_saved_dataset_are_left_aside(format: Any, tmp_path: Path) -> None:
    assert read(saved(tmp_path / "a", _format_type=format)) == TEXTS
    table = pyarrow.table({"other": TEXTS, "text": TEXTS[::-1]})
    shown = saved(tmp_path / "b", table, _format_type=format, _format_columns=["text"])
    assert read(shown) == TEXTS[::-1]
    with pytest.raises(DataError, match="its columns are 'other'\n"):  # what is not shown is not there
        edit(shown / "state.json", _format_columns=["other"])
        read(shown)


def test_an_unknown_feature_type_is_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    edit(folder / "dataset_info.json", features={"text": {"_type": "Mine"}})
    with pytest.raises(DataError, match="could not be read as a saved dataset: Feature type 'Mine' not"):
        read(folder)


# ---- damaged and absurd files ---------------------------------------------------------------


def test_damaged_arrow_files_are_one_line(tmp_path: Path) -> None:
    """Arrow itself reads wherever a damaged offset points, and ends the process."""
    offsets = np.arange(0, 64, 2, dtype=np.int32)
    folder = saved(tmp_path / "a", pyarrow.table({"text": ["xy"] * 31}))
    file = arrow_of(folder)
    whole = file.read_bytes()
    begin = whole.index(offsets.tobytes())
    length = struct.pack("<q", 31)
    for damaged, message in (
        (
            whole[: begin + 16] + struct.pack("<i", 2**31 - 10) + whole[begin + 20 :],
            r"from the first row:",
        ),
        (whole[:begin] + struct.pack("<i", -5) + whole[begin + 4 :], "from the first row:"),
        (whole.replace(length, struct.pack("<q", 10**18)), "cannot be read after row 30"),
        (whole.replace(b"xy" * 31, b"\xff" * 62), "from the first row: .*UTF8"),
        (whole[: len(whole) // 2], "could not be read as a saved dataset"),
        (b"", "could not be read as a saved dataset"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=message) as caught:
            read(folder)
        assert len(caught.value.message) < 600 and caught.value.hint
    file.write_bytes(whole)
    assert read(folder) == ["xy"] * 31  # the control


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (file_content, readers):
        monkeypatch.setattr(module, "FREE_EXPANSION", 1 << 20)
        monkeypatch.setattr(module, "LARGEST_ROW", 1 << 18)


@pytest.mark.parametrize("stored_as", ["text", "dictionary"])
def test_a_parquet_file_that_is_far_more_than_its_size(
    stored_as: str, tmp_path: Path, small_bounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value of 100 kB and 100,000 rows that name it: 10 GB in less than 794 bytes."""
    rows = pyarrow.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), ["a" * 100_000])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": rows}),
        path,
        compression="brotli",
        dictionary_pagesize_limit=1 << 30,
        write_statistics=False,
        store_schema=stored_as == "dictionary",
    )
    assert path.stat().st_size < 2000
    sizes = []
    size = readers._decoded_size
    monkeypatch.setattr(readers, "_decoded_size", lambda batch: sizes.append(size(batch)) or sizes[-1])
    with pytest.raises(DataError, match="expands to more than 200 times its size"):
        next(read_file(path))
    assert max(sizes) <= 1 << 18 and sum(sizes) < 2 << 20


def test_parquet_files_of_before_are_read_as_they_were(tmp_path: Path, small_bounds: None) -> None:
    """The control: rows of dictionaries, lists and nulls, in many groups, row by row as Arrow has them."""
    table = pyarrow.table(
        {
            "text": [f"text {n % 7} " * (n % 50) for n in range(600)],
            "messages": [[{"role": "user", "content": str(n % 3)}] * (n % 4) for n in range(600)],
            "n": [None if n % 5 else n for n in range(600)],
            "kind": pyarrow.array([f"k{n % 3}" for n in range(600)]).dictionary_encode(),
        }
    )
    for options in ({}, {"row_group_size": 100}, {"use_dictionary": False}):
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", **options)
        assert [row for row, _ in read_file(tmp_path / "a.parquet")] == table.to_pylist()


def test_a_compressed_file_that_is_far_more_than_its_size(tmp_path: Path, small_bounds: None) -> None:
    line = b'{"text": "%s"}\n' % (b"a" * 1000)
    for name, content in {
        "a.jsonl.gz": line * 4000,
        "b.json.gz": b"[" + b" " * 4_000_000 + b"]",
        "c.csv.gz": b"text\n" + b"a" * 1000 + b"\n" + (b"a" * 1000 + b"\n") * 4000,
        "d.txt.gz": b"a" * 4_000_000,
    }.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=r"expands to more than 200 times its size") as e:
            read(tmp_path / name)
        assert e.value.hint
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(line * 1000))  # the control: below the bound
    assert len(read(tmp_path / "e.jsonl.gz")) == 1000
    rows = write_rows(tmp_path / "f.jsonl", [{"text": os.urandom(50_000).hex()} for _ in range(20)])
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))  # and one that is large for good
    assert len(read(tmp_path / "f.jsonl.gz")) == 20


# ---- absurd numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        *("max_length", "max_samples", "max_train_bytes", "max_steps", "num_train_epochs", "val_size"),
        *("buffer_size", "per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_step"),
        *("per_device_eval_batch_size", "train_tokenizer_vocab_size", "data_seed", "dataset_num_proc"),
        "dataloader_num_workers",
    ],
)
def test_settings_of_data_have_bounds(key: str) -> None:
    values = (1e301, 1e308) if key == "num_train_epochs" else (10**19, 10**30, 10**400)
    for value in values:
        with pytest.raises(ConfigError, match=key) as caught:
            config(**{key: value})
        assert caught.value.exit_code == 2 and len(caught.value.message) < 1200
    assert isinstance(config(), TrainConfig)


def test_an_absurd_length_of_sequences_takes_no_memory(tmp_path: Path) -> None:
    """Packing needs a place for each length, up to that of all documents together."""
    lengths = np.array([3, 5, 2, 7, 7, 1])
    expected = _best_fit(lengths, 25)  # all in one sequence, exactly
    for longer in (26, 1000, 10**9, 10**18):
        found = _best_fit(lengths, longer)
        assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    rows = [{"prompt": "a", "completion": "b" * n} for n in range(1, 9)]
    path = str(write_rows(tmp_path / "a.jsonl", rows))
    data = load_training_data(
        config(datasets=path, max_length=10**9, dataset_cache_dir=None), train_tokenizer([], 257)
    )
    assert len(data.rows) == 1 and data.rows.strategy == "bfd"


def test_dataset_entries_have_bounds() -> None:
    with pytest.raises(ConfigError, match="max_samples"):
        config(datasets=[{"path": "a.jsonl", "max_samples": 10**19}])
    assert dataset("a.jsonl", max_samples=10**12).max_samples == 10**12


def test_parquet_that_says_it_has_more_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x"] * 40})
    content = path.read_bytes()
    varint = bytes([40 * 2])  # zigzag: the number of rows, in the footer and in the group
    footer = len(content) - 8 - struct.unpack("<i", content[-8:-4])[0]
    for at in [i for i in range(footer, len(content) - 8) if content[i : i + 1] == varint]:
        path.write_bytes(content[:at] + bytes([126]) + content[at + 1 :])
        try:
            assert set(read(path)) <= {"x"}
        except DataError as error:
            assert len(error.message) < 600
