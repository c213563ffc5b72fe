"""Tokenizers of the kinds that models have, trained on a few lines, so small that tokens straddle the border
between prompt and completion wherever their kind lets them; and prompts and completions that try it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
