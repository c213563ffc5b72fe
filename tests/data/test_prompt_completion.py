"""Rows of a prompt and its completion: ids and mask are those of TRL's own SFTTrainer, to the token.

The authority is `SFTTrainer._prepare_dataset` of the installed TRL, called without a trainer. Tokenizers are
those of the kinds that models have, trained here on a few lines, so small that tokens straddle the border
between prompt and completion wherever their kind lets them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from chat_families import CHATML, FAMILIES, FORGETFUL, SPECIAL
from data_helpers import config, write_rows
from horizon_lm.data import load_training_data
from horizon_lm.data.documents import Placed
from horizon_lm.data.encode import Encoded, Encoder
from horizon_lm.data.examples import Chat, Pair
from horizon_lm.data.preview import pieces
from horizon_lm.errors import DataError

CORPUS = [
    "The capital of France is Paris. Answer: Dog\n\nQuestion: what is 1234?\nAnswer: Paris\n",
    "Question:\n\n\tDogs and  cats, Answer:  yes. It's the answer: don't say über 日本 12 34.\n",
] * 30
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


def finished(made: Tokenizer, eos: str | AddedToken, bos: str | None = None, **more: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=eos, **({"bos_token": bos} if bos else {}), **more
    )


def around(made: Tokenizer, *parts: str) -> None:
    """Put special tokens around each text, as in `around(made, "<s>", "$A")`."""
    named = [(part, made.token_to_id(part)) for part in parts if part != "$A"]
    made.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=named)


def byte_level(
    eos: str,
    *,
    regex: str | None = None,
    prefix_space: bool = False,
    whole: bool = False,
    bos: str | None = None,
) -> Any:
    """GPT-2's pattern unless `regex` is another; whole: no pattern at all, merges cross spaces."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(
        add_prefix_space=prefix_space, use_regex=regex is None and not whole, trim_offsets=True
    )
    made.pre_tokenizer = level
    if regex is not None:
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    made.decoder = decoders.ByteLevel()
    special = [eos, *([bos] if bos else [])]
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=BYTES, show_progress=False
        ),
    )
    if bos:
        around(made, bos, "$A")
    return finished(made, eos, bos)


def sentencepiece(*, prepend: str, end: bool = False, eos: str | AddedToken = "</s>") -> Any:
    """prepend: "text" as in Llama 2 (the normalizer's), "first" as in Mistral's, or "never" as in Gemma."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    if prepend == "text":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps])
    elif prepend == "never":
        made.normalizer = steps[0]
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *FALLBACK]
    # Merges are learned within words and across spaces at most once, as in SentencePiece.
    learned = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    learned.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    learned.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    made.model = learned.model
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    around(made, "<s>", "$A", *(["</s>"] if end else []))
    return finished(made, eos, "<s>", unk_token="<unk>")


def unigram() -> Any:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    made.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    around(made, "$A", "</s>")
    return finished(made, "</s>", unk_token="<unk>", pad_token="<pad>")


def wordpiece() -> Any:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", "[EOS]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=260, special_tokens=special, show_progress=False)
    )
    around(made, "[CLS]", "$A", "[SEP]")
    return finished(made, "[EOS]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: byte_level("<|endoftext|>"),
    "gpt2, space before": lambda: byte_level("<|endoftext|>", prefix_space=True),
    "llama 3": lambda: byte_level("<|eot_id|>", regex=LLAMA_3, bos="<|begin_of_text|>"),
    "qwen 2": lambda: byte_level("<|im_end|>", regex=QWEN_2),
    "bytes without a pattern": lambda: byte_level("<|endoftext|>", whole=True),
    "llama 2": lambda: sentencepiece(prepend="text"),
    "llama 2 with its end": lambda: sentencepiece(prepend="text", end=True),
    "mistral": lambda: sentencepiece(prepend="first"),
    "gemma": lambda: sentencepiece(prepend="never"),
    "an end that takes spaces": lambda: sentencepiece(
        prepend="never", eos=AddedToken("</s>", lstrip=True, rstrip=True, special=True)
    ),
    "t5": unigram,
    "bert": wordpiece,
}

PROMPTS = {
    "a space": "The answer: ",
    "a newline": "Question: what?\n",
    "nothing": "The capital of France is P",
    "a colon": "Answer:",
    "two spaces": "Answer:  ",
    "a digit": "what is 12",
    "half a letter's bytes": "日",
    "a special token": "Question: what?{eos}",
    "nothing at all": "",
}
COMPLETIONS = ["D", "Dog", "aris.", " Dog", "\nDog", "34?", "本", "  ", "Dog{eos}", "Dog {eos}", "'s"]


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
