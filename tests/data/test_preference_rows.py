"""Rows of preferences: every layout that is read, and one clear line for each malformed one."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import config, dataset, write_rows
from horizon_lm.config.preference import DataKind
from horizon_lm.data import Documents
from horizon_lm.data.detect import data_kind, require_suitable, with_method
from horizon_lm.data.examples import Chat, Labelled, Pair, Preference, texts
from horizon_lm.data.formats import convert, detect
from horizon_lm.data.preferences import num_shared
from horizon_lm.errors import ConfigError, DataError


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


Q, Q2, A, B, S = (
    said("user", "q"),
    said("user", "q\ni"),
    said("assistant", "a"),
    said("assistant", "b"),
    said("system", "s"),
)
TEXT = Preference(Pair("q", "a"), Pair("q", "b"))
TOOLS = [{"name": "look"}]


def chats(*prompt: dict[str, Any], tools: Any = None) -> Preference:
    return Preference(*(Chat([*prompt, answer], tools, len(prompt)) for answer in (A, B)))


SIDES = {"chosen": "a", "rejected": "b"}
LISTS = {"chosen": [A], "rejected": [B]}
# name: (row, what it becomes)
PAIRS: dict[str, tuple[dict[str, Any], Preference]] = {
    "text": ({"prompt": "q", **SIDES}, TEXT),
    "text without a prompt": ({"chosen": "qa", "rejected": "qb"}, TEXT),
    "an empty system prompt": ({"prompt": "q", **SIDES, "system": ""}, TEXT),
    "messages": ({"prompt": [Q], **LISTS}, chats(Q)),
    "messages without a prompt": ({"chosen": [S, Q, A], "rejected": [S, Q, B]}, chats(S, Q)),
    "messages, their prompt also as text": (
        {"prompt": "unread", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]},
        chats(Q),
    ),
    "messages of answers to a text": ({"prompt": "q", **LISTS, "system": "s"}, chats(S, Q)),
    "a system prompt and tools": (
        {"prompt": [Q], **LISTS, "system": "s", "tools": TOOLS},
        chats(S, Q, tools=TOOLS),
    ),
    "tools as JSON": ({"prompt": [Q], **LISTS, "tools": '[{"name": "look"}]'}, chats(Q, tools=TOOLS)),
    "a system prompt twice": ({"prompt": [S, Q], **LISTS, "system": "other"}, chats(S, Q)),
    "single messages": ({"messages": [S, Q], "chosen": A, "rejected": B}, chats(S, Q)),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        chats(Q),
    ),
    "text that answers messages": ({"messages": [Q], **SIDES}, chats(Q)),
    "alpaca": ({"instruction": "q", "input": "i", **SIDES, "system": "s"}, chats(S, Q2)),
    "alpaca with history": (
        {"instruction": "q", "input": "", "history": [["x", "y"]], **SIDES},
        chats(said("user", "x"), said("assistant", "y"), Q),
    ),
    "chatml.intel": ({"system": "s", "question": "q", **SIDES}, chats(S, Q)),
    "chatml.icr": ({"input": "q", **SIDES}, chats(Q)),
    "chatml.argilla": ({"instruction": "q", "chosen_response": "a", "rejected_response": "b"}, chats(Q)),
}


def answer(*prompt: dict[str, Any], label: bool = True) -> Labelled:
    return Labelled(Chat([*prompt, A], None, len(prompt)), label)


LABELLED: dict[str, tuple[dict[str, Any], Labelled]] = {
    "text": ({"prompt": "q", "completion": "a", "label": True}, Labelled(Pair("q", "a"), True)),
    "messages": ({"prompt": [Q], "completion": [A], "label": False}, answer(Q, label=False)),
    "a number": ({"prompt": [Q], "completion": [A], "label": 0}, answer(Q, label=False)),
    "text of csv": ({"instruction": "q", "output": "a", "label": "False"}, answer(Q, label=False)),
    "a number in csv": ({"instruction": "q", "output": "a", "label": "1"}, answer(Q)),
    "alpaca": ({"instruction": "q", "input": "i", "output": "a", "kto_tag": True}, answer(Q2)),
    "chatml.intel": ({"question": "q", "completion": "a", "label": True, "system": "s"}, answer(S, Q)),
    "a conversation": ({"messages": [S, Q, A], "kto_tag": True}, answer(S, Q)),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "label": True},
        answer(Q),
    ),
    "a conversation as completion": ({"completion": [Q, A], "label": True, "system": "s"}, answer(S, Q)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    row, expected = PAIRS[name]
    assert detect(row, "here", "pairs") == "preference"
    assert convert(row, "preference", "here") == expected


@pytest.mark.parametrize("name", LABELLED)
def test_labelled(name: str) -> None:
    row, expected = LABELLED[name]
    assert detect(row, "here", "labelled") == "labelled"
    assert convert(row, "labelled", "here") == expected


def test_columns_and_tags(tmp_path: Path) -> None:
    """Axolotl's user_defined: any names, through `columns`."""
    row = {"ask": "q", "good": {"who": "IT", "what": "a"}, "bad": {"who": "IT", "what": "b"}, "chosen": 1}
    path = write_rows(tmp_path / "a.jsonl", [row])
    names = {"ask": "question", "good": "chosen", "bad": "rejected"}
    tags = {"role_tag": "who", "content_tag": "what", "assistant_tag": "IT"}
    (placed,) = Documents([dataset(path, columns=names, tags=tags)])
    assert placed.example == chats(Q)


