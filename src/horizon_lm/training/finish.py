"""The end of a run: the exported model, the loss curve, a sample, the result in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from horizon_lm.checkpoint.card import WHOLE, adapter_part, model_card
from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.data import TrainingData
from horizon_lm.data.chat import without_marks
from horizon_lm.errors import HorizonError
from horizon_lm.io import files
from horizon_lm.report.display import Progress, say
from horizon_lm.report.metrics import versions
from horizon_lm.report.plot import plot_loss
from horizon_lm.training import describe, sample
from horizon_lm.training.describe import TrainResult
from horizon_lm.training.loop import RunEnd
from horizon_lm.training.ready import Ready
from horizon_lm.training.upload import Upload


def save_tokenizer(data: TrainingData, target: Path) -> None:
    """Save the tokenizer, or the processor with it, with the chat template that was trained on if one was
    given."""
    tokenizer, given = data.tokenizer, data.encoder.chat_template_to_save
    if data.processor is not None:
        data.processor.save(target, None if given is None else without_marks(given))
        return
    own = tokenizer.chat_template
    if given is not None:
        tokenizer.chat_template = without_marks(given)
    try:
        tokenizer.save_pretrained(target)
    finally:
        tokenizer.chat_template = own


def export(ready: Ready, end: RunEnd) -> str:
    """Write the model with tokenizer and card, and the loss curve; return a sample completion in words.

    All ranks write the model; rank 0 does the rest.
    """
    config, folder, model = ready.config, ready.asked.folder, ready.model
    model.save_pretrained(
        folder.model,
        dtype=config.save_dtype,
        max_shard_size=config.max_shard_size,
        extra=partial(_save_beside, ready, end),
    )
    if not ready.asked.together.is_first:
        return ""
    if config.plot_loss:
        with _only_warn("loss.png is not drawn", ready.asked.progress):
            title = describe.title(config, model, end.last, folder.metrics)
            plot_loss(folder.metrics, folder.picture, title=title)
    return _sample(ready)


def _save_beside(ready: Ready, end: RunEnd, target: Path) -> None:
    """Write what a model folder has besides the model: the tokenizer and a card."""
    save_tokenizer(ready.data, target)
    adapter = ready.model.skeleton.adapter
    card = model_card(
        ready.config.to_dict(),
        model_type=str(ready.model.config.model_type),
        step=end.exported_step,
        num_tokens=end.exported_tokens,
        versions=versions(),
        part=WHOLE if adapter is None else adapter_part(adapter.words),
    )
    files.write_file(target / "README.md", card)


def _sample(ready: Ready) -> str:
    """Return what the exported model makes of a prompt, in words; empty if that fails."""
    with _only_warn("no sample completion", ready.asked.progress):
        folder = ready.asked.folder.model
        return f"\n{sample.sample_of_run(ready.config, folder, ready.data, ready.model.device)}\n"
    return ""


def conclude(ready: Ready, end: RunEnd, completion: str, hub: Upload | None) -> TrainResult:
    """Say on rank 0 how the run ended, upload the model, and return the result on all ranks."""
    folder = ready.asked.folder

    def on_first() -> dict[str, Any]:
        result = _result(folder, end)
        say(f"{completion}\n{describe.summary(ready.config, folder, result, end.remarks)}")
        if hub is not None:
            say(f"  uploaded    {hub.upload(folder.model)}")
        return {key: value for key, value in asdict(result).items() if not isinstance(value, Path)}

    values: Mapping[str, Any] = ready.asked.together.first("result", on_first)
    return TrainResult(**values, output_dir=folder.path, model_dir=folder.model, metrics_path=folder.metrics)


def _result(folder: RunFolder, end: RunEnd) -> TrainResult:
    last, tail = end.last, describe.tail_loss(folder.metrics)
    return TrainResult(
        final_loss=last.loss,
        eval_loss=describe.eval_loss(folder.metrics, end.exported_step),
        tail_loss=last.loss
        if math.isnan(tail)
        else tail,  # a resumed run with no step left recorded none here
        num_steps=last.step,
        num_tokens=last.num_tokens,
        seconds=last.seconds,
        output_dir=folder.path,
        model_dir=folder.model,
        metrics_path=folder.metrics,
        exported_step=end.exported_step,
        stopped_by=end.stopped_by,
    )


@contextmanager
def _only_warn(what: str, progress: Progress) -> Iterator[None]:
    """Turn any exception into a warning: for extras once the model is trained and saved."""
    try:
        yield
    except Exception as error:
        message = error.message if isinstance(error, HorizonError) else f"{type(error).__name__}: {error}"
        progress.warn(f"{what}: {message}")
