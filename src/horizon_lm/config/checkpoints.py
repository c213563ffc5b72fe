"""The settings of checkpoints, of resuming, and of what a run does when something goes wrong."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from horizon_lm.config.base import Settings, setting

_GROUP = "Checkpoints and faults"


class CheckpointSettings(Settings):
    """Part of `TrainConfig`."""

    save_strategy: Literal["no", "steps", "epoch", "time"] = setting(
        "steps",
        "When to save a checkpoint that the run can be resumed from: every save_steps steps, at the end of "
        "each epoch, every save_minutes minutes, or never.",
        group=_GROUP,
        resume="free",
    )
    save_steps: int = setting(
        500,
        "Steps between checkpoints, with save_strategy: steps.",
        group=_GROUP,
        resume="free",
        unit="steps",
        ge=1,
    )
    save_minutes: float = setting(
        30.0,
        "Time between checkpoints, with save_strategy: time.",
        group=_GROUP,
        resume="free",
        unit="minutes",
        gt=0,
    )
    save_first_step: bool = setting(
        False,
        "Save after the first step as well: shows that saving works before hours are spent.",
        group=_GROUP,
        resume="free",
    )
    save_last: bool | Literal["auto"] = setting(
        "auto",
        "Save a checkpoint after the last step too, so that horizon resume RUN max_steps=N can train "
        "further. auto: if the run is long enough for other checkpoints, or if one takes at most 1 GB. "
        "save_strategy: no saves none.",
        group=_GROUP,
        resume="free",
        expects="true, false or auto",
    )
    save_total_limit: int | None = setting(
        2,
        "Keep so many of the latest checkpoints; null keeps all.",
        group=_GROUP,
        resume="free",
        unit="checkpoints",
        ge=1,
    )
    save_keep_every: int | None = setting(
        None,
        "Keep, beside those, every checkpoint whose step is a multiple of this.",
        group=_GROUP,
        resume="free",
        unit="steps",
        ge=1,
    )
    save_in_background: bool = setting(
        True,
        "Write checkpoints while training goes on, each layer before its next update.",
        group=_GROUP,
        resume="free",
    )
    save_on_signal: bool = setting(
        True,
        "Save when the run is stopped by SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or deadline_minutes.",
        group=_GROUP,
        resume="free",
    )
    save_patience_seconds: float = setting(
        600.0,
        "How long a step waits for a disk that does not answer before the checkpoint is given up.",
        group=_GROUP,
        resume="free",
        unit="seconds",
        gt=0,
    )
    max_failed_saves: int | None = setting(
        3,
        "Checkpoints in a row that may fail (disk full, read-only, gone) before the run ends; null goes on "
        "for ever.",
        group=_GROUP,
        resume="free",
        unit="checkpoints",
        ge=0,
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "Go on from a checkpoint: its folder, or latest (of output_dir), or auto (latest if there is one, "
        "else a new run).",
        group=_GROUP,
        resume="free",
        expects="latest, auto, the path of a checkpoint or a run, or null",
        min_length=1,
    )
    allow_changed_settings: bool = setting(
        False,
        "Resume although settings that alter results are not those of the checkpoint.",
        group=_GROUP,
        resume="free",
    )
    deadline_minutes: float | None = setting(
        None,
        "Save and stop in time before the run has taken so long, as when a preemptible machine will be taken "
        "away.",
        group=_GROUP,
        resume="free",
        unit="minutes",
        gt=0,
    )
    loss_spike: Literal["ignore", "warn", "skip", "stop", "rollback"] = setting(
        "ignore",
        "What a loss far above the recent ones does: nothing, a warning, no update for that step, the end of "
        "the run, or going back to the last checkpoint and on with the data after it.",
        group=_GROUP,
        resume="free",
    )
    loss_spike_sigmas: float = setting(
        6.0,
        "How far: standard deviations of the recent losses above their mean.",
        group=_GROUP,
        resume="free",
        gt=0,
    )
    loss_spike_window: int = setting(
        100,
        "How many recent losses count; nothing is a spike before a fifth of them is known.",
        group=_GROUP,
        resume="free",
        unit="steps",
        ge=5,
    )
    max_rollbacks: int = setting(
        3,
        "Times that the run may go back to a checkpoint, for nonfinite and loss_spike: rollback, before it "
        "ends.",
        group=_GROUP,
        resume="free",
        ge=0,
    )
    load_best_model_at_end: bool = setting(
        False,
        "Export the model of the best evaluation. Each new best is saved as a checkpoint, which is kept in "
        "addition to save_total_limit; save_strategy need not fit.",
        group="Evaluation",
        resume="free",
    )
    metric_for_best_model: Literal["eval_loss", "eval_perplexity"] = setting(
        "eval_loss",
        "What the best evaluation is measured by, for load_best_model_at_end and early_stopping_patience.",
        group="Evaluation",
        resume="free",
    )
    greater_is_better: bool | None = setting(
        None,
        "Whether more of that metric is better; null means less is, for loss and perplexity alike.",
        group="Evaluation",
        resume="free",
    )
    early_stopping_patience: int | None = setting(
        None,
        "End the run after this many evaluations in a row that are not better; null never does.",
        group="Evaluation",
        resume="free",
        unit="evaluations",
        ge=1,
    )
    early_stopping_threshold: float = setting(
        0.0,
        "How much better than the best an evaluation must be to count for early_stopping_patience.",
        group="Evaluation",
        resume="free",
        ge=0,
    )

    @field_validator("metric_for_best_model", mode="before")
    @classmethod
    def _name_metric(cls, value: Any) -> Any:
        """transformers allows the names without their prefix, and null for the loss."""
        names = {None: "eval_loss", "loss": "eval_loss", "perplexity": "eval_perplexity"}
        return names.get(value, value) if value is None or isinstance(value, str) else value
