"""Mismatched documents, from which KTO estimates its KL term: the prompt of a sample with the completion of
another one.

As in TRL, completions are rotated by one within blocks of consecutive samples. Theirs are as large as a
micro-batch; ours do not depend on how a step is cut. Nothing is learned from these documents, so that
completions of held-out samples may be among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice

import numpy as np

from horizon_lm.data.encode import Encoded
from horizon_lm.errors import DataError

BLOCK = 256  # samples


def with_mismatched(batches: Iterable[list[Encoded]], block: int) -> Iterator[list[Encoded]]:
    """Yield each block of labelled samples, every sample followed by its mismatched document.

    The last block takes one more sample rather than leaving it alone. Raises DataError for a single sample.
    """
    samples = chain.from_iterable(batches)
    own = list(islice(samples, block))
    while own:
        following = list(islice(samples, block))
        if len(following) == 1:
            own, following = own + following, []
        if len(own) == 1 and block > 1:
            raise DataError(
                f"{own[0].place} is the only sample, but the KL term of method: kto needs "
                "another's completion",
                hint="add rows, or set loss_type: apo_zero_unpaired",
            )
        yield [part for i, sample in enumerate(own) for part in (sample, _mismatched(sample, own[i - 1]))]
        own = following


def _mismatched(sample: Encoded, other: Encoded) -> Encoded:
    assert sample.trained is not None and other.trained is not None
    prompt, completion = sample.ids[~sample.trained], other.ids[other.trained]
    trained = np.arange(len(prompt) + len(completion)) >= len(prompt)
    return replace(sample, ids=np.concatenate([prompt, completion]), trained=trained, label=None)
