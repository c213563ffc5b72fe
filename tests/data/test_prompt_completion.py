"""Rows of a prompt and its completion: ids and mask are those of TRL's own SFTTrainer, to the token.

The authority is `SFTTrainer._prepare_dataset` of the installed TRL, called without a trainer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from chat_families import CHATML, FAMILIES, FORGETFUL, SPECIAL
from data_helpers import config, write_rows
from horizon_lm.data import load_training_data
from horizon_lm.data.documents import Placed
from horizon_lm.data.encode import Encoded, Encoder
from horizon_lm.data.examples import Chat, Pair
from horizon_lm.data.preview import pieces
from horizon_lm.errors import DataError
from small_tokenizers import COMPLETIONS, KINDS, PROMPTS, byte_level


def rows_for(tokenizer: Any) -> list[dict[str, str]]:
    eos = tokenizer.eos_token
    return [
        {"prompt": prompt.format(eos=eos), "completion": completion.format(eos=eos)}
        for prompt in PROMPTS.values()
        for completion in COMPLETIONS
    ]


def of_trl(tokenizer: Any, rows: list[Any], *, completion_only_loss: bool = True) -> list[dict[str, Any]]:
    """`input_ids` and `labels` of each row, as TRL's trainer makes them."""
    from trl import SFTTrainer

    trainer = SimpleNamespace(
        _tokenizer=tokenizer, completion_only_loss=completion_only_loss, chat_template=None
    )
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=False,
        max_length=None,
        shuffle_dataset=False,
    )
    made = SFTTrainer._prepare_dataset(
        trainer, datasets.Dataset.from_list(rows), tokenizer, args, False, None, "train"
    )
    return list(made)


def of_ours(tokenizer: Any, examples: list[Any], **settings: Any) -> list[Encoded]:
    placed = [Placed(example, f"row {n}", 0) for n, example in enumerate(examples)]
    found = Encoder(tokenizer, **settings).encode(placed)
    for result in found:
        if isinstance(result, DataError):
            raise result
    return [result for result in found if isinstance(result, Encoded)]


def labels(encoded: Encoded) -> list[int]:
    ids = encoded.ids.astype(int)
    return (ids if encoded.trained is None else np.where(encoded.trained, ids, -100)).tolist()


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {name: make() for name, make in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_mask_are_those_of_trl(kind: str, made: dict[str, Any]) -> None:
    tokenizer = made[kind]
    rows = rows_for(tokenizer)
    theirs = of_trl(tokenizer, rows)
    ours = of_ours(tokenizer, [Pair(**row) for row in rows])
    before = int(tokenizer("a").input_ids[0] in tokenizer.all_special_ids)
    straddling = 0
    for row, expected, found in zip(rows, theirs, ours, strict=True):
        assert found.ids.tolist() == expected["input_ids"], row
        assert labels(found) == expected["labels"], row
        alone = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        straddling += labels(found).count(-100) < before + len(alone)
    assert straddling >= 2  # else nothing was tried; WordPiece, which drops spaces, has fewest


def test_the_mask_of_before_differs(made: dict[str, Any]) -> None:
    """The control: by the characters alone, as it was, the first answer token would be lost."""
    lost = {}
    for kind, tokenizer in made.items():
        row = {"prompt": "The capital of France is P", "completion": "aris."}
        (theirs,) = of_trl(tokenizer, [row])
        whole = row["prompt"] + row["completion"] + tokenizer.eos_token
        offsets = tokenizer(whole, return_offsets_mapping=True).offset_mapping
        before = [begin >= len(row["prompt"]) for begin, _ in offsets]
        lost[kind] = before != [label != -100 for label in theirs["labels"]]
    assert sum(lost.values()) >= 8, lost


@pytest.mark.parametrize("kind", ["gpt2", "llama 2 with its end", "t5", "bert"])
def test_loss_on_everything_is_trl_s_without_completion_only_loss(kind: str, made: dict[str, Any]) -> None:
    tokenizer = made[kind]
    rows = rows_for(tokenizer)
    ours = of_ours(tokenizer, [Pair(**row) for row in rows], loss_on="all")
    theirs = of_trl(tokenizer, rows, completion_only_loss=False)
    assert [labels(found) for found in ours] == [expected["labels"] for expected in theirs]
    assert all(found.trained is None for found in ours)


def test_one_batch_of_all_shapes_is_the_rows_one_by_one(made: dict[str, Any]) -> None:
    """Pairs need two texts of the tokenizer, conversations one with offsets: none gets another's tokens."""
    tokenizer = made["gpt2"]
    tokenizer.chat_template = CHATML
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "Dog"}]
    examples = [Pair("P", "aris."), Chat(turns), Pair("Answer: ", "D"), Chat(turns, num_prompt=1)]
    together = of_ours(tokenizer, examples)
    apart = [of_ours(tokenizer, [example])[0] for example in examples]
    assert [labels(found) for found in together] == [labels(found) for found in apart]


