"""Where rows come from: files of all kinds, folders, globs, saved datasets, names on the Hub."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import config, dataset, examples, read, write_parquet, write_rows
from horizon_lm.data import Documents, file_content, hf_datasets, load_training_data, sources, train_tokenizer
from horizon_lm.data.examples import Chat, Pair, Text
from horizon_lm.data.readers import read_file
from horizon_lm.data.sources import ShardOrder, check_exists, rows
from horizon_lm.errors import DataError


def test_every_kind_of_file_and_folders_and_globs(tmp_path: Path) -> None:
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


def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path) -> None:
    plain = {
        "a.txt": b"one\r\ntwo",
        "b.jsonl": b'\xef\xbb\xbf{"text": "three"}\n\n{"text": "four"}',
        "c.json": b'\n [{"text": "five"}]',
        "d.json": b'{"text": "six"}\n{"text": "seven"}\n',
        "e.csv": b"\xef\xbb\xbfid,text\r\n1,eight\r\n2,nine\r\n",
    }
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    for name, content in plain.items():
        (tmp_path / "plain" / name).write_bytes(content)
        (tmp_path / "packed" / f"{name.upper() if name < 'c' else name}.gz").write_bytes(
            gzip.compress(content)
        )
    for name in plain:
        (packed,) = (tmp_path / "packed").glob(f"{name.upper() if name < 'c' else name}.gz")
        assert read(packed) == read(tmp_path / "plain" / name), name
    everything = ["one\r\ntwo", "three", "four", "five", "six", "seven", "eight", "nine"]
    for folder in ("plain", "packed"):
        assert read(tmp_path / folder / "*") == everything
        assert read(tmp_path / folder) == everything[:-2]  # CSV beside JSON may be the same in another form
    (tmp_path / "packed" / "b.jsonl").write_bytes(plain["b.jsonl"])
    assert read(tmp_path / "packed") == [*everything[:1], *everything[1:3], *everything[1:6]]
    (tmp_path / "packed" / "c.json").write_bytes(plain["c.json"])
    assert read(tmp_path / "packed").count("five") == 1  # beside itself a compressed file is not read again


def test_content_is_known_by_its_type_too(tmp_path: Path) -> None:
    """The same bytes under .jsonl.gz and .txt.gz are other rows, and other tokens in the cache."""
    content = gzip.compress(b'{"text": "a"}\n')
    prints = set()
    for name in ("a.jsonl.gz", "a.txt.gz", "a.json.gz"):
        (tmp_path / name).write_bytes(content)
        prints.add(Documents([dataset(tmp_path / name)]).fingerprint())
    assert len(prints) == 3


CSV = """instruction,input,output,note
"Say ""hi"", twice",,hi hi,"1,5"
"two
lines",x,"a
b\r
c",

