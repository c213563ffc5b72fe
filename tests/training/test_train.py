"""`horizon train` end to end on a tiny model: what a run leaves, what it equals, and where it may be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from horizon_lm import cli
from horizon_lm.checkpoint import folder as run_folder
from horizon_lm.config import TrainConfig
from horizon_lm.data import TokenLoader, load_training_data
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.host_model import HostModel
from horizon_lm.model.loading import create_model
from horizon_lm.optim.curves import learning_rates
from horizon_lm.report.metrics import read_steps
from horizon_lm.training import train as run_train
from tiny_runs import LENGTH, LLAMA, ROWS, RUN_FILES, STEPS, Run, entries, settings
from tiny_runs import built as built
from tiny_runs import run as run
from tiny_runs import text as text

LAST = f"checkpoint-{STEPS}"  # the end of a run whose checkpoint is small
STEP_KEYS = {
    *(
        "event",
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "mfu",
        "num_tokens",
        "num_target_tokens",
        "lanes",
    ),
    *("seconds", "skipped_steps", "host_rss_bytes", "device_bytes", "time"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def random_model() -> Any:
    """The model of the run before it was trained, by transformers."""
    values = {**LLAMA, "vocab_size": 300}
    return create_model(values, dtype=torch.float32, seed=42, attn_implementation="sdpa")


def some_ids(rows: int = 2) -> torch.Tensor:
    return torch.arange(rows * LENGTH).reshape(rows, LENGTH) % 280


# What a run leaves.


def test_a_run_leaves_exactly_its_files_and_says_where(run: Run) -> None:
    assert entries(run.folder) == RUN_FILES | {LAST}
    for name in RUN_FILES:
        assert str(run.folder / name) in run.printed
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "completion" in run.printed and f"step {STEPS}/{STEPS}" in run.printed


def test_the_exported_folder_has_the_logits_of_the_store(run: Run) -> None:
    ids = some_ids()
    exported = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype="auto").eval()
    assert exported.dtype == torch.float32
    reference = random_model().eval()
    before = reference(ids).logits
    reference.load_state_dict(run.masters, strict=True)
    with torch.no_grad():
        expected, found = reference(ids).logits, exported(ids).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, before, atol=1e-2)  # else an export of untrained weights would pass


def test_the_exported_folder_has_its_tokenizer(run: Run) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    text = "the store holds\n\tévery weight."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    config = json.loads((run.folder / "model" / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) and config["eos_token_id"] == tokenizer.eos_token_id


def rows_given(num_sequences: int) -> list[int]:
    """After each step; the last of an epoch has what is left."""
    given, found = 0, []
    for _ in range(STEPS):
        given += min(ROWS, num_sequences - given % num_sequences)
        found.append(given)
    return found


def test_metrics_are_one_uniform_line_a_step(run: Run) -> None:
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("timeline") == 1
    lines = [line for line in lines if line["event"] != "timeline"]
    assert [line["event"] for line in lines] == ["start", *["step"] * STEPS, "checkpoint", "end"]
    assert lines[0]["versions"]["torch"] == torch.__version__ and lines[0]["num_steps"] == STEPS
    assert lines[-1]["status"] == "finished"
    steps = lines[1:-2]
    assert all(line.keys() == STEP_KEYS for line in steps)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    rows = rows_given(lines[0]["num_sequences"])
    assert [line["num_tokens"] for line in steps] == [LENGTH * given for given in rows]
    targets = [(LENGTH - 1) * given for given in rows]  # nothing predicts a first token
    assert [line["num_target_tokens"] for line in steps] == targets
    assert all(0 < line["mfu"] < 1 for line in steps)
    assert all(line["lanes"]["compute"] > 0 and 0.5 < sum(line["lanes"].values()) < 1.01 for line in steps)
    assert all(line["host_rss_bytes"] > 1e8 and line["tokens_per_second"] > 0 for line in steps)
    assert [line["seconds"] for line in steps] == sorted(line["seconds"] for line in steps)
    curve = learning_rates(run.config, STEPS)
    assert [line["learning_rate"] for line in steps] == [curve(s) for s in range(STEPS)]


def test_the_resolved_settings_reload_equal(run: Run) -> None:
    assert TrainConfig.from_yaml(run.folder / "config.resolved.yaml") == run.config


def test_training_equals_a_plain_pytorch_loop(run: Run) -> None:
    """fp32, all steps within 1e-5 of the loss: clipping, warmup, betas and data order are those asked for.

    The tolerance is for another order of summation: the reference takes the step as one batch.
    """
    reference = random_model()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    rows = load_training_data(run.config, tokenizer).rows
    loader = TokenLoader(rows, micro_batch_size=ROWS, seed=42)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=5e-3, weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    expected = []
    for _ in range(STEPS):
        loss = reference(**next(loader)[0]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    found = [line["loss"] for line in read_steps(run.folder / "metrics.jsonl")]
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_loss_falls(run: Run) -> None:
    losses = [line["loss"] for line in read_steps(run.folder / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(300), abs=0.3)
    assert losses[-1] < losses[0] - 1


def test_without_a_learning_rate_nothing_is_learned(
    text: Path, tmp_path: Path, built: list[HostModel]
) -> None:
    """The control of the test above, and of the export's. 1e-30 is below what any weight can take up."""
    run_train.train(settings(text, tmp_path / "run", learning_rate=1e-30, max_steps=3, plot_loss=False))
    for name, value in random_model().state_dict().items():
        assert torch.equal(dict(built[0].named_parameters())[name], value)
    assert entries(tmp_path / "run") == RUN_FILES - {"loss.png"} | {"checkpoint-3"}


