"""Rows of preferences: ids and masks are those of TRL's own DPOTrainer and KTOTrainer, to the token.

The authorities are `_prepare_dataset` of the installed TRL's trainers, called without a trainer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from chat_families import FAMILIES, FORGETFUL, SPECIAL
from horizon_lm.data.documents import Placed
from horizon_lm.data.encode import Encoded, Encoder
from horizon_lm.data.formats import convert, detect
from horizon_lm.data.mismatched import with_mismatched
from horizon_lm.errors import DataError
from small_tokenizers import COMPLETIONS, KINDS, PROMPTS, byte_level

Ids = list[int]


def of_dpo(tokenizer: Any, rows: list[Any], max_length: int | None = None) -> list[tuple[Ids, Ids, Ids]]:
    """(prompt, chosen, rejected) of each row, as TRL's trainer makes them."""
    from trl import DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    made = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), datasets.Dataset.from_list(rows), tokenizer, args, "train"
    )
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in made]


def of_kto(tokenizer: Any, rows: list[Any], block: int) -> list[tuple[Ids, Ids, Ids, bool]]:
    """(prompt, completion, mismatched completion, label) of each row."""
    from trl import KTOTrainer

    trainer = SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0
    )
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, per_device_train_batch_size=block)
    made = KTOTrainer._prepare_dataset(trainer, datasets.Dataset.from_list(rows), tokenizer, args, "train")
    return [(r["prompt_ids"], r["completion_ids"], r["KL_completion_ids"], r["label"]) for r in made]


def of_ours(tokenizer: Any, rows: list[dict[str, Any]], format: str | None = None) -> list[Encoded]:
    """Documents of rows that are read with the format of the first."""
    format = format or detect(rows[0], "row 0")
    placed = [Placed(convert(row, format, f"row {n}"), f"row {n}", 0) for n, row in enumerate(rows)]
    found = Encoder(tokenizer).encode(placed)
    for result in found:
        if isinstance(result, DataError):
            raise result
    return [result for result in found if isinstance(result, Encoded)]


def parts(document: Encoded) -> tuple[Ids, Ids]:
    """(prompt, completion); the mask is false, then true."""
    assert document.trained is not None and (np.diff(document.trained.astype(int)) >= 0).all()
    return document.ids[~document.trained].tolist(), document.ids[document.trained].tolist()


def pairs(documents: list[Encoded]) -> list[tuple[Ids, Ids, Ids]]:
    found = []
    for one, other in zip(documents[::2], documents[1::2], strict=True):
        (prompt, chosen), (same, rejected) = parts(one), parts(other)
        assert prompt == same
        found.append((prompt, chosen, rejected))
    return found


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {name: make() for name, make in KINDS.items()}


def text_rows(tokenizer: Any) -> list[dict[str, str]]:
    eos = tokenizer.eos_token
    said = [completion.format(eos=eos) for completion in COMPLETIONS]
    return [
        {"prompt": prompt.format(eos=eos), "chosen": one, "rejected": other}
        for prompt in PROMPTS.values()
        for one, other in zip(said, said[1:] + said[:1], strict=True)
        if one + eos != other  # become the same tokens, which TRL trains on
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_text_are_those_of_trl(kind: str, made: dict[str, Any]) -> None:
    tokenizer = made[kind]
    rows = text_rows(tokenizer)
    theirs = of_dpo(tokenizer, rows)
    unlike = [n for n, (_, chosen, rejected) in enumerate(theirs) if chosen != rejected]
    assert len(unlike) == len(rows) or kind == "bert" and len(unlike) > 60  # it drops spaces
    rows, theirs = [rows[n] for n in unlike], [theirs[n] for n in unlike]
    ours = pairs(of_ours(tokenizer, rows))
    for row, expected, found in zip(rows, theirs, ours, strict=True):
        assert found == expected, row


def test_the_border_is_the_lesser_of_both_sides(made: dict[str, Any]) -> None:
    """The control: by its own border, as if it were trained on alone, a side would have a longer prompt."""
    tokenizer = made["llama 3"]
    row = {"prompt": "France is P", "chosen": "aris.", "rejected": " Dog"}
    ((prompt, _, rejected),) = pairs(of_ours(tokenizer, [row]))
    alone = of_ours(tokenizer, [{"prompt": row["prompt"], "completion": row["rejected"]}])
    assert (prompt, rejected) != parts(alone[0]) and prompt + rejected == alone[0].ids.tolist()
    assert [(prompt, rejected)] == [(p, r) for p, _, r in of_dpo(tokenizer, [row])]


def implicit_rows() -> list[dict[str, str]]:
    shared = ["\n\nHuman: what is 12?\n\nAssistant:", "Answer: ", "Question"]
    sides = [(" Paris", " Dog"), (" Dog", " Dogs and"), ("yes", "no"), (" 12 34", " 12 35")]
    return [{"chosen": start + one, "rejected": start + other} for start in shared for one, other in sides]


@pytest.mark.parametrize("kind", ["gpt2", "llama 2", "qwen 2", "t5"])
def test_a_shared_beginning_is_the_prompt_as_in_trl(kind: str, made: dict[str, Any]) -> None:
    rows = implicit_rows()
    assert pairs(of_ours(made[kind], rows)) == of_dpo(made[kind], rows)


# ---- messages -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def for_chats() -> Any:
    made = byte_level("</s>", bos="<s>")
    made.add_tokens(SPECIAL, special_tokens=True)
    return made


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversations(with_system: bool) -> list[dict[str, Any]]:
    one = [said("user", "what is 12")]
    if with_system:
        one = [said("system", "Answer: yes."), *one]
    three = [*one, said("assistant", " Paris "), said("user", "Dog?\n")]
    answers = ["34", "\n\nDog", " yes. ", "'s"]
    return [
        {"prompt": prompt, "chosen": [said("assistant", a)], "rejected": [said("assistant", b)]}
        for prompt in (one, three)
        for a, b in zip(answers, answers[1:] + answers[:1], strict=True)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_of_messages_are_those_of_trl(name: str, for_chats: Any) -> None:
    """With the prompt in a column of its own, and as the beginning of both sides."""
    family = FAMILIES[name]
    for_chats.chat_template = family.text
    rows = conversations(family.takes_system())
    theirs = of_dpo(for_chats, rows)
    assert pairs(of_ours(for_chats, rows)) == theirs
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    assert pairs(of_ours(for_chats, implicit)) == theirs == of_dpo(for_chats, implicit)


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_pairs_of_messages_whose_tokens_straddle_the_border(kind: str, made: dict[str, Any]) -> None:
    tokenizer = made[kind]
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Question: ' + m.content + '\n' }}"
        "{% else %}{{ 'Answer: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
    )
    rows = conversations(False)
    theirs = of_dpo(tokenizer, rows)
    assert pairs(of_ours(tokenizer, rows)) == theirs
    alone = [
        len(tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True)["input_ids"]) for r in rows
    ]
    assert any(len(prompt) < size for (prompt, _, _), size in zip(theirs, alone, strict=True))


