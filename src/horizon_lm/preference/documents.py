"""Values per document from values per token, for padded and packed micro-batches alike.

Indices are made on the host before the step, so that the loss neither waits for the device nor adds up in an
order that varies: a gather into [documents, longest] and a sum along the second axis.
"""

from __future__ import annotations

import torch

from horizon_lm.config.data import IGNORED
from horizon_lm.micro_batches import MicroBatch

INDEX, MASK, TOKENS = "document_index", "document_mask", "document_tokens"


def with_places(batch: MicroBatch) -> MicroBatch:
    """Add to a micro-batch where its documents' targets are.

    Reads `documents` [n, 3]: row, first position, tokens. Adds document_mask [n, longest - 1]: targets of the
    completion; document_tokens [n], fp32: their number; document_index [n, longest - 1]: places in the
    flattened values per token, unless each document is one row.
    """
    rows, starts, lengths = batch["documents"].unbind(dim=1)
    labels = batch["labels"][:, 1:]
    trained = labels != IGNORED
    found = dict(batch)
    if len(rows) == len(labels) and bool((rows == torch.arange(len(rows))).all()) and not bool(starts.any()):
        mask = trained
    else:
        steps = torch.arange(int(lengths.max()) - 1)
        inside = steps[None] < lengths[:, None] - 1
        index = rows[:, None] * labels.shape[1] + starts[:, None] + steps
        # Beyond a document's end stand zeros behind all values, each for one place: nothing is read twice, so
        # that the gradient needs no sum.
        beyond = labels.numel() + torch.arange(index.numel()).view(index.shape)
        found[INDEX] = torch.where(inside, index, beyond)
        mask = torch.where(inside, trained.flatten()[found[INDEX].clamp(max=labels.numel() - 1)], False)
    found[MASK], found[TOKENS] = mask, mask.sum(dim=1).float()
    return found


def by_document(values: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Arrange values per target [rows, tokens - 1] as [documents, longest - 1], 0 beyond a document."""
    index = batch.get(INDEX)
    if index is None:
        return values
    flat = torch.cat([values.flatten(), values.new_zeros(index.numel())])
    return flat[index.flatten()].view(index.shape)


def sums(log_probs: torch.Tensor, batch: MicroBatch, ld_alpha: float | None = None) -> torch.Tensor:
    """Return the log-probability of each document's completion, fp32 [documents].

    ld_alpha: weight of the tokens beyond the length of the shorter completion of a pair (LD-DPO,
    https://huggingface.co/papers/2409.06411, Eq. 10).
    """
    mask = batch[MASK]
    found = by_document(log_probs, batch)
    if ld_alpha is not None:
        place = mask.cumsum(dim=1)
        shorter = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
        weight = torch.where(place <= shorter[:, None], 1.0, ld_alpha)
        found = found * weight
    return (found * mask).sum(dim=1)
