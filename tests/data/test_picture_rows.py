"""Where rows have their pictures, how those are read, and what is refused, with the line that is at fault."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
from transformers.image_utils import load_image

from data_helpers import config, dataset, examples, write_parquet, write_rows
from horizon_lm.config import TrainConfig
from horizon_lm.data import Documents, load_training_data
from horizon_lm.data.examples import Chat
from horizon_lm.data.pictures import BadPictureError, Picture, open_picture
from horizon_lm.data.processor import Processor
from horizon_lm.errors import ConfigError, DataError
from tiny_processors import llava, pictures

ASKED = {"role": "user", "content": "What is it?"}
SAID = {"role": "assistant", "content": "A cat."}
IMAGE = {"type": "image"}


def png(number: int = 0) -> bytes:
    file = io.BytesIO()
    pictures(number + 1)[number].save(file, "PNG")
    return file.getvalue()


def chat(path: Path, **settings: Any) -> Chat:
    (found,) = examples(path, **settings)
    assert isinstance(found, Chat)
    return found


def parts(found: Chat) -> list[list[str]]:
    return [
        [part["text"] if part["type"] == "text" else "[IMAGE]" for part in m["content"]]
        for m in found.messages
    ]


def names(found: Chat) -> list[str]:
    return [Path(str(picture.path)).name for picture in found.pictures]


@pytest.mark.parametrize(
    ("row", "content"),
    [
        (
            {"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}, SAID]},
            ["[IMAGE]", "What?"],
        ),
        ({"messages": [ASKED, SAID]}, ["[IMAGE]", "What is it?"]),
        (
            {"messages": [{"role": "user", "content": "Look: <image>\nWhat?"}, SAID]},
            ["Look: ", "[IMAGE]", "What?"],
        ),
        ({"prompt": [ASKED], "completion": [SAID]}, ["[IMAGE]", "What is it?"]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat?"},
                    {"from": "gpt", "value": "A cat."},
                ]
            },
            ["[IMAGE]", "What?"],
        ),
        ({"instruction": "What?\n<image>", "output": "A cat."}, ["What?", "[IMAGE]"]),
    ],
    ids=["trl parts", "trl text", "marks", "prompt and completion", "llava", "llama-factory alpaca"],
)
@pytest.mark.parametrize("column", ["images", "image"])
def test_pictures_are_at_their_place(
    row: dict[str, Any], content: list[str], column: str, tmp_path: Path
) -> None:
    value: Any = ["a/1.png"] if column == "images" else "a/1.png"
    found = chat(write_rows(tmp_path / "a.jsonl", [{**row, column: value}]))
    assert parts(found) == [content, ["A cat."]]
    assert [picture.path for picture in found.pictures] == [str(tmp_path.resolve() / "a/1.png")]


def test_order_folders_and_own_pictures_of_parts(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image> and <image>"},
        {"from": "gpt", "value": "Two."},
        {"from": "human", "value": "<image>?"},
        {"from": "gpt", "value": "One."},
    ]
    path = write_rows(
        tmp_path / "a.json", [{"image": ["1.png", "/b/2.png", "c/3.png"], "conversations": turns}]
    )
    found = chat(path, image_dir="/pictures")
    assert [picture.path for picture in found.pictures] == [
        "/pictures/1.png",
        "/b/2.png",
        "/pictures/c/3.png",
    ]
    assert parts(found) == [["[IMAGE]", " and ", "[IMAGE]"], ["Two."], ["[IMAGE]", "?"], ["One."]]
    own = [
        {"type": "image", "image": "own.png"},
        IMAGE,
        {"type": "image_url", "image_url": {"url": "url.png"}},
    ]
    path = write_rows(
        tmp_path / "b.jsonl",
        [{"images": ["given.png"], "messages": [{"role": "user", "content": own}, SAID]}],
    )
    assert names(chat(path)) == ["own.png", "given.png", "url.png"]


def test_text_beside_pictures_stays_text(tmp_path: Path) -> None:
    """Rows without pictures keep their words, marks included; plain text stands beside any column."""
    said = {"messages": [{"role": "user", "content": "What is <image> in HTML?"}, SAID]}
    assert chat(write_rows(tmp_path / "a.jsonl", [said])).messages[0]["content"] == "What is <image> in HTML?"
    (found,) = examples(write_rows(tmp_path / "b.jsonl", [{"text": "a", "image": "1.png"}]))
    assert found.text == "a"  # type: ignore[union-attr]


def test_bytes_of_saved_datasets_and_parquet(tmp_path: Path) -> None:
    messages = [[ASKED, SAID]] * 2
    (tmp_path / "b.png").write_bytes(png(1))
    made = datasets.Dataset.from_dict(
        {"messages": messages, "images": [[{"bytes": png(0), "path": None}], [str(tmp_path / "b.png")]]},
        features=datasets.Features(
            {
                "messages": datasets.List(
                    {"role": datasets.Value("string"), "content": datasets.Value("string")}
                ),
                "images": datasets.List(datasets.Image()),
            }
        ),
    )
    made.save_to_disk(str(tmp_path / "saved"))
    stored = [{"bytes": png(i), "path": None} for i in range(2)]
    write_parquet(tmp_path / "a.parquet", {"messages": messages, "image": stored})
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        found = [one for one in examples(path) if isinstance(one, Chat)]
        opened = [open_picture(one.pictures[0], "row").image for one in found]
        assert all(
            np.array_equal(np.asarray(image), np.asarray(other))
            for image, other in zip(opened, pictures(2), strict=True)
        )


def test_llama_factory_names_pictures_in_dataset_info(tmp_path: Path) -> None:
    entry = {
        "file_name": "a.json",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "images": "seen"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mllm": entry}))
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
    write_rows(tmp_path / "a.json", [{"turns": turns, "seen": ["1.png"]}])
    (found,) = config(datasets="mllm", dataset_dir=str(tmp_path)).datasets
    (placed,) = Documents([found])
    assert isinstance(placed.example, Chat) and names(placed.example) == ["1.png"]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


LLAVA_ROW = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A"}]
ONE, BOTH = "1 mark of a picture .* and", "2 marks of pictures .* and"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["1.png", "2.png"], "messages": [user("<image>"), SAID]}, f"{ONE} 2 pictures"),
        ({"images": [], "messages": [user("<image>"), SAID]}, f"{ONE} 0 pictures"),
        ({"images": [], "messages": [user([IMAGE, IMAGE]), SAID]}, f"{BOTH} 0 pictures"),
        ({"image": "1.png", "conversations": LLAVA_ROW}, "0 marks of pictures .* and 1 picture"),
        ({"images": ["https://a.org/1.png"], "messages": [ASKED, SAID]}, "'https://a.org/1.png' is a URL"),
        ({"images": ["file:///1.png"], "messages": [ASKED, SAID]}, "is a URL"),
        ({"images": ["data:image/png;base64,AAAA"], "messages": [ASKED, SAID]}, "base64"),
        ({"images": [5], "messages": [ASKED, SAID]}, "a picture is a number, expected a path"),
        ({"images": [{"name": "1.png"}], "messages": [ASKED, SAID]}, "is an object, expected a path"),
        ({"images": ["1.png"], "prompt": "a", "completion": "b"}, "its prompt and completion are text"),
    ],
)
def test_what_does_not_fit_names_its_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"images": ["1.png"], "messages": [ASKED, SAID]}, changes])
    settings = {"format": "sharegpt"} if "conversations" in changes else {}
    if "prompt" in changes or settings:  # a row of another format
        path = write_rows(tmp_path / "a.jsonl", [changes])
    line = 1 if "prompt" in changes or settings else 2
    with pytest.raises(DataError, match=rf"a\.jsonl:{line}[: ].*{message}") as caught:
        examples(path, **settings)
    assert caught.value.hint


MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "I", "F", "CMYK", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_pictures_are_opened_as_transformers_does(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tiff" if mode in ("F", "I", "CMYK") else "a.png")
    pictures(1)[0].convert("L" if mode == "I;16" else mode).convert(mode).save(path)
    ours = open_picture(Picture(str(path)), "row").image
    assert ours.mode == "RGB" and np.array_equal(np.asarray(ours), np.asarray(load_image(str(path))))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    path, exif = tmp_path / "a.jpg", PIL.Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    pictures(1)[0].save(path, exif=exif)
    ours = open_picture(Picture(str(path)), "row").image
    assert np.array_equal(np.asarray(ours), np.asarray(load_image(str(path))))
    assert ours.size == pictures(1)[0].size[::-1], "the picture lies on its side otherwise"


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 5000)


def bad(folder: Path) -> dict[str, str]:
    """Bad pictures by name, and what is said of them."""
    whole = png()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"no picture at all")
    (folder / "folder.png").mkdir()
    PIL.Image.new("1", (90, 80)).save(folder / "huge.png")  # more than LIMIT
    PIL.Image.new("1", (200, 80)).save(folder / "bomb.png")  # more than twice that
    zero = bytearray(whole)
    zero[16:20] = bytes(4)  # width 0
    (folder / "zero.png").write_bytes(bytes(zero))
    return {
        "cut.png": "truncated",
        "empty.png": "not a picture in one of the formats JPEG, ",
        "text.png": "not a picture in one of the formats JPEG, ",
        "folder.png": "it is a folder, not a file",
        "huge.png": "90 x 80 pixels, and PIL's limit is 5,000",
        "bomb.png": "too many pixels",
        "zero.png": "cannot be used",
        "none.png": "does not exist",
    }


@pytest.mark.usefixtures("small_limit")
def test_bad_pictures_are_one_line_with_file_row_and_reason(tmp_path: Path) -> None:
    for name, reason in bad(tmp_path).items():
        with pytest.raises(BadPictureError) as caught:
            open_picture(Picture(str(tmp_path / name)), "a.jsonl:7")
        said = caught.value.message
        assert said.startswith("a.jsonl:7: the picture ") and name in said and reason in said, said
        assert "\n" not in said and caught.value.hint


@pytest.mark.parametrize("error", [IndexError("3"), KeyError("w"), AssertionError(), ZeroDivisionError("0")])
def test_what_a_processor_raises_is_a_bad_picture(error: Exception) -> None:
    class Own:
        image_token = "<image>"

        def __call__(self, **_: Any) -> None:
            raise error

    opened: Any = SimpleNamespace(image=None)
    with pytest.raises(BadPictureError, match="a.jsonl:7: a picture is rejected by Own: ") as caught:
        Processor(Own(), SimpleNamespace()).tokens("<image>", [opened], "a.jsonl:7")  # type: ignore[arg-type]
    assert caught.value.__cause__ is error


def processor_folder(tmp_path: Path) -> Path:
    llava().save_pretrained(tmp_path / "processor")
    return tmp_path / "processor"


def settings(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> TrainConfig:
    path = write_rows(tmp_path / "a.jsonl", rows)
    values = {
        "datasets": str(path),
        "tokenizer_name_or_path": str(processor_folder(tmp_path)),
        "max_length": 64,
        "dataset_cache_dir": None,
    }
    return config(**{**values, **changes})


@pytest.mark.usefixtures("small_limit")
def test_rows_of_bad_pictures_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png())
    rows = [{"images": [name], "messages": [ASKED, SAID]} for name in ("good.png", *bad(tmp_path))]
    data = load_training_data(settings(tmp_path, rows, on_bad_image="skip"))
    assert len(data.rows) == 1
    counts = data.store.counts
    assert counts.num_bad_pictures == 8 and counts.num_bad == 0
    assert len(counts.bad_pictures) == 5 and counts.bad_pictures[0].startswith(f"{tmp_path / 'a.jsonl'}:2: ")
    with pytest.raises(BadPictureError, match=r"a\.jsonl:2: the picture .*cut\.png cannot be used"):
        load_training_data(settings(tmp_path, rows, on_bad_row="skip"))  # another setting


def test_cached_tokens_do_not_hide_bad_pictures(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png())
    rows = [{"images": [name], "messages": [ASKED, SAID]} for name in ("1.png", "2.png")]
    cached = {"dataset_cache_dir": str(tmp_path / "cache")}
    skipping = settings(tmp_path, rows, on_bad_image="skip", **cached)
    assert [load_training_data(skipping).was_cached for _ in range(2)] == [False, True]
    with pytest.raises(BadPictureError, match=r"2\.png does not exist"):
        load_training_data(settings(tmp_path, rows, **cached))
    (tmp_path / "2.png").write_bytes(png(1))
    data = load_training_data(skipping)
    assert len(data.rows) == 2 and data.store.counts.num_bad_pictures == 0
    assert load_training_data(skipping).was_cached


def test_rows_too_long_for_their_placeholders_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png())
    long = {"role": "assistant", "content": "A cat. " * 40}
    rows = [{"images": ["1.png"], "messages": [ASKED, said]} for said in (SAID, long)]
    rows.append({"images": [], "messages": [ASKED, long]})
    for truncation, kept, too_long in (("drop", 1, 2), ("keep_start", 2, 1)):
        data = load_training_data(settings(tmp_path, rows, truncation=truncation))
        assert (len(data.rows), data.rows.left.documents, data.rows.left.too_long) == (
            kept,
            too_long,
            too_long,
        )
        assert [row.shown for row in map(data.rows.row, range(kept))] == [(0,), ()][:kept]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streaming": True, "max_steps": 1}, "streaming: true"),
        ({"truncation": "split"}, "truncation: split"),
        ({"truncation": "keep_end"}, "truncation: keep_end"),
        ({"packing_strategy": "bfd"}, "packing_strategy: bfd"),
        ({"packing_strategy": "wrapped"}, "packing_strategy: wrapped"),
    ],
)
def test_settings_that_pictures_do_not_allow(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png())
    rows = [{"images": ["1.png"], "messages": [ASKED, SAID]}]
    with pytest.raises(ConfigError, match=rf"{message}, and .*a\.jsonl:1 has pictures") as caught:
        load_training_data(settings(tmp_path, rows, **changes))
    assert caught.value.hint
    assert load_training_data(settings(tmp_path, rows)).rows.strategy == "none", "packing is off by itself"


@pytest.mark.parametrize("column", ["images", "image"])
def test_models_of_text_refuse_pictures(column: str, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png())
    llava().tokenizer.save_pretrained(tmp_path / "text")
    rows = [{column: ["1.png"], "messages": [ASKED, SAID]}]
    changes = {"tokenizer_name_or_path": str(tmp_path / "text"), "chat_template": "plain"}
    with pytest.raises(ConfigError, match=r"a\.jsonl:1 has pictures, .*it is a text-only model") as caught:
        load_training_data(settings(tmp_path, rows, **changes))
    assert f"{{{column}: null}}" in str(caught.value.hint)
    path = str(tmp_path / "a.jsonl")
    left_out = {"datasets": [{"path": path, "columns": {column: None}}], "packing": False}
    assert load_training_data(settings(tmp_path, rows, **changes, **left_out)).store.pictures is None


def test_preferences_with_pictures_are_refused(tmp_path: Path) -> None:
    row = {"prompt": [ASKED], "chosen": [SAID], "rejected": [ASKED], "images": ["1.png"]}
    path = write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(ConfigError, match=r"a\.jsonl:1 is a preference with pictures"):
        list(Documents([dataset(path)]))


def test_the_mark_in_the_words_is_refused(tmp_path: Path) -> None:
    """It would be read as a placeholder, in rows with and without pictures."""
    (tmp_path / "1.png").write_bytes(png())
    told = {"role": "assistant", "content": "I see <image>."}
    asked = {"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}
    for second in ({"messages": [ASKED, told]}, {"images": ["1.png"], "messages": [asked, told]}):
        rows = [{"images": ["1.png"], "messages": [asked, SAID]}, second]
        with pytest.raises(
            DataError, match=r"a\.jsonl:2: .*the conversation has <image> \d times? for \d picture"
        ):
            load_training_data(settings(tmp_path, rows))
