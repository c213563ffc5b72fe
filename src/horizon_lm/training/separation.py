"""Whether documents that are packed into one sequence stay apart in this model: tried, not assumed.

Attention is kept within a document by position ids. A model that carries anything else from token to token (a
state-space layer, a convolution) would let one document into the next, without a word; one that compresses
groups of tokens cuts them by their place in the sequence. So, before the first step, two documents are run in
both orders: what stands before a document may not change its log-probabilities.
"""

from __future__ import annotations

import inspect

import numpy as np
import torch

from horizon_lm.config.data import IGNORED
from horizon_lm.data.loader import collate
from horizon_lm.data.packing import Row, Rows
from horizon_lm.engine.step import MicroBatch
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel

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
    change = change_by_place(model, pair)
    if change > _TOLERANCE[model.store.dtype]:  # NaN is for the first step to report
        raise ConfigError(
            f"documents packed into one sequence see each other in a {name} model: a log-probability of a "
            f"document changed by {change:.2g} when another stood before it",
            _HINT,
        )


def change_by_place(model: HostModel, row: Row) -> float:
    """Largest change of a log-probability of the second document of `row` when it stands before the first."""
    first, second = (int(length) for length in row.lengths)
    batches: list[MicroBatch] = []
    for begin, lengths in ((first, row.lengths), (0, row.lengths[::-1])):
        ids = row.ids if begin else np.roll(row.ids, second)
        labels = np.full_like(ids, IGNORED)
        labels[begin + 1 : begin + second] = ids[begin + 1 : begin + second]  # nothing predicts a first token
        batches.append(collate([Row(ids, labels, lengths)], "bfd", 0)[0])
    found = model.evaluate(batches, return_log_probs=True).log_probs
    assert found is not None
    behind, before = found[0][0, first : first + second - 1], found[1][0, : second - 1]
    return float((behind - before).abs().max())


def _two_documents(rows: Rows) -> Row | None:
    """A sequence of two documents, cut short, or None where none of the first hundred has two.

    The first has an odd length, so that a model that compresses tokens in groups of 2 or more has a group
    with tokens of both.
    """
    for number in range(min(len(rows), 100)):
        row = rows.row(number)
        if len(row.lengths) < 2 or row.lengths[1] < 2:
            continue
        first, second = (min(int(length), _LONGEST) for length in row.lengths[:2])
        first -= first % 2 == 0
        begin = int(row.lengths[0])
        ids = row.ids[begin - first : begin + second]
        return Row(ids, ids.copy(), np.array([first, second], row.lengths.dtype))
    return None
