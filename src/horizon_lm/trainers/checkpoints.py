"""`HorizonCheckpoints`: a Trainer's checkpoints in our format, written in the background, resumed bitwise.

The Trainer still decides when to save and stop, which model is best, and on the name `checkpoint-N`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy, SaveStrategy, rotate_checkpoints
from transformers.utils import PushInProgress, logging

from horizon_lm.checkpoint.export import tokenizer_saver
from horizon_lm.checkpoint.folder import Retention, list_checkpoints, locked, open_checkpoint
from horizon_lm.checkpoint.manifest import NAME as MANIFEST
from horizon_lm.checkpoint.writer import Outcome
from horizon_lm.config import TrainConfig
from horizon_lm.errors import DoesNotFitError
from horizon_lm.host_model import HostModel
from horizon_lm.io import files
from horizon_lm.io.leftovers import OwnedFolder
from horizon_lm.trainers.resumed import Resumed, load, load_weights
from horizon_lm.trainers.trainer_state import (
    ARGUMENTS,
    TRAINER_STATE,
    arguments_file,
    files_of,
    restore_progress,
    restore_schedule,
    state_file,
)
from horizon_lm.training.checkpoint_series import CheckpointSeries, Content, small_files
from horizon_lm.training.resume import load_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_log = logging.get_logger(__name__)  # where Trainer's own messages go
_DEFAULTS = {
    name: TrainConfig.model_fields[name].default for name in ("max_failed_saves", "save_patience_seconds")
}
# Arguments that a checkpoint's manifest keeps, for `horizon export` and `horizon eval`.
_SETTINGS = (
    *("learning_rate", "weight_decay", "max_grad_norm", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "max_steps", "max_length", "seed", "output_dir"),
)
# What a folder has of a model or an adapter.
_OF_MODELS = (
    *("*.safetensors.index.json", "model*.safetensors"),
    *("adapter_config.json", "adapter_model.safetensors"),
)
_STRATEGIES = (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)


class HorizonCheckpoints(_Base):
    """Saving and resuming of a Trainer over `host`. Comes before the trainer's class."""

    host: HostModel
    args: Any
    push_in_progress: Any
    _series: CheckpointSeries | None = None
    _resumed: Resumed | None = None
    _best_before: str | None = None

    # Training.

    def train(
        self,
        resume_from_checkpoint: str | bool | os.PathLike[str] | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as `Trainer.train` does.

        resume_from_checkpoint: a checkpoint, or True for the latest intact one in output_dir. Raises
        CheckpointError if there is none, DoesNotFitError after repeated failures to save.
        """
        with self._saving():
            self._resumed = None
            if resume_from_checkpoint:
                self._resumed = load(resume_from_checkpoint, self.args.output_dir, self.host, _log.warning)
            source = str(self._resumed.path) if self._resumed is not None else None
            return super().train(source, trial, ignore_keys_for_eval)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Hold the folder's lock; finish what is being written at the end, or drop it after Ctrl-C."""
        ended_by: BaseException | None = None
        run = Path(self.args.output_dir)
        run.mkdir(parents=True, exist_ok=True)
        with locked(run):
            try:
                yield
            except BaseException as error:
                ended_by = error
                raise
            finally:
                if self._series is not None:
                    self._series.close(ended_by)

    def _finalize_training(self, *args: Any, **named: Any) -> Any:
        """Finish the last checkpoint, then do as Trainer does."""
        if self._series is not None:
            self._series.finish()
        return super()._finalize_training(*args, **named)

    # Saving.

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if any(kind.__module__.startswith("trl.") for kind in type(self).__mro__):
            name = self.args.hub_model_id or self.args.output_dir
            self.create_model_card(model_name=Path(name).name)
        self.store_flos()
        run = Path(self._get_output_dir(trial=trial))
        run.mkdir(parents=True, exist_ok=True)
        path = run / f"checkpoint-{self.state.global_step}"
        series = self._checkpoints(run)
        series.finish()
        self._note_best(run)
        if self.args.save_only_model:
            self._save_only_model(run, path)
        else:
            series.begin(self._content(), self._retention(run, path), background=self._may_wait())
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(path))

    def _checkpoints(self, run: Path) -> CheckpointSeries:
        if self._series is None or self._series.folder != run:
            self._series = CheckpointSeries(
                run,
                self.host,
                self._saved,
                patience_seconds=_DEFAULTS["save_patience_seconds"],
                replaces=True,
            )
        return self._series

    def _content(self) -> Content:
        settings = {
            "model_name_or_path": getattr(self.host.config, "_name_or_path", None) or None,
            **{name: getattr(self.args, name, None) for name in _SETTINGS},
        }
        state = {
            "trainer": type(self).__name__,
            "steps_done": self.host.steps_done,
            "kept_in_fp32": self.host.kept_in_fp32,
        }
        return Content(
            self.state.global_step,
            {**self.host.settings.to_dict(), **{k: v for k, v in settings.items() if v is not None}},
            state,
            {**small_files(self.host, self._save_processor), **files_of(self)},
            parent=str(self._resumed.path) if self._resumed is not None else None,
        )

    def _may_wait(self) -> bool:
        """Tell whether the checkpoint may be written during the next steps: there are some, and nobody reads
        its files now."""
        is_last = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        reads = any(
            type(callback).on_save is not TrainerCallback.on_save
            for callback in self.callback_handler.callbacks
        )
        return self.is_in_train and not is_last and not reads and not self._pushes

    @property
    def _pushes(self) -> bool:
        return bool(self.args.push_to_hub) and self.args.hub_strategy != HubStrategy.END

    def _note_best(self, run: Path) -> None:
        """Name the checkpoint of the best evaluation, which may be the one about to be written."""
        step = self.state.best_global_step
        if not step or self.args.save_strategy not in _STRATEGIES:
            return
        path = run / f"checkpoint-{step}"
        if step == self.state.global_step or path.is_dir():
            self._best_before = self.state.best_model_checkpoint
            self.state.best_model_checkpoint = os.path.join(str(run), path.name)

    def _retention(self, run: Path, path: Path) -> Retention:
        """Return what save_total_limit keeps: the latest, and the best among as many."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return Retention()
        others = [one.path.name for one in list_checkpoints(run)[0] if one.path != path]
        name = Path(best).name if best is not None else path.name
        if name == path.name or name in others[: limit - 1]:
            return Retention(limit)
        return Retention(max(1, limit - 1), names=frozenset((name,)))

    def _save_only_model(self, run: Path, path: Path) -> None:
        def write_state(folder: Path) -> None:
            files.write_file(folder / TRAINER_STATE, state_file(self))
            self._write_arguments(folder)

        try:
            self.host.save_pretrained(path, tokenizer=self._processor, extra=write_state)
        except DoesNotFitError as error:
            self._saved(Outcome(self.state.global_step, None, error.message, 0, 0.0))
            return
        best = self.state.best_model_checkpoint
        rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)

    def _saved(self, outcome: Outcome) -> None:
        """Note how a checkpoint ended. Raises DoesNotFitError after too many failures in a row."""
        if outcome.error is None:
            return
        _log.warning(f"the checkpoint of step {outcome.step} could not be saved: {outcome.error}")
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).name == f"checkpoint-{outcome.step}":
            self.state.best_model_checkpoint = self._best_before
        failed = self._series.failed_in_a_row if self._series is not None else 0
        if failed > _DEFAULTS["max_failed_saves"]:
            raise DoesNotFitError(
                f"{failed} checkpoints in a row could not be saved; the last: {outcome.error}",
                hint="free disk space, then trainer.train(resume_from_checkpoint=True)",
            )

    # The model as a folder.

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write model, tokenizer and arguments, beside what the folder holds."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        save = self.host.save_pretrained
        if not folder.exists() or not any(folder.iterdir()):
            save(folder, tokenizer=self._processor, extra=self._write_arguments)
            return
        owned = OwnedFolder(".model-", folder)
        try:
            made = owned.path / "model"
            save(made, tokenizer=self._processor, extra=self._write_arguments)
            olds = (path for pattern in _OF_MODELS for path in folder.glob(pattern))
            for old in list(olds):
                files.remove(old)  # the index first: half a model must not look like a whole one
            for file in sorted(made.iterdir(), key=lambda path: path.suffix == ".json"):
                os.replace(file, folder / file.name)
        finally:
            owned.release()

    @property
    def _processor(self) -> Any:
        if self.processing_class is not None:
            return self.processing_class
        return getattr(self.data_collator, "tokenizer", None)

    @property
    def _save_processor(self) -> Callable[[Path], object]:
        return tokenizer_saver(self._processor, self.host.settings.trust_remote_code)

    def _write_arguments(self, folder: Path) -> None:
        files.write_file(folder / ARGUMENTS, arguments_file(self))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the model of now, and the checkpoint if hub_strategy says so."""
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if not self._pushes or running and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._save(self.args.output_dir)
        common = {
            "repo_id": self.hub_model_id,
            "token": self.args.hub_token,
            "revision": self.args.hub_revision,
            "run_as_future": True,
        }
        message = f"Training in progress, step {self.state.global_step}"
        ignored = ["_*", ".*", "checkpoint-*"]
        upload: Any = HfApi().upload_folder
        jobs: Any = [
            upload(
                folder_path=self.args.output_dir, commit_message=message, ignore_patterns=ignored, **common
            )
        ]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_latest = self.args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if is_latest else Path(checkpoint_folder).name
            message = f"{message}, checkpoint"
            jobs.append(
                upload(folder_path=checkpoint_folder, path_in_repo=name, commit_message=message, **common)
            )
        if running:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    # Resuming: `train` has loaded the checkpoint; these put the rest in place when Trainer asks for it.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the weights are loaded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_schedule(self, self._state_of(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_progress(self, self._state_of(checkpoint))

    def _state_of(self, checkpoint: str) -> Mapping[str, Any]:
        assert self._resumed is not None and str(self._resumed.path) == checkpoint
        return self._resumed.state

    def _load_best_model(self) -> None:
        """Load the best model. Raises CheckpointError for a damaged one."""
        path = Path(self.state.best_model_checkpoint or "")
        _log.info(f"Loading best model from {path} (score: {self.state.best_metric}).")
        if not path.is_dir():
            _log.warning(f"the best checkpoint {path} is gone: the model stays as it is")
        elif (path / MANIFEST).is_file():
            load_checkpoint(open_checkpoint(path), self.host)
        else:
            load_weights(path, self.host)
