"""All settings of a run, each declared once: name, type, default, unit, meaning.

Names follow transformers' `TrainingArguments`; those of other trainers are aliases (`config.aliases`). Values
are strict: `true` is not a number, `1` is not a boolean; NaN, infinity and unknown keys are rejected. Every
error is a `ConfigError`. This module does not import torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from horizon_lm.config.base import collect, fault, keys_of, setting
from horizon_lm.config.checkpoints import CheckpointSettings
from horizon_lm.config.curves import curve_faults, curve_name
from horizon_lm.config.data import MOST, DataSettings
from horizon_lm.config.data import DatasetConfig as DatasetConfig
from horizon_lm.config.model import ModelSettings as ModelSettings
from horizon_lm.config.preference import PreferenceSettings


class TrainConfig(PreferenceSettings, DataSettings, CheckpointSettings, ModelSettings):
    """The settings of `horizon train`."""

    model_name_or_path: str | None = setting(
        None,
        "Model to train: a folder in Hugging Face format or a Hub name (this or init_model).",
        group="Model",
        resume="ask",
        min_length=1,
    )
    init_model: dict[str, Any] | None = setting(
        None,
        "Transformers configuration, with its model_type, of a model with random weights.",
        group="Model",
        resume="fixed",
        expects="a mapping with model_type, or null",
    )
    tokenizer_name_or_path: str | None = setting(
        None,
        "Folder or name of the tokenizer; null uses the model's.",
        group="Model",
        resume="ask",
        min_length=1,
    )
    train_tokenizer_vocab_size: int | None = setting(
        None,
        "Train a byte-level BPE tokenizer of this size on the data first; needs init_model.",
        group="Model",
        resume="ask",
        unit="tokens",
        ge=257,  # 256 bytes and the end-of-text token
        le=10**7,
    )
    new_tokens: list[str] = setting(
        [],
        "Special tokens to add to the tokenizer. Embeddings that are too small grow; new rows are drawn "
        "around the mean of the old ones, as in transformers' resize_token_embeddings.",
        group="Model",
        resume="fixed",
        expects="a list of different texts, none of them empty",
    )
    per_device_train_batch_size: int = setting(
        1,
        "Sequences in one micro-batch.",
        group="Batch and schedule",
        resume="ask",
        unit="sequences",
        ge=1,
        le=MOST,
    )
    gradient_accumulation_steps: int = setting(
        1,
        "Micro-batches per optimizer step; a layer is uploaded once for all of them.",
        group="Batch and schedule",
        resume="ask",
        unit="micro-batches",
        ge=1,
        le=MOST,
    )
    tokens_per_step: int | Literal["auto"] | None = setting(
        None,
        "Tokens per optimizer step, at most an epoch; the planner cuts them into micro-batches, in place of"
        " per_device_train_batch_size and gradient_accumulation_steps. auto sizes the step to the data: "
        "about 16384 for conversations and pairs and 65536 for text, fewer if a run by epochs would have "
        "less than about 50 steps.",
        group="Batch and schedule",
        resume="ask",
        unit="tokens",
        expects=f"a whole number >= 2 and <= {MOST}, auto or null",
    )
    num_train_epochs: float = setting(
        1.0,
        "Passes over the data, fractions allowed.",
        group="Batch and schedule",
        resume="length",
        unit="epochs",
        gt=0,
        le=1e300,  # times the rows, still a number
    )
    max_steps: int = setting(
        -1,
        "Optimizer steps to train, overriding num_train_epochs; -1 trains num_train_epochs.",
        group="Batch and schedule",
        resume="length",
        unit="steps",
        ge=-1,
        le=MOST,
        expects=f"a whole number >= 1 and <= {MOST}, or -1",
    )
    learning_rate: float = setting(
        1e-5, "Peak learning rate.", group="Batch and schedule", resume="ask", ge=0
    )
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = setting(
        "cosine",
        "Learning-rate curve, by its name in transformers' get_scheduler; wsd is warmup_stable_decay.",
        group="Batch and schedule",
        resume="ask",
    )
    lr_scheduler_kwargs: dict[str, Any] = setting(
        {},
        "Arguments of the curve: min_lr or min_lr_rate for cosine_with_min_lr and cosine_warmup_with_min_lr, "
        "num_decay_steps for warmup_stable_decay, lr_end and power for polynomial, num_cycles for "
        "cosine_with_restarts, timescale for inverse_sqrt.",
        group="Batch and schedule",
        resume="ask",
        expects="a mapping",
    )
    warmup_steps: int | float = setting(
        0.03,
        "Steps in which the learning rate rises from 0; below 1, a share of all steps, rounded up. At most "
        "all steps but the last.",
        group="Batch and schedule",
        resume="ask",
        unit="steps",
        expects="a whole number >= 0, or a share of all steps below 1",
    )
    weight_decay: float = setting(
        0.0, "Weight decay, not applied to biases and norms.", group="Optimizer", resume="ask", ge=0
    )
    max_skipped_steps: int = setting(
        3,
        "Consecutive updates that nonfinite: skip may skip before the run ends.",
        group="Optimizer",
        resume="free",
        unit="steps",
        ge=0,
    )
    output_dir: str = setting(
        "runs/run",
        "Folder for the trained model, metrics and resolved settings.",
        group="Output",
        resume="free",
        min_length=1,
    )
    overwrite_output_dir: bool = setting(
        False, "Allow output_dir to hold an earlier run.", group="Output", resume="free"
    )
    run_name: str | None = setting(None, "Name of the run in its reports.", group="Output", resume="free")
    logging_steps: int = setting(
        1, "Write metrics every N steps.", group="Output", resume="free", unit="steps", ge=1
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml"]] = setting(
        [],
        "Trackers of metrics, in addition to metrics.jsonl.",
        group="Output",
        resume="free",
        expects="a list of tensorboard, wandb, trackio, mlflow and comet_ml",
    )
    project: str = setting(
        "horizon-lm",
        "Project (MLflow: experiment) under which the trackers file the run.",
        group="Output",
        resume="free",
        min_length=1,
    )
    peak_tflops: float | None = setting(
        None,
        "Peak speed of the device, for MFU; null measures a large matrix product in the run's dtype.",
        group="Output",
        resume="free",
        unit="TFLOP/s",
        gt=0,
    )
    plot_loss: bool = setting(
        True, "Save a plot of the loss curve in output_dir.", group="Output", resume="free"
    )
    save_dtype: Literal["bfloat16", "float32"] | None = setting(
        None, "Dtype of the exported model; null uses dtype.", group="Output", resume="free"
    )
    max_shard_size: str = setting(
        "5GB",
        "Largest weight file of the exported model.",
        group="Output",
        resume="free",
        expects="a size such as 5GB or 500MB",
        pattern=r"^[0-9]{0,6}[1-9][0-9]{0,6}(KB|MB|GB|TB)$",
    )
    push_to_hub: bool = setting(
        False,
        "Upload the trained model to the Hugging Face Hub, with the token of HF_TOKEN or `hf auth login`.",
        group="Output",
        resume="free",
    )
    hub_model_id: str | None = setting(
        None,
        "Repository to upload to; a name alone is under your account, null uses the name of output_dir.",
        group="Output",
        resume="free",
        expects="NAME or OWNER/NAME, or null",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$",
    )
    hub_private_repo: bool = setting(
        True,
        "Create the repository of push_to_hub as private.",
        group="Output",
        resume="free",
    )
    sample_prompt: str | None = setting(
        None,
        "Text to complete at the end of the run; null picks a piece of the data.",
        group="Output",
        resume="free",
    )
    sample_max_new_tokens: int = setting(
        64, "Length of that completion.", group="Output", resume="free", unit="tokens", ge=1
    )
    progress: Literal["auto", "rich", "plain", "off"] = setting(
        "auto",
        "Progress display; auto is rich on a terminal, redrawn in place in Jupyter, else plain.",
        group="Output",
        resume="free",
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _list_reports(cls, value: Any) -> Any:
        if value in (None, "none", ["none"]):  # as in transformers
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("lr_scheduler_type", mode="before")
    @classmethod
    def _name_curve(cls, value: Any) -> Any:
        return curve_name(value)

    @field_validator("new_tokens")
    @classmethod
    def _check_new_tokens(cls, value: list[str]) -> list[str]:
        if not all(value) or len(set(value)) < len(value):
            raise ValueError("empty or twice")  # reported with the field's `expects`
        return value

    @field_validator("max_steps")
    @classmethod
    def _check_max_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("no steps")  # reported with the field's `expects`
        return value

    @field_validator("tokens_per_step")
    @classmethod
    def _check_tokens_per_step(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and not 2 <= value <= MOST:
            raise ValueError("too few, or too many")  # reported with the field's `expects`
        return value

    @field_validator("warmup_steps")
    @classmethod
    def _check_warmup(cls, value: int | float) -> int | float:
        if value < 0 or isinstance(value, float) and value >= 1:
            raise ValueError("neither steps nor a share")
        return value

    @property
    def row_tokens(self) -> int:
        """The most tokens in a row: those of a document, or of the two of a pair."""
        return self.sides * self.max_length

    def faults(self) -> Iterator[PydanticCustomError]:
        yield from super().faults()
        yield from self._model_faults()
        yield from curve_faults(self.lr_scheduler_type, self.lr_scheduler_kwargs)
        yield from self._data_faults()
        if self.streaming:
            yield from self._streaming_faults()
        yield from self._round_faults()
        yield from self._best_faults()
        yield from self._fault_policy_faults()
        yield from self.preference_faults()
        if self.is_preference:
            yield from self._sft_only_faults()
        if self.method != "auto":
            yield from self._metric_faults()

    def _sft_only_faults(self) -> Iterator[PydanticCustomError]:
        if self.streaming:
            yield fault(
                f"streaming: true is for method: sft, not {self.method}",
                key="streaming",
                hint="set streaming=false",
            )
        if self.label_smoothing_factor:
            yield fault(
                f"label_smoothing_factor has no effect with method: {self.method}",
                key="label_smoothing_factor",
                hint="leave the key out; label_smoothing is that of preferences",
            )
        if self.lora_dropout:
            yield fault(
                f"lora_dropout has no effect with method: {self.method}, which disables dropout",
                key="lora_dropout",
                hint="leave the key out",
            )

    def _metric_faults(self) -> Iterator[PydanticCustomError]:
        metric = self.metric_for_best_model
        if "rewards" in metric and not self.is_preference:
            yield fault(
                f"{metric} is measured by methods on preferences, not with method: {self.method}",
                key="metric_for_best_model",
                hint="set metric_for_best_model=eval_loss",
            )
        elif metric == "eval_perplexity" and self.is_preference:
            yield fault(
                f"method: {self.method} has a loss of preferences, which has no perplexity",
                key="metric_for_best_model",
                hint="set metric_for_best_model=eval_loss or eval_rewards/margins",
            )
        elif metric == "eval_rewards/accuracies" and self.method == "kto":
            yield fault(
                "method: kto has no pairs, of which eval_rewards/accuracies is a mean",
                key="metric_for_best_model",
                hint="set metric_for_best_model=eval_rewards/margins",
            )

    def _round_faults(self) -> Iterator[PydanticCustomError]:
        rounds, steps = self.rounds, self.gradient_accumulation_steps
        if rounds == "auto" or self.tokens_per_step is not None:  # of which the planner makes micro-batches
            return
        if steps % rounds:
            yield fault(
                f"rounds: {rounds} does not divide gradient_accumulation_steps: {steps}",
                key="rounds",
                hint=f"set rounds={_divisor(steps, rounds)}, or gradient_accumulation_steps="
                f"{-(-steps // rounds) * rounds}",
            )
        elif self.round_sums == "add" and 1 < rounds < steps:
            yield fault(
                f"round_sums: add needs one micro-batch per round, but rounds: {rounds} has "
                f"{steps // rounds} of the {steps} micro-batches in each",
                key="round_sums",
                hint=f"set rounds={steps} or round_sums=host",
            )

    def _best_faults(self) -> Iterator[PydanticCustomError]:
        wants = {
            "load_best_model_at_end": self.load_best_model_at_end,
            "early_stopping_patience": self.early_stopping_patience,
        }
        for key, value in wants.items():
            if value and self.eval_strategy == "no":
                yield fault(
                    f"{key} is {str(value).lower()}, but eval_strategy is no",
                    key=key,
                    hint="set eval_strategy=steps (with eval_steps) or eval_strategy=epoch",
                )

    def _fault_policy_faults(self) -> Iterator[PydanticCustomError]:
        if self.loss_spike == "skip" and self.update_mode == "eager":
            yield fault(
                "loss_spike: skip needs to skip updates that update: eager makes during the backward pass",
                key="loss_spike",
                hint="set update=deferred or loss_spike=rollback",
            )
        rollback = "rollback" in (self.nonfinite, self.loss_spike)
        if rollback and self.save_strategy == "no":
            yield fault(
                "rollback needs checkpoints, but save_strategy is no",
                key="save_strategy",
                hint="set save_strategy=steps",
            )

    def _data_faults(self) -> Iterator[PydanticCustomError]:
        if self.val_size and self.eval_datasets:
            yield fault(
                "'val_size' and 'eval_datasets' are both given", key="val_size", hint="keep one of them"
            )
        if self.eval_strategy != "no" and not (self.val_size or self.eval_datasets):
            yield fault(
                f"eval_strategy is {self.eval_strategy}, but there is no evaluation data",
                key="eval_strategy",
                hint="set eval_datasets, or val_size to hold out part of datasets",
            )
        if self.truncation == "split" and self.loss_on not in ("auto", "all"):
            yield fault(
                f"truncation: split with loss_on: {self.loss_on} would separate answers from their prompts",
                key="truncation",
                hint="set truncation=drop, keep_start or keep_end",
            )

    def _streaming_faults(self) -> Iterator[PydanticCustomError]:
        if self.max_steps < 1:
            yield fault(
                "streaming needs max_steps: the length of a stream is unknown",
                key="streaming",
                hint="set max_steps=1000, say",
            )
        if self.val_size:
            yield fault(
                "val_size is not supported with streaming: true", key="val_size", hint="set eval_datasets"
            )
        if any(dataset.weight != 1 for dataset in self.datasets):
            yield fault(
                "weights of datasets are not supported with streaming: true",
                key="datasets",
                hint="set streaming=false, or weight=1 in datasets",
            )

    def _model_faults(self) -> Iterator[PydanticCustomError]:
        trains_all = not self.has_adapter and not self.freeze and not self.train
        if self.base_dtype in ("int8", "nf4") and trains_all:
            yield fault(
                f"base_dtype: {self.base_dtype} packs frozen weights, and all weights are trained",
                key="base_dtype",
                hint="set adapter=lora, or leave base_dtype out",
            )
        if self.model_name_or_path is None and self.init_model is None:
            yield fault(
                "no model: neither 'model_name_or_path' nor 'init_model' is given",
                key="model_name_or_path",
                hint="model_name_or_path=FOLDER trains an existing model",
            )
        if self.model_name_or_path is not None and self.init_model is not None:
            yield fault(
                "'model_name_or_path' and 'init_model' are both given",
                key="model_name_or_path",
                hint="keep one of them, or set the other to null",
            )
        if self.init_model is not None and self.has_adapter:
            yield fault(
                "an adapter needs a trained base, and init_model creates a model with random weights",
                key="adapter",
                hint="set model_name_or_path=FOLDER instead of init_model",
            )
        if self.new_tokens and self.has_adapter:
            yield fault(
                "new_tokens adds rows to the embedding table, which an adapter leaves frozen",
                key="new_tokens",
                hint="train the whole model (adapter: none), or leave new_tokens out",
            )
        if self.init_model is not None and not isinstance(self.init_model.get("model_type"), str):
            yield fault(
                "init_model has no 'model_type'", key="init_model", hint="for example 'model_type: llama'"
            )
        if self.train_tokenizer_vocab_size is not None and self.init_model is None:
            yield fault(
                "train_tokenizer_vocab_size needs init_model",
                key="train_tokenizer_vocab_size",
                hint="leave it out: an existing model keeps its own tokenizer",
            )
        if self.train_tokenizer_vocab_size is not None and self.tokenizer_name_or_path is not None:
            yield fault(
                "'train_tokenizer_vocab_size' and 'tokenizer_name_or_path' are both given",
                key="train_tokenizer_vocab_size",
                hint="keep one of them, or set the other to null",
            )


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def load_config(
    path: str | os.PathLike[str] | None, overrides: Iterable[str] = ()
) -> tuple[TrainConfig, list[str]]:
    """Read a file (or none) with overrides on top; return settings and one-line notes about aliases."""
    document, notes = collect(path, overrides, keys_of(TrainConfig))
    return TrainConfig.from_document(document), notes


def json_schema() -> str:
    """Return the JSON schema of a configuration file, for editors."""
    schema = TrainConfig.model_json_schema()
    for field in schema["properties"].values():
        del field["resume"]
    return json.dumps(schema, indent=2)
