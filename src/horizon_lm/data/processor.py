"""A model's own processor: pictures to pixels, and the placeholder tokens that stand for them in a text.

    "<image> What is it?"  ->  "<image><image>...<image> What is it?"  ->  tokens

The processor expands each mark to as many placeholders as the picture has features. Tokens of the expanded
text are mapped back to the characters before it, where the spans of the assistant's turns lie.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from horizon_lm.data.pictures import SKIP, BadPictureError, Opened
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.io.hub import is_offline
from horizon_lm.model.configuration import reason_of
from horizon_lm.words import count

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_FILES = ("processor_config.json", "preprocessor_config.json")
OUTSIDE = (-1, -1)  # characters of a placeholder: in no span
# Outputs of a processor that are about tokens; all others are about pictures.
_OF_TOKENS = frozenset(
    {"input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets", "token_type_ids"}
    | {"mm_token_type_ids", "special_tokens_mask", "labels"}
)
_TYPES = ("mm_token_type_ids", "token_type_ids")
_PIXELS = "pixel"
# What processors raise for pictures that they cannot take: most divide, index and assert without a check.
_REJECTED = (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AssertionError)

Span = tuple[int, int]


@dataclass(frozen=True)
class PictureTokens:
    """A text with pictures as tokens. offsets: characters of the text with marks, (-1, -1) for placeholders.
    counts: features of each picture. sizes: small outputs of the processor for each, as image_grid_thw."""

    ids: list[int]
    offsets: list[Span]
    counts: list[int]
    sizes: list[dict[str, list[int]]]


class Processor:
    """A processor of transformers for text and pictures."""

    def __init__(self, own: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """tokenizer: that of the run, which may have new tokens; the processor takes it over."""
        self.own = own
        own.tokenizer = self.tokenizer = tokenizer

    @property
    def chat_template(self) -> str | None:
        template = self.own.chat_template or self.tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def mark(self) -> str:
        """The text that stands for one picture before expansion."""
        return str(self.own.image_token)

    @cached_property
    def key(self) -> str:
        """Identify what decides pixels and placeholders, versions included."""
        parts = json.dumps(self.own.to_dict(), sort_keys=True, default=str)
        made_by = [version(name) for name in ("transformers", "pillow")]
        return xxhash.xxh3_128(repr((type(self.own).__name__, parts, made_by)).encode()).hexdigest()

    @cached_property
    def types(self) -> tuple[str, list[int]] | None:
        """Return (name of the input that marks placeholders with 1, tokens that count as placeholders).

        None if the processor has no such output.
        """
        found = self.own(text=["a"], add_special_tokens=False)
        name = next((name for name in _TYPES if name in found), None)
        if name is None or not hasattr(self.own, "create_mm_token_type_ids"):
            return None
        return name, sorted(int(token) for token in self.own.image_token_ids if token is not None)

    def tokens(self, text: str, pictures: Sequence[Opened], place: str) -> PictureTokens:
        """Tokenise a text with marks. Raises DataError if marks and pictures differ in number, and
        BadPictureError for a picture that the processor rejects."""
        marks = text.count(self.mark)
        if marks != len(pictures):
            raise self.marks_differ(marks, len(pictures), place)
        if not pictures:
            found = self.tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
            return PictureTokens(found["input_ids"][0], found["offset_mapping"][0], [], [])
        try:
            found = self.own(
                text=[text],
                images=[[picture.image for picture in pictures]],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
            )
        except _REJECTED as error:
            raise BadPictureError(
                f"{place}: a picture is rejected by {type(self.own).__name__}: {reason_of(error)}", hint=SKIP
            ) from error
        ids = [int(token) for token in found["input_ids"][0]]
        offsets = [(int(a), int(b)) for a, b in found["offset_mapping"][0]]
        replaced = found["text_replacement_offsets"][0]
        owners = _owners(offsets, [part["new_span"] for part in replaced])
        counts = [_most_common([t for t, k in zip(ids, owners, strict=True) if k == i]) for i in range(marks)]
        before = _before_expansion(offsets, owners, replaced)
        return PictureTokens(ids, before, counts, _sizes(found, marks))

    def marks_differ(self, marks: int, pictures: int, place: str) -> DataError:
        """Return the error for a rendered conversation that shows another number of pictures than it has."""
        return DataError(
            f"{place}: rendered by the chat template, the conversation has {self.mark} "
            f"{count(marks, 'time')} for {count(pictures, 'picture')}",
            hint=f"remove {self.mark} from the text; templates show pictures only in the user's messages",
        )

    def inputs(self, *pictures: Opened) -> dict[str, torch.Tensor]:
        """Return the inputs of the model's tower: pixel_values and what describes them."""
        images = [[picture.image for picture in pictures]]
        found = self.own(text=[self.mark * len(pictures)], images=images, return_tensors="pt")
        return {name: value for name, value in found.items() if name not in _OF_TOKENS}

    def collapsed(self, text: str) -> str:
        """Write the placeholders of each picture in a decoded text as <image × 256>."""
        tokens = [token for token in self.own.image_token_ids if token is not None]
        names = [re.escape(name) for name in self.tokenizer.convert_ids_to_tokens(tokens)]

        def short(run: re.Match[str]) -> str:
            return f"<image × {max(len(re.findall(name, run[0])) for name in names)}>"

        return re.sub(f"(?:{'|'.join(names)})+", short, text)

    def save(self, folder: Path, chat_template: str | None) -> None:
        """Write the processor and its tokenizer. chat_template: in place of its own."""
        template = self.own.chat_template
        if chat_template is not None:
            self.own.chat_template = chat_template
        try:
            self.own.save_pretrained(folder)
        finally:
            self.own.chat_template = template


