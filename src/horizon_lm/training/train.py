"""`train`: from settings to a trained model in Hugging Face format, in one visible sequence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from horizon_lm.checkpoint.folder import Checkpoint, RunFolder, check_disk, claim
from horizon_lm.checkpoint.shared import shared_folder
from horizon_lm.config import TrainConfig
from horizon_lm.config.python import ConfigSource, as_train_config
from horizon_lm.data import TrainingData
from horizon_lm.data.rows import Rows
from horizon_lm.data.training_data import pad_id
from horizon_lm.engine.policies import DTYPES
from horizon_lm.io.output import lasting_output
from horizon_lm.memory.arena import keep_freed_memory
from horizon_lm.model.pretrained import quiet_transformers
from horizon_lm.optim import kernel
from horizon_lm.preference.method import Method
from horizon_lm.report.display import Progress, choose_progress
from horizon_lm.report.flops import UNKNOWN, flops_of, measure_peak
from horizon_lm.report.loggers import Loggers
from horizon_lm.report.metrics import Meter, MetricsFile, SilentFile, versions
from horizon_lm.training import describe, prepare
from horizon_lm.training.build import NAMES, build_model, model_without_source, stand_in
from horizon_lm.training.callbacks import Callbacks, CallbackState, check_callbacks
from horizon_lm.training.checkpoint_series import checkpoint_bytes, small_files
from horizon_lm.training.checks import check_factors, check_separation, check_sources, check_together
from horizon_lm.training.describe import TrainResult
from horizon_lm.training.evaluate import Evaluator, evaluate
from horizon_lm.training.finish import conclude, export, save_tokenizer
from horizon_lm.training.log import RunLog
from horizon_lm.training.loop import Run, run_loop
from horizon_lm.training.memory_faults import memory_faults
from horizon_lm.training.pictures import check_model_sees, encode_pictures
from horizon_lm.training.preferences import Preferences, ReferenceOf, without_dropout
from horizon_lm.training.preferences import small_files as reference_files
from horizon_lm.training.ready import Asked, Ready
from horizon_lm.training.restarts import resumed
from horizon_lm.training.resume import about as about_resume
from horizon_lm.training.resume import (
    cut_of,
    find,
    restore,
    wants_own_folder,
    with_chunk_of,
    with_reduction_of,
)
from horizon_lm.training.run_settings import absolute
from horizon_lm.training.save import Saver
from horizon_lm.training.state import Best, RunState
from horizon_lm.training.together import Together, joined
from horizon_lm.training.upload import Upload, prepare_upload


def train(
    config: ConfigSource = None,
    *,
    callbacks: Sequence[object] = (),
    config_notes: Sequence[str] = (),
    **settings: Any,
) -> TrainResult:
    """Train as `config` says and leave the run in its output_dir.

    Args:
        config: a TrainConfig, the path of a YAML file, or a dict of settings.
        callbacks: objects with some of the methods on_step_end, on_log, on_evaluate and on_save, each called
            as method(state, control); see `callbacks`.
        config_notes: remarks on how the settings were read, kept with the metrics.
        **settings: further settings by name, which win, as in train("run.yaml", max_steps=100).

    Raises ConfigError, UnsupportedModelError, DataError, DoesNotFitError, CheckpointError, NonFiniteError,
    CallbackError for an exception in a callback, and StoppedError if a signal or the deadline ended the run.
    Until the first step is done nothing is written, and an earlier run in output_dir is not touched. Raises
    UploadError if the finished model, which is in output_dir, could not be uploaded.

    On several ranks (torchrun, srun, Ray) each of them calls this with the same arguments. Rank 0 speaks,
    writes and calls the callbacks; all ranks return the same result or raise an error of the same kind.
    """
    started = time.monotonic()
    check_callbacks(callbacks)
    found, notes = as_train_config(config, settings)
    with lasting_output(after_pipe=True), joined(found.device) as together:
        return _train(found, [*config_notes, *notes], callbacks, started, together)


def _train(
    config: TrainConfig,
    config_notes: Sequence[str],
    callbacks: Sequence[object],
    started: float,
    together: Together,
) -> TrainResult:
    progress = choose_progress(config.progress) if together.is_first else Progress()
    together.agree("settings", {**config.to_dict(), **versions()})
    config, launchers, is_restarted = resumed(config, together)
    own = is_restarted or wants_own_folder(config)
    with _claimed(config, own, together) as folder, quiet_transformers(), memory_faults(config):
        resume = find(config, folder, progress.warn, together)
        readable, source = stand_in(config, resume)
        together.each("sources", partial(check_sources, readable, folder))
        asked = Asked(config, folder, progress, resume, together, launchers)
        hub = _repository(asked, readable)
        if (slower := kernel.notice()) is not None:
            progress.warn(slower)
            config_notes = [*config_notes, slower]
        ready = _prepare(asked, readable, source)
        with closing(ready.data.loader):
            end = run_loop(_assemble(ready, config_notes, callbacks, started))
        completion = export(ready, end)
    return conclude(ready, end, completion, hub)


@contextmanager
def _claimed(config: TrainConfig, own: bool, together: Together) -> Iterator[RunFolder]:
    """Lock output_dir on rank 0. own: it may hold a run of ours. Raises ConfigError."""
    folder = RunFolder(Path(config.output_dir).expanduser())
    with ExitStack() as held:

        def take() -> None:
            overwrite = config.overwrite_output_dir
            held.enter_context(claim(config.output_dir, overwrite=overwrite, resume=own))

        together.first("output_dir", take)
        shared_folder(together.ranks, folder.path)
        yield folder


def _repository(asked: Asked, config: TrainConfig) -> Upload | None:
    """Make the repository of push_to_hub on rank 0."""
    found: list[Upload] = []
    if config.push_to_hub:
        asked.together.first("push_to_hub", lambda: found.append(prepare_upload(config, asked.progress.warn)))
    return found[0] if found else None


def _prepare(asked: Asked, config: TrainConfig, source: Checkpoint | None) -> Ready:
    """Plan the run, read its data, build its model, and check that they fit each other and the disk.

    config, source: see `stand_in`.
    """
    progress, resume, together = asked.progress, asked.resume, asked.together
    config = with_reduction_of(resume, with_chunk_of(resume, config), together.ranks.world)
    config = together.each("method", partial(prepare.with_method_of_data, config, progress))
    if config.tokens_per_step is None:  # else the planner cuts the step
        prepare.check_share(config, together)
    config, plan, data = prepare.plan_and_read(config, progress, cut_of(resume, config), together)
    prepare.check_share(config, together)
    if not together.is_alone:
        progress.stage(describe.share_of_ranks(config.gradient_accumulation_steps, together.ranks.world))
    together.agree("data", {"data": data.rows.fingerprint, "evaluation data": _fingerprint(data.eval_rows)})
    if resume is None:  # else the checkpoint says by which rule the steps are counted
        num_steps = prepare.count_steps(config, data.loader)
        together.each("learning rates", lambda: prepare.curve(config, data.loader, num_steps))
    reference = ReferenceOf.begin(config, data, resume, progress, together)
    if reference is not None:
        together.alike(reference.before)
    if source is None:
        model = build_model(config, data.tokenizer, together.ranks)
    else:
        model = model_without_source(source, config, together.ranks)
        name = asked.config.model_name_or_path
        progress.stage(f"model_name_or_path={name!r} does not exist; {source.path} replaces it")
    if model.device.type == "cpu":
        keep_freed_memory()
    config = config.replace(**{key: getattr(asked.config, key) for key in NAMES})
    progress.stage(describe.about_model(model))
    together.each("data and model", lambda: check_together(config, data, model))
    together.each("pictures", lambda: check_model_sees(model, (data.rows, data.eval_rows)))
    together.each("factors", lambda: check_factors(config, model))
    together.alike(lambda: check_separation(model, data.rows))
    exported = model.num_exported * DTYPES[config.save_dtype or config.dtype].itemsize
    saved = checkpoint_bytes(model) if _will_save(config, data) else 0
    together.first("disk space", lambda: check_disk(asked.folder, exported, saved))
    preferences = None
    if config.is_preference:
        without_dropout(model)
        found = None if reference is None else together.alike(partial(reference.by, model, source))
        preferences = Preferences(Method(config), found)
    return Ready(asked, config, plan, data, model, preferences)


def _fingerprint(rows: Rows | None) -> str | None:
    return None if rows is None else rows.fingerprint


def _will_save(config: TrainConfig, data: TrainingData) -> bool:
    """Tell whether the run is long enough for a checkpoint that is due by its steps."""
    num_steps = prepare.count_steps(config, data.loader)
    return config.load_best_model_at_end or (
        config.save_strategy != "no" and (config.save_strategy != "steps" or num_steps >= config.save_steps)
    )


def _assemble(ready: Ready, config_notes: Sequence[str], callbacks: Sequence[object], started: float) -> Run:
    """Make the parts of a run, in the state of its checkpoint if it is resumed."""
    asked, config, data, model = ready.asked, ready.config, ready.data, ready.model
    folder, progress, resume, loader = asked.folder, asked.progress, asked.resume, data.loader
    together = asked.together
    meter, peak = _meter(ready)
    state = RunState(config, model, loader, meter, Best(config, folder.path, progress.warn))
    small = small_files(model, partial(save_tokenizer, data))
    if ready.preferences is not None:
        small |= reference_files(ready.preferences.reference)
    found = None
    if resume is not None:
        found = restore(resume, state, small, asked.config, progress.warn, together)
        prepare.count_on(loader, found, state.step)
    # A checkpoint may hold the vision tower.
    encode_pictures(model, (data.rows, data.eval_rows), data.processor, config, together, progress.stage)
    num_steps = meter.num_steps = prepare.count_steps(config, loader)
    rates = prepare.curve(config, loader, num_steps)
    if found is not None:
        about = partial(about_resume, found, asked.config, folder, state.step, num_steps, rates)
        for line in together.each("length", about):
            progress.stage(line)
    remarks = prepare.remarks(config, data, num_steps, rates)
    for remark in remarks:
        progress.warn(remark)
    evaluator = _evaluator(ready, num_steps)
    together.agree("state", {"settings": config.to_dict(), "steps": num_steps, **state.state_dict()})
    notes = [*config_notes, *remarks]
    called = Callbacks(
        callbacks if together.is_first else (), CallbackState(state.step, num_steps, loader.epoch)
    )
    log = _open_log(ready, lambda: describe.header(ready, notes, num_steps, peak), called)
    saver = Saver(
        folder.path,
        state,
        small_files=small,
        report=log.checkpoint,
        started=started,
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
        ready.preferences,
        together,
    )


def _meter(ready: Ready) -> tuple[Meter, float]:
    """Return the meter, and the peak FLOP/s of one device. Only rank 0 measures, for all."""
    asked, config, model = ready.asked, ready.config, ready.model
    flops, peak = UNKNOWN, math.nan
    if asked.together.is_first:
        given = config.peak_tflops
        peak = measure_peak(model.device, model.store.dtype) if given is None else given * 1e12
        flops = flops_of(model, ready.plan.planner.outline.counted if ready.plan is not None else None)
        if flops == UNKNOWN:
            asked.progress.warn(f"no MFU: {model.config.model_type} cannot be run without its weights")
    world = asked.together.ranks.world
    loader = ready.data.loader
    return Meter(model, loader, every=config.logging_steps, flops=flops, peak=peak * world), peak


def _evaluator(ready: Ready, num_steps: int) -> Evaluator | None:
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


def _open_log(ready: Ready, header: Callable[[], dict[str, Any]], callbacks: Callbacks) -> RunLog:
    """Make the log, on rank 0 with its header. The folder becomes this run's when the first step is done."""
    asked = ready.asked
    folder, progress, resume = asked.folder, asked.progress, asked.resume
    if not asked.together.is_first:
        silent = ready.config.replace(report_to=[])
        return RunLog(folder, SilentFile(), Loggers(silent, folder.path, progress.warn), progress, callbacks)
    in_place = resume is not None and resume.in_place
    settings = absolute(asked.config).to_yaml()
    file = MetricsFile(
        folder.metrics,
        begin=lambda: folder.write_settings(settings) if in_place else folder.begin(settings),
        header=header(),
        resumed_at=callbacks.state.step if resume is not None else None,
        warn=progress.warn,
    )
    loggers = Loggers(ready.config, folder.path, progress.warn)
    return RunLog(folder, file, loggers, progress, callbacks)
