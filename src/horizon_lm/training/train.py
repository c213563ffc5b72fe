"""`train`: from settings to a trained model in Hugging Face format, in one visible sequence."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from horizon_lm.checkpoint.card import model_card
from horizon_lm.checkpoint.folder import Checkpoint, RunFolder, check_disk, claim
from horizon_lm.config import TrainConfig
from horizon_lm.config.python import ConfigSource, as_train_config
from horizon_lm.data import TrainingData
from horizon_lm.data.chat import without_marks
from horizon_lm.data.training_data import pad_id
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import DoesNotFitError, HorizonError
from horizon_lm.host_model import HostModel
from horizon_lm.io import files
from horizon_lm.io.output import lasting_output
from horizon_lm.memory.arena import keep_freed_memory
from horizon_lm.memory.store import state_bytes
from horizon_lm.memory.ways import next_smaller
from horizon_lm.model.pretrained import quiet_transformers
from horizon_lm.plan.run_plan import RunPlan
from horizon_lm.preference.method import Method
from horizon_lm.report.display import Progress, choose_progress, say
from horizon_lm.report.flops import UNKNOWN, flops_of, measure_peak
from horizon_lm.report.loggers import Loggers
from horizon_lm.report.metrics import Meter, MetricsFile, versions
from horizon_lm.report.plot import plot_loss
from horizon_lm.training import describe, prepare, sample
from horizon_lm.training.build import NAMES, build_model, model_without_source, stand_in
from horizon_lm.training.callbacks import Callbacks, CallbackState, check_callbacks
from horizon_lm.training.checkpoint_series import small_files
from horizon_lm.training.checks import check_factors, check_separation, check_sources, check_together
from horizon_lm.training.describe import TrainResult
from horizon_lm.training.evaluate import Evaluator, evaluate
from horizon_lm.training.log import RunLog
from horizon_lm.training.loop import Run, RunEnd, run_loop
from horizon_lm.training.preferences import Preferences, ReferenceOf, without_dropout
from horizon_lm.training.preferences import small_files as reference_files
from horizon_lm.training.resume import Resume, cut_of, find, restore, wants_own_folder, with_chunk_of
from horizon_lm.training.resume import about as about_resume
from horizon_lm.training.run_settings import absolute
from horizon_lm.training.save import Saver
from horizon_lm.training.state import Best, RunState
from horizon_lm.training.upload import prepare_upload


def train(
    config: ConfigSource = None,
    *,
    callbacks: Sequence[object] = (),
    config_notes: Sequence[str] = (),
    **settings: Any,
) -> TrainResult:
    """Train as `config` says and leave the run in its output_dir.

    config: a TrainConfig, the path of a YAML file, or a dict of settings. settings: further ones by name,
    which win, as in train("run.yaml", max_steps=100). callbacks: objects with some of the methods
    on_step_end, on_log, on_evaluate and on_save, each called as method(state, control); see `callbacks`.
    config_notes: remarks on how the settings were read, kept with the metrics.

    Raises ConfigError, UnsupportedModelError, DataError, DoesNotFitError, CheckpointError, NonFiniteError,
    CallbackError for an exception in a callback, and StoppedError if a signal or the deadline ended the run.
    Until the first step is done nothing is written, and an earlier run in output_dir is not touched. Raises
    UploadError if the finished model, which is in output_dir, could not be uploaded.
    """
    started = time.monotonic()
    check_callbacks(callbacks)
    found, notes = as_train_config(config, settings)
    with lasting_output(after_pipe=True):
        return _train(found, [*config_notes, *notes], callbacks, started)


def _train(
    config: TrainConfig, config_notes: Sequence[str], callbacks: Sequence[object], started: float
) -> TrainResult:
    progress = choose_progress(config.progress)
    own = wants_own_folder(config)
    with (
        claim(config.output_dir, overwrite=config.overwrite_output_dir, resume=own) as folder,
        quiet_transformers(),
        _memory_faults(config),
    ):
        resume = find(config, folder, progress.warn)
        readable, source = stand_in(config, resume)
        check_sources(readable, folder)
        hub = prepare_upload(readable, progress.warn) if config.push_to_hub else None
        ready = _prepare(_Asked(config, folder, progress, resume), readable, source)
        with closing(ready.data.loader):
            end = run_loop(_assemble(ready, config_notes, callbacks, started))
        _export(ready, end)
        completion = _sample(ready)
    result = _result(folder, end)
    say(f"{completion}\n{describe.summary(ready.config, folder, result, end.remarks)}")
    if hub is not None:
        say(f"  uploaded    {hub.upload(folder.model)}")
    return result


@dataclass(frozen=True)
class _Asked:
    """What a run is asked to do, and where. config: the settings as given, which the run's folder keeps, so
    that a plan for another machine can be made from them."""

    config: TrainConfig
    folder: RunFolder
    progress: Progress
    resume: Resume | None


@dataclass(frozen=True)
class _Ready:
    """A run whose data and model are there. config: the resolved settings; plan: the plan behind them."""

    asked: _Asked
    config: TrainConfig
    plan: RunPlan | None
    data: TrainingData
    model: HostModel
    preferences: Preferences | None


def _prepare(asked: _Asked, config: TrainConfig, source: Checkpoint | None) -> _Ready:
    """Plan the run, read its data, build its model, and check that they fit each other and the disk.

    config, source: see `stand_in`.
    """
    progress, resume = asked.progress, asked.resume
    config = prepare.with_method_of_data(with_chunk_of(resume, config), progress)
    config, plan, data = prepare.plan_and_read(config, progress, cut_of(resume, config))
    if resume is None:  # else the checkpoint says by which rule the steps are counted
        prepare.curve(config, data.loader, prepare.count_steps(config, data.loader))
    reference = ReferenceOf.begin(config, data, resume, progress)
    if reference is not None:
        reference.before()
    if source is None:
        model = build_model(config, data.tokenizer)
    else:
        model = model_without_source(source, config)
        name = asked.config.model_name_or_path
        progress.stage(f"model_name_or_path={name!r} does not exist; {source.path} replaces it")
    if model.device.type == "cpu":
        keep_freed_memory()
    config = config.replace(**{key: getattr(asked.config, key) for key in NAMES})
    progress.stage(describe.about_model(model))
    check_together(config, data, model)
    check_factors(config, model)
    check_separation(model, data.rows)
    check_disk(
        asked.folder,
        model.num_parameters * DTYPES[config.save_dtype or config.dtype].itemsize,
        state_bytes(model.store.units, model.store.spec) if _will_save(config, data) else 0,
    )
    preferences = None
    if config.is_preference:
        without_dropout(model)
        found = reference.by(model, source) if reference is not None else None
        preferences = Preferences(Method(config), found)
    return _Ready(asked, config, plan, data, model, preferences)


def _will_save(config: TrainConfig, data: TrainingData) -> bool:
    """Tell whether the run is long enough for a checkpoint that is due by its steps."""
    num_steps = prepare.count_steps(config, data.loader)
    return config.load_best_model_at_end or (
        config.save_strategy != "no" and (config.save_strategy != "steps" or num_steps >= config.save_steps)
    )


def _assemble(ready: _Ready, config_notes: Sequence[str], callbacks: Sequence[object], started: float) -> Run:
    """Make the parts of a run, in the state of its checkpoint if it is resumed."""
    asked, config, data, model = ready.asked, ready.config, ready.data, ready.model
    folder, progress, resume, loader = asked.folder, asked.progress, asked.resume, data.loader
    peak = config.peak_tflops * 1e12 if config.peak_tflops is not None else None
    peak = measure_peak(model.device, model.store.dtype) if peak is None else peak
    flops = flops_of(model, ready.plan.planner.outline.counted if ready.plan is not None else None)
    if flops == UNKNOWN:
        progress.warn(f"no MFU: {model.config.model_type} cannot be run without its weights")
    meter = Meter(model, loader, every=config.logging_steps, flops=flops, peak=peak)
    state = RunState(config, model, loader, meter, Best(config, folder.path, progress.warn))
    small = small_files(model, partial(_save_tokenizer, data))
    if ready.preferences is not None:
        small |= reference_files(ready.preferences.reference)
    found = None
    if resume is not None:
        found = restore(resume, state, small, asked.config, progress.warn)
        prepare.count_on(loader, found, state.step)
    num_steps = meter.num_steps = prepare.count_steps(config, loader)
    rates = prepare.curve(config, loader, num_steps)
    if found is not None:
        for line in about_resume(found, asked.config, folder, state.step, num_steps, rates):
            progress.stage(line)
    remarks = prepare.remarks(config, data, num_steps, rates)
    for remark in remarks:
        progress.warn(remark)
    evaluator = _evaluator(ready, num_steps)
    header = describe.header(config, [*config_notes, *remarks], data, model, num_steps, peak)
    if ready.plan is not None:
        header["plan"] = ready.plan.to_dict()
    called = Callbacks(callbacks, CallbackState(state.step, num_steps, loader.epoch))
    log = _open_log(ready, header, called)
    saver = Saver(
        folder.path,
        state,
        small_files=small,
        report=log.checkpoint,
        parent=found.path if found is not None else None,
    )
    in_place = resume is not None and resume.in_place
    return Run(
        config,
        state,
        rates,
        num_steps,
        evaluator,
        log,
        saver,
        in_place,
        started,
        ready.preferences,
    )


def _evaluator(ready: _Ready, num_steps: int) -> Evaluator | None:
    data, config = ready.data, ready.config
    if data.eval_rows is None:
        return None
    how = {
        "micro_batch_size": config.per_device_eval_batch_size or config.per_device_train_batch_size,
        "pad_id": pad_id(data.tokenizer),
    }
    rows, found = data.eval_rows, evaluate if ready.preferences is None else ready.preferences.evaluate
    return Evaluator(
        lambda step: found(ready.model, rows, **how, step=step),
        config,
        num_steps=num_steps,
        epochs_done=int(data.loader.epoch),
    )


def _open_log(ready: _Ready, header: dict[str, Any], callbacks: Callbacks) -> RunLog:
    """Make the log. The folder becomes this run's when the first step is done."""
    asked = ready.asked
    folder, progress, resume = asked.folder, asked.progress, asked.resume
    in_place = resume is not None and resume.in_place
    settings = absolute(asked.config).to_yaml()
    file = MetricsFile(
        folder.metrics,
        begin=lambda: folder.write_settings(settings) if in_place else folder.begin(settings),
        header=header,
        resumed_at=callbacks.state.step if resume is not None else None,
        warn=progress.warn,
    )
    loggers = Loggers(ready.config, folder.path, progress.warn)
    return RunLog(folder, file, loggers, progress, callbacks)


