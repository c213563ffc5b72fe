"""The Python interface: what it refuses, and what it hands out."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from horizon_lm.errors import ConfigError, DataError, NonFiniteError, UnsupportedModelError
from horizon_lm.memory.arena import keep_freed_memory


def host(name: str = "llama", dtype: str = "float32", **settings: Any) -> hz.HostModel:
    return from_pretrained(zoo.build(name), device="cpu", dtype=dtype, **settings)


def ids(rows: int = 2, tokens: int = 6) -> torch.Tensor:
    return torch.arange(rows * tokens).view(rows, tokens) % zoo.VOCAB


GOOD = {"input_ids": ids(), "labels": ids()}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"input_ids": ids()}, "no labels"),
    "unknown key": (GOOD | {"token_type_ids": ids()}, "token_type_ids"),
    "one token": ({"input_ids": ids(2, 1), "labels": ids(2, 1)}, "at least 2 tokens"),
    "one dimension": ({"input_ids": ids()[0], "labels": ids()[0]}, "batch, tokens"),
    "other shape": (GOOD | {"labels": ids(2, 5)}, "beside|input_ids of"),
    "floats": (GOOD | {"input_ids": ids().float()}, "int64"),
    "id too large": (GOOD | {"input_ids": ids() + zoo.VOCAB}, "outside the vocabulary"),
    "label too large": (GOOD | {"labels": ids() + zoo.VOCAB}, "outside the vocabulary"),
    "negative label": (GOOD | {"labels": torch.full_like(ids(), -1)}, "-1, outside"),
    "nothing to train on": (GOOD | {"labels": torch.full_like(ids(), -100)}, "every label is -100"),
    "mask hides a row": (
        GOOD | {"attention_mask": torch.tensor([[1] * 6, [0] * 6])},
        "hides every token of row 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_micro_batches_that_cannot_be_trained_on(case: str) -> None:
    batch, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        host().forward_backward([batch])
    assert caught.value.hint


def test_no_micro_batch() -> None:
    with pytest.raises(DataError, match="no micro-batch"):
        host().forward_backward([])


def test_a_step_needs_gradients() -> None:
    model = host()
    with pytest.raises(ConfigError, match="without gradients"):
        model.step(lr=1e-3)
    model.forward_backward([GOOD])
    model.step(lr=1e-3)
    with pytest.raises(ConfigError, match="without gradients"):
        model.step(lr=1e-3)


def test_position_ids_for_a_model_that_takes_none() -> None:
    with pytest.raises(UnsupportedModelError, match="position_ids"):
        host("bloom").forward_backward([GOOD | {"position_ids": ids()}])


def test_a_norm_that_is_not_finite_updates_nothing() -> None:
    model = host()
    model.store.weight("lm_head.weight")[3, 4] = torch.nan
    before = {r: [t.clone() for t in model.store._runs[r]] for r in ("weights", "exp_avg", "exp_avg_sq")}
    model.forward_backward([GOOD])
    with pytest.raises(NonFiniteError, match="nothing was updated"):
        model.step(lr=1e-3, max_grad_norm=1.0)
    for region, runs in before.items():
        for old, new in zip(runs, model.store._runs[region], strict=True):
            assert torch.equal(old.view(torch.int32), new.view(torch.int32))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "ernie4_5_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_folder_reloads_with_the_same_logits(name: str, dtype: str, tmp_path: Path) -> None:
    model = host(name, dtype)
    model.forward_backward([zoo.batch(name)])
    model.step(lr=1e-2)
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == getattr(torch, dtype)
    stored = dict(model.named_parameters())
    for key, parameter in again.named_parameters():
        expected = stored[key]
        if parameter.dtype == torch.bfloat16:
            expected = expected.bfloat16()
        assert torch.equal(parameter, expected), key
    reloaded = hz.HostModel.from_pretrained(tmp_path / "out", device="cpu", dtype=dtype)
    batch = zoo.batch(name)
    assert reloaded.forward_backward([batch]).loss == model.forward_backward([batch]).loss


def test_weights_that_no_slot_holds_are_never_read() -> None:
    """After each op the modules hold `meta` parameters again: reading one is an error, not old data."""
    model = host("gemma2", lanes="adversarial")
    model.forward_backward([zoo.batch("gemma2")])
    assert all(p.is_meta for p in model.skeleton.model.parameters())


def test_the_model_object_is_consumed() -> None:
    plain = zoo.build("llama")
    hz.HostModel.from_pretrained(plain, device="cpu", dtype="float32")
    assert all(p.is_meta for p in plain.parameters())


def test_a_model_that_recomputes_by_itself_is_not_recomputed_twice() -> None:
    """Such a model object (or an old config.json) would compute each layer three times."""
    counts = []
    for enabled in (False, True):
        source, seen = zoo.build("llama"), []
        if enabled:
            source.gradient_checkpointing_enable()
            assert source.is_gradient_checkpointing
        for layer in source.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        model = hz.HostModel.from_pretrained(source, device="cpu", dtype="float32", activations="recompute")
        seen.clear()
        model.forward_backward([GOOD, GOOD])
        counts.append(len(seen))
    layers = model.skeleton.num_layers
    assert counts == [2 * (2 * layers - 1)] * 2  # the last layer's graph is still there


def test_fp32_weights_give_fp32_masters_under_bf16() -> None:
    plain = zoo.build("llama")
    wanted = {n: p.detach().clone() for n, p in plain.named_parameters()}
    model = hz.HostModel.from_pretrained(plain, device="cpu", dtype="bfloat16")
    for name, master in model.named_parameters():
        moved = (wanted[name].view(torch.int32) & 0x1FFFF) == 0x7FFF
        assert torch.equal(master[~moved], wanted[name][~moved])
        assert torch.equal(model.store.weight(name), wanted[name].bfloat16())


@pytest.mark.parametrize("name", ["missing", "empty", "pickled"])
def test_folders_that_hold_no_model(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    if name != "missing":
        folder.mkdir()
    if name == "pickled":
        zoo.build("llama").config.save_pretrained(folder)
        torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=name) as caught:
        hz.HostModel.from_pretrained(folder, device="cpu")
    assert caught.value.exit_code == 2 and caught.value.hint


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    host().save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises((DataError, ConfigError), match="out"):
        hz.HostModel.from_pretrained(tmp_path / "out", device="cpu")


def test_unknown_settings_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="slotz") as caught:
        host(slotz=3)
    assert "slots" in str(caught.value)


def test_building_a_model_leaves_malloc_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping freed memory concerns the whole process, so it is up to the caller (`train` does it)."""
    calls: list[tuple[int, int]] = []
    load = ctypes.CDLL
    libc = SimpleNamespace(mallopt=lambda *given: calls.append(given), malloc_trim=lambda pad: 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *more: libc if name is None else load(name, *more))
    host()
    assert not calls
    if not any(name.startswith("MALLOC_") for name in os.environ):
        keep_freed_memory()
        assert calls == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD
