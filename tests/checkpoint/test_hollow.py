"""A model built from a checkpoint's own files, without its source: the same units, bits and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.folder import Checkpoint, open_checkpoint
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.model import model_of
from horizon_lm.checkpoint.units import copied_buffers
from horizon_lm.checkpoint.writer import CheckpointWriter, Snapshot
from horizon_lm.config import TrainConfig
from horizon_lm.host_model import HostModel
from horizon_lm.training.build import model_without_source
from horizon_lm.training.checkpoint_series import small_files
from horizon_lm.training.resume import load_checkpoint

# tied, scaled embeddings, experts, parameters kept in fp32, buffers that belong to layers
MODELS = ["llama", "gpt2", "gemma3_text", "mixtral", "gpt_oss", "deepseek_v3", "phimoe", "mamba2"]

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(model: HostModel, run: Path) -> Checkpoint:
    run.mkdir()
    state = {"steps_done": model.steps_done, "kept_in_fp32": model.kept_in_fp32}
    writer = CheckpointWriter(
        run,
        Snapshot(
            Manifest(model.steps_done, 1, {}, config={"dtype": model.settings.dtype}, state=state),
            model.store,
            copied_buffers(model.skeleton.model),
            small_files(model, lambda folder: None),
        ),
        Disk(),
    )
    model.save_state(writer)
    assert writer.outcome is not None and writer.outcome.path is not None, writer.outcome
    return open_checkpoint(writer.outcome.path)


def step(model: HostModel, name: str, seed: int) -> None:
    torch.manual_seed(seed)  # phimoe draws noise from the process-wide generator
    model.train_step([zoo.batch(name, seed=seed)], lr=1e-2, weight_decay=0.1)


def bits(model: HostModel) -> dict[str, Any]:
    """Masters, gradients' norm aside, and every buffer, also those that no file holds."""
    found = {name: value.numpy().tobytes() for name, value in model.named_parameters()}
    for name, buffer in model.skeleton.model.named_buffers(remove_duplicate=False):
        found[f"buffer {name}"] = (buffer.dtype, buffer.flatten().view(torch.uint8).numpy().tobytes())
    return found


def check(name: str, place: Path, dtype: str = "bfloat16") -> None:
    attention = zoo._find(name).attn
    settings = {"device": "cpu", "dtype": dtype, "skip_memory_check": True, "attn_implementation": attention}
    source = zoo.build(name, getattr(torch, dtype))
    original = HostModel.from_pretrained(source, **settings)
    step(original, name, 1)
    checkpoint = saved(original, place / "run")
    config = TrainConfig.from_dict({"model_name_or_path": "gone", "datasets": "none", **settings})
    model = model_without_source(checkpoint, config)
    assert bits(model) != bits(original)  # the control: so far it is empty
    load_checkpoint(checkpoint, model)
    assert model.kept_in_fp32 == original.kept_in_fp32
    assert bits(model) == bits(original)
    weights = model_of(checkpoint, trust_remote_code=False, attn_implementation=attention)
    for key, value in weights.named_parameters(remove_duplicate=False):
        names = [key] if key in original.store.names() else original.skeleton.aliases
        if key in names:
            master = dict(original.named_parameters())[key]
            assert torch.equal(value, master.to(value.dtype)), key
    for one in (original, model):
        step(one, name, 2)
    assert bits(model) == bits(original)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_its_checkpoint_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


def test_in_fp32_too(tmp_path: Path) -> None:
    check("llama", tmp_path, "float32")
