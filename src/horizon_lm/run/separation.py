"""Whether documents that are packed into one sequence stay apart in this model: tried, not assumed.

Attention is kept within a document by position ids. A model that carries anything else from token to token (a
state-space layer, a convolution) would let one document into the next, without a word. So, before the first
step, one packed sequence is run twice with other tokens in its first document: nothing may change after it.
"""

from __future__ import annotations

import inspect

import torch

from ..data.batches import MicroBatch, collate
from ..data.packing import Row, Rows
from ..errors import ConfigError
from .host_model import HostModel

# Of a log-probability. Without contamination the change is zero where the same kernels run on the same
# shapes; experts see other groups of tokens, which rounds otherwise. A hybrid model with random weights,
# whose state is still weak, was seen to change by 0.015; others by 0.1 and more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.01}
_LONGEST = 512  # of the first document and of the second, in tokens: enough to see

_HINT = "packing: false, or packing_strategy: wrapped, in which documents do see each other"


def check_separation(model: HostModel, rows: Rows) -> None:
    """Raises ConfigError where packed documents would see each other, or cannot be told apart at all."""
    if rows.strategy != "bfd":
        return
    name = model.config.model_type
    if "position_ids" not in inspect.signature(model.skeleton.model.forward).parameters:
        raise ConfigError(
            f"a {name} model takes no position_ids, by which packing keeps documents apart", _HINT
        )
    pair = _two_documents(rows)
    if pair is None:
        return
    change = change_after_first(model, pair, vocabulary=model.skeleton.embedding.num_embeddings)
    if change > _TOLERANCE[model.store.dtype]:  # NaN is for the first step to report
        raise ConfigError(
            f"documents packed into one sequence see each other in a {name} model: other tokens in the first "
            f"changed a log-probability in the second by {change:.2g}",
            _HINT,
        )


def change_after_first(model: HostModel, row: Row, *, vocabulary: int) -> float:
    """Largest change of a log-probability in the second document of `row` when the first has other tokens."""
    first = int(row.lengths[0])
    other = row.ids.copy()
    other[:first] = (other[:first] + 1 + vocabulary // 2) % vocabulary
    batches: list[MicroBatch] = []
    for ids in (row.ids, other):
        labels = ids.copy()
        labels[: first + 1] = -100  # of the second document alone, whose first token nothing predicts
        batches.append(collate([Row(ids, labels, row.lengths)], "bfd", 0)[0])
    found = model.evaluate(batches, return_log_probs=True).log_probs
    assert found is not None
    return float((found[0] - found[1]).abs().max())


def _two_documents(rows: Rows) -> Row | None:
    """A sequence of two documents, cut short, or None where none of the first hundred has two."""
    for number in range(min(len(rows), 100)):
        row = rows.row(number)
        if len(row.lengths) < 2 or row.lengths[1] < 2:
            continue
        first, second = (min(int(length), _LONGEST) for length in row.lengths[:2])
        begin = int(row.lengths[0])
        ids = row.ids[begin - first : begin + second]
        return Row(ids, ids.copy(), row.lengths[:2].clip(max=_LONGEST))
    return None
