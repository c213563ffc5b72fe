"""Malformed input: `horizon train` ends with one clear line and its exit code; nothing is trained or written.

Each case is a file as people have them, and what the line must say: the file, the row, what is wrong.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_helpers import write_parquet
from horizon_lm import cli
from horizon_lm.data import train_tokenizer
from horizon_lm.data.readers import read_file
from horizon_lm.errors import DataError
from horizon_lm.training import train as run_train

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
GOOD_LINE = json.dumps(GOOD).encode() + b"\n"


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def messages(*entries: Any, **more: Any) -> bytes:
    return lines({"messages": list(entries), **more})


USER, SAID = GOOD["messages"]

# name of the case -> (file, content, what the line says)
FILES: dict[str, tuple[str, bytes, str]] = {
    # broken JSON
    "an open brace": ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a\.jsonl:2 is not valid JSON"),
    "single quotes": ("a.jsonl", b"{'text': 'x'}\n", r"a\.jsonl:1 is not valid JSON"),
    "a trailing comma": ("a.jsonl", b'{"text": "x",}\n', r"a\.jsonl:1 is not valid JSON"),
    "two objects on a line": ("a.jsonl", b'{"text": "x"}{"text": "y"}\n', r"a\.jsonl:1 is not valid JSON"),
    "plain text as jsonl": ("a.jsonl", b"once upon a time\n", r"a\.jsonl:1 is not valid JSON"),
    "an object over several lines": ("a.jsonl", b'{\n"text": "x"\n}\n', r"a\.jsonl:1 is not valid JSON"),
    "a raw line end in a string": ("a.jsonl", b'{"text": "x\n y"}\n', r"a\.jsonl:1 is not valid JSON"),
    "a raw tab in a string": ("a.jsonl", b'{"text": "x\ty"}\n', r"a\.jsonl:1 is not valid JSON"),
    "a comment": ("a.jsonl", b'// rows\n{"text": "x"}\n', r"a\.jsonl:1 is not valid JSON"),
    "python's None": ("a.jsonl", b'{"text": None}\n', r"a\.jsonl:1 is not valid JSON"),
    "NaN": ("a.jsonl", b'{"text": NaN}\n', r"a\.jsonl:1: 'text' holds a number"),
    "HTML": ("a.json", b"<!DOCTYPE html><html></html>", r"a\.json:1 is not valid JSON"),
    "a broken array": ("a.json", b'[{"text": "x"},\n {"text": }]', r"a\.json:2 is not valid JSON"),
    "an array that ends early": ("a.json", b'[{"text": "x"},', r"a\.json is not valid JSON"),
    "very deep": ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1 is not"),
    "a huge number": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"a\.jsonl:1 is not usable JSON"),
    "a pointer of git-lfs": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        r"a\.jsonl:1 is not valid JSON",
    ),
    # encodings
    "latin-1": ("a.jsonl", '{"text": "é"}'.encode("latin-1"), r"a\.jsonl:1 is not UTF-8: byte 0xe9"),
    "UTF-16": ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"a\.jsonl:1 is not UTF-8: byte 0xff"),
    "UTF-16 text": ("a.txt", "once upon".encode("utf-16"), r"a\.txt is not UTF-8: byte 0xff"),
    "bytes in the second line": ("a.jsonl", GOOD_LINE + b'{"text": "\xff"}', r"a\.jsonl:2 is not UTF-8"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: .*surrogate"),
    "half a pair in a message": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        r"messages\[0\]: .*surrogate",
    ),
    "gzip under another name": ("a.jsonl", b"\x1f\x8b\x08\x00\x00", r"a\.jsonl:1 is not UTF-8: byte 0x8b"),
    "NUL bytes": ("a.jsonl", b"\x00" * 64, r"a\.jsonl:1 is not valid JSON"),
    # empty
    "no bytes": ("a.jsonl", b"", r"a\.jsonl holds no text"),
    "blank lines": ("a.jsonl", b"\n \n\t\n", r"a\.jsonl holds no text"),
    "empty texts": ("a.jsonl", lines({"text": ""}, {"text": ""}), r"a\.jsonl holds no text"),
    "an empty array": ("a.json", b"[]", r"a\.json holds no text"),
    "an empty text file": ("a.txt", b"", r"a\.txt holds no text"),
    "an empty object": ("a.jsonl", b"{}\n", r"a\.jsonl:1 fits no known format; its columns are none"),
    "no messages": ("a.jsonl", messages(), r"a\.jsonl:1: 'messages' is an empty list"),
    "an empty completion": (
        "a.jsonl",
        lines({"prompt": "a", "completion": ""}),
        r"a\.jsonl:1: 'completion' is empty",
    ),
    "an empty instruction": (
        "a.jsonl",
        lines({"instruction": " ", "output": "x"}),
        r"a\.jsonl:1: 'instruction' is empty",
    ),
    "nothing the assistant says": ("a.jsonl", messages(USER), r"a\.jsonl:1 has no token to train on"),
    # rows that are no objects
    "a list": ("a.jsonl", GOOD_LINE + b'["y"]\n', r"a\.jsonl:2 holds a list, not an object"),
    "a string": ("a.jsonl", b'"text"\n', r"a\.jsonl:1 holds text, not an object"),
    "null": ("a.jsonl", b"null\n", r"a\.jsonl:1 holds null, not an object"),
    "a number in an array": ("a.json", b'[{"text": "x"}, 3]', r"a\.json: row 2 holds a number"),
    # columns
    "unknown columns": (
        "a.jsonl",
        lines({"question": "a", "answer": "b"}),
        r"a\.jsonl:1 fits no known format; its columns are 'question', 'answer'",
    ),
    "wrong case": ("a.jsonl", lines({"Text": "a"}), r"its columns are 'Text'"),
    "an instruction alone": ("a.jsonl", lines({"instruction": "a"}), r"its columns are 'instruction'"),
    "hundreds of columns": ("a.jsonl", lines({f"c{n}": n for n in range(300)}), r"and 288 more"),
    "a pair after a conversation": (
        "a.jsonl",
        GOOD_LINE + lines({"prompt": "a", "chosen": "b", "rejected": "c"}),
        r"a\.jsonl:2 has no column 'messages'",
    ),
    "a prompt alone": ("a.jsonl", lines({"prompt": "a"}), r"a\.jsonl:1 is a prompt without an answer"),
    # mixed formats
    "text after messages": (
        "a.jsonl",
        GOOD_LINE + lines({"text": "a"}),
        r"a\.jsonl:2 has no column 'messages', which the format messages needs; it has 'text'",
    ),
    "alpaca after text": (
        "a.jsonl",
        lines({"text": "a"}, {"instruction": "a", "output": "b"}),
        r"a\.jsonl:2 has no column 'text'",
    ),
    "a column that ends": (
        "a.jsonl",
        lines({"prompt": "a", "completion": "b"}, {"prompt": "a"}),
        r"a\.jsonl:2 has no column 'completion'",
    ),
    "prompt text, completion messages": (
        "a.jsonl",
        lines({"prompt": "a", "completion": [SAID]}),
        r"a\.jsonl:1: 'prompt' holds text, expected text in both",
    ),
    # content that is no text
    "text that is a number": ("a.jsonl", lines({"text": 1.5}), r"a\.jsonl:1: 'text' holds a number"),
    "text that is null": (
        "a.jsonl",
        lines({"text": "x"}, {"text": None}),
        r"a\.jsonl:2: 'text' holds null, not text",
    ),
    "text that is a list": ("a.jsonl", lines({"text": ["x"]}), r"a\.jsonl:1: 'text' holds a list"),
    "messages that are text": ("a.jsonl", lines({"messages": "hi"}), r"'messages' holds text"),
    "a message that is text": ("a.jsonl", messages("hi"), r"a\.jsonl:1: messages\[0\] holds text"),
    "content that is a number": (
        "a.jsonl",
        messages(USER, {"role": "assistant", "content": 4}),
        r"a\.jsonl:1: messages\[1\]: 'content' holds a number",
    ),
    "no content": ("a.jsonl", messages({"role": "user"}), r"messages\[0\] has no 'content'"),
    "content that is null": (
        "a.jsonl",
        GOOD_LINE + messages(USER, {"role": "assistant", "content": None}),
        r"a\.jsonl:2: messages\[1\]: 'content' is null",
    ),
    "a role that is null": (
        "a.jsonl",
        messages({"role": None, "content": "a"}),
        r"a\.jsonl:1: messages\[0\]: 'role' is null",
    ),
    "a sharegpt value that is null": (
        "a.jsonl",
        lines({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}),
        r"a\.jsonl:1: conversations\[1\]: 'value' is null",
    ),
    "a call that is null": (
        "a.jsonl",
        lines({"conversations": [{"from": "function_call", "value": None}]}),
        r"a\.jsonl:1: conversations\[0\]: 'value' is null",
    ),
    "an output that is null": (
        "a.jsonl",
        lines({"instruction": "a", "output": None}),
        r"a\.jsonl:1: 'output' is null, which the format alpaca needs",
    ),
    "a completion that is null": (
        "a.jsonl",
        lines({"prompt": "a", "completion": None}),
        r"a\.jsonl:1: 'completion' is null, which the format prompt_completion needs",
    ),
    "messages that are null": (
        "a.jsonl",
        GOOD_LINE + lines({"messages": None}),
        r"a\.jsonl:2: 'messages' holds null, expected a list",
    ),
    "no role": ("a.jsonl", messages({"content": "a"}), r"messages\[0\] has no 'role'; it has 'content'"),
    "an unknown role": (
        "a.jsonl",
        messages({"role": "narrator", "content": "a"}),
        r"messages\[0\]: the role is 'narrator'",
    ),
    "a role that is a number": ("a.jsonl", messages({"role": 1, "content": "a"}), r"the role is 1"),
    "a video": (
        "a.jsonl",
        messages({"role": "user", "content": [{"type": "video", "video": "x"}]}),
        r"messages\[0\]: 'content' has a part that is not text: 'video'",
    ),
    "output that is an object": (
        "a.jsonl",
        lines({"instruction": "a", "output": {"b": 1}}),
        r"a\.jsonl:1: 'output' holds an object",
    ),
    "history that is text": (
        "a.jsonl",
        lines({"instruction": "a", "output": "b", "history": ["q"]}),
        r"a\.jsonl:1: 'history' holds text, expected pairs",
    ),
    "a sharegpt turn without value": (
        "a.jsonl",
        lines({"conversations": [{"from": "human"}]}),
        r"conversations\[0\] has no 'content'",
    ),
    "tools that are broken text": (
        "a.jsonl",
        messages(USER, SAID, tools="[{"),
        r"a\.jsonl:1: tools: '\[\{' is not valid JSON",
    ),
    "a call without a name": (
        "a.jsonl",
        messages(USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}),
        r"messages\[1\]: a tool call has no 'name'",
    ),
    "a call whose arguments are broken": (
        "a.jsonl",
        messages(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}),
        r"messages\[1\]: '\{a' is not valid JSON",
    ),
    # sizes
    "one short text": ("a.txt", b"hi", r"less than one sequence of 64"),
    "only rows that are too long": (
        "a.jsonl",
        messages({"role": "user", "content": "a"}, {"role": "assistant", "content": "b c " * 200_000}),
        r"no usable document: all 1 are longer than max_length=64",
    ),
    # other kinds of files
    "no parquet": ("a.parquet", b"PAR1 no PAR1", r"a\.parquet is not a readable parquet file"),
    "half a parquet": ("a.parquet", b"PAR1", r"a\.parquet is not a readable parquet file"),
    # compressed files and CSV
    "no gzip": ("a.jsonl.gz", GOOD_LINE, r"a\.jsonl\.gz cannot be decompressed: .*no row is readable"),
    "half a gzip": (
        "a.jsonl.gz",
        gzip.compress(b"".join(lines({"text": str(n) * 9}) for n in range(20_000)))[:-3000],
        r"a\.jsonl\.gz cannot be decompressed: it ends early; the last readable row is .*gz:\d+",
    ),
    "a flipped bit in a gzip": (
        "a.csv.gz",
        gzip.compress(b"text\n" + b"x\n" * 99, mtime=0)[:-8] + b"\0" * 8,
        r"a\.csv\.gz cannot be decompressed: CRC",
    ),
    "a bad row in a gzip": (
        "a.jsonl.gz",
        gzip.compress(GOOD_LINE + b"{"),
        r"a\.jsonl\.gz:2 is not valid JSON",
    ),
    "gzip twice": ("a.jsonl.gz", gzip.compress(gzip.compress(GOOD_LINE)), r"a\.jsonl\.gz:1 is not UTF-8"),
    "parquet in a gzip": ("a.parquet.gz", b"", r"unknown file type '\.parquet\.gz'"),
    "csv without rows": ("a.csv", b"text\n", r"a\.csv holds no text"),
    "csv with no bytes": ("a.csv", b"", r"a\.csv holds no text"),
    "csv with too many cells": (
        "a.csv",
        b"text,n\nx,1\ny, and z,2\n",
        r"a\.csv: row 2 has 3 cells, the header 2 columns",
    ),
    "an open quote": (
        "a.csv",
        b'text\nx\n"y\nz\n',
        r"a\.csv: row 2 is not valid CSV: unexpected end of data",
    ),
    "text after a quote": ("a.csv", b'text\n"x"y\n', r"a\.csv: row 1 is not valid CSV"),
    "a column twice": ("a.csv", b"text,text\nx,y\n", r"a\.csv: the header has two columns named 'text'"),
    "semicolons": (
        "a.csv",
        b"prompt;completion\na;b\n",
        r"a\.csv: the header has one column, .*by semicolons",
    ),
    "latin-1 in csv": ("a.csv", b"text\nx\n\xe9\n", r"a\.csv: row 2 is not UTF-8: byte 0xe9"),
    "csv of other columns": ("a.csv", b"q,a\nx,y\n", r"a\.csv: row 1 fits no .*its columns are 'q', 'a'"),
    "an empty cell of csv": ("a.csv", b"prompt,completion\nx,\n", r"a\.csv: row 1: 'completion' is empty"),
    "equal answers in csv": (
        "a.csv",
        b"prompt,chosen,rejected\na,b,b\n",
        r"row 1: 'chosen' and 'rejected' are",
    ),
    "a spreadsheet": ("a.xlsx", b"PK\x03\x04", r"a\.xlsx: unknown file type '\.xlsx'"),
    "a pickle": ("a.pkl", b"\x80\x04.", r"a\.pkl: unknown file type '\.pkl'"),
    "no suffix": ("rows", GOOD_LINE, r"rows: unknown file type ''"),
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a b"], 260).save_pretrained(folder)
    return folder


@pytest.fixture
def end_with_a_line(
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs `horizon train` on a path and returns the error's line; nothing may be built or written."""

    def build(*_: Any) -> Any:
        raise AssertionError("a model was built")

    monkeypatch.setattr(run_train, "build_model", build)

    def run(path: Any, *more: str, begins: bool = False) -> str:
        settings = [
            f"datasets={path}",
            f"output_dir={tmp_path / 'out' / 'run'}",
            "max_length=64",
            "progress=off",
        ]
        settings += ["init_model.model_type=llama", f"tokenizer_name_or_path={tokenizer_folder}"]
        # Small: a model that does not fit would be refused before the data is read.
        settings += ["init_model.hidden_size=32", "init_model.num_hidden_layers=1"]
        settings += ["init_model.intermediate_size=64", "init_model.num_attention_heads=4"]
        code = cli.main(["train", *settings, "chat_template=plain", *more])
        shown = capsys.readouterr().err.splitlines()
        if begins:  # the control: the data was good, so that training would have begun
            assert code == 1 and "a model was built" in shown[-2]
            return ""
        assert code == 4
        assert shown[0].startswith("error: ") and shown[1:2] == [
            s for s in shown[1:] if s.startswith("hint: ")
        ]
        assert len(shown) <= 2 and len(shown[0]) < 600 and "Traceback" not in "".join(shown)
        assert not (tmp_path / "out").exists()
        return shown[0]

    return run


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_one_clear_line(case: str, end_with_a_line: Callable[..., str], tmp_path: Path) -> None:
    import re

    name, content, message = FILES[case]
    (tmp_path / name).write_bytes(content)
    assert re.search(message, end_with_a_line(tmp_path / name))