def test_from_a_file_to_the_preview_s_marks(made: dict[str, Any], tmp_path: Any) -> None:
    tokenizer = made["llama 3"]
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "France is P", "completion": "aris."}])
    settings = config(datasets=str(path), max_length=64, packing=False, dataset_cache_dir=None)
    data = load_training_data(settings, tokenizer)
    shown = [text for text, trained, _ in pieces(data.rows.row(0), tokenizer) if trained]
    assert shown == [" Paris.<|eot_id|>"]  # one token straddles the border, and is trained on whole


# ---- messages -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def for_chats() -> Any:
    made = byte_level("</s>", bos="<s>")
    made.add_tokens(SPECIAL, special_tokens=True)
    return made


def conversations(with_system: bool) -> list[dict[str, list[dict[str, str]]]]:
    user, assistant = ({"role": role} for role in ("user", "assistant"))
    system = [{"role": "system", "content": "Answer: yes."}] if with_system else []
    one = [*system, {**user, "content": "what is 12"}]
    three = [*one, {**assistant, "content": " Paris "}, {**user, "content": "Dog?\n"}]
    answers = ["34", "\n\nDog", " yes. ", "'s"]
    return [
        {"prompt": prompt, "completion": [{**assistant, "content": answer}]}
        for prompt in (one, three)
        for answer in answers
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_messages_are_those_of_trl(name: str, for_chats: Any) -> None:
    family = FAMILIES[name]
    for_chats.chat_template = family.text
    rows = conversations(family.takes_system())
    theirs = of_trl(for_chats, rows)
    ours = of_ours(for_chats, [Chat(r["prompt"] + r["completion"], None, len(r["prompt"])) for r in rows])
    for row, expected, found in zip(rows, theirs, ours, strict=True):
        assert found.ids.tolist() == expected["input_ids"], row
        assert labels(found) == expected["labels"], row


@pytest.mark.parametrize("kind", ["gpt2", "llama 2", "gemma", "mistral"])
def test_messages_whose_tokens_straddle_the_border(kind: str, made: dict[str, Any]) -> None:
    """A template that asks with `Answer: `, whose space goes into the answer's first token."""
    tokenizer = made[kind]
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Question: ' + m.content + '\n' }}"
        "{% else %}{{ 'Answer: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
    )
    rows = conversations(False)
    ours = of_ours(tokenizer, [Chat(r["prompt"] + r["completion"], None, len(r["prompt"])) for r in rows])
    theirs = of_trl(tokenizer, rows)
    assert [found.ids.tolist() for found in ours] == [expected["input_ids"] for expected in theirs]
    assert [labels(found) for found in ours] == [expected["labels"] for expected in theirs]
    alone = [
        len(tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True)["input_ids"]) for r in rows
    ]
    assert any(labels(found).count(-100) < size for found, size in zip(ours, alone, strict=True))


def test_a_prompt_that_is_written_another_way_is_refused_where_trl_trains_on_the_user(for_chats: Any) -> None:
    """The one difference: TRL warns and counts all from where they part to the completion, the user's words
    with it."""
    for_chats.chat_template = "{{ messages | length }}" + FORGETFUL
    rows = conversations(False)[:1]
    (theirs,) = of_trl(for_chats, rows)
    learned = for_chats.decode([label for label in theirs["labels"] if label != -100])
    assert "what is 12" in learned
    with pytest.raises(DataError, match="row 0: the chat template renders the prompt differently"):
        of_ours(for_chats, [Chat(rows[0]["prompt"] + rows[0]["completion"], None, 1)])
