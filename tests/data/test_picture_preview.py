"""What the preview says of pictures, the sheet of thumbnails, and what `horizon init` writes for them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import PIL.Image
import pytest

from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.data import load_training_data
from horizon_lm.data.preview import print_preview, summary
from horizon_lm.data.thumbnails import sheet
from horizon_lm.training.run_settings import absolute, located
from picture_runs import settings
from tiny_processors import PROCESSORS, pictures


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_placeholders_are_collapsed_and_pictures_counted(name: str, tmp_path: Path) -> None:
    config = settings(tmp_path, name)
    (tmp_path / "3.png").write_bytes(b"broken")
    data = load_training_data(config.replace(on_bad_image="skip"))
    found = summary(data)["pictures"]
    # Picture 3 is in one row, the fourth.
    kept = [row.shown for row in map(data.rows.row, range(len(data.rows)))]
    assert found["shown"] == sum(map(len, kept)) and found["distinct"] == len(
        {k for row in kept for k in row}
    )
    assert found["documents"] == sum(map(bool, kept)) and found["skipped"] == 8 - len(kept) == 1
    assert found["tokens"] == 16 * found["shown"] and found["tokens_each"] == {
        "min": 16,
        "median": 16,
        "max": 16,
    }
    assert (found["width"]["min"], found["width"]["max"]) == (24, 64)
    stream = io.StringIO()
    print_preview(data, 4, stream)
    printed = stream.getvalue()
    assert "<image × 16>" in printed and "What is in the picture?" in printed
    assert "<image><image>" not in printed and "soft_token" not in printed
    assert f"pictures     {found['shown']} pictures in {found['documents']} documents" in printed
    assert "24 x 32 to 64 x 64 pixels; 16 tokens each" in printed
    assert "bad pictures, the first: " in printed and "a.jsonl:4: the picture" in printed


def test_a_text_stays_as_it_is(tmp_path: Path) -> None:
    """The negative control: without pictures nothing is said of them."""
    config = settings(tmp_path)
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]}
    (tmp_path / "text.jsonl").write_text(json.dumps(row) + "\n")
    changes = {"datasets": str(tmp_path / "text.jsonl"), "eval_datasets": [], "chat_template": "plain"}
    data = load_training_data(config.replace(**changes))
    stream = io.StringIO()
    print_preview(data, 1, stream)
    assert "pictures" not in summary(data) and "picture" not in stream.getvalue()


def test_a_sheet_shows_the_pictures(tmp_path: Path) -> None:
    data = load_training_data(settings(tmp_path))
    image = PIL.Image.open(io.BytesIO(sheet(data.rows, data.tokenizer)))
    assert image.format == "PNG" and image.size == (6 * 184, 2 * 236)
    shown = pictures(8)[0].resize((160, 128), PIL.Image.Resampling.NEAREST)  # in whole steps
    assert image.crop((12, 28, 172, 156)).tobytes() == shown.tobytes()


def test_the_command_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    out = tmp_path / "new" / "sheet.png"
    assert cli.main(["data", "preview", str(file), "--samples", "1", "--images", str(out)]) == 0
    assert PIL.Image.open(out).format == "PNG" and "pictures     " in capsys.readouterr().out
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]}
    (tmp_path / "text.jsonl").write_text(json.dumps(row) + "\n")
    changes = [f"datasets={tmp_path / 'text.jsonl'}", "eval_datasets=null", "chat_template=plain"]
    assert cli.main(["data", "preview", str(file), *changes, "--images", str(out)]) == 2
    assert "the data has no pictures" in capsys.readouterr().err


def test_init_knows_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path)
    model = tmp_path / "processor"
    (model / "config.json").write_text(json.dumps({"model_type": "llava"}))
    out, data = tmp_path / "run.yaml", str(tmp_path / "a.jsonl")
    assert cli.main(["init", "--model", str(model), "--dataset", data, "-o", str(out)]) == 0
    assert "pictures: 9 in them" in capsys.readouterr().out
    written = TrainConfig.from_yaml(out)
    assert (
        written.chat_template is None
        and "packing" not in out.read_text()
        and "on_bad_image" in out.read_text()
    )
    assert written.max_length >= 128, "room for 32 tokens of two pictures, and the words"
    text = tmp_path / "text"
    PROCESSORS["llava"]().tokenizer.save_pretrained(text)
    (text / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert cli.main(["init", "--model", str(text), "--dataset", data, "-o", str(tmp_path / "b.yaml")]) == 2
    assert "a.jsonl:1 has pictures, and" in capsys.readouterr().err
    assert config.on_bad_image == "raise"


def test_image_dir_is_kept_as_an_absolute_path_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "x").mkdir()
    entries = [{"path": "a.jsonl", "image_dir": "seen"}]
    config = settings(tmp_path / "x", datasets=entries, output_dir="run")
    (entry,) = absolute(config).datasets
    assert entry.image_dir == str(tmp_path / "seen")
    (tmp_path / "seen").mkdir()
    (tmp_path / "moved").mkdir()
    (tmp_path / "seen").rename(tmp_path / "moved/seen")
    (tmp_path / "a.jsonl").rename(tmp_path / "moved/a.jsonl")
    (tmp_path / "moved/run").mkdir()
    found = located(absolute(config).to_dict(), tmp_path / "moved/run")
    assert found["datasets"][0]["image_dir"] == str(tmp_path / "moved/seen")
