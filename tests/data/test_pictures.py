"""Rows with pictures become the tokens and the mask that TRL's own collator gives."""

from __future__ import annotations

import copy
import io
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import PIL.Image
import pytest
from trl import get_training_chat_template
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from data_helpers import dataset, write_rows
from horizon_lm.data import Documents
from horizon_lm.data.encode import Encoded, Encoder
from horizon_lm.data.pictures import decoded
from horizon_lm.data.processor import Processor
from horizon_lm.errors import DataError
from tiny_processors import PROCESSORS, pictures

QUESTION = "What is in the picture?"
TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
    {"role": "user", "content": [{"type": "text", "text": "And in "}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat above a blue square."}]},
]


@cache
def processor(name: str) -> Any:
    return PROCESSORS[name]()


def encoder(name: str, **settings: Any) -> Encoder:
    own = processor(name)
    return Encoder(own.tokenizer, processor=Processor(own, own.tokenizer), **settings)


def encoded(path: Path, name: str = "llava", on_bad: str = "raise", **settings: Any) -> list[Encoded]:
    of_data = {key: settings.pop(key) for key in ("image_dir", "format", "columns") if key in settings}
    documents = Documents([dataset(path, **of_data)], on_bad_image=on_bad)
    found = encoder(name, **settings).encode(list(documents))
    for one in found:
        if isinstance(one, DataError):
            raise one
    return [one for one in found if isinstance(one, Encoded)]


def saved(folder: Path, number: int) -> list[str]:
    names = [f"{i}.png" for i in range(number)]
    for name, picture in zip(names, pictures(number), strict=True):
        picture.save(folder / name)
    return names


def theirs(name: str, rows: list[dict[str, Any]], **settings: Any) -> Any:
    own = processor(name)
    return DataCollatorForVisionLanguageModeling(own, **settings)(copy.deepcopy(rows))


@pytest.mark.parametrize("name", PROCESSORS)
def test_tokens_and_mask_are_those_of_trl(name: str, tmp_path: Path) -> None:
    names = saved(tmp_path, 3)
    chats = [
        {"images": names[:2], "messages": TURNS},
        {"images": names[2:], "messages": TURNS[:2]},
    ]
    ours = encoded(write_rows(tmp_path / "a.jsonl", chats), name)
    own, made = processor(name), pictures(3)
    template = own.chat_template
    with suppress(ValueError):  # TRL knows no variant of it with marks
        template = get_training_chat_template(own) or template
    has_marks = "generation %}" in template
    batch = theirs(
        name,
        [{"images": made[:2], "messages": TURNS}, {"images": made[2:], "messages": TURNS[:2]}],
        chat_template=template,
        assistant_only_loss=has_marks,
    )
    for i, one in enumerate(ours):
        real = batch["attention_mask"][i].bool()
        assert one.ids.tolist() == batch["input_ids"][i][real].tolist()
        assert one.trained is not None
        if has_marks:
            assert one.trained.tolist() == (batch["labels"][i][real] != -100).tolist()
        said = own.tokenizer.decode(one.ids[one.trained].tolist())
        assert ("A red circle." in said, "A cat above" in said) == (True, i == 0)
        assert QUESTION not in said
        per_picture = [shown.count for shown in one.pictures]
        assert len(per_picture) == (2, 1)[i] and min(per_picture) > 0


@pytest.mark.parametrize("name", PROCESSORS)
def test_placeholders_are_never_trained_on(name: str, tmp_path: Path) -> None:
    names = saved(tmp_path, 2)
    path = write_rows(tmp_path / "a.jsonl", [{"images": names, "messages": TURNS}])
    (one,) = encoded(path, name, loss_on="all")
    (batch,) = [theirs(name, [{"images": pictures(2), "messages": TURNS}])]
    ids, left_out = one.ids, ~np.asarray(one.trained)
    assert ids.tolist() == batch["input_ids"][0].tolist()
    text = processor(name).tokenizer.decode(ids[~left_out].tolist())
    assert QUESTION in text and "A red circle." in text
    fill = max(ids[left_out].tolist(), key=ids[left_out].tolist().count)
    assert fill not in ids[~left_out].tolist()
    assert left_out.sum() >= sum(shown.count for shown in one.pictures) == (ids == fill).sum()
    assert (batch["labels"][0] != -100).all(), "TRL's loss on all tokens takes placeholders in"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_prompt_and_completion(name: str, tmp_path: Path) -> None:
    names = saved(tmp_path, 1)
    row = {
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": "A cat."}],
    }
    (one,) = encoded(write_rows(tmp_path / "a.jsonl", [{**row, "images": names}]), name)
    batch = theirs(name, [{**row, "images": pictures(1)}], completion_only_loss=True)
    text = processor(name).tokenizer.decode
    assert one.trained is not None and text(one.ids.tolist()) == text(batch["input_ids"][0].tolist())
    if name == "llava":  # where TRL cuts, a space begins a token: they tokenise both parts on their own
        assert "A cat." in text(one.ids[one.trained].tolist()) and QUESTION not in text(one.ids[one.trained])
        return
    assert one.ids.tolist() == batch["input_ids"][0].tolist()
    assert one.trained.tolist() == (batch["labels"][0] != -100).tolist()


def test_a_format_that_starts_a_program_is_not_read() -> None:
    """PIL has Ghostscript draw EPS. It knows the file: only the list of formats keeps it out."""
    content = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), "red").save(content, "EPS")
    with PIL.Image.open(io.BytesIO(content.getvalue())) as image:
        assert image.format == "EPS"
    with pytest.raises(PIL.UnidentifiedImageError):
        decoded(content.getvalue())