def test_tools_reach_the_template(for_chats: Any) -> None:
    for_chats.chat_template = "{{ tools[0].name }}" + FAMILIES["chatml"].text
    (row, *_) = conversations(False)
    with_tools = {**row, "tools": '[{"name": "look"}]'}
    assert pairs(of_ours(for_chats, [with_tools])) == of_dpo(for_chats, [with_tools])
    other = {**row, "tools": '[{"name": "seek"}]'}
    assert pairs(of_ours(for_chats, [other])) != of_dpo(for_chats, [with_tools])


def test_a_prompt_that_is_written_another_way_is_refused(for_chats: Any) -> None:
    """TRL warns, and trains on the user's words."""
    for_chats.chat_template = "{{ messages | length }}" + FORGETFUL
    with pytest.raises(DataError, match="row 0: the chat template renders the prompt differently"):
        of_ours(for_chats, conversations(False)[:1])


def test_sides_that_become_the_same_tokens_are_a_bad_row(made: dict[str, Any]) -> None:
    tokenizer = made["gpt2"]
    rows = [{"prompt": "a", "chosen": "Dog", "rejected": "Dog" + tokenizer.eos_token}]
    ((_, chosen, rejected),) = of_dpo(tokenizer, rows)
    assert chosen == rejected
    with pytest.raises(DataError, match="row 0: 'chosen' and 'rejected' become the same tokens"):
        of_ours(tokenizer, rows)


# ---- labelled -------------------------------------------------------------------------------


def labelled_rows(tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 3 == 0}
        for n, row in enumerate(text_rows(tokenizer)[:23])
    ]


def kto_parts(documents: list[Encoded]) -> list[tuple[Ids, Ids, Ids, bool]]:
    found = []
    for own, other in zip(documents[::2], documents[1::2], strict=True):
        (prompt, completion), (same, mismatched) = parts(own), parts(other)
        assert prompt == same and own.label is not None and other.label is None
        found.append((prompt, completion, mismatched, own.label))
    return found


@pytest.mark.parametrize("kind", ["gpt2", "llama 2 with its end", "mistral", "t5"])
@pytest.mark.parametrize("block", [2, 5, 23, 64])
def test_labelled_text_and_its_mismatched_documents_are_those_of_trl(
    kind: str, block: int, made: dict[str, Any]
) -> None:
    tokenizer = made[kind]
    rows = labelled_rows(tokenizer)
    rows = rows[: len(rows) - (len(rows) % block == 1)]  # TRL leaves a last one alone, see below
    documents = of_ours(tokenizer, rows)
    batches = [documents[:3], [], documents[3:]]  # blocks do not depend on batches of the tokenizer
    ours = [part for made in with_mismatched(iter(batches), block) for part in made]
    assert kto_parts(ours) == of_kto(tokenizer, rows, block)


def test_the_last_block_is_never_one_sample(made: dict[str, Any]) -> None:
    """Its KL term would be that of its own completion, as with TRL."""
    rows = labelled_rows(made["gpt2"])[:5]
    *_, (_, own, mismatched, _) = of_kto(made["gpt2"], rows, 2)
    assert own == mismatched
    documents = of_ours(made["gpt2"], rows)
    sizes = [len(made) // 2 for made in with_mismatched([documents], 2)]
    assert sizes == [2, 3]
    with pytest.raises(DataError, match="row 0 is the only sample") as caught:
        list(with_mismatched([documents[:1]], 2))
    assert "apo_zero_unpaired" in (caught.value.hint or "")


def test_labelled_messages_are_those_of_trl(for_chats: Any) -> None:
    for_chats.chat_template = FAMILIES["llama3"].text
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": bool(n % 2)}
        for n, row in enumerate(conversations(True))
    ]
    ours = [part for made in with_mismatched([of_ours(for_chats, rows)], 4) for part in made]
    assert kto_parts(ours) == of_kto(for_chats, rows, 4)