def test_there_are_enough_cases() -> None:
    assert len(FILES) >= 60


def test_a_good_file_is_no_error(end_with_a_line: Callable[..., str], tmp_path: Path) -> None:
    """The control: with the same settings, training would have begun."""
    (tmp_path / "a.jsonl").write_bytes(GOOD_LINE * 20)
    assert end_with_a_line(tmp_path / "a.jsonl", begins=True) == ""


@pytest.mark.parametrize("skippable", ["broken", "number", "columns", "no answer"])
def test_bad_rows_can_be_skipped(skippable: str, end_with_a_line: Callable[..., str], tmp_path: Path) -> None:
    bad = {
        "broken": b'{"messages": \n',
        "number": messages(USER, {"role": "assistant", "content": 4}),
        "columns": lines({"text": "a"}),
        "no answer": messages(USER),
    }[skippable]
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD_LINE * 20 + bad + GOOD_LINE)
    assert f"{path}:21" in end_with_a_line(path)
    end_with_a_line(path, "on_bad_row=skip", begins=True)
    if skippable != "columns":  # alone, those rows are a format of their own
        path.write_bytes(bad * 3)
        assert "holds no" in end_with_a_line(path, "on_bad_row=skip")


def test_paths_that_lead_nowhere(end_with_a_line: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "dir.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for path in [
        tmp_path / "gone.jsonl",
        tmp_path / "dir.jsonl",
        tmp_path / "loop.jsonl",
        tmp_path / "dangling.jsonl",
        tmp_path / "*.jsonl",
        "../" * 30 + "gone.jsonl",
        "/dev/null",
        "/proc/self/mem",
        str(tmp_path / "a.jsonl") + "/b.jsonl",
        "https://example.org/a.jsonl",
    ]:
        assert Path(path).name in end_with_a_line(path), path


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(end_with_a_line: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD_LINE)
    (tmp_path / "a.jsonl").chmod(0)
    assert "cannot be read" in end_with_a_line(tmp_path / "a.jsonl")


