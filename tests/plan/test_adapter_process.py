"""Host memory of a process that trains an adapter: what Linux counts against what the plan says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from horizon_lm.config import TrainConfig
from horizon_lm.machine.profile import load_profile
from horizon_lm.plan.predict import predict
from planned_models import outline_of
from sizes import SOAK

# The proportions of Llama 3.1 70B, at which nearly all parameters are in packed weights.
SIZE = {
    "hidden_size": 1536,
    "intermediate_size": 5376,
    "num_hidden_layers": 24,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}
TINY = SIZE | {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 64}
TOKENS = 8  # without AVX-512, bf16 gradients of inputs take a quarter of a second per matrix and 8 tokens
ADAPTER: dict[str, Any] = {"adapter": "lora", "lora_r": 8}

_MEASURE = """
import json, sys

def memory():
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(rows["VmRSS"].split()[0]) * 1024

import torch
torch.set_num_threads(1)
from horizon_lm.config import ModelSettings
from horizon_lm.host_model import HostModel
from horizon_lm.memory.arena import return_free_memory

def trained(source):
    model = HostModel.from_pretrained(source, device="cpu", dtype="bfloat16", **json.loads(sys.argv[3]))
    ids = torch.arange(int(sys.argv[4]))[None]
    for _ in range(2):
        model.train_step([{"input_ids": ids, "labels": ids}], lr=1e-4)
    model.flush()
    return_free_memory()  # the C library's heap keeps some of what a step gave back
    return model

with trained(sys.argv[1]) as tiny:
    pass  # a first model imports libraries and starts threads
before = memory()
model = trained(sys.argv[2])
used = memory() - before
print(json.dumps({"used": used, "parameters": model.num_parameters, "bytes": model.memory_bytes()}))
"""


def folder_of(path: Path, size: dict[str, Any]) -> str:
    """A checkpoint whose values do not matter, so that they are not drawn."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**size)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.01)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    paths = [tmp_path_factory.mktemp(name) for name in ("tiny", "large")]
    yield [folder_of(path, size) for path, size in zip(paths, (TINY, SIZE), strict=True)]
    for path in paths:
        for file in path.iterdir():
            file.unlink()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("base_dtype", "each"), [("nf4", 0.6), *([("int8", 1.1), ("bfloat16", 2.0)] if SOAK else [])]
)
def test_a_process_takes_the_planned_memory(folders: list[str], base_dtype: str, each: float) -> None:
    """Within 3 %; and a frozen parameter takes `each` bytes at most, tables of embeddings included."""
    settings = ADAPTER | {"base_dtype": base_dtype}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *folders, json.dumps(settings), str(TOKENS)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    config = TrainConfig(
        model_name_or_path=folders[1], datasets=["none.txt"], device="cpu", max_length=TOKENS, **settings
    )
    outline = outline_of(config)
    planned = predict(
        outline, config, load_profile("cpu-2core"), batch=1, tokens=TOKENS, micro_batches=1
    ).host
    for part in ("weights", "packed", "residual", "exp_avg", "exp_avg_sq", "grads", "weight_slots"):
        assert planned.get(part, 0) == found["bytes"].get(part, 0), part
    total = sum(planned.values()) - planned["process"]
    print(f"\n{base_dtype}: {found['used'] / 1e6:.0f} MB used, {total / 1e6:.0f} MB planned")
    assert found["parameters"] > 600e6
    assert found["used"] == pytest.approx(total, rel=0.03)
    trainable = sum(unit.trainable_numel for unit in outline.units)
    frozen = found["parameters"] - trainable
    size = planned.get("packed", 0) + planned["weights"] - 2 * trainable
    assert 0.9 * each * frozen < size <= 1.03 * each * frozen
