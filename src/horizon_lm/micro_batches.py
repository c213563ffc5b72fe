"""Micro-batches: converted to host tensors, and rejected if they would train wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn
from torch._subclasses import FakeTensor

from horizon_lm.config.data import IGNORED
from horizon_lm.errors import DataError, HorizonError
from horizon_lm.picture_batches import (
    FEATURES,
    PictureInputs,
    check_pictures,
    flattened,
    refuse_other_media,
)

MicroBatch = dict[str, torch.Tensor]
# What calls of `HostModel` take: one micro-batch, or those of a step.
MicroBatches = Mapping[str, Any] | Iterable[Mapping[str, Any]]

# What becomes of tensors of other names than the model's inputs, which only a loss function can use.
Extra = Literal["refuse", "keep", "ignore"]

_KNOWN = frozenset({"input_ids", "labels", "attention_mask", "position_ids"})
_EXAMPLE = "[{'input_ids': ids, 'labels': labels}], tensors of shape [batch, tokens]"
_FORMS = "pass a tensor, a numpy array or nested lists"
_UNSIGNED = frozenset({torch.uint8, torch.uint16, torch.uint32, torch.uint64})
_INTEGERS = _UNSIGNED | {torch.int8, torch.int16, torch.int32, torch.int64}
# Models count tokens by summing the mask; a 16-bit float sum is wrong from 257 tokens on.
_MASKS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_MASKS |= {torch.float32, torch.float64}
# Rotary embeddings are computed from fp32 positions, which are exact up to here.
_MAX_POSITION = 1 << 24


class ModelLimits(Protocol):
    """What a micro-batch is checked against; a `Skeleton`."""

    embedding: nn.Embedding

    @property
    def vocabulary(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...
    @property
    def extends_positions(self) -> bool: ...
    @property
    def packs_one_row_only(self) -> bool: ...
    @property
    def picture_inputs(self) -> PictureInputs | None: ...


# Computes the features of each image of a micro-batch from the processor's outputs.
Encode = Callable[[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]


def check_micro_batches(
    micro_batches: MicroBatches,
    model: ModelLimits,
    *,
    extra: Extra = "refuse",
    encode: Encode | None = None,
) -> list[MicroBatch]:
    """Convert the micro-batches of a step to host tensors; token ids become int64 [batch, tokens].

    micro_batches: a mapping such as a BatchEncoding, or an iterable of them (a list, a generator, a
    DataLoader). Values are tensors on any device, numpy arrays or nested lists; None means absent.
    extra: what becomes of tensors of other names, of any shape. encode: for pixels of a vision-language
    model; its pictures leave in flat form (`picture_batches`). Raises DataError.
    """
    batches = [_checked(m, batch, model, extra, encode) for m, batch in _each(micro_batches)]
    if not batches:
        raise DataError("a step was given no micro-batch", hint=f"pass at least one, as in {_EXAMPLE}")
    if not any(bool((batch["labels"][:, 1:] != IGNORED).any()) for batch in batches):
        raise DataError(
            "no token of this step is trained on: every label is -100",
            hint="check the labels and the mask; the first token of a row is never a target",
        )
    return batches


def _each(given: Any) -> Iterator[tuple[int, Any]]:
    """Yield each micro-batch with its index. Errors of the caller's iterable propagate, with a note of how
    far it got."""
    if isinstance(given, Mapping):
        yield 0, given
        return
    is_one_value = isinstance(given, (str, bytes, torch.Tensor, np.ndarray))
    if is_one_value or not isinstance(given, Iterable):
        raise DataError(f"micro_batches is {_kind(given)}, not a list of dicts", hint=f"pass {_EXAMPLE}")
    m = 0
    try:
        for m, batch in enumerate(given):
            yield m, batch
            m += 1
    except Exception as error:
        error.add_note(f"raised by micro_batches where micro-batch {m} was asked for; nothing was trained on")
        raise


def _checked(m: int, given: Any, model: ModelLimits, extra: Extra, encode: Encode | None) -> MicroBatch:
    """Convert a micro-batch to host tensors and check it."""
    pictures = model.picture_inputs
    batch = _tensors(m, given, extra, pictures)
    shape = batch["input_ids"].shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise DataError(
            f"micro-batch {m}: input_ids of shape {tuple(shape)}",
            hint="[batch, tokens] with at least 2 tokens, in at least one row"
            + ("; one row is input_ids[None]" if len(shape) == 1 else ""),
        )
    of_tokens = _KNOWN if pictures is None else _KNOWN | set(pictures.per_token)
    for name, value in batch.items():
        if value.shape != shape and name in of_tokens:
            raise DataError(
                f"micro-batch {m}: {name} of shape {tuple(value.shape)}, input_ids of {tuple(shape)}",
                hint="all have the shape [batch, tokens]",
            )
    for name in ("input_ids", "labels", "position_ids"):
        if name in batch:
            batch[name] = _whole(m, name, batch[name])
    if "attention_mask" in batch:
        batch["attention_mask"] = _mask(m, batch["attention_mask"])
    labels, ids = batch["labels"], batch["input_ids"]
    if pictures is not None:
        _add_pictures(m, given, batch, pictures, encode)
        ids = ids[ids != pictures.placeholder] if pictures.placeholder is not None else ids
    _check_range(m, "input_ids", ids, model.embedding.num_embeddings)
    _check_range(m, "labels", labels[labels != IGNORED], model.vocabulary)
    _check_positions(m, batch, model)
    return batch


def _add_pictures(
    m: int, given: Mapping[str, Any], batch: MicroBatch, inputs: PictureInputs, encode: Encode | None
) -> None:
    """Put the features of the pictures into the micro-batch, computing them from pixels if need be."""
    features, names = given.get(FEATURES), inputs.pixels[:1]
    pixels = {name: batch.pop(name) for name in inputs.pixels if name in batch}
    if pixels and features is not None:
        raise DataError(
            f"micro-batch {m} has both {FEATURES} and {', '.join(pixels)}", hint="pass one or the other"
        )
    if pixels and encode is not None and names and len(pixels[names[0]]):
        sizes = {name: batch[name] for name in inputs.per_image if name in batch}
        features = encode(pixels | sizes)
    if features is not None:
        batch.update(flattened(m, features))
    check_pictures(m, batch, inputs)


def _tensors(m: int, given: Any, extra: Extra, pictures: PictureInputs | None) -> MicroBatch:
    """Convert the present values to host tensors. Raises DataError for missing and unknown keys."""
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
    known = _KNOWN if pictures is None else _KNOWN | pictures.names
    unknown = present.keys() - known
    if unknown and pictures is not None:
        refuse_other_media(f"micro-batch {m}", list(present))
    if extra == "ignore":
        present = {name: value for name, value in present.items() if name in known}
    elif unknown and extra == "refuse":
        raise DataError(
            f"micro-batch {m} has unknown keys {sorted(map(str, unknown))}",
            hint="leave them out: input_ids, labels, attention_mask and position_ids are taken, and with "
            "train_step(..., loss_fn=...) tensors of any name for that function",
        )
    if pictures is not None:
        present.pop(FEATURES, None)  # a list per image
    return {name: _tensor(f"micro-batch {m}: {name}", value).contiguous() for name, value in present.items()}


def _tensor(where: str, value: Any) -> torch.Tensor:
    """Convert a tensor on any device, an array or a nested list to a host tensor."""
    if isinstance(value, torch.Tensor):
        return _dense(where, value)
    is_list = isinstance(value, (list, tuple))
    if not is_list and not hasattr(value, "__array__"):
        raise DataError(f"{where} is {_kind(value)}", hint=_FORMS)
    try:
        if not is_list:
            return _from_array(where, value)
        if any(hasattr(row, "__array__") for row in value):
            return torch.stack([_tensor(where, row) for row in value])
        return torch.tensor(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        if isinstance(error, HorizonError):
            raise
        lengths = sorted({len(row) for row in value if hasattr(row, "__len__")}) if is_list else []
        if len(lengths) > 1:
            raise DataError(
                f"{where} has rows of {', '.join(map(str, lengths))} tokens",
                hint="pad the rows to one length: attention_mask 0 and labels -100 where padded",
            ) from None
        values = value.tolist() if isinstance(value, np.ndarray) else value if is_list else []
        odd = _no_number(values)
        said = str(error).strip() or type(error).__name__
        reason = f"it holds {odd}" if odd else said.splitlines()[0]
        raise DataError(f"{where} is no array of numbers: {reason}", hint=_FORMS) from None


def _dense(where: str, value: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to host memory. Raises DataError unless it is dense."""
    ways = {
        "meta": value.is_meta,
        "fake": isinstance(value, FakeTensor),
        "nested": value.is_nested,
        "quantized": value.is_quantized,
        str(value.layout): value.layout is not torch.strided,
    }
    for kind, is_so in ways.items():
        if is_so:
            raise DataError(f"{where} is a {kind} tensor", hint="pass a dense tensor")
    return value.detach().cpu()


