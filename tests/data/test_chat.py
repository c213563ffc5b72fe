"""Chat templates: ids and mask of 17 families equal transformers' and hand-marked spans, to the token."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from chat_families import (
    FAMILIES,
    FORGETFUL,
    LAST_ONLY,
    SPECIAL,
    WRONG_SIDE,
    Family,
    trl_template,
)
from horizon_lm.data import train_tokenizer
from horizon_lm.data.chat import ChatTemplate, built_in_templates, read_template, without_marks
from horizon_lm.data.documents import Placed
from horizon_lm.data.encode import Encoded, Encoder, covered
from horizon_lm.data.examples import Chat, Pair, Text
from horizon_lm.errors import ConfigError, DataError

TEXTS = [
    "How many legs has a spider?",
    "Eight legs.\n\nIt is no insect: é, 日本, 😀.",
    "And  a crab ?",
    "Ten.",
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Answer in few words."}
ONE = [user(TEXTS[0]), assistant(TEXTS[1])]
TWO = [*ONE, user(TEXTS[2]), assistant(TEXTS[3])]
SHAPES = {"one": ONE, "two": TWO, "system": [SYSTEM, *ONE], "system, two": [SYSTEM, *TWO]}
CASES = [
    pytest.param(family, shape, id=f"{name}, {label}")
    for name, family in FAMILIES.items()
    for label, shape in SHAPES.items()
    if family.takes_system() or shape[0]["role"] != "system"
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with the marks of all families as tokens of their own; offsets not trimmed."""
    made = train_tokenizer(["spider legs insect answer few words many how crab "] * 40, 420)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    made.add_tokens(SPECIAL, special_tokens=True)
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


@pytest.fixture(scope="module")
def trimming(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with offsets that leave white space out, as Llama 3's and GPT-2's do."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
    )
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def encode(
    tokenizer: Any, example: Any, template: str | None = None, loss_on: str = "auto", **kwargs: Any
) -> Encoded:
    tokenizer.chat_template = template
    found = Encoder(tokenizer, loss_on=loss_on, **kwargs).encode([Placed(example, "row 1", 0)])[0]
    if isinstance(found, DataError):
        raise found
    return found


