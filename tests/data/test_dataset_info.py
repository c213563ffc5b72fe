"""LLaMA-Factory's dataset_info.json: names become entries that read what it would read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_helpers import config, dataset, examples, write_rows
from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.data import Documents, load_training_data, train_tokenizer
from horizon_lm.data.examples import Chat, Labelled, Preference, Text
from horizon_lm.errors import ConfigError

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
INFO: dict[str, Any] = {  # entries as LLaMA-Factory's own file has them
    "identity": {"file_name": "identity.json"},
    "firefly": {"file_name": "firefly.jsonl", "columns": {"prompt": "input", "response": "target"}},
    "orca": {
        "file_name": "orca.jsonl",
        "columns": {"prompt": "question", "response": "response", "system": "system_prompt"},
    },
    "lima": {"hf_hub_url": "llamafactory/lima", "formatting": "sharegpt"},
    "ultrachat": {
        "hf_hub_url": "HuggingFaceH4/ultrachat_200k",
        "split": "train_sft",
        "subset": "default",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": TAGS,
        "num_samples": 3,
    },
    "spoken": {
        "file_name": "spoken.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "tools": "functions"},
        "tags": {
            "role_tag": "who",
            "content_tag": "what",
            "user_tag": "ME",
            "assistant_tag": "IT",
            "observation_tag": "SEEN",
            "function_tag": "CALL",
            "system_tag": "RULES",
        },
    },
    "wiki": {"file_name": "wiki.txt", "columns": {"prompt": "text"}},
    "dpo": {"file_name": "dpo.json", "ranking": True},
    "ranked": {
        "file_name": "ranked.jsonl",
        "ranking": True,
        "columns": {"prompt": "prompt", "query": "more", "chosen": "good", "rejected": "bad"},
    },
    "ranked talk": {
        "file_name": "ranked-talk.jsonl",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        "tags": {"user_tag": "ME"},
    },
    "ranked badly": {"file_name": "dpo.json", "ranking": True, "columns": {"prompt": "prompt"}},
    "kto": {
        "file_name": "kto.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "good"},
    },
    "kto alpaca": {
        "file_name": "kto-alpaca.jsonl",
        "columns": {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "kto_tag"},
    },
    "videos": {"file_name": "p.json", "formatting": "sharegpt", "columns": {"videos": "videos"}},
    "modelscope": {"ms_hub_url": "deepctrl/deepctrl-sft-data"},
    "script": {"script_url": "belle"},
    "typo": {"file_name": "a.json", "formating": "sharegpt"},
    "other": {"file_name": "a.json", "formatting": "parquet"},
    "column": {"file_name": "a.json", "columns": {"promt": "text"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("data")
    (made / "dataset_info.json").write_text("\ufeff" + json.dumps(INFO, indent=1), encoding="utf-8")
    alpaca = {
        "instruction": "a",
        "input": "b",
        "output": "c",
        "system": "unread",
        "history": [["unread", "x"]],
    }
    (made / "identity.json").write_text(json.dumps([alpaca]))
    write_rows(made / "firefly.jsonl", [{"kind": "k", "instruction": "unread", "input": "q", "target": "a"}])
    write_rows(
        made / "orca.jsonl", [{"question": "q", "response": "a", "system_prompt": "s", "input": "unread"}]
    )
    talk = [
        ("RULES", "s"),
        ("ME", "q"),
        ("CALL", '{"name": "f", "arguments": {}}'),
        ("SEEN", "r"),
        ("IT", "a"),
    ]
    rows = [{"who": who, "what": what, "role": "unread", "value": "unread"} for who, what in talk]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}, "what": "kept"}
    write_rows(made / "spoken.jsonl", [{"talk": rows, "functions": [tool], "system": "unread"}])
    (made / "wiki.txt").write_text("some text")
    plain = {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b", "prompt": "unread"}
    (made / "dpo.json").write_text(json.dumps([plain | {"system": "unread"}]))
    write_rows(made / "ranked.jsonl", [{"prompt": "q", "more": "i", "good": "a", "bad": "b", "chosen": "x"}])
    (one, other) = ({"from": "gpt", "value": value} for value in "ab")
    turns = [{"from": "ME", "value": "q\ni"}]
    write_rows(
        made / "ranked-talk.jsonl",
        [{"conversations": turns, "chosen": one, "rejected": other, "prompt": "unread"}],
    )
    turns = [{"from": "human", "value": "q\ni"}, one]
    write_rows(made / "kto.jsonl", [{"messages": turns, "good": False, "output": "unread"}])
    alpaca = {"instruction": "q", "input": "i", "output": "a", "kto_tag": False, "completion": "unread"}
    write_rows(made / "kto-alpaca.jsonl", [alpaca])
    write_rows(made / "mine.jsonl", [{"text": "x"}])
    return made


def named(folder: Any, names: Any, **more: Any) -> TrainConfig:
    return config(datasets=names, dataset_dir=str(folder), **more)


def said(folder: Path, name: str) -> list[tuple[str, str]]:
    (example,) = [placed.example for placed in Documents(named(folder, name).datasets)]
    assert isinstance(example, Chat)
    return [(message["role"], message["content"]) for message in example.messages]


def test_columns_are_read_as_llama_factory_reads_them(folder: Path) -> None:
    assert said(folder, "identity") == [("user", "a\nb"), ("assistant", "c")]
    assert said(folder, "firefly") == [("user", "q"), ("assistant", "a")]
    assert said(folder, "orca") == [("system", "s"), ("user", "q"), ("assistant", "a")]
    everything = examples(folder / "identity.json")[0]  # the control: without the file, all columns are read
    assert isinstance(everything, Chat) and len(everything.messages) == 5


def test_keys_and_roles_of_messages(folder: Path) -> None:
    (placed,) = Documents(named(folder, "spoken").datasets)
    chat = placed.example
    assert isinstance(chat, Chat)
    assert [message["role"] for message in chat.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert [message["content"] for message in chat.messages] == ["s", "q", "", "r", "a"]
    assert chat.messages[2]["tool_calls"][0]["function"]["name"] == "f"
    assert chat.tools and chat.tools[0]["what"] == "kept"  # a tool is no message


@pytest.mark.parametrize("name", ["dpo", "ranked", "ranked talk"])
def test_pairs_are_read_as_llama_factory_reads_them(name: str, folder: Path) -> None:
    (placed,) = Documents(named(folder, name).datasets, kind="pairs")
    asked = {"role": "user", "content": "q\ni"}
    sides = [Chat([asked, {"role": "assistant", "content": said}], None, 1) for said in "ab"]
    assert placed.example == Preference(*sides)


@pytest.mark.parametrize("name", ["kto", "kto alpaca"])
def test_labels_are_read_as_llama_factory_reads_them(name: str, folder: Path) -> None:
    (placed,) = Documents(named(folder, name).datasets, kind="labelled")
    turns = [{"role": "user", "content": "q\ni"}, {"role": "assistant", "content": "a"}]
    assert placed.example == Labelled(Chat(turns, None, 1), False)


def test_text_for_pretraining(folder: Path) -> None:
    (placed,) = Documents(named(folder, "wiki").datasets)
    assert placed.example == Text("some text")


def test_several_names_paths_and_entries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = named(folder, "identity, lima,ultrachat", eval_datasets="wiki").datasets
    assert [entry.path for entry in found] == [
        str(folder / "identity.json"),
        "llamafactory/lima",
        "HuggingFaceH4/ultrachat_200k",
    ]
    assert (found[2].split, found[2].name, found[2].max_samples) == ("train_sft", "default", 3)
    assert found[2].columns["messages"] == "conversations" and found[2].tags == TAGS
    listed = named(
        folder, ["identity", {"path": "orca", "weight": 2, "columns": {"question": "instruction"}}]
    )
    assert [entry.weight for entry in listed.datasets] == [1, 2]
    assert listed.datasets[1].columns == {"question": "instruction"}  # what is written here wins
    monkeypatch.chdir(folder.parent)
    (folder.parent / "here.jsonl").write_text('{"text": "x"}\n')
    paths = ["mine.jsonl", "here.jsonl", "owner/name", "*.jsonl", "python-stdlib"]
    assert [entry.path for entry in named(folder, ",".join(paths)).datasets] == [
        str(folder / "mine.jsonl"),
        *paths[1:],
    ]
    online = config(datasets="imdb,owner/name", dataset_dir="ONLINE").datasets
    assert [entry.path for entry in online] == ["imdb", "owner/name"]


def test_what_was_found_is_what_is_saved(folder: Path) -> None:
    found = named(folder, "ultrachat,identity", eval_datasets="orca")
    assert found.dataset_dir is None
    again = TrainConfig.from_dict(found.to_dict())
    assert again == found and again.eval_datasets[0].path == str(folder / "orca.jsonl")


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        ("identty", "has no dataset 'identty'", "did you mean 'identity'"),
        ("zzz", "has no dataset 'zzz'", "use one of column"),
        ("identity,ranked badly", "its columns do not name chosen and rejected", '"chosen": "chosen"'),
        ("videos", "has videos", "text"),
        ("modelscope", "has only ms_hub_url", "download"),
        ("script", "has only script_url", "scripts are never run"),
        ("typo", "unknown key 'formating'", "did you mean 'formatting'"),
        ("other", "unknown formatting 'parquet'", "alpaca"),
        ("column", "columns has the unknown key 'promt'", "prompt"),
    ],
)
def test_what_is_wrong_is_said(names: str, message: str, hint: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        named(folder, names)
    assert message in caught.value.message and "dataset_info.json" in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b'{"a":\n {', r"dataset_info.json:2 is not valid JSON"),
        (b"\xff", "not usable JSON"),
        (b"[]", "is not an object of objects"),
        (b'{"a": "b.json"}', "is not an object of objects"),
        (b'{"a": {"columns": ["x"]}}', "columns is not an object of texts"),
        (b'{"a": {}}', "has neither file_name nor hf_hub_url"),
    ],
)
def test_a_bad_file_is_one_clear_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "dataset_info.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        named(tmp_path, "a")


def test_from_a_file_of_llama_factory_to_the_preview(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tokenizer(["a b"], 300).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "run.yaml").write_text(
        f"dataset: identity,orca\ndataset_dir: {folder}\nmax_samples: 1\ncutoff_len: 128\n"
        "chat_template: plain\n"
        f"init_model: {{model_type: llama}}\ntokenizer_name_or_path: {tmp_path / 'tokenizer'}\n"
    )
    assert cli.main(["data", "preview", str(tmp_path / "run.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "dataset 2    1 document, format alpaca" in shown
    # Without dataset_dir the names are no files, and the way out is said.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(folder)
    settings = ["init_model.model_type=llama", f"tokenizer_name_or_path={tmp_path / 'tokenizer'}"]
    assert cli.main(["data", "preview", "datasets=identity,orca", *settings]) == 4
    assert "dataset_dir=data" in capsys.readouterr().err
    assert cli.main(["data", "preview", "dataset=identity,orca", "dataset_dir=data", *settings]) == 4
    assert "no chat template" in capsys.readouterr().err  # found, and read


# ---- max_samples ----------------------------------------------------------------------------


def many(folder: Path) -> Path:
    """Rows over three files, with a bad and an empty one; a row is its number."""
    for file in range(3):
        rows: list[Any] = [{"text": f"<{file * 10 + row}>"} for row in range(10)]
        rows[4] = {"text": ""} if file == 0 else rows[4]
        rows[5] = {"text": 5} if file == 0 else rows[5]
        write_rows(folder / f"{file}.jsonl", rows)
    return folder


def test_max_samples_reads_the_first_rows_of_each_dataset(tmp_path: Path) -> None:
    path = many(tmp_path)

    def read(count: int, **more: Any) -> list[str]:
        found = Documents([dataset(path, max_samples=count, **more)], on_bad_row="skip")
        return [placed.example.text for placed in found if isinstance(placed.example, Text)]

    assert read(3) == ["<0>", "<1>", "<2>"]
    assert read(7) == ["<0>", "<1>", "<2>", "<3>", "<6>"]  # of the rows, not of those that can be used
    assert read(12)[-1] == "<11>" and len(read(1000)) == 28
    settings = config(
        datasets=[{"path": str(path), "max_samples": 2}, str(path / "1.jsonl")],
        eval_datasets=str(path / "2.jsonl"),
        max_samples=4,
        packing=False,
        dataset_cache_dir=None,
    )
    data = load_training_data(settings, train_tokenizer([], 257))
    assert np_counts(data.store.datasets) == {0: 2, 1: 4}
    assert data.eval_rows is not None and len(data.eval_rows) == 4


def np_counts(values: Any) -> dict[int, int]:
    return {int(value): int((values == value).sum()) for value in set(values.tolist())}


def test_max_samples_is_part_of_what_tokens_are_kept_by(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    path = str(many(tmp_path / "rows"))
    made = train_tokenizer([], 257)
    cached = []
    for count in (9, 9, 8, None):
        more: dict[str, Any] = {"dataset_cache_dir": str(tmp_path / "cache"), "on_bad_row": "skip"}
        data = load_training_data(config(datasets=path, max_samples=count, **more), made)
        cached.append((data.was_cached, data.store.counts.num_documents))
    assert cached == [(False, 7), (True, 7), (False, 6), (False, 28)]
    inside = load_training_data(config(datasets=[{"path": path, "max_samples": 9}], **more), made)
    assert inside.was_cached  # said of the dataset or of all: the same rows


def test_every_epoch_of_a_stream_has_the_same_samples_and_resumes(tmp_path: Path) -> None:
    path = str(many(tmp_path))
    made = train_tokenizer([], 257)

    def stream(**more: Any) -> Any:
        settings = config(
            datasets=path,
            max_samples=13,
            streaming=True,
            max_steps=99,
            buffer_size=4,
            packing=False,
            on_bad_row="skip",
            **more,
        )
        return load_training_data(settings, made).loader

    def take(loader: Any, count: int) -> list[str]:
        return [made.decode([i for i in next(loader)[0]["input_ids"][0].tolist() if i]) for _ in range(count)]

    first = [f"<{n}>" for n in range(13) if n not in (4, 5)]
    loader = stream()
    epochs = [take(loader, 11) for _ in range(3)]
    assert all(sorted(epoch) == sorted(first) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # in windows, they are shuffled
    again = stream()
    assert take(again, 15) == [*epochs[0], *epochs[1]][:15]
    resumed = stream()
    resumed.load_state_dict(again.state_dict())
    assert take(resumed, 18) == [*epochs[1], *epochs[2]][4:]
