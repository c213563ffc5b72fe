"""`train`: from settings to a trained model in Hugging Face format, in one visible sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import ModelSettings, TrainConfig
from ..data import TokenLoader, TrainingData, load_training_data
from ..data.sources import PYTHON_STDLIB, list_files
from ..errors import ConfigError, DataError, DoesNotFitError
from ..optim.curves import learning_rates
from . import sample
from .folder import RunFolder, check_disk, claim
from .host_model import HostModel, resolve_device
from .loop import count_steps, train_steps
from .metrics import Meter, Metrics, MetricsFile, versions
from .plot import plot_loss
from .progress import Progress, choose_progress, clock, gigabytes, number, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainResult:
    """final_loss: of the last line of metrics_path. seconds: in steps, without loading and export.

    model_dir holds the trained model and its tokenizer in Hugging Face format.
    """

    final_loss: float
    num_steps: int
    num_tokens: int
    seconds: float
    output_dir: Path
    model_dir: Path
    metrics_path: Path


def train(config: TrainConfig, *, config_notes: Sequence[str] = ()) -> TrainResult:
    """Train as `config` says and leave the run in its output_dir.

    config_notes: remarks on how the settings were read, kept with the metrics. Raises ConfigError,
    UnsupportedModelError, DataError, DoesNotFitError and NonFiniteError; until the first step is
    done nothing is written, and an earlier run in output_dir is not touched.
    """
    progress = choose_progress(config.progress)
    with (
        claim(config.output_dir, overwrite=config.overwrite_output_dir) as folder,
        _quiet_transformers(),
        _memory_faults(),
    ):
        check_sources(config, folder)
        progress.stage("reading the data")
        data = load_training_data(config)
        progress.stage(describe_data(data))
        model = build_model(config, data.tokenizer)
        progress.stage(describe_model(model))
        check_together(config, data, model)
        check_disk(folder, model.num_parameters * _export_dtype(config).itemsize)

        last = _run_steps(config, config_notes, folder, data, model, progress)

        progress.stage(f"writing {folder.model}")
        model.save_pretrained(
            folder.model,
            dtype=config.save_dtype,
            max_shard_size=config.max_shard_size,
            extra=data.tokenizer.save_pretrained,
        )
        if config.plot_loss:
            plot_loss(folder.metrics, folder.picture, title=_title(config, model, last))
        completion = _sample(config, folder, data, model)
    result = TrainResult(
        final_loss=last.loss,
        num_steps=last.step,
        num_tokens=last.num_tokens,
        seconds=last.seconds,
        output_dir=folder.path,
        model_dir=folder.model,
        metrics_path=folder.metrics,
    )
    say(f"\n{completion}\n\n{_summary(config, folder, result)}")
    return result


def _run_steps(
    config: TrainConfig,
    config_notes: Sequence[str],
    folder: RunFolder,
    data: TrainingData,
    model: HostModel,
    progress: Progress,
) -> Metrics:
    """Train, show and record; returns the last metrics."""
    loader = TokenLoader(
        data.blocks,
        micro_batch_size=config.per_device_train_batch_size,
        micro_batches_per_step=config.gradient_accumulation_steps,
        seed=config.seed if config.data_seed is None else config.data_seed,
    )
    num_steps = count_steps(config, len(data.blocks), loader.rows_per_step)
    steps = train_steps(model, loader, learning_rates(config, num_steps), config, num_steps)
    meter = Meter(model, every=config.logging_steps, num_steps=num_steps)
    with progress:
        progress.start(num_steps)
        first = next(steps)
        folder.begin(config.to_yaml())  # only now is there a run that is worth a folder
        with MetricsFile(folder.metrics) as file:
            file.write("start", _start_event(config, config_notes, data, model, num_steps))
            with _end_event(file):
                metrics = last = meter.add(first)
                assert last is not None  # the first step is always recorded
                file.write_step(last)
                progress.step(first, metrics)
                for record in steps:
                    metrics = meter.add(record)
                    if metrics is not None:
                        file.write_step(metrics)
                        last = metrics
                    if record.skipped:
                        progress.warn(f"step {record.step} was not finite (loss {record.loss:.4g}); not updated")
                    progress.step(record, metrics)
    return last
