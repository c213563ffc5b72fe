"""Models on several ranks that train a step, save and load, run in the processes of a `RankPool`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zoo
from horizon_lm.checkpoint import units
from horizon_lm.checkpoint.disk import Disk, HashedFile
from horizon_lm.checkpoint.folder import open_checkpoint
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.units import copied_buffers
from horizon_lm.checkpoint.writer import CheckpointWriter, Outcome, Snapshot
from horizon_lm.errors import HorizonError
from horizon_lm.host_model import HostModel
from horizon_lm.memory.store import HostStore
from horizon_lm.training.checkpoint_series import small_files
from horizon_lm.training.resume import load_checkpoint

Bits = dict[str, tuple[int, bytes]]  # key -> first element held, bytes


def trained(name: str, dtype: str, steps: int = 1) -> HostModel:
    torch.set_num_threads(1)
    case = zoo._find(name)
    source = zoo.build(name, torch.float32)
    model = HostModel.from_pretrained(
        source, device="cpu", dtype=dtype, skip_memory_check=True, attn_implementation=case.attn
    )
    for step in range(steps):
        batches = [zoo.batch(name, batch_size=1, length=8, seed=10 * step + m) for m in range(2)]
        model.train_step(batches, lr=1e-2, weight_decay=0.1)
    model.flush()
    return model


def snapshot_of(model: HostModel, store: HostStore) -> Snapshot:
    adapter = model.skeleton.adapter
    state: dict[str, Any] = {"steps_done": model.steps_done, "kept_in_fp32": model.kept_in_fp32}
    if adapter is not None:
        state["adapter"] = adapter.name
    config = {"dtype": model.settings.dtype, "datasets": []}
    return Snapshot(
        Manifest(model.steps_done, 1, {}, config=config, state=state, base=model.base_fingerprint()),
        store,
        copied_buffers(model.skeleton.model),
        small_files(model, lambda folder: None),
    )


def write(model: HostModel, run: Path) -> Outcome:
    run.mkdir(exist_ok=True)
    writer = CheckpointWriter(run, snapshot_of(model, model.store), Disk(), ranks=model.ranks)
    model.save_state(writer)
    assert writer.outcome is not None
    return writer.outcome


def bits(model: HostModel) -> Bits:
    """What this rank holds of all that is saved."""
    found = {}
    store = model.store
    for unit in range(len(store.units)):
        parts = units.parts(store.units[unit], store.spec, store.spec.shard)
        for (part, _), (key, view) in zip(parts, units.entries(store, unit), strict=True):
            found[key] = part.start, bytes(units.as_bytes(view))
    return found


def saved(name: str, dtype: str, place: str, shard_size: str) -> Any:
    """Train a step, write a checkpoint and the model in both dtypes."""
    model = trained(name, dtype)
    outcome = write(model, Path(place) / "run")
    model.save_pretrained(Path(place) / "model", max_shard_size=shard_size)
    model.save_pretrained(Path(place) / "masters", dtype="float32", max_shard_size=shard_size)
    return outcome, bits(model)


def loaded(name: str, dtype: str, path: str) -> Bits:
    model = trained(name, dtype, steps=0)
    load_checkpoint(open_checkpoint(Path(path)), model)
    assert model.steps_done == 1
    return bits(model)


def refused(name: str, folder: str) -> str:
    """Save to a folder that cannot be replaced, then to one where the disk fails in the middle; return what
    was raised. The ranks can be used after that."""
    model = trained(name, "bfloat16", steps=0)
    said = []

    def fail(staging: Path) -> None:
        raise OSError(28, "No space left on device")

    for target, extra in ((Path(folder), None), (Path(folder) / "new", fail)):
        try:
            model.save_pretrained(target, extra=extra)
        except HorizonError as error:
            said.append(f"{type(error).__name__}: {error.message}")
    model.save_pretrained(Path(folder) / "good")
    return "\n".join(said)


def large_model() -> LlamaForCausalLM:
    """25 M parameters, of which no unit has more than 2 M."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=13,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    return LlamaForCausalLM(config)


def grown_by_export(folder: str) -> int:
    """Bytes by which this process grows while it exports masters."""
    trained("llama", "bfloat16", steps=0).save_pretrained(Path(f"{folder} of a small model"))  # imports
    model = HostModel.from_pretrained(
        large_model(), device="cpu", moment_dtype="bfloat16", optim="sgd", skip_memory_check=True
    )
    peak, start, write = 0, anonymous_bytes(), HashedFile.write
    gather = type(model.ranks).gather

    def watched(self: HashedFile, data: memoryview) -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes())
        write(self, data)

    def gathered(*given: Any) -> Any:
        nonlocal peak
        found = gather(*given)
        peak = max(peak, anonymous_bytes())
        return found

    HashedFile.write, type(model.ranks).gather = watched, gathered  # type: ignore[method-assign]
    try:
        model.save_pretrained(Path(folder), dtype="float32", max_shard_size="40MB")
    finally:
        HashedFile.write, type(model.ranks).gather = write, gather  # type: ignore[method-assign]
    return peak - start


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
