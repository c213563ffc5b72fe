"""`train`: from settings to a trained model in Hugging Face format, in one visible sequence."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from horizon_lm.checkpoint.card import model_card
from horizon_lm.checkpoint.run_folder import RunFolder, check_disk, claim
from horizon_lm.config import TrainConfig, model_settings_of
from horizon_lm.config.python import ConfigSource, as_train_config
from horizon_lm.data import TrainingData
from horizon_lm.data.chat import without_marks
from horizon_lm.data.training_data import pad_id
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import DoesNotFitError, HorizonError, NonFiniteError
from horizon_lm.host_model import HostModel, load_model_of
from horizon_lm.io import files
from horizon_lm.io.output import lasting_output
from horizon_lm.machine.heap import frozen_heap
from horizon_lm.memory.arena import keep_freed_memory
from horizon_lm.memory.ways import next_smaller
from horizon_lm.model.loading import grow_vocabulary
from horizon_lm.model.quiet import quiet_transformers
from horizon_lm.report.display import Progress, choose_progress, say
from horizon_lm.report.flops import UNKNOWN, flops_of, measure_peak
from horizon_lm.report.loggers import Loggers
from horizon_lm.report.metrics import Meter, MetricsFile, versions
from horizon_lm.report.plot import plot_loss
from horizon_lm.training import describe, sample, steps
from horizon_lm.training.best import Best
from horizon_lm.training.callbacks import Callbacks, CallbackState, check_callbacks
from horizon_lm.training.checks import check_sources, check_together
from horizon_lm.training.describe import TrainResult
from horizon_lm.training.ending import RunEnd, finish
from horizon_lm.training.evaluation import Evaluator
from horizon_lm.training.guard import LossGuard
from horizon_lm.training.loop import recorded_step
from horizon_lm.training.paths import absolute
from horizon_lm.training.planning import plan_and_read
from horizon_lm.training.reports import Reports
from horizon_lm.training.resume import Resume, cut_of, find, restore, wants_own_folder
from horizon_lm.training.resume import about as about_resume
from horizon_lm.training.save import Saver, small_files
from horizon_lm.training.separation import check_separation
from horizon_lm.training.signals import watched
from horizon_lm.training.stand_in import NAMES, model_without_source, stand_in
from horizon_lm.training.trainer import Trainer
from horizon_lm.training.upload import prepare_upload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from horizon_lm.plan.run_plan import RunPlan


def train(
    config: ConfigSource = None,
    *,
    callbacks: Sequence[Any] = (),
    config_notes: Sequence[str] = (),
    **settings: Any,
) -> TrainResult:
    """Train as `config` says and leave the run in its output_dir.

    config: a TrainConfig, the path of a YAML file, or a dict of settings. settings: further ones by name,
    which win, as in train("run.yaml", max_steps=100). callbacks: objects with some of the methods
    on_step_end, on_log, on_evaluate and on_save, each called as method(state, control); see `callbacks`.
    config_notes: remarks on how the settings were read, kept with the metrics.

    Raises ConfigError, UnsupportedModelError, DataError, DoesNotFitError, CheckpointError, NonFiniteError,
    CallbackError for an exception in a callback and, where a signal or the deadline ended it, StoppedError;
    until the first step is done nothing is written, and an earlier run in output_dir is not touched. Raises
    UploadError where the finished model, which is in output_dir, could not be uploaded.
    """
    started = time.monotonic()
    check_callbacks(callbacks)
    found, notes = as_train_config(config, settings)
    with lasting_output(after_pipe=True):
        return _train(found, [*config_notes, *notes], callbacks, started)


def _train(
    config: TrainConfig, config_notes: Sequence[str], callbacks: Sequence[Any], started: float
) -> TrainResult:
    progress = choose_progress(config.progress)
    own = wants_own_folder(config)
    with (
        claim(config.output_dir, overwrite=config.overwrite_output_dir, resume=own) as folder,
        quiet_transformers(),
        _memory_faults(config),
    ):
        asked = config
        resume = find(asked, folder, progress.warn)
        config, source = stand_in(asked, resume)
        check_sources(config, folder)
        hub = prepare_upload(config, progress.warn) if config.push_to_hub else None
        config, plan, data = plan_and_read(config, progress, cut_of(resume, config))
        if resume is None:  # else the checkpoint says by which rule the steps are counted
            steps.curve(config, data.loader, steps.count_steps(config, data.loader))
        if source is None:
            model = build_model(config, data.tokenizer)
        else:
            model = model_without_source(source, config)
            name = asked.model_name_or_path
            progress.stage(f"model_name_or_path={name!r} does not exist; {source.path} replaces it")
        if model.device.type == "cpu":
            keep_freed_memory()
        config = config.replace(**{key: getattr(asked, key) for key in NAMES})
        progress.stage(describe.about_model(model))
        check_together(config, data, model)
        steps.check_factors(config, model)
        check_separation(model, data.rows)
        check_disk(
            folder,
            model.num_parameters * _export_dtype(config).itemsize,
            sum(model.store.num_bytes.values()) if _will_save(config, data) else 0,
        )

        with closing(data.loader):
            end = _run_steps(
                config, asked, plan, config_notes, folder, data, model, progress, resume, started, callbacks
            )
        last = end.last

        model.save_pretrained(
            folder.model,
            dtype=config.save_dtype,
            max_shard_size=config.max_shard_size,
            extra=lambda target: _save_beside(config, data, model, end, target),
        )
        if config.plot_loss:
            with _worth_no_failure("loss.png is not drawn", progress):
                title = describe.title(config, model, last, folder.metrics)
                plot_loss(folder.metrics, folder.picture, title=title)
        completion = _sample(config, folder, data, model, progress)
    tail = describe.tail_loss(folder.metrics)
    result = TrainResult(
        final_loss=last.loss,
        eval_loss=describe.eval_loss(folder.metrics, end.exported_step),
        tail_loss=last.loss if math.isnan(tail) else tail,  # no step is recorded here of a run that was done
        num_steps=last.step,
        num_tokens=last.num_tokens,
        seconds=last.seconds,
        output_dir=folder.path,
        model_dir=folder.model,
        metrics_path=folder.metrics,
        exported_step=end.exported_step,
        stopped_by=end.stopped_by,
    )
    say(f"{completion}\n{describe.summary(config, folder, result, end.remarks)}")
    if hub is not None:
        say(f"  uploaded    {hub.upload(folder.model)}")
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
    callbacks: Sequence[Any],
) -> RunEnd:
    """Train, evaluate, save, show and record; the model is left as it is to be exported. asked: the settings
    as they were given, which the run's folder keeps, so that a plan for another machine can be made of them;
    plan: what was chosen."""
    loader = data.loader
    peak = _peak(config, model)
    flops = flops_of(model, plan.planner.outline.counted if plan is not None else None)
    if flops == UNKNOWN:
        progress.warn(f"no MFU: {model.config.model_type} cannot be run without its weights")
    meter = Meter(model, loader, every=config.logging_steps, flops=flops, peak=peak)
    best = Best(config, folder.path, progress.warn)
    trainer = Trainer(model, loader, meter, LossGuard(config), best)
    files = small_files(model, lambda target: _save_tokenizer(data, target))
    parent = None
    if resume is not None:
        found = restore(resume, model, trainer.load_state, files, asked, progress.warn)
        best.restore(found)
        steps.count_on(loader, found, trainer.loop.step)
        parent = found.path
    num_steps = meter.num_steps = steps.count_steps(config, loader)
    rates = steps.curve(config, loader, num_steps)
    if resume is not None:
        for line in about_resume(found, asked, folder, trainer.loop.step, num_steps, rates):
            progress.stage(line)
    remarks = steps.remarks(config, data, num_steps, rates)
    for remark in remarks:
        progress.warn(remark)
    evaluator = _evaluator(config, data, model, num_steps)
    # The folder becomes this run's with the first step that is done; see `claim` for runs without one.
    in_place = resume is not None and resume.in_place
    settings = absolute(asked).to_yaml()
    header = describe.header(config, [*config_notes, *remarks], data, model, num_steps, peak)
    if plan is not None:
        header["plan"] = plan.to_dict()
    file = MetricsFile(
        folder.metrics,
        begin=lambda: folder.write_settings(settings) if in_place else folder.begin(settings),
        header=header,
        resumed_at=trainer.loop.step if resume is not None else None,
        warn=progress.warn,
    )
    called = Callbacks(callbacks, CallbackState(trainer.loop.step, num_steps, loader.epoch))
    reports = Reports(file, Loggers(config, folder.path, progress.warn), progress, called)
    saver = Saver(
        folder.path,
        model,
        config,
        state=trainer.state,
        load_state=trainer.load_guard,
        small_files=files,
        versions=versions(),
        report=reports.checkpoint,
        best=best,
        parent=str(parent) if parent is not None else None,
    )
    stopped_by = best.reason_to_stop  # of a run that was killed after it had stopped
    where = _say_where(folder, progress)
    with file, reports.loggers, progress, where, saver, frozen_heap(), watched() as request:
        if trainer.loop.step >= num_steps and not in_place:
            file.open()  # there is no step with which the folder would become this run's
        if evaluator is not None and config.eval_on_start and not trainer.loop.step:
            reports.evaluation(evaluator.run(0))
        progress.start(num_steps)
        for record in trainer.steps(config, rates, num_steps, saver.roll_back) if not stopped_by else ():
            metrics = meter.add(record)
            trainer.last = metrics or trainer.last
            reports.step(record, metrics)
            if record.step == recorded_step(num_steps) and file.has_begun:
                file.write_timeline(record.step, model.timeline)
            is_last = trainer.loop.step == num_steps or called.stopped_by is not None
            evaluation = None
            if evaluator is not None and record.rolled_back_to is None:
                evaluation = evaluator.after(record.step, record.epoch, is_last=is_last)
            is_best = evaluation is not None and best.add(evaluation)
            if evaluation is not None:
                reports.evaluation(evaluation)
            if trainer.loop.step < num_steps:
                stopped_by = called.stopped_by or best.reason_to_stop
            is_last = trainer.loop.step == num_steps or stopped_by is not None
            if is_last and metrics is None:
                trainer.last = reports.rest(meter.rest())
            saver.after(record, is_last=is_last, is_best=is_best)
            called.saved()
            if called.error is not None:
                raise called.fault(saver.secure(trainer.loop.step), folder.path)
            if request.signal is not None or not is_last and saver.is_deadline_near(started):
                raise saver.stop(request, trainer.loop.step)
            if is_last:
                break
        saver.finish()
        called.saved()
        if called.error is not None:
            raise called.fault(saver.secure(trainer.loop.step), folder.path)
        file.open()  # where no step was left to do, too
        end = finish(best, model, trainer, num_steps, stopped_by, progress.warn)
        for event, values in end.events:
            file.write_event(event, values)
    return end


def _evaluator(config: TrainConfig, data: TrainingData, model: HostModel, num_steps: int) -> Evaluator | None:
    """None without anything to evaluate on."""
    if data.eval_rows is None:
        return None
    return Evaluator(
        model,
        data.eval_rows,
        config,
        num_steps=num_steps,
        pad_id=pad_id(data.tokenizer),
        epochs_done=int(data.loader.epoch),
    )


def _will_save(config: TrainConfig, data: TrainingData) -> bool:
    """Whether the run is long enough for a checkpoint that is due by its steps."""
    num_steps = steps.count_steps(config, data.loader)
    return config.load_best_model_at_end or (
        config.save_strategy != "no" and (config.save_strategy != "steps" or num_steps >= config.save_steps)
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


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> HostModel:
    """The model to train: read, or with random weights and, where not given, the tokenizer's vocabulary."""
    settings = model_settings_of(config)
    if config.model_name_or_path is not None:
        model = load_model_of(config.model_name_or_path, settings)
        if config.new_tokens:
            grow_vocabulary(model, len(tokenizer), config.seed)
        return HostModel(model, settings)
    assert config.init_model is not None  # TrainConfig has seen to it
    fitting = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    values = {**fitting, **config.init_model}
    if config.new_tokens:
        values["vocab_size"] = max(values["vocab_size"], len(tokenizer))
    return HostModel.from_config(values, settings)


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
    config: TrainConfig, data: TrainingData, model: HostModel, end: RunEnd, target: Path
) -> None:
    """What a model folder has beside the model: the tokenizer and a card."""
    _save_tokenizer(data, target)
    card = model_card(
        config.to_dict(),
        model_type=str(model.config.model_type),
        step=end.exported_step,
        num_tokens=end.exported_tokens,
        versions=versions(),
    )
    files.write_file(target / "README.md", card)


def _export_dtype(config: TrainConfig) -> torch.dtype:
    return DTYPES[config.save_dtype or config.dtype]


def _sample(
    config: TrainConfig, folder: RunFolder, data: TrainingData, model: HostModel, progress: Progress
) -> str:
    """What the exported model makes of a prompt, in words; empty where that fails."""
    with _worth_no_failure("no sample completion", progress):
        reason = sample.reason_to_skip(folder.model)
        if reason is not None:
            return f"\nno sample completion: {reason}\n"
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
        return f"\n{describe.completion(made)}\n"
    return ""


@contextmanager
def _worth_no_failure(what: str, progress: Progress) -> Iterator[None]:
    """For extras once the model is trained and saved: whatever goes wrong with them is a warning."""
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