def learned_text(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The text of each run of trained tokens."""
    assert encoded.trained is not None
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.trained.astype(int), [0]]))).reshape(-1, 2)
    return [tokenizer.decode(encoded.ids[a:b].tolist()) for a, b in edges]


def token_spans(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> list[bool]:
    """The mask of hand-marked spans: whether each token's bytes, by decoding one after another, lie inside.

    Uses no offsets: tokens of this tokenizer follow each other without a gap, so that their bytes add up.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    inside = np.zeros(len(text.encode()), bool)
    for begin, end in spans:
        inside[len(text[:begin].encode()) : len(text[:end].encode())] = True
    decoder = {value: key for key, value in _bytes_to_unicode().items()}
    added = tokenizer.get_added_vocab()
    mask, at = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        size = len(token.encode()) if token in added else len(bytes(decoder[c] for c in token))
        mask.append(bool(inside[at : at + size].any()))
        at += size
    assert at == len(inside)
    return mask


def _bytes_to_unicode() -> dict[int, str]:
    """The characters by which byte-level tokenizers write bytes: printable ones as they are."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in kept}
    for number, byte in enumerate(byte for byte in range(256) if byte not in table):
        table[byte] = chr(256 + number)
    assert set(table.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return table


@pytest.mark.parametrize(("family", "messages"), CASES)
@pytest.mark.parametrize("offsets", ["whole", "trimmed"])
def test_ids_and_mask_are_those_of_hand_marked_spans(
    family: Family, messages: list[dict[str, Any]], offsets: str, tokenizer: Any, trimming: Any
) -> None:
    chosen = tokenizer if offsets == "whole" else trimming
    text, spans = family.expected(messages)
    encoded = encode(chosen, Chat(messages), family.text)
    assert encoded.ids.tolist() == chosen(text, add_special_tokens=False).input_ids
    assert encoded.trained is not None
    assert encoded.trained.tolist() == token_spans(chosen, text, spans)
    assert 0 < encoded.trained.sum() < len(encoded.ids)


@pytest.mark.parametrize(("family", "messages"), CASES)
def test_ids_and_mask_are_those_of_transformers(
    family: Family, messages: list[dict[str, Any]], tokenizer: Any
) -> None:
    """The mask is compared where the template, or TRL's variant of it, has marks: else theirs is empty."""
    encoded = encode(tokenizer, Chat(messages), family.text)
    template = ChatTemplate(tokenizer)
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=template.template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.ids.tolist() == theirs["input_ids"]
    if "differences" in template.source:
        assert not any(theirs["assistant_masks"])  # why the mask is not taken from there
    else:
        assert encoded.trained is not None
        assert encoded.trained.astype(int).tolist() == theirs["assistant_masks"]


def test_at_least_twelve_families_in_both_ways(tokenizer: Any) -> None:
    ways = []
    for family in FAMILIES.values():
        tokenizer.chat_template = family.text
        ways.append(ChatTemplate(tokenizer).source)
    assert len(FAMILIES) >= 12
    assert sum("TRL" in way for way in ways) >= 8 and sum("differences" in way for way in ways) >= 4


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_on_the_last_turn_or_on_everything(name: str, tokenizer: Any) -> None:
    family = FAMILIES[name]
    text, spans = family.expected(TWO)
    last = encode(tokenizer, Chat(TWO), family.text, "last_assistant")
    assert last.trained is not None
    assert last.trained.tolist() == token_spans(tokenizer, text, spans[1:])
    everything = encode(tokenizer, Chat(TWO), family.text, "all")
    assert everything.trained is None and everything.ids.tolist() == last.ids.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_on_the_completion_of_messages(name: str, tokenizer: Any) -> None:
    """From where the prompt with its generation prompt ends; equal to TRL's in test_prompt_completion.py."""
    found = encode(tokenizer, Chat(TWO, num_prompt=3), FAMILIES[name].text, "completion")
    text = tokenizer.decode(found.ids.tolist())
    assert text == tokenizer.apply_chat_template(TWO, tokenize=False)  # by the template as it is given
    (learned,) = learned_text(tokenizer, found)
    assert text.endswith(learned) and TEXTS[3] in learned and TEXTS[2] not in learned


@pytest.mark.parametrize("name", built_in_templates())
def test_built_in_templates(name: str, tokenizer: Any) -> None:
    found = encode(tokenizer, Chat([SYSTEM, *TWO]), None, chat_template=name)
    end = "<|im_end|>\n" if name == "chatml" else "</s>"
    lead = " " if name == "plain" else ""
    assert learned_text(tokenizer, found) == [f"{lead}{TEXTS[1]}{end}", f"{lead}{TEXTS[3]}{end}"]
    marked = read_template(name)
    plain = without_marks(marked)
    assert "generation %}" in marked and "generation %}" not in plain
    for ask in (True, False):  # what is saved with the model writes the same text
        texts = [
            tokenizer.apply_chat_template(
                [SYSTEM, *TWO], chat_template=t, tokenize=False, add_generation_prompt=ask
            )
            for t in (marked, plain)
        ]
        assert texts[0] == texts[1]
        assert not ask or texts[0].rstrip().endswith(("assistant", "Assistant:", "### Response:"))


# ---- conversations that the assistant begins ------------------------------------------------

GREETING = assistant("Hello, I am here.")
ALTERNATING = {"gemma", "gemma3", "cohere"}  # their templates insist on a user's turn first


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ALTERNATING])
def test_a_conversation_that_the_assistant_begins(name: str, tokenizer: Any) -> None:
    """As in many ShareGPT files: the greeting is a turn of the assistant's like the others, whether the
    template has marks or the mask is had from differences, which have nothing to begin with here."""
    family = FAMILIES[name]
    for before in [[], [SYSTEM]] if family.takes_system() else [[]]:
        found = encode(tokenizer, Chat([*before, GREETING, *TWO]), family.text)
        learned = learned_text(tokenizer, found)
        assert len(learned) == 3
        assert learned[0].removeprefix(" ") == family.learned.format(GREETING["content"]).removeprefix(" ")
        rest = learned_text(tokenizer, encode(tokenizer, Chat([*before, *TWO]), family.text))
        assert [text.removesuffix(family.end) for text in learned[1:]] == [
            text.removesuffix(family.end) for text in rest
        ]
        last = encode(tokenizer, Chat([*before, GREETING, *TWO]), family.text, "last_assistant")
        assert TEXTS[3] in "".join(learned_text(tokenizer, last))
        assert "Hello" not in "".join(learned_text(tokenizer, last))


