"""Settings of checkpoints, resuming, and the response to errors in a run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from horizon_lm.config.base import Settings, setting

_GROUP = "Checkpoints and faults"


class CheckpointSettings(Settings):
    """The checkpoint settings of `TrainConfig`."""

    save_strategy: Literal["no", "steps", "epoch", "time"] = setting(
        "steps",
        "When to save a resumable checkpoint: every save_steps steps, after each epoch, every save_minutes "
        "minutes, or never.",
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
        "Also save after the first step, to prove early that saving works.",
        group=_GROUP,
        resume="free",
    )
    save_last: bool | Literal["auto"] = setting(
        "auto",
        "Also save after the last step, so that horizon resume RUN max_steps=N can train further. auto: if "
        "the run is long enough for other checkpoints, or if one takes at most 1 GB. save_strategy: no "
        "saves none.",
        group=_GROUP,
        resume="free",
        expects="true, false or auto",
    )
    save_total_limit: int | None = setting(
        2,
        "Keep this many of the latest checkpoints; null keeps all.",
        group=_GROUP,
        resume="free",
        unit="checkpoints",
        ge=1,
    )
    save_keep_every: int | None = setting(
        None,
        "Also keep every checkpoint whose step is a multiple of this.",
        group=_GROUP,
        resume="free",
        unit="steps",
        ge=1,
    )
    save_in_background: bool = setting(
        True,
        "Write checkpoints while training continues, each layer before its next update.",
        group=_GROUP,
        resume="free",
    )
    save_on_signal: bool = setting(
        True,
        "Save when SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or deadline_minutes stops the run.",
        group=_GROUP,
        resume="free",
    )
    save_patience_seconds: float = setting(
        600.0,
        "How long a step waits for an unresponsive disk before the checkpoint is abandoned.",
        group=_GROUP,
        resume="free",
        unit="seconds",
        gt=0,
    )
    max_failed_saves: int | None = setting(
        3,
        "Consecutive checkpoints that may fail (disk full, read-only, gone) before the run ends; null never"
        " ends it.",
        group=_GROUP,
        resume="free",
        unit="checkpoints",
        ge=0,
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "Checkpoint to resume: its folder, latest (in output_dir), or auto (latest if there is one, else a "
        "new run).",
        group=_GROUP,
        resume="free",
        expects="latest, auto, the path of a checkpoint or a run, or null",
        min_length=1,
    )
    allow_changed_settings: bool = setting(
        False,
        "Resume even if settings that alter results differ from the checkpoint's.",
        group=_GROUP,
        resume="free",
    )
    deadline_minutes: float | None = setting(
        None,
        "Save and stop before the run has taken this long, as on a preemptible machine.",
        group=_GROUP,
        resume="free",
        unit="minutes",
        gt=0,
    )
    loss_spike: Literal["ignore", "warn", "skip", "stop", "rollback"] = setting(
        "ignore",
        "Response to a loss far above recent ones: none, warn, skip the step's update, end the run, or "
        "return to the last checkpoint and continue with the data after the bad step.",
        group=_GROUP,
        resume="free",
    )
    loss_spike_sigmas: float = setting(
        6.0,
        "Spike threshold, in standard deviations above the mean of recent losses.",
        group=_GROUP,
        resume="free",
        gt=0,
    )
    loss_spike_window: int = setting(
        100,
        "Recent losses that count; no loss is a spike until a fifth of them is known.",
        group=_GROUP,
        resume="free",
        unit="steps",
        ge=5,
    )
    max_rollbacks: int = setting(
        3,
        "Rollbacks, for nonfinite and loss_spike: rollback, before the run ends.",
        group=_GROUP,
        resume="free",
        ge=0,
    )
    load_best_model_at_end: bool = setting(
        False,
        "Export the model of the best evaluation. Each new best is saved as a checkpoint and kept in "
        "addition to save_total_limit; save_strategy need not match.",
        group="Evaluation",
        resume="free",
    )
    metric_for_best_model: Literal[
        "eval_loss", "eval_perplexity", "eval_rewards/accuracies", "eval_rewards/margins"
    ] = setting(
        "eval_loss",
        "Metric of the best evaluation, for load_best_model_at_end and early_stopping_patience; those of "
        "rewards are for methods on preferences.",
        group="Evaluation",
        resume="free",
    )
    greater_is_better: bool | None = setting(
        None,
        "Prefer higher values of that metric; null prefers lower ones of loss and perplexity, higher ones of "
        "rewards.",
        group="Evaluation",
        resume="free",
    )
    early_stopping_patience: int | None = setting(
        None,
        "End the run after this many consecutive evaluations that are not better; null never does.",
        group="Evaluation",
        resume="free",
        unit="evaluations",
        ge=1,
    )
    early_stopping_threshold: float = setting(
        0.0,
        "Smallest improvement on the best that counts for early_stopping_patience.",
        group="Evaluation",
        resume="free",
        ge=0,
    )

    @field_validator("metric_for_best_model", mode="before")
    @classmethod
    def _name_metric(cls, value: Any) -> Any:
        """Accept what transformers accepts: names without their prefix, and null for the loss."""
        names = {None: "eval_loss", "loss": "eval_loss", "perplexity": "eval_perplexity"}
        names |= {name: f"eval_{name}" for name in ("rewards/accuracies", "rewards/margins")}
        return names.get(value, value) if value is None or isinstance(value, str) else value
