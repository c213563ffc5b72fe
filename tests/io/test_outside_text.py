"""Text, settings and templates from outside: what a terminal, a page, a file and transformers get of them."""

from __future__ import annotations

import io
import json
import logging
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from data_helpers import write_rows
from horizon_lm import cli, cli_model, train
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.data import load_training_data, template_limits, train_tokenizer
from horizon_lm.data.chat import ChatTemplate, read_template
from horizon_lm.data.formats import Chat
from horizon_lm.data.preview import print_preview
from horizon_lm.errors import ConfigError, DataError, HorizonError
from horizon_lm.model import configuration
from horizon_lm.model.loading import create_model, load_model
from horizon_lm.output import Output
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.run.card import model_card
from horizon_lm.run.generate import Generator, Sampling
from horizon_lm.run.progress import RichProgress, say
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


# What a model folder may choose.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside") / "model"
    tokenizer = train_tokenizer(["the store holds every weight"] * 50, 300)
    config = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=300)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    configuration._said.clear()
    with caplog.at_level(logging.WARNING, logger="horizon_lm"):
        yield caplog


@pytest.fixture
def changed(model: Path) -> Iterator[Any]:
    """Changes the folder's config.json for the length of a test."""
    path = model / "config.json"
    was = path.read_text()

    def change(text: str | None = None, **more: Any) -> Path:
        path.write_text(text if text is not None else json.dumps({**json.loads(was), **more}))
        return model

    yield change
    path.write_text(was)


def load(folder: Path, attention: str = "sdpa") -> Any:
    return load_model(folder, trust_remote_code=False, revision=None, attn_implementation=attention)


KERNEL = "kernels-community/flash-attn"


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize(
    ("user", "folders"),
    [
        ("eager", "sdpa"),
        ("sdpa", "eager"),
        ("sdpa", KERNEL),
        ("sdpa", "flash_attention_2"),
        ("eager", {"": KERNEL}),
    ],
)
def test_the_users_attention_wins(
    changed: Any, said: pytest.LogCaptureFixture, key: str, user: str, folders: Any
) -> None:
    folder = changed(**{key: folders, "_experts_implementation": "eager", "vision_config": {key: folders}})
    loaded = load(folder, user)
    assert loaded.config._attn_implementation == user
    assert not configuration.CHOOSES_CODE & loaded.config.to_dict().keys()
    config = TrainConfig.from_dict(
        {
            "model_name_or_path": str(folder),
            "datasets": "t.txt",
            "output_dir": "r",
            "attn_implementation": user,
        }
    )
    planned = model_config(config)
    assert planned._attn_implementation == user
    assert Outline(planned, ModelSettings(attn_implementation=user)).num_layers == 2
    found = [line for line in said.messages if "which is ignored" in line]
    assert any(
        str(KERNEL if isinstance(folders, dict) else folders) in line and user in line for line in found
    )
    assert len(found) == len(set(found))


def test_without_our_care_the_folder_chooses(changed: Any) -> None:
    """The control: transformers lets a folder override what is asked for."""
    folder = changed(_attn_implementation="sdpa")
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert loaded.config._attn_implementation == "sdpa"


def test_generate_takes_no_kernel_of_a_folder(changed: Any, said: pytest.LogCaptureFixture) -> None:
    folder = changed(_attn_implementation=KERNEL)
    generator = Generator.load(folder, device="cpu")
    assert generator._model.config._attn_implementation == "sdpa"
    generator.complete("the", Sampling(max_new_tokens=2))
    assert len(said.messages) == 1


def test_parts_of_a_model_and_init_model_choose_no_code_either(said: pytest.LogCaptureFixture) -> None:
    inner = {k: v for k, v in LLAMA.items() if k != "model_type"}
    nested = {
        "model_type": "mistral3",
        "text_config": {**inner, "model_type": "mistral", "_attn_implementation": KERNEL},
        "vision_config": {"model_type": "pixtral", "attn_implementation": KERNEL, "use_kernels": True},
    }
    config = configuration.configuration_of(nested, "eager")
    assert config.text_config._attn_implementation == config.vision_config._attn_implementation == "eager"
    assert "kernel" not in config.to_json_string()
    made = create_model(
        {**LLAMA, "vocab_size": 40, "_attn_implementation": KERNEL},
        dtype=torch.float32,
        seed=0,
        attn_implementation="eager",
    )
    assert made.config._attn_implementation == "eager"


def test_an_export_names_no_kernel(
    changed: Any, tmp_path: Path, said: pytest.LogCaptureFixture, no_samples: None
) -> None:
    folder = changed(_attn_implementation=KERNEL, attn_implementation=KERNEL, experts_implementation="evil")
    given = settings(write_text(tmp_path / "t.txt"), tmp_path / "run", max_steps=1)
    trained = given.replace(init_model=None, train_tokenizer_vocab_size=None, model_name_or_path=str(folder))
    train(trained)
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert cli.main(["eval", str(tmp_path / "run" / "model"), f"datasets={tmp_path / 't.txt'}"]) == 0
    for place in (tmp_path / "run" / "model", tmp_path / "run" / "checkpoint-1", tmp_path / "out"):
        text = (place / "config.json").read_text()
        assert "kernels-community" not in text and "implementation" not in text