def _save_tokenizer(data: TrainingData, target: Path) -> None:
    """Save the tokenizer, with the chat template that was trained on if one was given."""
    tokenizer, given = data.tokenizer, data.encoder.chat_template_to_save
    own = tokenizer.chat_template
    if given is not None:
        tokenizer.chat_template = without_marks(given)
    try:
        tokenizer.save_pretrained(target)
    finally:
        tokenizer.chat_template = own


def _export(ready: _Ready, end: RunEnd) -> None:
    """Write the model with tokenizer and card, and the loss curve."""
    config, folder, model = ready.config, ready.asked.folder, ready.model
    model.save_pretrained(
        folder.model,
        dtype=config.save_dtype,
        max_shard_size=config.max_shard_size,
        extra=partial(_save_beside, ready, end),
    )
    if config.plot_loss:
        with _only_warn("loss.png is not drawn", ready.asked.progress):
            title = describe.title(config, model, end.last, folder.metrics)
            plot_loss(folder.metrics, folder.picture, title=title)


def _save_beside(ready: _Ready, end: RunEnd, target: Path) -> None:
    """Write what a model folder has besides the model: the tokenizer and a card."""
    _save_tokenizer(ready.data, target)
    card = model_card(
        ready.config.to_dict(),
        model_type=str(ready.model.config.model_type),
        step=end.exported_step,
        num_tokens=end.exported_tokens,
        versions=versions(),
    )
    files.write_file(target / "README.md", card)


def _sample(ready: _Ready) -> str:
    """Return what the exported model makes of a prompt, in words; empty if that fails."""
    with _only_warn("no sample completion", ready.asked.progress):
        folder = ready.asked.folder.model
        return f"\n{sample.sample_of_run(ready.config, folder, ready.data, ready.model.device)}\n"
    return ""


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