def _from_array(where: str, value: Any) -> torch.Tensor:
    """Copy an array, which may change or be read-only, to this machine's byte order."""
    if np.ma.is_masked(value):
        raise DataError(
            f"{where} is a masked array whose mask hides some of its entries",
            hint="pass value.filled(...) in its place: -100 in labels, 0 in attention_mask",
        )
    array = np.asarray(value)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))


def _no_number(values: Any, depth: int = 4) -> str | None:
    """Describe the first entry of nested lists that is not a 64-bit number."""
    for value in values:
        if isinstance(value, (list, tuple)) and depth:
            found = _no_number(value, depth - 1)
            if found:
                return found
        elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return f"{_kind(value)}, beyond int64"
        elif not isinstance(value, (int, float, complex, np.generic, np.ndarray, torch.Tensor)):
            return _kind(value)
    return None


def _whole(m: int, name: str, values: torch.Tensor) -> torch.Tensor:
    """Convert token ids or positions to int64."""
    if values.dtype not in _INTEGERS:
        raise DataError(
            f"micro-batch {m}: {name} are {values.dtype}",
            hint="pass whole numbers (torch.int64, or another integer type)",
        )
    whole = values.long()
    if values.dtype in _UNSIGNED and bool((whole < 0).any()):
        raise DataError(
            f"micro-batch {m}: {name} hold {int(whole[whole < 0][0]) + (1 << 64)}, beyond int64",
            hint="a negative number as an unsigned one? pass torch.int64",
        )
    return whole


