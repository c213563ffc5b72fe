"""The instruction set: large and varied enough, well-formed, and right where a program can tell."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_helpers import dataset
from horizon_lm.data import Documents
from horizon_lm.data.examples import Chat

FOLDER = Path(__file__).parents[2] / "examples" / "instructions"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


TRAIN, HELD_OUT = rows("train"), rows("eval")
ALL = TRAIN + HELD_OUT


def test_it_is_large_and_varied() -> None:
    assert len(TRAIN) >= 200 and len(HELD_OUT) >= 30
    tasks = Counter(row["task"] for row in TRAIN)
    assert len(tasks) >= 12 and max(tasks.values()) < len(TRAIN) / 8
    assert set(row["task"] for row in HELD_OUT) == set(tasks)
    assert sum(row["messages"][0]["role"] == "system" for row in ALL) >= 5
    assert sum(len(row["messages"]) > 3 for row in ALL) >= 5


def test_no_row_comes_twice_and_none_is_in_both_parts() -> None:
    asked = [json.dumps(row["messages"][:-1]) for row in ALL]
    assert len(set(asked)) == len(asked)


def test_rows_are_read_as_conversations() -> None:
    for name in ("train", "eval"):
        documents = list(Documents([dataset(FOLDER / f"{name}.jsonl")]))
        assert len(documents) == len(rows(name))
        for placed in documents:
            assert isinstance(placed.example, Chat)
            roles = [message["role"] for message in placed.example.messages]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
            assert all(message["content"].strip() for message in placed.example.messages)


def answers(task: str) -> list[Any]:
    return [
        pytest.param(
            row["messages"][-2]["content"],
            row["messages"][-1]["content"],
            id=row["messages"][-2]["content"][-40:],
        )
        for row in ALL
        if row["task"] == task
    ]


@pytest.mark.parametrize(("question", "answer"), answers("read python"))
def test_what_a_program_prints(question: str, answer: str) -> None:
    program = question.split("\n\n", 1)[1]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    assert answer.split("\n\n")[0] == printed.getvalue().strip()


@pytest.mark.parametrize(("question", "answer"), answers("write python"))
def test_written_programs_compile_and_define_something(question: str, answer: str) -> None:
    found = re.fullmatch(r"```python\n(.*)\n```", answer, re.S)
    assert found
    names: dict[str, Any] = {}
    exec(compile(found[1], "answer", "exec"), names)
    assert any(callable(value) for name, value in names.items() if not name.startswith("__"))


@pytest.mark.parametrize(("question", "answer"), answers("arithmetic"))
def test_equations_in_answers_hold(question: str, answer: str) -> None:
    """Every `a op b = c` that stands in an answer, and the sums that are asked for in digits."""
    text = answer.replace(",", "").replace(" x ", " * ")
    for left, right in re.findall(r"((?:\d+(?:\.\d+)? [-+*/] )+\d+(?:\.\d+)?) = (\d+(?:\.\d+)?)", text):
        assert eval(left) == pytest.approx(float(right))
    asked = re.fullmatch(r"What is (\d+) (\+|-|times|divided by) (\d+)\?", question)
    if asked:
        sign = {"times": "*", "divided by": "/"}.get(asked[2], asked[2])
        assert float(answer) == eval(f"{asked[1]} {sign} {asked[3]}")
