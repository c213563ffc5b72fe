"""Checks of a run before its first step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config import TrainConfig, check_max_length
from horizon_lm.config.data import IGNORED
from horizon_lm.data import TrainingData
from horizon_lm.data.collate import collate
from horizon_lm.data.rows import Row, Rows
from horizon_lm.data.sources import check_exists
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.host_model import HostModel
from horizon_lm.machine.device import resolve_device
from horizon_lm.memory import packed
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.report.loggers import check_installed

# Largest change of a log-probability. Without contamination it is zero if the same kernels run on the same
# shapes; experts see other groups of tokens, which rounds differently. A hybrid model with random weights,
# whose state is still weak, changed by 0.015; others by 0.1 and more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.01}
_LONGEST = 512  # tokens of each of the two documents

_HINT = "set packing: false, or packing_strategy: wrapped, in which documents do see each other"


def check_sources(config: TrainConfig, folder: RunFolder) -> None:
    """Check what needs neither data nor weights. Raises ConfigError and DataError."""
    resolve_device(config.device)
    keys = ["model_name_or_path", "tokenizer_name_or_path", "adapter_name_or_path"]
    if config.resume_from_checkpoint is None:  # else the checkpoint has what the reference said
        keys.append("ref_model_name_or_path")
    for key in keys:
        name = getattr(config, key)
        if name is None:
            continue
        path = Path(name).expanduser()
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
        if looks_local and not path.is_dir():
            raise ConfigError(
                f"{key}={name!r} is not a folder", hint=f"check the path; looked in {Path.cwd()}"
            )
        if path.is_dir() and path.resolve().is_relative_to(folder.model.resolve()):
            raise ConfigError(
                f"{key}={name!r} lies in output_dir={str(folder.path)!r}, whose model this run replaces",
                hint="choose another output_dir",
            )
    if config.base_dtype in packed.FORMATS:
        if not config.has_adapter:
            raise ConfigError(
                f"base_dtype={config.base_dtype} without an adapter: the packed weights could not be saved "
                "as a whole model at the end",
                hint="set adapter: lora, or leave base_dtype out",
            )
        packed.check_installed(config.base_dtype)
    check_installed(config.report_to)
    for key in ("datasets", "eval_datasets"):
        for dataset in getattr(config, key):
            with explain_missing(config, key):
                check_exists(dataset)


def check_together(config: TrainConfig, data: TrainingData, model: HostModel) -> None:
    """Check that data and model fit each other. Raises DataError and ConfigError."""
    vocabulary, highest = int(model.config.get_text_config().vocab_size), int(data.store.ids.max())
    if highest >= vocabulary:
        raise DataError(
            f"the data holds token {highest}, outside the model's vocabulary of {vocabulary}",
            hint="use the model's own tokenizer, leave vocab_size out of init_model, or name the tokens in "
            "new_tokens, for which the embeddings grow",
        )
    check_max_length(config, getattr(model.config.get_text_config(), "max_position_embeddings", None))


@contextmanager
def explain_missing(config: TrainConfig, key: str) -> Iterator[None]:
    """Add a hint to the DataError of a resumed run whose data have moved."""
    try:
        yield
    except DataError as error:
        if config.resume_from_checkpoint is not None:
            moved = f"{key}=NEW if they were moved (the content decides, not the path)"
            error.hint = f"{moved}; {error.hint}" if error.hint else moved
        raise


def check_factors(config: TrainConfig, model: HostModel) -> None:
    """Raise ConfigError if `lr_factors` leaves no parameter to train."""
    factors = [s.group.lr_factor for unit in model.engine.optimizer.segments for s in unit]
    if factors and not any(factors):
        raise ConfigError(
            f"lr_factors={config.lr_factors} makes the learning rate of every parameter 0: nothing would be "
            "trained",
            hint="give at least one parameter a factor above 0",
        )


def check_separation(model: HostModel, rows: Rows) -> None:
    """Try whether documents packed into one sequence stay apart in this model.

    Position ids keep attention within a document. A model that carries anything else from token to token (a
    state-space layer, a convolution) would silently let one document into the next; one that compresses
    groups of tokens cuts them by their position in the sequence. So two documents are run in both
    orders: what stands before a document must not change its log-probabilities.

    Raises ConfigError if documents see each other, or if the model cannot tell them apart.
    """
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
    if change > _TOLERANCE[model.store.dtype]:  # the first step reports a NaN
        raise ConfigError(
            f"documents packed into one sequence see each other in a {name} model: a log-probability of a "
            f"document changed by {change:.2g} when another stood before it",
            _HINT,
        )


def change_by_place(model: HostModel, row: Row) -> float:
    """Return the largest change of a log-probability of the second document if it comes first."""
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
    """Return a sequence of two documents, cut short, or None if none of the first hundred has two.

    The first has an odd length, so that a model that compresses tokens in groups has a group with tokens of
    both.
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