def test_faults_of_parquet_columns(end_with_a_line: Callable[..., str], tmp_path: Path) -> None:
    for columns, message in [
        ({"a": ["x"], "b": ["y"]}, "row 1 fits no known format; its columns are 'a', 'b'"),
        ({"text": ["x", None]}, "row 2: 'text' holds null"),
        ({"text": [1, 2]}, "row 1: 'text' holds a number"),
        ({"text": [b"\xff"]}, "row 1: 'text' holds bytes"),
        ({"messages": ["hi"]}, "row 1: 'messages' holds text"),
    ]:
        line = end_with_a_line(write_parquet(tmp_path / "a.parquet", columns))
        assert f"a.parquet: {message}" in line


def test_text_that_would_be_code_is_only_text(end_with_a_line: Callable[..., str], tmp_path: Path) -> None:
    """Rows are data: a template's braces in them are not rendered, and nothing is imported or run."""
    attack = "{{ cycler.__init__.__globals__.os.system('touch owned') }}"
    row = {"messages": [{"role": "user", "content": attack}, {"role": "assistant", "content": attack}]}
    (tmp_path / "a.jsonl").write_bytes(lines(*[row] * 5))
    end_with_a_line(tmp_path / "a.jsonl", "max_length=512", begins=True)
    assert not Path("owned").exists()


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_the_hint_of_another_encoding_works(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "é"}\n'.encode(encoding))
    refused = next(read_file(file))[0]
    assert isinstance(refused, DataError)
    command = str(refused.hint).partition("example: ")[2]
    new = tmp_path / "b.jsonl"
    command = command.replace("FILE", str(file)).replace("NEW", str(new))
    subprocess.run(command, shell=True, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert [row for row, _ in read_file(new)] == [{"text": "é"}]


def test_the_hint_of_a_compressed_file_names_the_ending(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(gzip.compress(GOOD_LINE))
    refused = next(read_file(file))[0]
    assert isinstance(refused, DataError)
    assert refused.hint == "it is compressed with gzip: add .gz to its name"