def test_texts_of_a_pair_hold_its_prompt_once() -> None:
    assert list(texts(TEXT)) == ["q", "a", "b"]
    assert list(texts(chats(S, Q))) == ["s", "q", "a", "b"]
    assert list(texts(answer(Q))) == ["q", "a"]


@settings(max_examples=200, deadline=None)
@given(st.text("ab ", min_size=1, max_size=6), st.text("ab ", min_size=1, max_size=6))
def test_the_shared_beginning_is_trl_s(chosen: str, rejected: str) -> None:
    from trl.data_utils import extract_prompt

    shared = num_shared(chosen, rejected)
    if chosen[0] != rejected[0]:
        assert shared == 0  # a bad row; TRL may look at the last character, for want of one before the first
        return
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert (chosen[:shared], chosen[shared:], rejected[shared:]) == tuple(theirs.values())


# ---- what is detected, and for which method ------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "wanted", "format"),
    [
        ({"prompt": "q", **SIDES}, None, "preference"),
        ({"prompt": "q", "completion": "a", "label": True}, None, "labelled"),
        ({"prompt": "q", "completion": "a", "label": "False"}, None, "labelled"),
        ({"instruction": "q", "chosen_response": "a", "rejected_response": "b"}, None, "preference"),
        # trained on as documents before there were methods, and so with method: auto
        ({"prompt": "q", "completion": "a", "label": 1}, None, "prompt_completion"),
        ({"prompt": "q", "completion": "a", "label": "sports"}, None, "prompt_completion"),
        ({"messages": [Q, A], "label": True}, None, "messages"),
        ({"messages": [Q, A], "chosen": None, "rejected": None}, None, "messages"),
        ({"instruction": "q", "output": "a", "kto_tag": True}, None, "alpaca"),
        ({"prompt": "q", "completion": "a", "label": 1}, "documents", "prompt_completion"),
        # with the method, they are its samples
        ({"prompt": "q", "completion": "a", "label": 1}, "labelled", "labelled"),
        ({"messages": [Q, A], "label": True}, "labelled", "labelled"),
    ],
)
def test_what_is_detected(row: dict[str, Any], wanted: DataKind | None, format: str) -> None:
    assert detect(row, "here", wanted) == format


@pytest.mark.parametrize(
    ("row", "wanted", "message", "hint"),
    [
        ({"prompt": "q", **SIDES}, "documents", "is a preference pair", "method: dpo"),
        (
            {"prompt": "q", "completion": "a", "label": True},
            "documents",
            "an answer with a label",
            "method: kto",
        ),
        ({"messages": [Q, A]}, "pairs", "holds no preference, .*'messages'", "method: sft"),
        ({"text": "a"}, "labelled", "holds no preference, .*'text'", "method: sft"),
        (
            {"prompt": "q", "completion": "a", "label": True},
            "pairs",
            "a completion with a label",
            "method: kto",
        ),
        ({"prompt": "q", **SIDES}, "labelled", "is a preference pair", "method: dpo"),
    ],
)
def test_rows_for_another_method(row: dict[str, Any], wanted: DataKind, message: str, hint: str) -> None:
    with pytest.raises(DataError, match=f"^here {message}" if "holds" in message else message) as caught:
        detect(row, "here", wanted)
    assert hint in (caught.value.hint or "")


