"""Small runs for the tests of checkpoints: settings, and what a run left, to compare bit by bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from horizon_lm.config import TrainConfig

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_DROPOUT = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}


def write_text(path: Path, sentences: int = 200) -> Path:
    rng = random.Random(0)
    words = ["the", "store", "holds", "every", "weight", "while", "one", "layer", "visits", "a", "device"]
    path.write_text("\n".join(" ".join(rng.choices(words, k=9)) + "." for _ in range(sentences)))
    return path


def values(text: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "init_model": LLAMA,
        "train_tokenizer_vocab_size": 300,
        "datasets": str(text),
        "dataset_cache_dir": None,
        "max_length": 16,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 8,
        "learning_rate": 5e-3,
        "warmup_steps": 2,
        "dtype": "float32",
        "device": "cpu",
        "reserve_host_gb": 0.0,
        "peak_tflops": 1.0,
        "plot_loss": False,
        "sample_max_new_tokens": 1,
        "progress": "plain",
        "save_steps": 1,
        "save_total_limit": None,
        "output_dir": str(output_dir),
        **changes,
    }


def settings(text: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.from_dict(values(text, output_dir, **changes))


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of everything that is trained: weights, residuals, moments, buffers."""
    found = {p.name: p.read_bytes() for p in sorted(checkpoint.glob("*.safetensors"))}
    assert len(found) >= 4, checkpoint
    return found


def place_of(checkpoint: Path) -> dict[str, Any]:
    """The trainer's place, without what the clock decides."""
    state = json.loads((checkpoint / "manifest.json").read_text())["state"]
    return {key: state[key] for key in ("steps_done", "loop", "loader", "losses")}


def losses_of(run: Path) -> list[tuple[int, float]]:
    from horizon_lm.report.metrics import read_steps

    return [(line["step"], line["loss"]) for line in read_steps(run / "metrics.jsonl")]