@pytest.mark.parametrize("name", sorted(ALTERNATING))
def test_a_template_that_wants_the_user_first_is_refused_by_its_own_words(name: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1: the chat template rejects .* roles must alternate") as caught:
        encode(tokenizer, Chat([GREETING, *TWO]), FAMILIES[name].text)
    assert "on_bad_row: skip" in (caught.value.hint or "")


def test_an_opening_that_the_template_rewrites_is_refused(tokenizer: Any) -> None:
    """No generation prompt, and its words are not found: what is the assistant's cannot be told."""
    shouting = (
        "{% for m in messages %}{% set first = loop.first and m.role == 'assistant' %}"
        "{{ m.role + ': ' + (m.content | upper if first else m.content) + eos_token }}{% endfor %}"
    )
    assert encode(tokenizer, Chat(ONE), shouting)
    with pytest.raises(DataError, match="does not tell which tokens of message 1"):
        encode(tokenizer, Chat([GREETING, *ONE]), shouting)


# ---- tools ----------------------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Bern"}}}
WITH_TOOLS = [
    user("Is it warm in Bern?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "21 degrees"},
    assistant("Yes, 21 degrees."),
]
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"place": "Bern"}}\n</tool_call><|im_end|>\n'


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen2_5", ["\n" + CALLED, "\nYes, 21 degrees.<|im_end|>\n"]),
        ("qwen3_instruct_2507", [CALLED, "Yes, 21 degrees.<|im_end|>\n"]),
        (
            "qwen3",
            ["<think>\n\n</think>\n\n" + CALLED, "<think>\n\n</think>\n\nYes, 21 degrees.<|im_end|>\n"],
        ),
    ],
)
def test_calls_of_tools_are_learned_and_their_results_are_not(
    name: str, said: list[str], tokenizer: Any
) -> None:
    found = encode(tokenizer, Chat(WITH_TOOLS, TOOLS), trl_template(name))
    assert learned_text(tokenizer, found) == said
    whole = tokenizer.decode(found.ids.tolist())
    assert "The weather of a place." in whole and "<tool_response>\n21 degrees" in whole


@pytest.mark.parametrize("name", ["glm4moe", "llama3_1", "gemma4", "lfm2"])
def test_conversations_with_tools_equal_transformers(name: str, tokenizer: Any) -> None:
    found = encode(tokenizer, Chat(WITH_TOOLS, TOOLS), trl_template(name))
    template = ChatTemplate(tokenizer).template
    theirs = tokenizer.apply_chat_template(WITH_TOOLS, tools=TOOLS, chat_template=template, return_dict=True)
    assert found.ids.tolist() == theirs["input_ids"]
    learned = "".join(learned_text(tokenizer, found))
    assert "Yes, 21 degrees." in learned and "21 degrees\n" not in learned.replace("Yes, 21 degrees.", "")
    assert "Is it warm" not in learned


