"""Text from outside: what a terminal, a file and a model card show of it."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import pytest

from horizon_lm import cli
from horizon_lm.checkpoint.card import model_card
from horizon_lm.cli import model as cli_model
from horizon_lm.config import TrainConfig
from horizon_lm.data import load_training_data
from horizon_lm.data.preview import print_preview
from horizon_lm.errors import ConfigError
from horizon_lm.io.output import Output
from horizon_lm.report.display import RichProgress, say
from horizon_lm.text import (
    code_span,
    json_text,
    markdown,
    one_line,
    printable,
    redact,
    redacted,
    shown,
    shown_with_bars,
)
from small_runs import LLAMA, settings, values, write_text

EVIL = "a\x1b[31mb\x1b]0;title\x07c\rd\x08e\x9b2Jf\u202eg\x7f"
RAW = set("\x1b\x07\r\x08\x9b\u202e\x7f")
CANARY = "c4nary" + "Z" * 20
SECRETS = [
    f"https://user:{CANARY}@host/x",
    f"hf_{CANARY}",
    f"https://host/x?a=1&access_token={CANARY}",
    f"Authorization: Bearer {CANARY}",
]


# What a terminal shows.


def test_control_characters_become_escapes() -> None:
    found = printable(EVIL + "\n\t\ud800é日")
    assert not RAW & set(found) and found.endswith("\n\t\\ud800é日")
    assert found.startswith("a\\x1b[31mb\\x1b]0;title\\x07c\\rd\\x08e\\x9b2Jf\\u202eg\\x7f")
    assert one_line("a\nb\tc") == "a\\nb\\tc" and printable("plain ü") == "plain ü"
    assert json.loads(json_text({"a": EVIL + "é"})) == {"a": EVIL + "é"} and not RAW & set(json_text(EVIL))


def test_a_stream_is_safe_and_leaves_progress_bars_alone() -> None:
    raw = io.StringIO()
    print(EVIL, SECRETS[0], file=Output(raw, "out", fit=shown))  # type: ignore[arg-type]
    assert not RAW & set(raw.getvalue()) and CANARY not in raw.getvalue()
    bars = io.StringIO()
    for text in ("\r 50%|###  | 1/2", "\x1b[A", "\n", f"\r{EVIL}"):
        Output(bars, "bars", fit=shown_with_bars).write(text)
    assert bars.getvalue().startswith("\r 50%|###  | 1/2\x1b[A\n") and "\x1b[31m" not in bars.getvalue()


def test_errors_are_printable_and_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(f"{EVIL} {SECRETS[0]}", hint=EVIL)))
    assert not RAW & set(str(error) + error.message) and CANARY not in str(error)
    assert "\\x1b[31m" in error.message and "https://***@host/x" in error.message


def test_the_command_shows_nothing_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('"\\x1b[2Jkey": 1\nrun_name: "\\u202e\\x9b"\nmax_steps: "\\e]0;x\\a"\n')
    named = tmp_path / "x\x1b[2Jy\nerror: faked"
    for arguments in (
        ["config", "validate", str(path)],
        ["verify", str(named)],
        ["resume", str(named)],
        ["generate", str(named), "--prompt", "x"],
        ["eval", str(named)],
        ["train", "datasets=x", f"model_name_or_path={named}"],
        [f"no{EVIL}verb"],
        [
            "config",
            "show",
            "datasets=x",
            "output_dir=r",
            f"run_name={EVIL}",
            f"init_model={{model_type: '{SECRETS[0]}'}}",
        ],
    ):
        cli.main(arguments)
        shown = "".join(capsys.readouterr())
        assert not RAW & set(shown), (arguments, shown)
        assert "\\x1b" in shown or "\\e" in shown or "u202e" in shown, (arguments, shown)
        assert CANARY not in shown and sum(line.startswith("error: ") for line in shown.splitlines()) <= 1


def test_displays_take_no_markup_and_no_controls(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    display = RichProgress(stream)
    display.stage(f"[red]x[/red] [link=http://y]z[/link] :smile: {EVIL}")
    display.warn(SECRETS[0])
    say(EVIL, stream)
    assert not RAW & set(stream.getvalue()) and CANARY not in stream.getvalue()
    assert "[red]x[/red] [link=http://y]z[/link] :smile:" in stream.getvalue()
    cli_model._write(EVIL + "\n")
    assert not RAW & set(capsys.readouterr().out)


def test_a_preview_shows_data_escaped(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("\n".join(f"line {n} \x1b]0;t\x07\u202e\x9b" for n in range(80)))
    data = load_training_data(settings(text, tmp_path / "run", max_length=64))
    shown = io.StringIO()
    print_preview(data, 2, shown)
    assert not RAW & set(shown.getvalue()) and "\\x1b]0;t\\x07" in shown.getvalue()


# Secrets.


@pytest.mark.parametrize(
    "secret", [*SECRETS, f"{{'authorization': 'Basic {CANARY}'}}", f"/a/https:/u:{CANARY}@h"]
)
def test_secrets_are_redacted(secret: str) -> None:
    assert CANARY not in redact(f"x {secret} y") and "***" in redact(secret)
    assert CANARY not in str(redacted({"a": [secret, {secret: (secret,)}]}))


@pytest.mark.parametrize(
    "text",
    ["name@host.de", "git@host:x", "hf_data/x", "lr=1 key=2", "https://host/x?page=2", "a token: b", "sk-1"],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text
    plain = {"a": [text]}
    assert redacted(plain) is plain


def test_no_setting_keeps_a_secret() -> None:
    """Every key, whatever type it has: the configuration has no secret, and neither has the error."""
    kept = refused = 0
    for key in TrainConfig.model_fields:
        for value in (SECRETS[0], [SECRETS[1]], {"x": SECRETS[2]}, [{"path": SECRETS[3]}]):
            try:
                made = TrainConfig.from_dict({**values(Path("t.txt"), Path("r")), key: value})
                assert CANARY not in made.to_yaml() + repr(made), key
                kept += 1
            except ConfigError as error:
                assert CANARY not in str(error) + repr(error), key
                refused += 1
    assert kept > 12 and refused > 100


def test_no_file_and_no_output_of_a_run_has_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_samples: None
) -> None:
    text = write_text(tmp_path / "t.txt")
    given = values(text, tmp_path / "run", max_steps=2, plot_loss=True, logging_steps=1)
    given |= {
        "run_name": rf"$\frac{{ {SECRETS[1]} {EVIL}",
        "project": SECRETS[2],
        "model_revision": SECRETS[3],
        "init_model": {**LLAMA, "made_by": SECRETS[0], SECRETS[1]: "x"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(given))
    assert cli.main(["train", str(path)]) == 0
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert cli.main(["resume", str(tmp_path / "run"), "max_steps=3"]) == 0
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "run" / "out")]) == 0
    shown = "".join(capsys.readouterr())
    assert CANARY not in shown
    assert not (RAW - {"\r"}) & set(shown)  # a progress bar of the export
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 20 and (tmp_path / "run" / "loss.png").is_file()
    assert not [file for file in files if CANARY.encode() in file.read_bytes()]
    assert [file for file in files if b"https://***@host/x" in file.read_bytes()]  # the control
    card = (tmp_path / "run" / "out" / "README.md").read_text()
    assert not RAW & set(card)


# Markdown.


def test_a_card_has_no_markup_of_names() -> None:
    evil = "x\n---\nlicense: evil\n# head `code` | [a](http://b) <script>alert(1)</script> ![i](j) *b* {{ 7 * 7 }}"  # noqa: E501
    config = {
        "run_name": evil,
        "model_name_or_path": evil,
        "datasets": [{"path": evil}],
        "optim": "a|b\nc",
        "output_dir": "r",
    }
    card = model_card(config, model_type=evil, step=1, num_tokens=5, versions={"x": "1"})
    plain = model_card(
        {**config, "run_name": "x", "model_name_or_path": "o/m", "datasets": [{"path": "d"}], "optim": "a"},
        model_type="llama",
        step=1,
        num_tokens=5,
        versions={"x": "1"},
    )
    assert len(card.splitlines()) == len(plain.splitlines()) - 1  # without base_model
    assert card.count("---\n") == plain.count("---\n") and "license:" not in card.split("---")[1]
    span = code_span(Path(evil).name)  # of what looks like a path
    outside = card.replace(span, "")
    assert span in card
    for mark in ("<script", "](", "\n# head", " `code`", "49"):
        assert mark not in outside.replace("\\", "\0"), mark
    assert "base_model: o/m" in plain and "| optim | a\\|b\\\\nc |" in card
    assert markdown("plain_name-2.5") == "plain_name-2.5" and markdown("# x") == "\\# x"