é 日本, ,😀,null
"""


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + CSV.encode())
    found = [chat.messages for chat in examples(path) if isinstance(chat, Chat)]
    assert [[m["content"] for m in messages] for messages in found] == [
        ['Say "hi", twice', "hi hi"],
        ["two\nlines\nx", "a\nb\r\nc"],
        ["é 日本\n ", "😀"],
    ]
    with path.open(encoding="utf-8-sig", newline="") as file:  # the authority
        rows_of = list(csv.DictReader(file))
    assert [row for row, _ in read_file(path)] == rows_of
    (tmp_path / "b.csv").write_bytes(CSV.encode().replace(b"\n", b"\r\n"))
    assert len(examples(tmp_path / "b.csv")) == 3


def test_a_cell_of_csv_may_be_a_document(tmp_path: Path) -> None:
    long = "word, " * 60_000
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f'text\n"{long}"\n')
    assert read(tmp_path / "a.csv") == [long]
    assert csv.field_size_limit() == limit  # which is everyone's


def test_bad_rows_of_csv_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\nx,1\ny\n"z"z,3\n\xff,4\nv,5\n"open,6\n')
    documents = Documents([dataset(path)], on_bad_row="skip")
    assert [placed.example for placed in documents] == [Text("x"), Text("v")]
    assert [row.removeprefix(f"{path}: ").split(" ")[:2] for row in documents.bad_rows] == [
        ["row", str(number)] for number in (2, 3, 4, 6)
    ]


def test_a_small_file_that_decompresses_to_much_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_content, "LARGEST_ROW", 1 << 16)
    monkeypatch.setattr(file_content, "LARGEST_WHOLE", 1 << 17)
    row = b'{"text": "x"}\n'
    (tmp_path / "many.jsonl.gz").write_bytes(gzip.compress(row * 100_000))  # rows of a fair size
    assert len(read(tmp_path / "many.jsonl.gz")) == 100_000
    bomb = gzip.compress(b'{"text": "' + b"x" * (1 << 18))
    for name, message in [
        ("bomb.jsonl.gz", "bomb.jsonl.gz:1 is longer than"),
        ("bomb.csv.gz", "bomb.csv.gz:1 is longer than"),
        ("bomb.txt.gz", "bomb.txt.gz holds more than"),
        ("bomb.json.gz", "bomb.json.gz:1 is longer than"),
    ]:
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(b"[" + b" " * (1 << 18)))
    with pytest.raises(DataError, match="holds more than"):
        read(tmp_path / "array.json.gz")


def test_the_text_column_can_be_named_or_renamed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    table = write_parquet(tmp_path / "a.parquet", {"text": ["no"], "body": ["yes"]})
    for source in (path, table):
        assert read(source, text_column="body") == ["yes"]
        assert read(source, columns={"body": "text"}) == ["yes"]


def test_max_bytes_cuts_the_document_that_crosses_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "dé€"}, {"text": "never"}])
    sizes = {size: "".join(read(path, max_bytes=size)) for size in (2, 3, 6, 8, 9, 11, 100)}
    expected = {2: "ab", 3: "abc", 6: "abcdé", 8: "abcdé", 9: "abcdé€", 11: "abcdé€ne", 100: "abcdé€never"}
    assert sizes == expected


def test_max_bytes_leaves_out_the_conversation_that_crosses_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "abc", "completion": "def"}] * 4)
    assert len(examples(path, max_bytes=20)) == 3 and len(examples(path, max_bytes=100)) == 4


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": ""}, {"text": "x"}, {"text": ""}])
    documents = Documents([dataset(path)])
    for _ in range(2):  # iterating again starts again
        assert [placed.example for placed in documents] == [Text("x")]
        assert documents.num_empty == 2


def test_bad_rows_are_counted_and_named_where_they_are_skipped(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', '{"text": 1}', "{broken", '{"txt": "b"}', '{"text": "c"}', "\udcff"]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    documents = Documents([dataset(path)], on_bad_row="skip")
    assert [placed.example for placed in documents] == [Text("a"), Text("c")]
    assert documents.num_bad == 4
    assert [row.split(str(path))[1][:3].strip() for row in documents.bad_rows] == [":2:", ":3", ":4", ":6"]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_gives_a_data_error_or_text(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """300 bytes of JSONL with any bytes overwritten: never another exception, never other types."""
    content = bytearray("".join(json.dumps({"text": "a line", "n": n}) + "\n" for n in range(8)).encode())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.jsonl"
    path.write_bytes(content)
    try:
        assert all(isinstance(text, str) and text for text in read(path))
    except DataError as error:
        assert f"{path}:" in error.message


def test_the_standard_library_is_source_text_in_a_fixed_mixed_order() -> None:
    first, again = (read("python-stdlib", max_bytes=1_000_000) for _ in range(2))
    assert first == again
    assert sum(len(text.encode()) for text in first) == 1_000_000
    assert len(first) > 20
    assert sum("import " in text for text in first) > len(first) / 2


# ---- through the `datasets` library ---------------------------------------------------------

MESSAGES = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}],
    [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "tool_calls": None}],
]


def test_a_saved_dataset_and_its_splits(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"messages": MESSAGES})
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made.select([0]), "test": made.select([1])}).save_to_disk(
        str(tmp_path / "two")
    )
    chats = examples(tmp_path / "one")
    assert [chat.messages[1] for chat in chats if isinstance(chat, Chat)] == [
        {"role": "assistant", "content": "b"},  # what the columns' one type filled with null is gone
        {"role": "assistant", "content": "d"},
    ]
    assert examples(tmp_path / "two") == chats[:1] and examples(tmp_path / "two", split="test") == chats[1:]
    with pytest.raises(DataError, match="has no split 'dev'; it has 'train', 'test'"):
        examples(tmp_path / "two", split="dev")


@pytest.fixture
def hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sources, hf_datasets):
        monkeypatch.setattr(module, "require_reachable", lambda *_, **__: None)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_answers: None) -> str:
    """A dataset of three files that `load_dataset` finds under a name as on the Hub, without a network."""
    folder = tmp_path / "there"
    folder.mkdir()
    for shard in range(3):
        write_rows(folder / f"train-{shard}.jsonl", [{"text": f"{shard}{row}"} for row in range(4)])
    load = datasets.load_dataset

    def load_dataset(path: str, **options: Any) -> Any:
        assert path == "someone/things"
        files = sorted(str(path) for path in folder.glob("*.jsonl"))
        return load("json", data_files={"train": files}, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return "someone/things"


def test_a_name_on_the_hub(repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_exists(dataset(repository))
    assert read(repository) == [f"{shard}{row}" for shard in range(3) for row in range(4)]
    first = Documents([dataset(repository)]).fingerprint()
    assert first == Documents([dataset(repository)]).fingerprint()
    assert first != Documents([dataset(repository, columns={"text": "prompt"})]).fingerprint()


def test_a_stream_of_the_hub_comes_in_an_order_of_shards_by_seed_and_epoch(repository: str) -> None:
    def order(seed: int, epoch: int) -> list[str]:
        return [row["text"] for row, _ in rows(dataset(repository), ShardOrder(seed, epoch))]  # type: ignore[index, call-overload]

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert all(sorted(found) == sorted(orders[0, 0]) for found in orders.values())
    assert len({tuple(found) for found in orders.values()}) > 2
    assert order(1, 2) == orders[1, 2]


def test_a_name_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, hub_answers: None) -> None:
    def gone(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(
        DataError, match="no/such is not a local file and could not be read .* exist on the Hub\n"
    ):
        read("no/such")


def test_faults_of_paths(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.bin").write_bytes(b"x")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    for path, options, message in [
        (tmp_path / "none.txt", {}, "does not exist"),
        ("none.jsonl", {}, "does not exist"),
        (tmp_path / "*.txt", {}, "matches no file"),
        (tmp_path / "folder", {}, "matches no file"),
        (tmp_path / "a.jsonl", {"split": "test"}, "has no split 'test'"),
        (tmp_path, {"split": "test"}, "has no split 'test'"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            check_exists(dataset(path, **options))
        assert caught.value.exit_code == 4 and caught.value.hint
    with pytest.raises(DataError, match="no dataset"):
        Documents([])


def test_names_that_may_be_on_the_hub() -> None:
    assert all(hf_datasets.looks_like_repository(name) for name in ("owner/name-1.5", "imdb"))
    for name in ("a.jsonl", "owner/a.jsonl", "/etc/passwd", "../up", "a/b/c", "a b", "*.txt", "~/x", ""):
        assert not hf_datasets.looks_like_repository(name)


def test_a_folder_s_splits_are_known_by_names(tmp_path: Path) -> None:
    names = ["train-0.jsonl", "train-1.jsonl", "test.jsonl", "dev/rows.jsonl"]
    (tmp_path / "dev").mkdir()
    for name in names:
        write_rows(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("# About")
    assert read(tmp_path) == names[:2]
    assert read(tmp_path, split="test") == names[2:3]
    assert read(tmp_path, split="validation") == read(tmp_path, split="dev") == names[3:]
    assert len(read(tmp_path / "**" / "*.jsonl")) == 4  # a glob says itself what it wants
    with pytest.raises(DataError, match="has no split 'other'"):
        read(tmp_path, split="other")


def test_names_that_speak_of_no_split(tmp_path: Path) -> None:
    for name in ("contest.jsonl", "training_notes.txt", "testimony.txt", "a.md"):
        (tmp_path / name).write_text('{"text": "x"}')
    assert len(examples(tmp_path)) == 4
    (tmp_path / "README.md").write_text("about")
    assert len(examples(tmp_path)) == 4
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "README.md").write_text("the only file")
    assert read(tmp_path / "alone") == ["the only file"]


# ---- several datasets -----------------------------------------------------------------------


def test_weights_repeat_documents_and_take_a_part_of_them(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["abc"], 300)
    for name in "xyz":
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": str(n)} for n in range(20)])
    data = load_training_data(
        config(
            datasets=[
                {"path": str(tmp_path / "x.jsonl"), "weight": 2},
                {"path": str(tmp_path / "y.jsonl")},
                {"path": str(tmp_path / "z.jsonl"), "weight": 0.25},
            ],
            packing=False,
            dataset_cache_dir=None,
        ),
        tokenizer,
    )
    texts = [tokenizer.decode(data.rows.row(r).ids.tolist()) for r in range(len(data.rows))]
    counts = {name: sum(text.startswith(name) for text in texts) for name in "xyz"}
    assert counts == {"x": 40, "y": 20, "z": 5}
    assert len({text for text in texts if text.startswith("x")}) == 20
    assert len({text for text in texts if text.startswith("z")}) == 5


def test_datasets_may_have_different_formats(tmp_path: Path) -> None:
    pairs = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    text = write_rows(tmp_path / "b.jsonl", [{"text": "c"}])
    documents = Documents([dataset(pairs), dataset(text)])
    assert [placed.example for placed in documents] == [Pair("a", "b"), Text("c")]
    assert documents.formats == ["prompt_completion", "text"]
