"""`train`: from settings to a trained model in Hugging Face format, in one visible sequence."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import ModelSettings, TrainConfig
from ..data import StreamLoader, TrainingData, load_training_data
from ..data.chat import without_marks
from ..data.documents import check_exists
from ..data.training_data import pad_id
from ..errors import ConfigError, DataError, DoesNotFitError, NonFiniteError
from ..optim.curves import learning_rates
from ..plan.smaller import next_smaller
from . import sample
from .card import model_card
from .evaluation import Evaluator
from .flops import FORMULA, measure_peak
from .folder import RunFolder, check_disk, claim
from .guard import LossGuard
from .host_model import HostModel, resolve_device
from .loggers import Loggers, check_installed
from .loop import count_steps, recorded_step
from .metrics import Meter, Metrics, MetricsFile, read_evaluations, read_steps, versions
from .planning import settle
from .plot import plot_loss
from .progress import Progress, choose_progress, clock, number, say, size
from .quiet import quiet_transformers
from .reports import Reports
from .resume import Resume, find, restore, wants_own_folder
from .saver import Saver, small_files
from .separation import check_separation
from .signals import watched
from .trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..plan.run_plan import RunPlan


@dataclass(frozen=True)
class TrainResult:
    """final_loss: of the last line of metrics_path; tail_loss: mean over the last tenth of its lines,
    as single steps are noisy. eval_loss: at the end, None without anything to evaluate on. num_tokens: real
    tokens, without padding. seconds: in steps, without loading, evaluation and export.

    model_dir holds the trained model and its tokenizer in Hugging Face format.
    """

    final_loss: float
    tail_loss: float
    eval_loss: float | None
    num_steps: int
    num_tokens: int
    seconds: float
    output_dir: Path
    model_dir: Path
    metrics_path: Path


def train(config: TrainConfig, *, config_notes: Sequence[str] = ()) -> TrainResult:
    """Train as `config` says and leave the run in its output_dir.

    config_notes: remarks on how the settings were read, kept with the metrics. Raises ConfigError,
    UnsupportedModelError, DataError, DoesNotFitError, CheckpointError, NonFiniteError and, where a signal or
    the deadline ended it, StoppedError; until the first step is done nothing is written, and an earlier run
    in output_dir is not touched.
    """
    started = time.monotonic()
    progress = choose_progress(config.progress)
    own = wants_own_folder(config)
    with (
        claim(config.output_dir, overwrite=config.overwrite_output_dir, resume=own) as folder,
        quiet_transformers(),
        _memory_faults(config),
    ):
        check_sources(config, folder)
        asked = config
        config, plan = settle(config, progress)
        resume = find(asked, folder, progress.warn)
        progress.stage("reading the data")
        data = load_training_data(config)
        progress.stage(describe_data(data))
        model = build_model(config, data.tokenizer)
        progress.stage(describe_model(model))
        check_together(config, data, model)
        check_separation(model, data.rows)
        check_disk(
            folder,
            model.num_parameters * _export_dtype(config).itemsize,
            sum(model.store.num_bytes.values()) if _will_save(config, data) else 0,
        )

        last = _run_steps(config, asked, plan, config_notes, folder, data, model, progress, resume, started)

        model.save_pretrained(
            folder.model,
            dtype=config.save_dtype,
            max_shard_size=config.max_shard_size,
            extra=lambda target: _save_beside(config, data, model, last, target),
        )
        if config.plot_loss:
            plot_loss(folder.metrics, folder.picture, title=_title(config, model, last, folder.metrics))
        completion = _sample(config, folder, data, model)
    evaluations = read_evaluations(folder.metrics)
    result = TrainResult(
        final_loss=last.loss,
        eval_loss=evaluations[-1]["eval_loss"] if evaluations else None,
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
    resume: Resume | None,
    started: float,
) -> Metrics:
    """Train, evaluate, save, show and record; returns the last metrics. asked: the settings as they were
    given, which the run's folder keeps, so that a plan for another machine can be made of them; plan: what
    was chosen."""
    loader = data.loader
    num_steps = count_steps(config, len(data.rows), loader.rows_per_step)
    peak = _peak(config, model)
    meter = Meter(model, loader, every=config.logging_steps, num_steps=num_steps, peak=peak)
    trainer = Trainer(model, loader, meter, LossGuard(config))
    files = small_files(model, lambda target: _save_tokenizer(data, target))
    parent = None
    if resume is not None:
        parent = restore(resume, model, trainer.load_state, files, progress.warn).path
        progress.stage(f"resumed from {parent}, after step {trainer.loop.step}")
    evaluator = None
    if data.eval_rows is not None:
        evaluator = Evaluator(
            model,
            data.eval_rows,
            config,
            num_steps=num_steps,
            pad_id=pad_id(data.tokenizer),
            epochs_done=int(loader.epoch),
        )
    # The folder becomes this run's with the first step that is done; see `claim` for runs without one.
    in_place = resume is not None and resume.in_place
    settings = asked.to_yaml()
    header = _header(config, config_notes, data, model, num_steps, peak)
    if plan is not None:
        header["plan"] = plan.to_dict()
    file = MetricsFile(
        folder.metrics,
        begin=lambda: folder.write_settings(settings) if in_place else folder.begin(settings),
        header=header,
        resumed_at=trainer.loop.step if resume is not None else None,
    )
    reports = Reports(file, Loggers(config, folder.path), progress)
    saver = Saver(
        folder.path,
        model,
        config,
        state=trainer.state,
        load_state=trainer.load_guard,
        small_files=files,
        versions=versions(),
        report=reports.checkpoint,
        parent=str(parent) if parent is not None else None,
    )
    last = trainer.last
    with file, reports.loggers, progress, _say_where(folder, progress), saver, watched() as request:
        if evaluator is not None and config.eval_on_start and not trainer.loop.step:
            reports.evaluation(evaluator.run(0))
        progress.start(num_steps)
        for record in trainer.steps(config, learning_rates(config, num_steps), num_steps, saver.roll_back):
            metrics = meter.add(record)
            last = metrics or last
            trainer.last = last
            reports.step(record, metrics)
            if record.step == recorded_step(num_steps) and file.has_begun:
                file.write_timeline(record.step, model.timeline)
            evaluation = evaluator.after(record.step, record.epoch) if evaluator is not None else None
            if evaluation is not None:
                reports.evaluation(evaluation)
            is_last = trainer.loop.step == num_steps
            saver.after(record, is_last=is_last)
            if request.signal is not None or not is_last and saver.is_deadline_near(started):
                raise saver.stop(request, trainer.loop.step)
    assert last is not None, "a run has at least one step, and the last is recorded"
    return last


def _will_save(config: TrainConfig, data: TrainingData) -> bool:
    """Whether the run is long enough for a checkpoint that is due by its steps."""
    num_steps = count_steps(config, len(data.rows), data.loader.rows_per_step)
    return config.save_strategy != "no" and (
        config.save_strategy != "steps" or num_steps >= config.save_steps
    )


def _peak(config: TrainConfig, model: HostModel) -> float:
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    return measure_peak(model.device, model.store.dtype)


@contextmanager
def _say_where(folder: RunFolder, progress: Progress) -> Iterator[None]:
    """What is left of a run that is stopped."""
    try:
        yield
    except (KeyboardInterrupt, NonFiniteError):
        if folder.metrics.exists():
            progress.warn(f"no model is written; the metrics so far are in {folder.metrics}")
        if folder.has_checkpoints:
            progress.warn(f"the latest checkpoint is there: horizon resume {folder.path}")
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
    check_installed(config.report_to)
    for dataset in [*config.datasets, *config.eval_datasets]:
        check_exists(dataset)


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
    vocabulary, highest = int(model.config.get_text_config().vocab_size), int(data.store.ids.max())
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


def _save_tokenizer(data: TrainingData, target: Path) -> None:
    """The tokenizer, with the chat template that was trained on where one was given."""
    tokenizer, given = data.tokenizer, data.encoder.chat_template_to_save
    own = tokenizer.chat_template
    if given is not None:
        tokenizer.chat_template = without_marks(given)
    try:
        tokenizer.save_pretrained(target)
    finally:
        tokenizer.chat_template = own


def _save_beside(
    config: TrainConfig, data: TrainingData, model: HostModel, last: Metrics, target: Path
) -> None:
    """What a model folder has beside the model: the tokenizer and a card."""
    _save_tokenizer(data, target)
    card = model_card(
        config.to_dict(),
        model_type=str(model.config.model_type),
        step=last.step,
        num_tokens=last.num_tokens,
        versions=versions(),
    )
    (target / "README.md").write_text(card, encoding="utf-8")


def describe_data(data: TrainingData) -> str:
    """What was read, what became of it, and what was left out, in words."""
    counts, rows = data.store.counts, data.rows
    formats = ", ".join(sorted({str(f) for f in counts.formats if f is not None}))
    what = f"data: {counts.num_documents:,} documents ({formats}), {counts.num_tokens:,} tokens"
    if counts.num_trained < counts.num_tokens:
        what += f", {counts.num_trained:,} of them trained on"
    if isinstance(data.loader, StreamLoader):
        return f"{what} in the first window of the stream"
    what += " (from the cache)" if data.was_cached else ""
    lines = [f"{what}, {len(rows):,} sequences of {rows.max_length}, {rows.fill:.1%} full ({rows.strategy})"]
    left = rows.left
    if left.documents:
        lines.append(
            f"data: {left.documents:,} documents left out: longer than max_length, or nothing to train on"
        )
    if left.truncated:
        lines.append(f"data: {left.truncated:,} documents longer than max_length were cut")
    if counts.num_bad:
        lines.append(f"data: {counts.num_bad:,} bad rows left out; the first: {counts.bad_rows[0]}")
    if data.eval_rows is not None:
        lines.append(f"evaluation: {len(data.eval_rows):,} sequences, {data.eval_rows.num_tokens:,} tokens")
    return "\n".join(lines)


def describe_model(model: HostModel) -> str:
    store = sum(model.store.num_bytes.values())
    return (
        f"model: {model.config.model_type}, {model.num_parameters / 1e6:,.1f} M parameters, "
        f"{model.settings.dtype} on {model.device}, {size(store)} in host memory"
    )


def _header(
    config: TrainConfig,
    notes: Sequence[str],
    data: TrainingData,
    model: HostModel,
    num_steps: int,
    peak: float,
) -> dict[str, Any]:
    is_cuda = model.device.type == "cuda"
    return {
        "run_name": config.run_name,
        "versions": versions(),
        "device": torch.cuda.get_device_name(model.device) if is_cuda else "cpu",
        "num_threads": torch.get_num_threads(),
        "model_type": model.config.model_type,
        "num_parameters": model.num_parameters,
        "num_sequences": len(data.rows),
        "max_length": data.rows.max_length,
        "packing": data.rows.strategy,
        "fill": data.rows.fill,
        "peak_flops": peak,
        "peak_from": "a matrix product" if config.peak_tflops is None else "peak_tflops",
        "mfu_formula": FORMULA,
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
    prompt, is_chat = config.sample_prompt, False
    if prompt is None:
        prompt, is_chat = sample.piece_of_data(data.rows.row(0), data.tokenizer)
    made = sample.complete(
        folder.model,
        prompt,
        max_new_tokens=config.sample_max_new_tokens,
        device=model.device,
        trust_remote_code=config.trust_remote_code,
        special_tokens=not is_chat,
    )
    return f"{_quoted('sample prompt', made.prompt)}\n{_quoted('completion', made.completion)}"


def _quoted(title: str, text: str) -> str:
    return "\n".join([title, *(f"  | {line}" for line in text.splitlines() or [""])])


def _summary(config: TrainConfig, folder: RunFolder, result: TrainResult) -> str:
    speed = result.num_tokens / result.seconds
    lines = [
        f"trained {result.num_steps:,} steps on {result.num_tokens:,} tokens in {clock(result.seconds)} "
        f"({speed:,.0f} tokens/s), loss {number(result.tail_loss)} (mean of the last tenth)",
        *([f"evaluation loss {number(result.eval_loss)}"] if result.eval_loss is not None else []),
        f"  model       {folder.model}",
        f"  metrics     {folder.metrics}",
        f"  settings    {folder.settings}",
    ]
    if config.plot_loss:
        lines.append(f"  loss curve  {folder.picture}")
    return "\n".join(lines)


@contextmanager
def _memory_faults(config: TrainConfig) -> Iterator[None]:
    """Turns what torch and Python raise when memory runs out into DoesNotFitError. Nothing is lost by it: a
    step that fails leaves the last checkpoint as it is."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        run = RunFolder(Path(config.output_dir).expanduser())
        hint = f"next smaller: {next_smaller(config)}"
        if run.path.is_dir() and run.has_checkpoints:
            hint += f"; horizon resume {run.path} goes on from the last checkpoint with it"
        raise DoesNotFitError(
            f"the device is out of memory: {str(error).splitlines()[0]}", hint=hint
        ) from error
    except MemoryError as error:
        raise DoesNotFitError(
            "the host is out of memory", hint="free memory, or read less (max_train_bytes)"
        ) from error