def _owners(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Return for each token the number of the expanded mark that it overlaps, else -1."""
    owners, k = [], 0
    for first, last in offsets:
        while k < len(spans) and spans[k][1] <= first:
            k += 1
        inside = k < len(spans) and last > spans[k][0] and first < spans[k][1]
        owners.append(k if inside else -1)
    return owners


def _before_expansion(
    offsets: Sequence[Span], owners: Sequence[int], replaced: Sequence[dict[str, Any]]
) -> list[Span]:
    """Map characters of the expanded text to those of the text with marks."""
    ends = np.array([part["new_span"][1] for part in replaced])
    gained = np.array([0, *(part["new_span"][1] - part["span"][1] for part in replaced)])
    shifts = gained[np.searchsorted(ends, np.array([first for first, _ in offsets]), side="right")]
    return [
        OUTSIDE if owner >= 0 else (first - int(shift), last - int(shift))
        for (first, last), owner, shift in zip(offsets, owners, shifts, strict=True)
    ]


def _most_common(tokens: Sequence[int]) -> int:
    """Count the token that fills an expanded mark; others begin, end or break its rows."""
    return max((tokens.count(token) for token in set(tokens)), default=0)


def _sizes(found: Any, number: int) -> list[dict[str, list[int]]]:
    """Return the small whole-number outputs of each picture."""
    sizes: list[dict[str, list[int]]] = [{} for _ in range(number)]
    for name, values in found.items():
        if name in _OF_TOKENS or name.startswith(_PIXELS) or not hasattr(values, "__len__"):
            continue
        if len(values) != number:
            continue
        for i, value in enumerate(values):
            array = np.asarray(value)
            if array.ndim == 1 and array.dtype.kind in "iu":
                sizes[i][name] = array.tolist()
    return sizes


def has_processor(name: str, *, revision: str | None = None) -> bool:
    """Tell whether a folder, or a model of the Hub, comes with a processor of pictures or the like."""
    path = Path(name).expanduser()
    if path.is_dir():
        return any((path / file).is_file() for file in _FILES)
    from transformers.utils import cached_file

    options: dict[str, Any] = {
        "revision": revision or "main",
        "local_files_only": is_offline(),
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    try:
        return any(cached_file(name, file, **options) is not None for file in _FILES)
    except OSError:
        return False


def load_processor(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Processor | None:
    """Load the processor of a folder or Hub name; None if it has none for text and pictures.

    Raises ConfigError if it cannot be loaded.
    """
    if not has_processor(name, revision=revision):
        return None
    from transformers import AutoProcessor

    path = Path(name).expanduser()
    try:
        own: Any = AutoProcessor.from_pretrained(
            str(path) if path.is_dir() else name,
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
            local_files_only=path.is_dir() or is_offline(),
        )
    except Exception as error:  # transformers raises many kinds
        what = f"the processor of {name} cannot be loaded: {reason_of(error)}"
        hint = "use a model folder with processor_config.json and the files that it names"
        if "torchvision" in str(error):
            what, hint = (
                f"the processor of {name} needs torchvision",
                "pip install torchvision, in the version for your torch",
            )
        raise ConfigError(what, hint) from error
    if not hasattr(own, "tokenizer") or getattr(own, "image_processor", None) is None:
        return None
    if getattr(own, "image_token", None) is None or not _maps_back(own):
        raise ConfigError(
            f"{type(own).__name__} does not tell which tokens stand for a picture, with transformers "
            f"{version('transformers')}",
            hint="use transformers>=5.18, and a model of docs/guides/pictures.md",
        )
    return Processor(own, tokenizer)


def _maps_back(own: Any) -> bool:
    return hasattr(type(own), "get_text_with_replacements")
