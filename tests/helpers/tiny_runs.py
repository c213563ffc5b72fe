"""A run of a tiny model, its settings, and the models that it built."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs
from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.host_model import HostModel
from horizon_lm.training import train as run_train

LENGTH, STEPS, ROWS = 32, 50, 8  # tokens in a sequence, steps, sequences in a step
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
RUN_FILES = {"config.resolved.yaml", "metrics.jsonl", "model", "loss.png"}


def settings(text: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "init_model": LLAMA,
        "train_tokenizer_vocab_size": 300,
        "datasets": str(text),
        "max_length": LENGTH,
        "per_device_train_batch_size": ROWS // 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "dtype": "float32",
        "device": "cpu",
        "reserve_host_gb": 0.0,
        "sample_max_new_tokens": 8,
        "progress": "plain",
        "output_dir": str(output_dir),
    }
    return TrainConfig.from_dict({**values, **changes})


@dataclass
class Run:
    config: TrainConfig
    masters: dict[str, torch.Tensor]
    folder: Path
    printed: str


def remember_models(patch: pytest.MonkeyPatch) -> list[HostModel]:
    """The list receives the models that `train` builds."""
    made: list[HostModel] = []
    build = run_train.build_model

    def remember(*arguments: Any) -> HostModel:
        made.append(build(*arguments))
        return made[-1]

    patch.setattr(run_train, "build_model", remember)
    return made


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[HostModel]:
    return remember_models(monkeypatch)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.write_text(tmp_path_factory.mktemp("data") / "text.txt", sentences=600)


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run from random weights, by the command line; the tests below look at what it left."""
    folder = tmp_path_factory.mktemp("runs") / "deeper" / "run"
    config = settings(text, folder)
    file = text.parent / "run.yaml"
    file.write_text(config.to_yaml())
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        models = remember_models(patch)
        patch.setattr("sys.stdout", output)
        assert cli.main(["train", str(file)]) == 0
    return Run(config, dict(models[0].named_parameters()), folder, output.getvalue())


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
