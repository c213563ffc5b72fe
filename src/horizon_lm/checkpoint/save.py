"""Save the model of a store in Hugging Face format, one unit at a time, with one rank or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from horizon_lm.checkpoint import units
from horizon_lm.checkpoint.export import write_folder, write_model
from horizon_lm.checkpoint.model import Group, Tensors
from horizon_lm.distributed.outcomes import packed, unpacked
from horizon_lm.distributed.ranks import Ranks
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import RankError
from horizon_lm.memory.store import HostStore
from horizon_lm.memory.whole import Whole
from horizon_lm.model.skeleton import Skeleton


def save_model(
    skeleton: Skeleton,
    whole: Whole,
    folder: Path,
    *,
    dtype: str | None,
    max_shard_size: int | str,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write config, generation config and sharded safetensors to `folder` atomically; of a model with an
    adapter, the adapter alone in PEFT's files.

    whole: where the first rank, which writes, gathers each unit. dtype None: the store's compute dtype,
    straight from the store. float32 from a bf16 store reconstructs the masters. extra: writes further files
    (the tokenizer) into the folder. Raises DoesNotFitError and ConfigError, on all ranks.
    """
    store, ranks = whole.store, whole.ranks
    wanted = store.dtype if dtype is None else DTYPES[dtype]

    def group(names: Sequence[str]) -> Group:
        hollow = {name: _hollow(*_described(store, name, wanted)) for name in names}
        return Group(hollow, lambda: {name: _exported(whole, name, wanted) for name in names})

    adapter = skeleton.adapter
    buffers = dict(units.persistent_buffers(skeleton.model)) if adapter is None else {}
    groups = [
        group([p.name for p in unit.parameters if adapter is None or adapter.is_part(p.name)])
        for unit in store.units
    ]
    groups.append(Group({n: _hollow(b.shape, b.dtype) for n, b in buffers.items()}, lambda: buffers))

    def save(groups: Sequence[Group]) -> None:
        def write(target: Path) -> None:
            if adapter is not None:
                adapter.save(target, {name: t for group in groups for name, t in group.load().items()})
                if extra is not None:
                    extra(target)
                return
            try:
                write_model(skeleton.model, skeleton.aliases, groups, target, wanted, max_shard_size)
            finally:
                skeleton.config.dtype = store.dtype
            if extra is not None:
                extra(target)

        write_folder(folder, write)

    if ranks.world == 1:
        save(groups)
    elif ranks.is_first:
        _lead(ranks, groups, save)
    else:
        _follow(ranks, groups)


def _lead(ranks: Ranks, groups: Sequence[Group], save: Callable[[Sequence[Group]], None]) -> None:
    """Save on rank 0, telling the others each group that is loaded, and how it ended."""

    def told(number: int) -> Group:
        def load() -> Tensors:
            ranks.from_first({"load": number})
            return groups[number].load()

        return Group(groups[number].hollow, load)

    try:
        save([told(number) for number in range(len(groups))])
    except RankError:
        raise  # nobody listens any more
    except Exception as error:
        ranks.from_first({"error": packed(error)})
        raise
    ranks.from_first({"error": None})


def _follow(ranks: Ranks, groups: Sequence[Group]) -> None:
    """Load each group that rank 0 loads."""
    while "load" in (told := ranks.from_first(None)):
        groups[told["load"]].load()
    if told["error"] is not None:
        raise unpacked(told["error"], 0)


def _hollow(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _described(store: HostStore, name: str, dtype: torch.dtype) -> tuple[Sequence[int], torch.dtype]:
    _, parameter = store.locate(name)
    wide = parameter.compute_dtype != store.dtype
    return parameter.shape, torch.float32 if wide else dtype


def _exported(whole: Whole, name: str, dtype: torch.dtype) -> torch.Tensor:
    _, parameter = whole.store.locate(name)
    if parameter.compute_dtype != whole.store.dtype:
        return whole.master(name)  # one of the few weights that transformers keeps in fp32
    if dtype == whole.store.dtype:
        return whole.weight(name)
    return whole.master(name).to(dtype)