@pytest.mark.parametrize(("dtype", "save_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_number_format_of_the_export_can_be_chosen(
    dtype: str, save_dtype: str, text: Path, tmp_path: Path
) -> None:
    """A bfloat16 run can export its fp32 masters: those are what was drawn in float32 before, but for
    the one in 131,072 that the store keeps as its neighbour (`memory.master`), hence the one ulp.
    """
    config = settings(
        text, tmp_path / "run", learning_rate=1e-30, max_steps=1, dtype=dtype, save_dtype=save_dtype
    )
    result = run_train.train(config)
    wanted = getattr(torch, save_dtype)
    exported = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype="auto").state_dict()
    for name, value in random_model().state_dict().items():
        torch.testing.assert_close(exported[name], value.to(wanted), rtol=2**-23, atol=0)
        assert "norm" in name or not torch.equal(value, value.bfloat16().float())  # the control


def test_training_goes_on_from_a_folder_on_jsonl(run: Run, tmp_path: Path) -> None:
    rows = run.config.datasets[0].path
    documents = [json.dumps({"body": line}) for line in Path(rows).read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("\n".join(documents))
    config = settings(
        tmp_path / "rows.jsonl",
        tmp_path / "tuned",
        init_model=None,
        train_tokenizer_vocab_size=None,
        model_name_or_path=str(run.folder / "model"),
        datasets=[{"path": str(tmp_path / "rows.jsonl"), "text_column": "body"}],
        dtype="bfloat16",
        max_steps=-1,
        num_train_epochs=0.5,
        logging_steps=3,
    )
    result = run_train.train(config, config_notes=["a note"])
    lines = [json.loads(line) for line in result.metrics_path.read_text().splitlines()]
    assert lines[0]["notes"][0] == "a note"
    steps = [line["step"] for line in lines if line["event"] == "step"]
    sequences = lines[0]["num_sequences"]
    assert result.num_steps == math.ceil(sequences / 2 / ROWS) == steps[-1]
    assert steps == sorted({1, *range(3, result.num_steps, 3), result.num_steps})
    assert lines[1]["loss"] < math.log(300) - 1  # it began where the first run ended
    assert lines[-3]["epoch"] == pytest.approx(0.5, abs=ROWS / sequences)
    tuned = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype="auto")
    assert tuned.dtype == torch.bfloat16
    assert result.final_loss == lines[-3]["loss"] and result.num_tokens == lines[-3]["num_tokens"]


# Where a run may be written.


def test_an_earlier_run_is_kept_unless_it_may_be_replaced(
    run: Run, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    first = settings(text, folder, max_steps=2)
    run_train.train(first)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    (tmp_path / "again.yaml").write_text(first.replace(max_steps=3).to_yaml())
    again = ["train", str(tmp_path / "again.yaml")]
    assert cli.main(again) == 2
    assert "holds an earlier run" in capsys.readouterr().err

    def fail(*_: Any) -> HostModel:
        raise DoesNotFitError("too large")

    with pytest.MonkeyPatch.context() as patch:  # a run that fails before its first step changes nothing
        patch.setattr(run_train, "build_model", fail)
        assert cli.main([*again, "overwrite_output_dir=true"]) == 3
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    assert cli.main([*again, "overwrite_output_dir=true"]) == 0
    assert entries(folder) == RUN_FILES | {"checkpoint-3"}
    assert len(read_steps(folder / "metrics.jsonl")) == 3


def test_a_foreign_folder_is_refused(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "papers"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "draft.txt").write_text("mine")
    for overwrite in (False, True):  # true is not enough where something would be replaced
        with pytest.raises(ConfigError, match="no run of ours"):
            run_train.train(settings(text, folder, overwrite_output_dir=overwrite))
    assert (folder / "model" / "draft.txt").read_text() == "mine" and entries(folder) == {"model"}
    (folder / "model").rename(folder / "other")
    with run_folder.claim(str(folder), overwrite=True) as claimed:
        assert claimed.path == folder
    assert entries(folder) == {"other"}


def test_a_model_is_not_trained_into_its_own_place(run: Run, text: Path) -> None:
    config = settings(
        text,
        run.folder,
        init_model=None,
        train_tokenizer_vocab_size=None,
        model_name_or_path=str(run.folder / "model"),
        overwrite_output_dir=True,
    )
    with pytest.raises(ConfigError, match="lies in output_dir"):
        run_train.train(config)
    assert entries(run.folder) == RUN_FILES | {LAST}