# ---- templates that cannot give the mask ----------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LAST_ONLY, "marks 1 of 2 assistant turns"),
        (WRONG_SIDE, "includes the user's words"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ messages | length }}",
            "does not tell which tokens",
        ),
        ("{{ raise_exception('no such thing') }}", "rejects this conversation: no such thing"),
        ("{% for m in messages %}", "rejects this conversation"),
    ],
)
def test_a_template_that_cannot_give_the_mask_is_refused(template: str, message: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        encode(tokenizer, Chat(TWO), template)
    assert caught.value.hint


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_does(tokenizer: Any) -> None:
    """The trial conversation has no thoughts in it; the row has."""
    thinking = [user("a"), assistant("<think>hm</think>b"), user("c"), assistant("<think>hm</think>d")]
    with pytest.raises(DataError, match="row 1: the chat template does not tell which tokens of message 2"):
        encode(tokenizer, Chat(thinking), FORGETFUL)
    one = encode(tokenizer, Chat(thinking[:2]), FORGETFUL)
    assert learned_text(tokenizer, one) == ["<think>hm</think>b<|im_end|>\n"]
    assert encode(tokenizer, Chat(thinking), FORGETFUL, "all").trained is None


def test_a_tokenizer_without_a_template_is_refused_even_where_bad_rows_are_skipped(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template") as caught:
        Encoder(tokenizer).encode([Placed(Chat(ONE), "row 1", 0)])
    assert "chatml" in (caught.value.hint or "")


def test_a_row_without_the_assistant_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1 has no token to train on"):
        encode(tokenizer, Chat([user("hello?")]), FAMILIES["chatml"].text)


def test_templates_are_sandboxed(tokenizer: Any) -> None:
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match="rejects this conversation"):
        encode(tokenizer, Chat(ONE), attack)


def test_chat_template_names_and_files(tokenizer: Any, tmp_path: Any) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(FAMILIES["zephyr"].text)
    found = encode(tokenizer, Chat(ONE), None, chat_template=str(file))
    assert learned_text(tokenizer, found) == [TEXTS[1] + "</s>\n"]
    with pytest.raises(ConfigError, match="neither a file nor a built-in template"):
        read_template("chatmll")


def test_chatml_needs_its_tokens(tokenizer: Any) -> None:
    """Else the end of an answer would be some letters, at which nothing stops."""
    assert Encoder(tokenizer, chat_template="chatml").chat
    with pytest.raises(ConfigError, match="not a token of this tokenizer") as caught:
        Encoder(train_tokenizer([], 257), chat_template="chatml")
    assert "plain" in (caught.value.hint or "")


def templates_of_trl() -> list[str]:
    """Those that take text and have a training variant."""
    names = {file.name.removesuffix(".jinja") for file in (files("trl") / "chat_templates").iterdir()}
    return sorted(n for n in names if f"{n}_training" in names and n not in OF_PICTURES)


OF_PICTURES = {"llava_next", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl", "diffusion_gemma"}


@pytest.mark.parametrize("name", templates_of_trl())
def test_every_template_that_trl_knows(name: str, tokenizer: Any) -> None:
    found = encode(tokenizer, Chat(TWO), trl_template(name))
    template = ChatTemplate(tokenizer)
    theirs = tokenizer.apply_chat_template(
        TWO, chat_template=template.template, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.ids.tolist() == theirs["input_ids"] and found.trained is not None
    assert found.trained.astype(int).tolist() == theirs["assistant_masks"]
    learned = "".join(learned_text(tokenizer, found))
    assert TEXTS[1] in learned and TEXTS[3] in learned
    assert TEXTS[0] not in learned and TEXTS[2] not in learned
    last = encode(tokenizer, Chat(TWO), trl_template(name), "last_assistant")
    assert TEXTS[3] in "".join(learned_text(tokenizer, last))
    assert TEXTS[1] not in "".join(learned_text(tokenizer, last))


def test_there_are_many_templates_of_trl() -> None:
    assert len(templates_of_trl()) >= 20


def test_template_variables_reach_the_template(tokenizer: Any) -> None:
    template = FAMILIES["chatml"].text + "{% if shout %}{{ '!' }}{% endif %}"
    loud = encode(tokenizer, Chat(ONE), template, "all", chat_template_kwargs={"shout": True})
    assert tokenizer.decode(loud.ids[-1:].tolist()) == "!"
    assert len(encode(tokenizer, Chat(ONE), template, "all").ids) == len(loud.ids) - 1


# ---- text and pairs -------------------------------------------------------------------------


def test_a_text_is_trained_on_whole_and_ends_with_the_end_of_text(tokenizer: Any) -> None:
    found = encode(tokenizer, Text("a spider"))
    assert found.trained is None and found.is_text
    assert found.ids.tolist() == [*tokenizer("a spider").input_ids, tokenizer.eos_token_id]


def test_of_a_pair_the_completion_is_trained_on(tokenizer: Any) -> None:
    pair = Pair("How many legs?", " Eight legs")
    found = encode(tokenizer, pair)
    assert learned_text(tokenizer, found) == [" Eight legs</s>"]
    assert found.ids.tolist() == [*tokenizer("How many legs? Eight legs").input_ids, tokenizer.eos_token_id]
    assert encode(tokenizer, pair, loss_on="all").trained is None


def test_covered_counts_white_space_at_its_end() -> None:
    offsets = [(0, 3), (4, 4), (4, 7), (8, 8)]  # "abc", " ", "def", " "
    assert covered(offsets, [(3, 8)]).tolist() == [False, True, True, True]
    assert covered(offsets, [(4, 7)]).tolist() == [False, False, True, False]
    assert covered(offsets, []).tolist() == [False] * 4


def test_keys_differ_by_everything_that_decides_on_tokens(tokenizer: Any) -> None:
    tokenizer.chat_template = FAMILIES["chatml"].text
    keys = {
        Encoder(tokenizer).key(),
        Encoder(tokenizer, loss_on="all").key(),
        Encoder(tokenizer, chat_template="plain").key(),
        Encoder(tokenizer, chat_template_kwargs={"a": 1}).key(),
    }
    tokenizer.chat_template = FAMILIES["zephyr"].text
    keys.add(Encoder(tokenizer).key())
    assert len(keys) == 5 and Encoder(tokenizer).key() in keys
    json.dumps(sorted(keys))