def test_the_method_is_that_of_the_data(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "pairs": {"prompt": "q", **SIDES},
        "labelled": {"prompt": "q", "completion": "a", "label": True},
        "documents": {"text": "a"},
    }
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", [{}, row]) for name, row in rows.items()}
    for name, method in (("pairs", "dpo"), ("labelled", "kto"), ("documents", "sft")):
        skipping = config(datasets=str(paths[name]), on_bad_row="skip")  # a bad row does not decide
        assert data_kind(skipping) == name and with_method(skipping).method == method
    named = config(datasets=str(tmp_path / "absent.jsonl"), method="simpo")
    assert data_kind(named) == "pairs" and with_method(named) is named  # nothing is read


def test_datasets_of_two_kinds(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", **SIDES}])
    b = write_rows(tmp_path / "b.jsonl", [{"text": "a"}])
    message = r"a\.jsonl holds preference pairs, .*b\.jsonl documents: a run trains on one kind"
    with pytest.raises(DataError, match=message) as caught:
        data_kind(config(datasets=[str(a), str(b)]))
    assert "runs of their own" in (caught.value.hint or "")
    with pytest.raises(DataError, match=message):
        list(Documents([dataset(a), dataset(b)]))
    with pytest.raises(DataError, match="b.jsonl:1 holds no preference"):
        list(Documents([dataset(a), dataset(b)], kind="pairs"))


def test_a_named_format_of_another_kind(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", **SIDES}])
    with pytest.raises(
        DataError, match="has the format preference, .*; the method trains on documents"
    ) as caught:
        list(Documents([dataset(path, format="preference")], kind="documents"))
    assert "method: dpo" in (caught.value.hint or "")
    assert len(list(Documents([dataset(path, format="preference")], kind="pairs"))) == 1


@pytest.mark.parametrize(
    ("settled", "kind", "message", "hint"),
    [
        ({"loss_on": "all"}, "pairs", "loss_on: all with preference pairs", "loss_on=auto"),
        ({"truncation": "split"}, "pairs", "truncation: split with", "truncation=drop"),
        ({"packing_strategy": "wrapped"}, "pairs", "packing_strategy: wrapped", "packing_strategy=auto"),
        ({"packing_strategy": "bfd"}, "labelled", "packing_strategy: bfd", "packing=false"),
        (
            {"streaming": True, "max_steps": 1},
            "pairs",
            "streaming: true with preference pairs",
            "streaming=false",
        ),
        ({"streaming": True, "max_steps": 1}, "labelled", "streaming: true with labelled", "streaming=false"),
    ],
)
def test_settings_that_do_not_suit(settled: dict[str, Any], kind: DataKind, message: str, hint: str) -> None:
    require_suitable(config(**settled), "documents")
    with pytest.raises(ConfigError, match=message) as caught:
        require_suitable(config(**settled), kind)
    assert hint in (caught.value.hint or "")


# ---- malformed rows ------------------------------------------------------------------------------

BAD_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "chosen is missing": (
        {"prompt": "q", "rejected": "b"},
        "no column 'chosen'; it has 'prompt', 'rejected'",
    ),
    "rejected is missing": ({"prompt": "q", "chosen": "a"}, "no column 'rejected'"),
    "chosen is null": ({"prompt": "q", "chosen": None, "rejected": "b"}, "'chosen' is null"),
    "rejected is null": ({"prompt": "q", "chosen": "a", "rejected": None}, "'rejected' is null"),
    "chosen is empty": ({"prompt": "q", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
    "rejected is empty": ({"prompt": "q", "chosen": "a", "rejected": ""}, "'rejected' is empty"),
    "chosen is an empty list": ({"prompt": [Q], "chosen": [], "rejected": [B]}, "'chosen' is an empty list"),
    "an answer says nothing": (
        {"prompt": [Q], "chosen": [said("assistant", "")], "rejected": [B]},
        "'chosen' is empty",
    ),
    "equal text": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are equal"),
    "equal messages": ({"prompt": [Q], "chosen": [A], "rejected": [A]}, "'chosen' and 'rejected' are equal"),
    "equal conversations": ({"chosen": [Q, A], "rejected": [Q, A]}, "'chosen' and 'rejected' are equal"),
    "equal but for null keys": (
        {"prompt": [Q], "chosen": [A], "rejected": [{**A, "tool_calls": None}]},
        "'chosen' and 'rejected' are equal",
    ),
    "a number": (
        {"prompt": "q", "chosen": 3, "rejected": "b"},
        "'chosen' holds a number, expected text or messages",
    ),
    "a boolean": ({"prompt": "q", "chosen": "a", "rejected": True}, "'rejected' holds a boolean"),
    "a list of texts": (
        {"prompt": "q", "chosen": ["a"], "rejected": ["b"]},
        r"chosen\[0\] holds text, expected an",
    ),
    "an object": (
        {"prompt": "q", "chosen": {"text": "a"}, "rejected": {"text": "b"}},
        r"chosen\[0\] has no 'role'",
    ),
    "text and messages": (
        {"prompt": "q", "chosen": "a", "rejected": [B]},
        "'chosen' holds text, 'rejected' a list",
    ),
    "messages and text": (
        {"prompt": [Q], "chosen": [A], "rejected": "b"},
        "'chosen' holds a list, 'rejected' text",
    ),
    "text that answers a prompt of messages": (
        {"prompt": [Q], **SIDES},
        "'chosen' holds text, 'prompt' messages; expected text in both, or messages in both",
    ),
    "the prompt is null": ({"prompt": None, **SIDES}, "'prompt' is null"),
    "the prompt is a number": ({"prompt": 3, **SIDES}, "'prompt' holds a number"),
    "the prompt is an empty list": ({"prompt": [], **LISTS}, "'prompt' is an empty list"),
    "the prompt has a bad message": (
        {"prompt": [{"role": "user"}], **LISTS},
        r"prompt\[0\] has no 'content'",
    ),
    "an empty question": ({"instruction": " ", **SIDES}, "'instruction' is empty"),
    "a question of a wrong type": ({"question": ["q"], **SIDES}, "'question' holds a list"),
    "history of a wrong type": ({"instruction": "q", "history": ["x"], **SIDES}, "'history' holds text"),
    "no prompt of text": ({"chosen": "yes", "rejected": "no"}, "has no prompt, and .* share no beginning"),
    "a space is no prompt": ({"chosen": " yes", "rejected": " no"}, "share no beginning"),
    "no prompt of messages": (LISTS, "has no prompt, and .* share no beginning; its columns are 'chosen'"),
    "no shared prompt": (
        {"chosen": [said("user", "x"), A], "rejected": [Q, B]},
        "has no prompt, and .* share no beginning",
    ),
    "an answer of the user": (
        {"prompt": [Q], "chosen": [Q2], "rejected": [B]},
        "'chosen' begins with .* role user",
    ),
    "sides that part at the user": (
        {"chosen": [S, said("user", "x"), A], "rejected": [S, Q, B]},
        "'chosen' begins with a message of the role user, expected the assistant's",
    ),
    "an answer that ends with the user": (
        {"prompt": [Q], "chosen": [A, Q2], "rejected": [B]},
        "'chosen' ends with a message of the role user",
    ),
    "an answer of the system": (
        {"prompt": [Q], "chosen": [A], "rejected": [S]},
        "'rejected' begins with .* system",
    ),
    "a prompt that ends with the answer": (
        {"prompt": [Q, A], "chosen": [A], "rejected": [B]},
        "the prompt ends with a message of the assistant",
    ),
    "an unknown role": (
        {"prompt": [Q], "chosen": [said("judge", "a")], "rejected": [B]},
        r"chosen\[0\]: the role is",
    ),
    "content is null": (
        {"prompt": [Q], "chosen": [said("assistant", None)], "rejected": [B]},
        "'content' is null",
    ),
    "a video": (
        {"prompt": [said("user", [{"type": "video"}])], **LISTS},
        r"prompt\[0\]: 'content' has a part that is not text: 'video'",
    ),
    "tools are not JSON": ({"prompt": [Q], **LISTS, "tools": "{"}, "tools: '{' is not valid JSON"),
    "tools are text": (
        {"prompt": [Q], **LISTS, "tools": '"look"'},
        "'tools' holds text, expected a list of objects",
    ),
    "tools are numbers": ({"prompt": [Q], **LISTS, "tools": [3]}, "'tools' holds a list"),
    "half a character": (
        {"prompt": "q", "chosen": "\ud83d", "rejected": "b"},
        "character 0 is half of a surrogate",
    ),
    "half a character of a message": (
        {"prompt": [said("user", "\udc00")], **LISTS},
        "half of a surrogate pair",
    ),
    "a system prompt of text": (
        {"prompt": "q", **SIDES, "system": "s"},
        "has a system prompt, but its prompt is text and not a conversation",
    ),
    "a system prompt of a wrong type": ({"prompt": [Q], **LISTS, "system": 3}, "'system' holds a number"),
}
BAD_LABELLED: dict[str, tuple[dict[str, Any], str]] = {
    "the label is missing": ({"prompt": "q", "completion": "a"}, "has no column 'label'; it has"),
    "the label is null": ({"prompt": "q", "completion": "a", "label": None}, "'label' is null"),
    "the label is a word": (
        {"prompt": "q", "completion": "a", "label": "good"},
        "'label' holds 'good', expected true",
    ),
    "the label is 2": (
        {"prompt": "q", "completion": "a", "label": 2},
        "'label' holds 2, expected true or false",
    ),
    "the label is a fraction": ({"prompt": "q", "completion": "a", "label": 0.5}, "'label' holds 0.5"),
    "the label is a list": ({"prompt": "q", "completion": "a", "label": [True]}, "'label' holds a list"),
    "the answer is missing": (
        {"prompt": "q", "label": True},
        "has no column 'completion', which the format labelled",
    ),
    "the answer is null": ({"prompt": "q", "completion": None, "label": True}, "'completion' is null"),
    "the answer is empty": ({"prompt": "q", "completion": "", "label": True}, "'completion' is empty"),
    "the prompt is missing": ({"completion": "a", "label": True}, "has no prompt; its columns are"),
    "the answer alone": (
        {"messages": [A], "label": True},
        "'messages' holds 1 message, expected a question and",
    ),
    "the conversation ends with the user": (
        {"messages": [Q, A, Q2], "label": True},
        "prompt ends with .* assistant",
    ),
    "text and messages": (
        {"prompt": [Q], "completion": "a", "label": True},
        "'completion' holds text, 'prompt' mess",
    ),
    "the last word is empty": (
        {"messages": [Q, said("assistant", "")], "label": True},
        r"'messages\[1\]' is empty",
    ),
}


def found_in(path: Path, format: str) -> DataError:
    with pytest.raises(DataError) as caught:
        list(Documents([dataset(path, format=format)]))
    return caught.value


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_malformed_pair_is_one_clear_line(case: str, tmp_path: Path) -> None:
    _check_line(*BAD_PAIRS[case], PAIRS["messages"][0], "preference", tmp_path)


@pytest.mark.parametrize("case", BAD_LABELLED)
def test_a_malformed_labelled_row_is_one_clear_line(case: str, tmp_path: Path) -> None:
    _check_line(*BAD_LABELLED[case], LABELLED["text"][0], "labelled", tmp_path)


def _check_line(row: Any, message: str, good: Any, format: str, tmp_path: Path) -> None:
    """The second row is bad: its line is named, with the problem and a way out; skipped, it is counted."""
    path = write_rows(tmp_path / "a.jsonl", [good, copy.deepcopy(row), good])
    error = found_in(path, format)
    assert re.search(message, error.message), error.message
    assert error.message.startswith(f"{path}:2") and "\n" not in error.message + (error.hint or "\n")
    assert error.hint and len(error.message) < 600
    skipping = Documents([dataset(path, format=format)], on_bad_row="skip")
    assert len(list(skipping)) == 2 and skipping.num_bad == 1 and skipping.bad_rows == [error.message]


_SAID = st.fixed_dictionaries(
    {},
    optional={
        k: st.sampled_from(["user", "assistant", "", 3, None, [{"type": "text"}], {}])
        for k in ("role", "content", "from", "value", "tool_calls")
    },
)
_VALUES = st.one_of(
    st.sampled_from(["", "q", "qa", "qb", None, True, 0, 2.5, [], {}, [[]], [None], "\ud800"]),
    _SAID,
    st.lists(_SAID, max_size=3),
    st.just([Q, A]),
    st.just([Q, B]),
)
_COLUMNS = [
    *(
        "prompt",
        "chosen",
        "rejected",
        "completion",
        "label",
        "kto_tag",
        "instruction",
        "question",
        "input",
        "output",
    ),
    *("messages", "conversations", "system", "tools", "history", "chosen_response", "rejected_response"),
]


@settings(max_examples=300, deadline=None)
@given(
    row=st.dictionaries(st.sampled_from(_COLUMNS), _VALUES),
    wanted=st.sampled_from([None, "documents", "pairs", "labelled"]),
)
def test_any_row_is_read_or_gives_a_data_error(row: dict[str, Any], wanted: DataKind | None) -> None:
    for format in ("preference", "labelled"):
        try:
            found = convert(row, format, "here")
        except DataError as error:
            assert error.message.startswith("here") and error.hint and "\n" not in error.message
        else:
            assert all(isinstance(text, str) for text in texts(found))
    try:
        detect(row, "here", wanted)
    except DataError as error:
        assert error.message.startswith("here") and error.hint


def test_there_are_forty() -> None:
    assert len(BAD_PAIRS) >= 40