def _mask(m: int, mask: torch.Tensor) -> torch.Tensor:
    """Convert the mask to a dtype that models compute with.

    Raises DataError for values other than 0 and 1 (an additive mask, document numbers), and for rows without
    any token.
    """
    if mask.is_complex() or not (mask.is_floating_point() or mask.dtype in _INTEGERS | _MASKS):
        raise DataError(
            f"micro-batch {m}: attention_mask is {mask.dtype}",
            hint="pass booleans or whole numbers: 1 stands for a token, 0 for padding",
        )
    plain = mask
    if mask.dtype not in _MASKS:
        plain = mask.float() if mask.is_floating_point() else mask.long()
    odd = (plain != 0) & (plain != 1)
    if bool(odd.any()):
        row, token = divmod(int(odd.flatten().long().argmax()), mask.shape[1])
        raise DataError(
            f"micro-batch {m}: attention_mask ({mask.dtype}) holds other values than 0 and 1: "
            f"{mask[row, token].item()} in row {row}, token {token}",
            hint="1 stands for a token, 0 for padding; additive masks are not taken, and documents of a row "
            "are kept apart by position_ids that begin at 0 again",
        )
    has_token = plain.bool().any(dim=1)
    if not bool(has_token.all()):
        raise DataError(
            f"micro-batch {m}: attention_mask hides every token of row {int(has_token.long().argmin())}",
            hint="1 stands for a token, 0 for padding; leave empty rows out",
        )
    return plain


def _check_range(m: int, name: str, values: torch.Tensor, end: int) -> None:
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= end):
        worst = int(values.min()) if int(values.min()) < 0 else int(values.max())
        raise DataError(
            f"micro-batch {m}: {name} hold {worst}, outside the vocabulary of {end}",
            hint="use the model's own tokenizer; -100 in labels means ignored",
        )


def _check_positions(m: int, batch: MicroBatch, model: ModelLimits) -> None:
    """Raise DataError for negative positions, for those inexact in fp32, for any beyond the model's table of
    positions, which on a GPU would abort the process, and for documents that would not be kept apart."""
    positions, tokens = batch.get("position_ids"), batch["input_ids"].shape[1]
    lowest = int(positions.min()) if positions is not None else 0
    highest = int(positions.max()) if positions is not None else tokens - 1
    if lowest < 0:
        raise DataError(f"micro-batch {m}: position_ids hold {lowest}", hint="positions count from 0")
    if highest >= _MAX_POSITION:
        raise DataError(
            f"micro-batch {m}: position_ids hold {highest}; positions are computed with in fp32, exact below "
            f"{_MAX_POSITION}",
            hint="positions count from 0 in each document",
        )
    end = model.max_positions
    if end is not None and highest >= (max(end, tokens) if model.extends_positions else end):
        raise DataError(
            f"micro-batch {m} reaches position {highest}, the model's max_position_embeddings is {end}"
            + ("" if positions is None else " (position_ids)"),
            hint=f"cut the sequences to {end} tokens",
        )
    if positions is not None and len(positions) > 1 and model.packs_one_row_only:
        if bool((positions.diff(dim=1) == 1).all()):
            return  # one document in each row
        raise DataError(
            f"micro-batch {m} packs documents into {len(positions)} rows, and flash attention keeps "
            "documents apart only in micro-batches of one row",
            hint="set per_device_train_batch_size=1, or attn_implementation=sdpa",
        )


def _kind(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 64:  # Python writes no number of thousands of digits
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (str, bytes, int, float)):
        text = repr(value)
        return text if len(text) <= 40 else text[:37] + "..."
    return f"a {type(value).__name__}"