# What a configuration may say.

ABSURD: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 10**30},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": "2"},
    {"num_hidden_layers": 2.0},
    {"num_hidden_layers": None},
    {"num_hidden_layers": [2]},
    {"hidden_size": 10**9},
    {"hidden_size": 10**12},
    {"hidden_size": 0},
    {"hidden_size": 17},
    {"vocab_size": 10**12},
    {"vocab_size": 10**9},
    {"vocab_size": -5},
    {"intermediate_size": 10**9},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 10**9},
    {"head_dim": -8},
    {"max_position_embeddings": 10**12},
    {"max_position_embeddings": "x"},
    {"num_labels": 10**9},
    {"layer_types": ["full_attention"] * 5},
    {"layer_types": "x"},
    {"rms_norm_eps": "x"},
    {"hidden_act": "evil"},
    {"model_type": 5},
    {"model_type": ["llama"]},
    {"model_type": "evil"},
    {"transformers_weights": "../other.safetensors"},
    {"quantization_config": {"quant_method": "evil"}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"vision_config": {"num_hidden_layers": 10**9}},
]


@pytest.mark.parametrize("change", ABSURD, ids=str)
def test_absurd_configurations_are_refused_at_once(changed: Any, change: dict[str, Any]) -> None:
    folder = changed(**change)
    started = time.process_time()
    with pytest.raises(HorizonError) as caught:
        load(folder)
    assert caught.value.exit_code in (2, 4) and time.process_time() - started < 10
    assert len(caught.value.message) < 900 and "bug" not in caught.value.message


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"model_type": "llama", "x": ' + "[" * 500 + "]" * 500 + "}", "[]", "{", "5"]
)
def test_what_is_no_configuration_is_refused(changed: Any, text: str) -> None:
    folder = changed(text)
    with pytest.raises(HorizonError) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) <= 2


def test_commands_refuse_an_absurd_configuration_in_one_line(
    changed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(num_hidden_layers=10**9)
    text = write_text(tmp_path / "t.txt")
    common = [f"datasets={text}", "device=cpu", f"output_dir={tmp_path / 'run'}", "max_steps=1"]
    for arguments in (
        ["plan", f"model_name_or_path={folder}", *common],
        ["train", f"model_name_or_path={folder}", *common],
        ["eval", str(folder), f"datasets={text}", "device=cpu"],
        ["generate", str(folder), "--prompt", "x"],
        ["train", "init_model={model_type: llama, num_hidden_layers: 1000000000}", *common],
    ):
        assert cli.main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert any("num_hidden_layers is 1,000,000,000, expected at most" in line for line in lines)
    assert not (tmp_path / "run").exists()


# Templates.

CHAT = Chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"


@pytest.mark.parametrize(
    "tail",
    [
        LOOPS,
        "{% set x %}" + LOOPS + "{% endset %}",
        "{% generation %}" + LOOPS + "{% endgeneration %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        DOUBLING,
        DOUBLING.replace("+", "~"),
        "{{ 'x' * 10 ** 10 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ 'x'|center(9999999999) }}",
        "{% for a in range(9000) %}{{ 'x' * 99999 }}{% endfor %}",
    ],
)
def test_templates_end(tail: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MOST_TURNS", 20_000)
    from horizon_lm.data import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = read_template("chatml") + tail
    with pytest.raises(ConfigError) as caught:
        ChatTemplate(tokenizer).render(CHAT, "row 1")
    assert str(model) in caught.value.message and "row 1" in caught.value.message
    assert len(caught.value.message) < 400


def test_limits_change_no_text(model: Path) -> None:
    """Loops, macros, `~`, `+`, `*`, `%` and spans of `{% generation %}` are what they are without limits."""
    from transformers.utils import chat_template_utils as theirs

    template = (
        "{% macro say(m) %}{{ m.role ~ ': ' + m.content|trim }}{% endmacro %}"
        "{% for m in messages %}{% if loop.first %}{{ '=' * 7 }}{% endif %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ say(m) }}{% endgeneration %}{% else %}{{ '%s|' % say(m) }}{% endif %}"
        "{{ loop.length - loop.revindex }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    )
    given = {
        "conversations": [CHAT.messages],
        "chat_template": template,
        "return_assistant_tokens_mask": True,
    }
    theirs._compile_jinja_template.cache_clear()
    plain = theirs.render_jinja_template(**given)
    template_limits.limit(template)
    assert theirs.render_jinja_template(**given) == plain and "say" not in plain[0][0] and plain[1][0]


def test_a_template_without_end_is_no_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MOST_TURNS", 20_000)
    (tmp_path / "t.jinja").write_text(
        read_template("chatml") + "{% if messages|length > 4 %}" + LOOPS + "{% endif %}"
    )
    rows = [{"messages": CHAT.messages * n} for n in (1, 2, 3)]
    write_rows(tmp_path / "rows.jsonl", rows)
    given = settings(
        tmp_path / "rows.jsonl",
        tmp_path / "run",
        chat_template=str(tmp_path / "t.jinja"),
        on_bad_row="skip",
        max_length=128,
    )
    with pytest.raises((ConfigError, DataError), match="turns") as caught:
        load_training_data(given)
    assert isinstance(caught.value, ConfigError) and "chat_template" in caught.value.message
