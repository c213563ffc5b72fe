"""`horizon data preview`, `init`, `generate` and `chat`: what they show is what training does."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from data_helpers import write_rows
from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.config.data import IGNORED
from horizon_lm.data import load_training_data, train_tokenizer
from horizon_lm.data.preview import histogram, pieces, print_preview, remarks, summary
from horizon_lm.training.describe import about_data, left_out
from horizon_lm.training.generate import Generator, Sampling, model_folder

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"question {n}"},
            {"role": "assistant", "content": f"answer {n}" * (n % 5 + 1)},
        ]
    }
    for n in range(40)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, its tokenizer with a chat template, in a run's folder."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer((json.dumps(row) for row in ROWS), 320)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    made.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def settings(model: Path, data: Path, **changes: Any) -> TrainConfig:
    values = {"model_name_or_path": str(model / "model"), "datasets": str(data), "max_length": 64}
    return TrainConfig.from_dict({**values, **changes})


def test_the_pieces_are_the_sequence_and_its_labels(model: Path, data: Path) -> None:
    loaded = load_training_data(settings(model, data))
    for number in range(len(loaded.rows)):
        row = loaded.rows.row(number)
        found = list(pieces(row, loaded.tokenizer))
        assert "".join(text for text, _, _ in found) == loaded.tokenizer.decode(row.ids.tolist())
        learned = "".join(text for text, trained, _ in found if trained)
        assert learned == loaded.tokenizer.decode(row.ids[row.labels != IGNORED].tolist())
        assert {document for _, _, document in found} == set(range(len(row.lengths)))
    assert "answer" in learned and "question" not in learned


def test_preview_on_a_terminal_and_elsewhere(model: Path, data: Path) -> None:
    loaded = load_training_data(settings(model, data, val_size=4))
    plain = io.StringIO()
    print_preview(loaded, 2, plain)
    shown = plain.getvalue()
    assert "«answer" in shown and "question" in shown and "«question" not in shown
    assert "36 documents, format messages" in shown and "left out     nothing" in shown
    assert "differences between turns" in shown and "% full" in shown and "█" in shown
    assert shown.count("\nsequence ") == 2 and "---- next document" in shown
    assert "evaluation   " in shown

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm-256color")
        patch.delenv("NO_COLOR", raising=False)
        coloured = Terminal()
        print_preview(loaded, 1, coloured)
    assert "\x1b[32m" in coloured.getvalue() and "«" not in coloured.getvalue()


def test_the_figures_are_those_of_the_data(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_training_data(settings(model, data))
    found = summary(loaded)
    assert (
        cli.main(
            [
                "data",
                "preview",
                "--json",
                f"model_name_or_path={model / 'model'}",
                f"datasets={data}",
                "max_length=64",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out) == found
    assert found["documents"] == found["documents_read"] == 40
    assert found["sequences"] == len(loaded.rows) and not found["remarks"]
    assert found["trained_tokens"] == int(np.asarray(loaded.store.trained).sum())
    assert found["fill"] == pytest.approx(loaded.rows.num_tokens / (64 * len(loaded.rows)))
    assert found["packing"] == "bfd" and found["datasets"] == [{"documents": 40, "format": "messages"}]


def test_bad_rows_and_long_documents_are_shown(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        *ROWS[:3],
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c" * 200}]},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = [
        f"model_name_or_path={model / 'model'}",
        f"datasets={path}",
        "max_length=64",
        "on_bad_row=skip",
    ]
    assert cli.main(["data", "preview", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "dataset 1    3 documents, format messages" in shown  # what is trained on
    assert "warning      1 of 4 documents (25.0%) left out: longer than max_length=64" in shown
    assert "to keep them, or truncation=keep_start to cut them" in shown and "over 64" in shown
    assert f"1 of 5 rows (20.0%) left out: bad rows, the first: {path}:4: 'messages' is an empty" in shown
    assert cli.main(["data", "preview", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["documents"], found["documents_read"], found["documents_too_long"]) == (3, 4, 1)
    loaded = load_training_data(settings(model, path, on_bad_row="skip"))
    rows_of_labels = [loaded.rows.row(number).labels for number in range(len(loaded.rows))]
    assert found["tokens"] == sum(map(len, rows_of_labels))
    assert found["trained_tokens"] == sum(int((labels != IGNORED).sum()) for labels in rows_of_labels)


@pytest.mark.parametrize(("good", "is_warning"), [(39, False), (19, False), (18, True)])
def test_more_than_a_twentieth_left_out_is_a_warning(
    good: int, is_warning: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": [ROWS[0]["messages"][0], {"role": "assistant", "content": "b c" * 200}]}
    path = write_rows(tmp_path / "rows.jsonl", [*(ROWS * 2)[:good], long])
    loaded = load_training_data(settings(model, path))
    (remark,) = remarks(loaded.rows)
    assert remark.is_warning is is_warning and remark.hint
    assert remark.text.startswith(f"1 of {good + 1} documents ({1 / (good + 1):.1%}) left out: longer than")
    ((text, warns),) = left_out(loaded)
    assert text.startswith("data: 1 of") and warns is is_warning
    assert about_data(loaded).startswith(f"data: {good} documents (messages)")
    model_settings = [f"model_name_or_path={model / 'model'}", f"datasets={path}", "max_length=64"]
    assert cli.main(["data", "preview", *model_settings, "--samples", "0"]) == 0
    shown = capsys.readouterr().out
    assert ("\nwarning  " in shown) is is_warning and ("\nnote  " in shown) is not is_warning


def test_what_is_held_out_and_not_evaluated_on_is_said_too(model: Path, tmp_path: Path) -> None:
    long = {"messages": [ROWS[0]["messages"][0], {"role": "assistant", "content": "b c" * 200}]}
    write_rows(tmp_path / "eval.jsonl", [*ROWS[:3], long, {"messages": []}])
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    options = {"eval_datasets": str(tmp_path / "eval.jsonl"), "on_bad_row": "skip"}
    found = left_out(load_training_data(settings(model, path, **options)))
    assert [(text[:30], warns) for text, warns in found] == [
        ("evaluation: 1 of 4 documents (", True),
        ("evaluation: 1 of 5 rows (20.0%", True),
    ]
    cut = load_training_data(settings(model, tmp_path / "eval.jsonl", truncation="keep_start", **options))
    first = remarks(cut.rows)[0]
    assert first.text == "1 document longer than max_length=64 was cut" and not first.is_warning


def test_preview_of_text_and_of_a_stream(model: Path, tmp_path: Path, capsys: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"text {n} " * 9} for n in range(30)])
    arguments = [f"model_name_or_path={model / 'model'}", f"datasets={path}", "max_length=32"]
    assert cli.main(["data", "preview", *arguments]) == 0
    assert "(wrapped)" in capsys.readouterr().out
    assert cli.main(["data", "preview", *arguments, "streaming=true", "max_steps=5"]) == 0
    assert "a stream: figures for its first window" in capsys.readouterr().out


def test_preview_of_pairs_and_of_labelled_samples(model: Path, tmp_path: Path, capsys: Any) -> None:
    """A prompt once, then what is trained on of each side; figures of samples and of both sides."""

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    pairs = [
        {
            "prompt": [turn("user", f"question {n}")],
            "chosen": [turn("assistant", f"answer {n}")],
            "rejected": [turn("assistant", "b " * (60 if n == 3 else 3))],
        }
        for n in range(20)
    ]
    path = write_rows(tmp_path / "pairs.jsonl", [*pairs, {**pairs[0], "rejected": pairs[0]["chosen"]}])
    loaded = load_training_data(settings(model, path, on_bad_row="skip", dataset_cache_dir=None))
    stream = io.StringIO()
    print_preview(loaded, 2, stream)
    shown = stream.getvalue()
    assert "dataset 1    19 pairs, format preference" in shown
    assert "sequences    " in shown and "of 2 x 64 tokens (bfd)" in shown
    assert "warning      1 of 20 pairs (5.0%)" not in shown  # a note: exactly WARN_ABOVE is none
    assert "note         1 of 20 pairs (5.0%) left out: longer than max_length=64 (the longest:" in shown
    assert "1 of 21 rows (4.8%) left out: bad rows, the first: " in shown
    assert "are equal" in shown
    number = int(loaded.rows.row(0).samples[0])
    assert f"\npair, number {number}: prompt " in shown
    assert f"\nuser: question {number}<|" in shown and shown.count(f"question {number}<|") == 1
    assert f"---- chosen\n«answer {number}" in shown and "---- rejected\n«b b b " in shown
    found = summary(loaded)
    assert (found["kind"], found["documents"], found["documents_read"]) == ("pairs", 19, 20)
    sides = loaded.store.lengths.reshape(-1, 2)
    assert [found[side]["max"] for side in ("chosen", "rejected")] == sides.max(axis=0).tolist()
    assert found["length_max"] == sides.max() > found["chosen"]["max"]  # the control
    assert about_data(loaded).startswith("data: 19 pairs (preference)")
    assert f"{len(loaded.rows)} sequences of 2 x 64, " in about_data(loaded)

    labelled = [
        {"prompt": f"question {n} ", "completion": f"answer {n}", "label": n % 4 == 0} for n in range(8)
    ]
    path = write_rows(tmp_path / "labelled.jsonl", labelled)
    arguments = [f"model_name_or_path={model / 'model'}", f"datasets={path}", "max_length=64"]
    assert cli.main(["data", "preview", *arguments, "dataset_cache_dir=null", "--samples", "8"]) == 0
    shown = capsys.readouterr().out
    assert "dataset 1    8 samples, format labelled" in shown and "2 of 8 samples read are true" in shown
    assert "\nsample labelled true, number 4: prompt " in shown and "sample labelled false, number 5" in shown
    assert "question 4 \n---- completion\n«answer 4" in shown and "of 64 tokens (none)" in shown
    assert cli.main(["data", "preview", *arguments, "dataset_cache_dir=null", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["desirable"], found["documents_read"]) == ("labelled", 2, 8)
    whole = sum(len(loaded.tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in labelled)
    assert found["tokens"] == whole  # documents of the KL term do not count


@pytest.mark.parametrize(
    ("truncation", "reason"),
    [
        ("keep_start", "2 of 4 pairs (50.0%) left out: their prompt or completion fills max_length=8"),
        ("drop", "3 of 4 pairs (75.0%) left out: longer than max_length=8"),
    ],
)
def test_pairs_left_out_are_said(truncation: str, reason: str, model: Path, tmp_path: Path) -> None:
    """Letters without merges: a token each, and the end token."""
    rows = [
        {"prompt": "xxxxx", "chosen": "z", "rejected": "y"},
        {"prompt": "xxxxxxxx", "chosen": "z", "rejected": "y"},
        {"prompt": "xxxxxxxx", "chosen": "y", "rejected": "z"},
        {"prompt": "xxxx", "chosen": "zzzzzz", "rejected": "zzzzzzy"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    loaded = load_training_data(settings(model, path, max_length=8, truncation=truncation))
    texts = {remark.text: remark for remark in remarks(loaded.rows)}
    (found,) = [text for text in texts if text.startswith(reason)]
    assert texts[found].is_warning and "set max_length=16 to keep them" in texts[found].hint
    equal = [text for text in texts if "their completions are equal within max_length=8" in text]
    assert len(equal) == (truncation == "keep_start")


def test_a_histogram_counts_every_document() -> None:
    lengths = np.array([1, 5, 5, 9, 64, 65, 200])
    lines = list(histogram(lengths, 64))
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == len(lengths)
    assert lines[-1].split()[:2] == ["over", "64"] and lines[-1].endswith(" 2")
    assert not list(histogram(lengths[:4], 64))[-1].strip().startswith("over")


# ---- init -----------------------------------------------------------------------------------


def test_init_writes_a_valid_commented_file(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "deeper" / "run.yaml"
    arguments = ["init", "--model", str(model), "--dataset", str(data), "-o", str(out)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "40 rows looked at, format messages" in shown and f"horizon train {out}" in shown
    config = TrainConfig.from_yaml(out)
    assert config.model_name_or_path == str(model / "model")
    assert config.datasets[0].path == str(data) and config.datasets[0].format == "messages"
    assert config.max_length == 128  # what the model is made for
    assert config.chat_template is None  # the tokenizer has one
    for line in out.read_text().splitlines():
        assert not line or "#" in line, line
    assert cli.main(["data", "preview", str(out)]) == 0
    assert "«answer" in capsys.readouterr().out
    assert cli.main(arguments) == 2 and "exists" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0


def test_init_for_a_model_without_a_template_and_for_text(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (model / "model").iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    chats = write_rows(tmp_path / "chats.jsonl", ROWS * 4)
    assert (
        cli.main(["init", "--model", str(bare), "--dataset", str(chats), "-o", str(tmp_path / "a.yaml")]) == 0
    )
    config = TrainConfig.from_yaml(tmp_path / "a.yaml")
    assert config.chat_template == "plain" and config.val_size == 0.05
    assert config.eval_strategy == "epoch"  # it is too short a run for eval_steps: 100
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a"}])
    both = ["--dataset", str(text), "--dataset", str(chats)]
    assert cli.main(["init", "--model", str(bare), *both, "-o", str(tmp_path / "b.yaml")]) == 0
    formats = [entry.format for entry in TrainConfig.from_yaml(tmp_path / "b.yaml").datasets]
    assert formats == ["text", "messages"]


@pytest.mark.parametrize(("kind", "method"), [("pairs", "dpo"), ("labelled", "kto")])
def test_init_for_preferences(kind: str, method: str, model: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [
        {"instruction": f"question {n}", "chosen": f"answer {n}", "rejected": "b " * 30}
        if kind == "pairs"
        else {"prompt": f"question {n} ", "completion": f"answer {n}", "label": n % 2 == 0}
        for n in range(120)
    ]
    path, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run.yaml"
    arguments = ["init", "--model", str(model), "--dataset", str(path)]
    assert cli.main([*arguments, "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"method: {method}" in shown and ("120 pairs, " in shown) is (kind == "pairs")
    assert ("sequences of 2 x 128; 1 epoch is" in shown) is (kind == "pairs")
    assert "# -- preferences" in out.read_text() and "loss_on" not in out.read_text()
    config = TrainConfig.from_yaml(out)
    assert (config.method, config.beta, config.learning_rate, config.num_train_epochs) == (
        method,
        0.1,
        1e-6,
        1,
    )
    assert config.max_length == 128 and config.data_kind == kind and config.val_size == 0.05
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert 1 <= step <= 3  # about 50 steps
    for line in out.read_text().splitlines():
        assert not line or "#" in line, line
    assert cli.main(["data", "preview", str(out), "dataset_cache_dir=null"]) == 0
    assert "«answer" in capsys.readouterr().out
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a"}])
    assert cli.main([*arguments, "--dataset", str(text), "-o", str(tmp_path / "b.yaml")]) == 4
    assert "a run trains on one kind" in capsys.readouterr().err


def test_init_takes_settings(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run.yaml"
    arguments = ["init", "--model", str(model), "--dataset", str(data), "-o", str(out), "--overwrite"]
    assert cli.main([*arguments, "adapter=lora", "--lora_r=4", "base_dtype=nf4", "optimizer_threads=1"]) == 0
    text, config = out.read_text(), TrainConfig.from_yaml(out)
    assert (config.adapter, config.lora_r, config.base_dtype) == ("lora", 4, "nf4")
    assert config.learning_rate == 2e-4 and config.optimizer_threads == 1
    assert "# -- adapter" in text and "# -- others" in text
    for line in text.splitlines():
        assert not line or "#" in line, line
    assert cli.main([*arguments, "qlora"]) == 2 and "'qlora' is not key=value" in capsys.readouterr().err
    # A given learning rate stays, other programs' names are understood, a full run has no adapter keys.
    assert cli.main([*arguments, "adapter=qlora", "learning_rate=1e-3", "cutoff_len=64"]) == 0
    config = TrainConfig.from_yaml(out)
    assert (config.adapter, config.base_dtype) == ("lora", "nf4")
    assert config.learning_rate == 1e-3 and config.max_length == 64
    assert cli.main([*arguments, "tokens_per_step=512", "num_train_epochs=2"]) == 0
    assert "adapter" not in out.read_text() and "per_device_train_batch_size" not in out.read_text()
    assert TrainConfig.from_yaml(out).tokens_per_step == 512
    before = out.read_bytes()
    for wrong, words in [
        ("lora_r=8", "lora_r has no effect"),
        ("learning_rat=1", "did you mean"),
        ("datasets=x", "--dataset"),
        ("resume_from_checkpoint=latest", "horizon resume"),
    ]:
        assert cli.main([*arguments, wrong]) == 2
        assert words in capsys.readouterr().err and out.read_bytes() == before


def test_init_says_how_many_rows_may_be_left_out(model: Path, tmp_path: Path, capsys: Any) -> None:
    long = {"messages": [ROWS[0]["messages"][0], {"role": "assistant", "content": "b c " * 4000}]}
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, long, long, long])
    arguments = ["init", "--model", str(model), "--dataset", str(path), "-o", str(tmp_path / "a.yaml")]
    assert cli.main(arguments) == 0
    assert "warning: 3 of 43 rows (7.0%) may be longer than max_length=128" in capsys.readouterr().out
    write_rows(path, ROWS)
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert "may be longer" not in capsys.readouterr().out


def test_init_says_what_is_wrong(model: Path, tmp_path: Path, capsys: Any) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [{"q": "a"}])
    assert (
        cli.main(["init", "--model", str(model), "--dataset", str(bad), "-o", str(tmp_path / "a.yaml")]) == 4
    )
    assert "fits no known format" in capsys.readouterr().err and not (tmp_path / "a.yaml").exists()
    assert cli.main(["init", "--model", "/no/such", "--dataset", str(bad), "-o", "x.yaml"]) == 2
    assert "holds no model" in capsys.readouterr().err


# ---- generate and chat ----------------------------------------------------------------------


def test_generate_is_greedy_decoding_by_transformers(model: Path, capsys: Any) -> None:
    generator = Generator.load(model, device="cpu")
    tokenizer = generator.tokenizer
    expected_model = AutoModelForCausalLM.from_pretrained(model / "model").eval()
    ids = tokenizer("question").input_ids
    for _ in range(5):
        ids.append(int(expected_model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    found = generator.complete("question", Sampling(5, temperature=0))
    assert "question" + found == expected
    heard: list[str] = []
    assert generator.complete("question", Sampling(5, temperature=0), on_text=heard.append) == "".join(heard)
    asked = ["generate", str(model), "--temperature", "0", "--max-new-tokens", "5", "--prompt", "question"]
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == found + "\n"


def test_the_same_seed_gives_the_same_text(model: Path) -> None:
    generator = Generator.load(model, device="cpu")
    drawn = [generator.complete("a", Sampling(12, 1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_prompts_from_a_file(model: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    arguments = ["generate", str(model), "--max-new-tokens", "2", "--json"]
    assert cli.main([*arguments, "--prompt", f"@{tmp_path / 'prompts.txt'}", "--prompt", "three"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two", "three"]
    assert cli.main([*arguments, "--prompt", "@/no/such"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_conversation_is_kept_and_forgotten(model: Path, monkeypatch: Any, capsys: Any) -> None:
    prompts: list[str] = []

    def complete(self: Generator, prompt: str, *_: Any, on_text: Any = None, **__: Any) -> str:
        prompts.append(prompt)
        on_text("hm")
        return "hm"

    monkeypatch.setattr(Generator, "complete", complete)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n/reset\nthree\n/quit\nfour\n"))
    assert cli.main(["chat", str(model), "--system", "S"]) == 0
    end = "<|endoftext|>\n"
    assert prompts == [
        f"system: S{end}user: one{end}assistant: ",
        f"system: S{end}user: one{end}assistant: hm{end}user: two{end}assistant: ",
        f"system: S{end}user: three{end}assistant: ",
    ]
    assert capsys.readouterr().out == "hm\nhm\nhm\n"


def test_chat_really_answers(model: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert cli.main(["chat", str(model), "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "/no/such", "--prompt", "a"], 2, "holds no model"),
        (["chat", "/no/such"], 2, "holds no model"),
        (["generate", "MODEL"], 2, "--prompt"),
        (["generate", "MODEL", "--prompt", "a", "--temperature", "-1"], 2, "--temperature"),
        (["generate", "MODEL", "--prompt", "a", "--device", "cuda:99"], 2, "device="),
    ],
)
def test_wrong_use_of_a_model(
    arguments: list[str], code: int, message: str, model: Path, capsys: Any
) -> None:
    assert cli.main([str(model) if a == "MODEL" else a for a in arguments]) == code
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_a_model_without_a_template_cannot_chat(model: Path, tmp_path: Path, capsys: Any) -> None:
    for file in (model / "model").iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert cli.main(["chat", str(tmp_path)]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_the_folder_of_a_run_is_that_of_its_model(model: Path) -> None:
    assert model_folder(model) == model / "model" == model_folder(model / "model")
    assert model_folder("owner/name") == "owner/name"
