"""Micro-batches as people give them: converted to host tensors, and refused if they would train wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..engine.loss import IGNORE_INDEX
from ..engine.step import MicroBatch
from ..errors import DataError
from ..model.skeleton import Skeleton

# What calls of `HostModel` take: one micro-batch, or the several of a step.
MicroBatches = Mapping[str, Any] | Iterable[Mapping[str, Any]]

_KNOWN = frozenset({"input_ids", "labels", "attention_mask", "position_ids"})
_EXAMPLE = "[{'input_ids': ids, 'labels': labels}], tensors of shape [batch, tokens]"


def check_micro_batches(
    micro_batches: MicroBatches, skeleton: Skeleton, *, extra: bool = False
) -> list[MicroBatch]:
    """The micro-batches of a step with host tensors; token numbers are int64 [batch, tokens].

    micro_batches: a mapping such as a BatchEncoding, or any iterable of them (a list, a generator, a
    DataLoader). Values are tensors on any device, numpy arrays or nested lists; None means not given.
    extra: tensors of any other name and shape may stand alongside the known ones. Raises DataError.
    """
    batches = [_checked(m, batch, skeleton, extra) for m, batch in enumerate(_each(micro_batches))]
    if not batches:
        raise DataError("a step was given no micro-batch", hint=f"pass at least one, as in {_EXAMPLE}")
    if not any(bool((batch["labels"][:, 1:] != IGNORE_INDEX).any()) for batch in batches):
        raise DataError(
            "no token of this step is trained on: every label is -100",
            hint="check the labels and the mask; the first token of a row is never a target",
        )
    return batches


def _each(given: Any) -> Iterator[Any]:
    """One micro-batch, or each of several."""
    if isinstance(given, Mapping):
        return iter([given])
    is_one_value = isinstance(given, (str, bytes, torch.Tensor, np.ndarray))
    if is_one_value or not isinstance(given, Iterable):
        raise DataError(f"micro_batches is {_kind(given)}, not a list of dicts", hint=f"pass {_EXAMPLE}")
    return iter(given)


def _checked(m: int, given: Any, skeleton: Skeleton, extra: bool) -> MicroBatch:
    """The micro-batch with host tensors, after looking for what would train wrongly."""
    batch = _tensors(m, given, extra)
    shape = batch["input_ids"].shape
    if len(shape) != 2 or shape[1] < 2:
        raise DataError(
            f"micro-batch {m}: input_ids of shape {tuple(shape)}",
            hint="[batch, tokens] with at least 2 tokens"
            + ("; one row is input_ids[None]" if len(shape) == 1 else ""),
        )
    for name, value in batch.items():
        if value.shape != shape and name in _KNOWN:
            raise DataError(
                f"micro-batch {m}: {name} of shape {tuple(value.shape)}, input_ids of {tuple(shape)}",
                hint="all have the shape [batch, tokens]",
            )
    for name in _KNOWN & batch.keys() - {"attention_mask"}:
        batch[name] = _whole(m, name, batch[name])
    if "attention_mask" in batch:
        _check_mask(m, batch["attention_mask"])
    labels = batch["labels"]
    _check_range(m, "input_ids", batch["input_ids"], skeleton.embedding.num_embeddings)
    _check_range(m, "labels", labels[labels != IGNORE_INDEX], skeleton.vocabulary)
    _check_positions(m, batch, skeleton)
    return batch


def _tensors(m: int, given: Any, extra: bool) -> MicroBatch:
    """The values that are given, as host tensors. Raises DataError for missing and unknown keys."""
    if not isinstance(given, Mapping):
        raise DataError(
            f"micro-batch {m} is {_kind(given)}, not a dict of input_ids and labels", hint=f"pass {_EXAMPLE}"
        )
    for name in ("input_ids", "labels"):
        if given.get(name) is None:
            what = f"{name}: it is None" if name in given else name
            ways = {
                "labels": "add labels: a copy of input_ids with -100 where nothing is to be learned, as "
                "transformers' DataCollatorForLanguageModeling(tokenizer, mlm=False) makes it",
                "input_ids": "add input_ids: token numbers [batch, tokens]",
            }
            raise DataError(
                f"micro-batch {m} has no {what}", hint=f"{ways[name]}; its keys are {sorted(map(str, given))}"
            )
    present = {name: value for name, value in given.items() if value is not None}
    unknown = present.keys() - _KNOWN
    if unknown and not extra:
        raise DataError(
            f"micro-batch {m} has unknown keys {sorted(map(str, unknown))}",
            hint="leave them out: input_ids, labels, attention_mask and position_ids are taken, and with "
            "train_step(..., loss_fn=...) tensors of any name for that function",
        )
    return {name: _tensor(m, name, value).contiguous() for name, value in present.items()}


def _tensor(m: int, name: str, value: Any) -> torch.Tensor:
    """A tensor on any device, an array or a nested list -> a tensor in host memory."""
    where = f"micro-batch {m}: {name}"
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout is not torch.strided or value.is_quantized:
            kind = "meta" if value.is_meta else f"{value.layout}"
            raise DataError(f"{where} is a {kind} tensor", hint="pass a dense tensor")
        return value.detach().cpu()
    rows = value if isinstance(value, (list, tuple)) else []
    if not isinstance(value, (list, tuple)) and not hasattr(value, "__array__"):
        raise DataError(f"{where} is {_kind(value)}", hint="pass a tensor, a numpy array or nested lists")
    try:
        if rows and all(isinstance(row, torch.Tensor) for row in rows):
            return torch.stack([row.detach().cpu() for row in rows])
        # A copy: the caller's array may change, or be read-only.
        is_array = not rows or hasattr(rows[0], "__array__")
        return torch.tensor(np.asarray(value) if is_array else value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        lengths = sorted({len(row) for row in rows if hasattr(row, "__len__")})
        if len(lengths) > 1:
            raise DataError(
                f"{where} has rows of {', '.join(map(str, lengths))} tokens",
                hint="pad the rows to one length: attention_mask 0 and labels -100 where padded",
            ) from None
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{where} is no array of numbers: {reason}", hint="pass a tensor, a numpy array or nested lists"
        ) from None


def _whole(m: int, name: str, values: torch.Tensor) -> torch.Tensor:
    """Token numbers or positions as int64."""
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise DataError(
            f"micro-batch {m}: {name} are {values.dtype}",
            hint="pass whole numbers (torch.int64, or another integer type)",
        )
    return values.long()


def _check_mask(m: int, mask: torch.Tensor) -> None:
    """Raises DataError for an additive mask, and for rows without any token."""
    is_additive = mask.is_complex() or bool((mask < 0).any())
    if is_additive or mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        raise DataError(
            f"micro-batch {m}: attention_mask ({mask.dtype}) holds other values than 0 and 1",
            hint="1 stands for a token, 0 for padding; additive masks are not taken",
        )
    has_token = mask.bool().any(dim=1)
    if not bool(has_token.all()):
        raise DataError(
            f"micro-batch {m}: attention_mask hides every token of row {int(has_token.long().argmin())}",
            hint="1 stands for a token, 0 for padding; leave empty rows out",
        )


def _check_range(m: int, name: str, values: torch.Tensor, end: int) -> None:
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= end):
        worst = int(values.min()) if int(values.min()) < 0 else int(values.max())
        raise DataError(
            f"micro-batch {m}: {name} hold {worst}, outside the vocabulary of {end}",
            hint="use the model's own tokenizer; -100 in labels means ignored",
        )


def _check_positions(m: int, batch: MicroBatch, skeleton: Skeleton) -> None:
    """Raises DataError for negative positions, and for any beyond a model's table of positions: a GPU
    answers those with an error that ends the process."""
    positions = batch.get("position_ids")
    lowest = int(positions.min()) if positions is not None else 0
    highest = int(positions.max()) if positions is not None else batch["input_ids"].shape[1] - 1
    if lowest < 0:
        raise DataError(f"micro-batch {m}: position_ids hold {lowest}", hint="positions count from 0")
    has_table = any(
        "wpe" in p.name or "position" in p.name for p in skeleton.units[0].parameters if len(p.shape) == 2
    )
    end = getattr(skeleton.config, "max_position_embeddings", None)
    if has_table and isinstance(end, int) and highest >= end:
        raise DataError(
            f"micro-batch {m} reaches position {highest}, the model's max_position_embeddings is {end}",
            hint=f"cut the sequences to {end} tokens",
        )


def _kind(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (str, bytes, int, float)):
        text = repr(value)
        return text if len(text) <= 40 else text[:37] + "..."
    return f"a {type(value).__name__}"
