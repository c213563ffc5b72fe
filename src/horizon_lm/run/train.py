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
from ..errors import ConfigError, DataError, DoesNotFitError, NonFiniteError
from ..optim.curves import learning_rates
from . import sample
from .folder import RunFolder, check_disk, claim
from .host_model import HostModel, resolve_device
from .loop import count_steps, recorded_step, train_steps
from .metrics import Meter, Metrics, MetricsFile, read_steps, versions
from .planning import settle
from .plot import plot_loss
from .progress import Progress, choose_progress, clock, number, say, size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..plan.run_plan import RunPlan


@dataclass(frozen=True)
class TrainResult:
    """final_loss: of the last line of metrics_path; tail_loss: mean over the last tenth of its lines,
    as single steps are noisy. seconds: in steps, without loading and export.

    model_dir holds the trained model and its tokenizer in Hugging Face format.
    """

    final_loss: float
    tail_loss: float
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
        asked = config
        config, plan = settle(config, progress)
        progress.stage("reading the data")
        data = load_training_data(config)
        progress.stage(describe_data(data))
        model = build_model(config, data.tokenizer)
        progress.stage(describe_model(model))
        check_together(config, data, model)
        check_disk(folder, model.num_parameters * _export_dtype(config).itemsize)

        last = _run_steps(config, asked, plan, config_notes, folder, data, model, progress)

        model.save_pretrained(
            folder.model,
            dtype=config.save_dtype,
            max_shard_size=config.max_shard_size,
            extra=lambda target: _save_tokenizer(data.tokenizer, target),
        )
        if config.plot_loss:
            plot_loss(folder.metrics, folder.picture, title=_title(config, model, last, folder.metrics))
        completion = _sample(config, folder, data, model)
    result = TrainResult(
        final_loss=last.loss,
        tail_loss=tail_loss(folder.metrics),
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
    asked: TrainConfig,
    plan: RunPlan | None,
    config_notes: Sequence[str],
    folder: RunFolder,
    data: TrainingData,
    model: HostModel,
    progress: Progress,
) -> Metrics:
    """Train, show and record; returns the last metrics. asked: the settings as they were given, which the
    run's folder keeps, so that a plan for another machine can be made of them; plan: what was chosen."""
    loader = TokenLoader(
        data.blocks,
        micro_batch_size=config.per_device_train_batch_size,
        micro_batches_per_step=config.gradient_accumulation_steps,
        seed=config.seed if config.data_seed is None else config.data_seed,
    )
    num_steps = count_steps(config, len(data.blocks), loader.rows_per_step)
    learning_rate = learning_rates(config, num_steps)
    meter = Meter(model, every=config.logging_steps, num_steps=num_steps)
    header = _header(config, config_notes, data, model, num_steps)
    if plan is not None:
        header["plan"] = plan.to_dict()
    # The folder becomes this run's with the first step that is done; see `claim` for runs without one.
    file = MetricsFile(folder.metrics, begin=lambda: folder.begin(asked.to_yaml()), header=header)
    last: Metrics | None = None
    with file, progress, _say_where(folder, progress):
        progress.start(num_steps)
        for record in train_steps(model, loader, learning_rate, config, num_steps):
            metrics = meter.add(record)
            if metrics is not None:
                file.write_step(metrics)
                last = metrics
            if record.step == recorded_step(num_steps) and file.has_begun:
                file.write_timeline(record.step, model.timeline)
            if record.skipped:
                progress.warn(f"step {record.step} was not finite (loss {record.loss:.4g}): not updated")
            progress.step(record, metrics)
    assert last is not None, "a run has at least one step, and the last is recorded"
    return last


@contextmanager
def _say_where(folder: RunFolder, progress: Progress) -> Iterator[None]:
    """What is left of a run that is stopped."""
    try:
        yield
    except (KeyboardInterrupt, NonFiniteError):
        if folder.metrics.exists():
            progress.warn(f"no model is written; the metrics so far are in {folder.metrics}")
        raise


def check_sources(config: TrainConfig, folder: RunFolder) -> None:
    """What can be told without reading data or weights. Raises ConfigError and DataError."""
    resolve_device(config.device)
    for key in ("model_name_or_path", "tokenizer_name_or_path"):
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
    for dataset in config.datasets:
        if dataset.path != PYTHON_STDLIB or Path(dataset.path).exists():
            list_files(dataset.path)


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> HostModel:
    """The model to train: read, or with random weights and, where not given, the tokenizer's vocabulary."""
    settings = {key: getattr(config, key) for key in ModelSettings.model_fields}
    if config.model_name_or_path is not None:
        return HostModel.from_pretrained(config.model_name_or_path, **settings)
    assert config.init_model is not None  # TrainConfig has seen to it
    fitting = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return HostModel.from_config({**fitting, **config.init_model}, ModelSettings(**settings))


