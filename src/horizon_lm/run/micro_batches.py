"""Micro-batches as people give them: what would train wrongly, or fail late, is refused first."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..engine.loss import IGNORE_INDEX
from ..engine.step import MicroBatch
from ..errors import DataError
from ..model.skeleton import Skeleton

_KNOWN = frozenset({"input_ids", "labels", "attention_mask", "position_ids"})


def check_micro_batches(
    micro_batches: Sequence[MicroBatch], skeleton: Skeleton, *, extra: bool = False
) -> list[MicroBatch]:
    """The micro-batches of a step with host tensors, int64 [batch, tokens].

    extra: tensors of any other name and shape may stand beside the known ones. Raises DataError.
    """
    batches = [_checked(m, batch, skeleton, extra) for m, batch in enumerate(micro_batches)]
    if not batches:
        raise DataError("a step was given no micro-batch", hint="pass a list of at least one")
    if not any(bool((batch["labels"][:, 1:] != IGNORE_INDEX).any()) for batch in batches):
        raise DataError(
            "no token of this step is trained on: every label is -100",
            hint="check the labels and the mask; the first token of a row is never a target",
        )
    return batches


def _checked(m: int, batch: MicroBatch, skeleton: Skeleton, extra: bool) -> MicroBatch:
    """The micro-batch with host tensors, after looking for what would train wrongly. extra: tensors
    of any name and shape may stand beside the known ones."""
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise DataError(f"micro-batch {m} has no {name}", hint=f"its keys are {sorted(batch)}")
    unknown = batch.keys() - _KNOWN
    if unknown and not extra:
        raise DataError(
            f"micro-batch {m} has unknown keys {sorted(unknown)}",
            hint="input_ids, labels, attention_mask and position_ids are taken",
        )
    shape = batch["input_ids"].shape
    if len(shape) != 2 or shape[1] < 2:
        raise DataError(
            f"micro-batch {m}: input_ids of shape {tuple(shape)}",
            hint="[batch, tokens] with at least 2 tokens",
        )
    for name, value in batch.items():
        if value is not None and value.shape != shape and name in _KNOWN:
            raise DataError(
                f"micro-batch {m}: {name} of shape {tuple(value.shape)}, input_ids of {tuple(shape)}",
                hint="all have the shape [batch, tokens]",
            )
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask.any(dim=1).all()):
        row = int(mask.any(dim=1).long().argmin())
        raise DataError(
            f"micro-batch {m}: attention_mask hides every token of row {row}",
            hint="1 stands for a token, 0 for padding; leave empty rows out",
        )
    _check_range(m, "input_ids", batch["input_ids"], skeleton.embedding.num_embeddings)
    labels = batch["labels"]
    _check_range(m, "labels", labels[labels != IGNORE_INDEX], skeleton.vocabulary)
    return {name: value.cpu() for name, value in batch.items() if value is not None}


def _check_range(m: int, name: str, values: torch.Tensor, end: int) -> None:
    if values.dtype != torch.int64:
        raise DataError(f"micro-batch {m}: {name} are {values.dtype}", hint="token numbers are torch.int64")
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= end):
        worst = int(values.min()) if int(values.min()) < 0 else int(values.max())
        raise DataError(
            f"micro-batch {m}: {name} hold {worst}, outside the vocabulary of {end}",
            hint="use the model's own tokenizer; -100 in labels means ignored",
        )