def check_together(config: TrainConfig, data: TrainingData, model: HostModel) -> None:
    """Whether data and model fit each other. Raises DataError and ConfigError."""
    vocabulary, highest = int(model.config.get_text_config().vocab_size), int(data.blocks.max())
    if highest >= vocabulary:
        raise DataError(
            f"the data holds token {highest}, outside the model's vocabulary of {vocabulary}",
            hint="use the model's own tokenizer, or leave vocab_size out of init_model",
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < config.max_length:
        raise ConfigError(
            f"max_length={config.max_length} is more than the model's max_position_embeddings={longest}",
            hint=f"max_length={longest}",
        )


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    tokenizer.save_pretrained(target)


def describe_data(data: TrainingData) -> str:
    rows, length = data.blocks.shape
    read = f"{data.num_documents:,} documents, {data.num_tokens:,} tokens"
    return f"data: {read}, {rows:,} sequences of {length}"


def describe_model(model: HostModel) -> str:
    store = sum(model.store.num_bytes.values())
    return (
        f"model: {model.config.model_type}, {model.num_parameters / 1e6:,.1f} M parameters, "
        f"{model.settings.dtype} on {model.device}, {size(store)} in host memory"
    )


def _header(
    config: TrainConfig, notes: Sequence[str], data: TrainingData, model: HostModel, num_steps: int
) -> dict[str, Any]:
    is_cuda = model.device.type == "cuda"
    return {
        "run_name": config.run_name,
        "versions": versions(),
        "device": torch.cuda.get_device_name(model.device) if is_cuda else "cpu",
        "num_threads": torch.get_num_threads(),
        "model_type": model.config.model_type,
        "num_parameters": model.num_parameters,
        "num_sequences": len(data.blocks),
        "max_length": data.blocks.shape[1],
        "num_steps": num_steps,
        "notes": list(notes),
    }


def _export_dtype(config: TrainConfig) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.save_dtype or config.dtype]


def tail_loss(metrics: Path) -> float:
    """Mean loss over the last tenth of the recorded steps that were finite."""
    losses = [line["loss"] for line in read_steps(metrics) if line["loss"] is not None]
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else float("nan")


def _title(config: TrainConfig, model: HostModel, last: Metrics, metrics: Path) -> str:
    name = config.run_name or Path(config.output_dir).name
    what = f"{model.config.model_type}, {model.num_parameters / 1e6:,.1f} M parameters"
    return f"{name}: {what}, {last.num_tokens:,} tokens, loss {number(tail_loss(metrics))}"


def _sample(config: TrainConfig, folder: RunFolder, data: TrainingData, model: HostModel) -> str:
    reason = sample.reason_to_skip(folder.model)
    if reason is not None:
        return f"no sample completion: {reason}"
    prompt = config.sample_prompt
    if prompt is None:
        prompt = sample.piece_of_data(data.blocks, data.tokenizer)
    made = sample.complete(
        folder.model,
        prompt,
        max_new_tokens=config.sample_max_new_tokens,
        device=model.device,
        trust_remote_code=config.trust_remote_code,
    )
    return f"{_quoted('sample prompt', made.prompt)}\n{_quoted('completion', made.completion)}"


def _quoted(title: str, text: str) -> str:
    return "\n".join([title, *(f"  | {line}" for line in text.splitlines() or [""])])


def _summary(config: TrainConfig, folder: RunFolder, result: TrainResult) -> str:
    speed = result.num_tokens / result.seconds
    lines = [
        f"trained {result.num_steps:,} steps on {result.num_tokens:,} tokens in {clock(result.seconds)} "
        f"({speed:,.0f} tokens/s), loss {number(result.tail_loss)} (mean of the last tenth)",
        f"  model       {folder.model}",
        f"  metrics     {folder.metrics}",
        f"  settings    {folder.settings}",
    ]
    if config.plot_loss:
        lines.append(f"  loss curve  {folder.picture}")
    return "\n".join(lines)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its progress bars would run through our display."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _memory_faults() -> Iterator[None]:
    """Turns what torch and Python raise when memory runs out into DoesNotFitError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"the device is out of memory: {str(error).splitlines()[0]}",
            hint="lower per_device_train_batch_size (with more gradient_accumulation_steps), max_length or "
            "loss_chunk_tokens",
        ) from error
    except MemoryError as error:
        raise DoesNotFitError(
            "the host is out of memory", hint="free memory, or read less (max_train_bytes)"
        ) from error
