"""HostModel: a transformers model whose weights, gradients and optimizer state live in host memory.

The handle for people who write their own loop:

    model = HostModel.from_pretrained(folder, device="cuda", dtype="bfloat16")
    out = model.train_step([{"input_ids": ids, "labels": ids}], lr=1e-5)
    model.save_pretrained("tuned")

or, to look at the gradients in between, `forward_backward` and `step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..config import ModelSettings
from ..engine.engine import Engine
from ..engine.lanes import Span, choose_lanes
from ..engine.loss import LossFunction
from ..engine.policies import DTYPES, store_spec
from ..engine.saving import Saving
from ..engine.step import MicroBatch, Step
from ..errors import ConfigError, NonFiniteError
from ..memory.arena import keep_freed_memory
from ..memory.layout import lay_out
from ..memory.store import HostStore
from ..model.loading import count_parameters, create_model, fill_store, load_model
from ..model.skeleton import Skeleton
from ..optim.groups import check_patterns, group_rule, segments
from ..optim.optimizer import Optimizer, UpdateSettings
from ..plan.preflight import check_host_memory
from .device import resolve_device
from .export import save_model
from .micro_batches import check_micro_batches
from .outputs import EvaluationOutput, ForwardBackwardOutput, StepOutput, TrainStepOutput


class _Default(Enum):
    """Stands for a setting that a call leaves as it is."""

    SETTING = "the setting"


class HostModel:
    """Built by `from_pretrained` or `from_config`. Not safe to use from several threads at once."""

    def __init__(self, model: nn.Module, settings: ModelSettings) -> None:
        """model: a transformers model in host memory. It is consumed: its parameters move into the
        store, and the object is left as a skeleton without memory."""
        self.settings = settings
        self.device = resolve_device(settings.device)
        self.skeleton = Skeleton(model, DTYPES[settings.dtype])
        if settings.mlp_tile_tokens is not None:
            self.skeleton.tile_mlps(settings.mlp_tile_tokens)
        self.optimizer = make_optimizer(self.skeleton, settings)
        units, spec = self.skeleton.units, store_spec(settings, self.skeleton)
        if not settings.skip_memory_check:
            check_host_memory(units, spec, reserve_bytes=int(settings.reserve_host_gb * 1e9))
        self.store = HostStore(units, spec, pin=self.device.type == "cuda")
        self.skeleton.place_buffers(self.device)
        fill_store(self.skeleton, self.store)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.engine = Engine(
            self.skeleton,
            self.store,
            self.optimizer,
            self.device,
            choose_lanes(settings.lanes, self.device, settings.seed),
            settings,
        )
        self.steps_done = 0
        self._has_gradients = False

    @classmethod
    def from_pretrained(
        cls, source: str | Path | nn.Module, device: str = "auto", dtype: Any = "bfloat16", **settings: Any
    ) -> HostModel:
        """Load a Hugging Face folder or name, or consume a transformers model object.

        settings: configuration keys of the same names (docs/configuration.md). Masters keep the
        precision of the source: an fp32 checkpoint gives fp32 masters whatever `dtype` is.
        Raises ConfigError, UnsupportedModelError, DoesNotFitError, DataError.
        """
        values = {"device": device, "dtype": dtype, **settings}
        resolved = ModelSettings.from_dict(values, source="HostModel.from_pretrained")
        model = load_model(
            source,
            trust_remote_code=resolved.trust_remote_code,
            revision=resolved.model_revision,
            attn_implementation=resolved.attn_implementation,
        )
        return cls(model, resolved)

    @classmethod
    def from_config(cls, values: dict[str, Any], settings: ModelSettings) -> HostModel:
        """A model with random weights (settings.seed) from the values of a transformers configuration."""
        dtype = DTYPES[settings.dtype]
        if not settings.skip_memory_check:  # before the source model takes its own share
            whole = lay_out("all", [("all", (count_parameters(values),), True, dtype)], dtype)
            # The slabs of eager updates are as large as a layer, which is not known yet.
            spec = store_spec(settings, None)
            check_host_memory([whole], spec, reserve_bytes=int(settings.reserve_host_gb * 1e9))
            settings = settings.replace(skip_memory_check=True)
        model = create_model(
            values, dtype=dtype, seed=settings.seed, attn_implementation=settings.attn_implementation
        )
        return cls(model, settings)

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.skeleton.config

    @property
    def num_parameters(self) -> int:
        return sum(p.numel for unit in self.store.units for p in unit.parameters)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_fn: LossFunction | None = None,
        *,
        record: bool = False,
    ) -> ForwardBackwardOutput:
        """Gradients of the mean loss over all target tokens of all micro-batches of a step.

        micro_batches: dicts of input_ids and labels [batch, tokens] (int64, labels aligned with
        input_ids, -100 ignored), and optionally attention_mask and position_ids of that shape; with
        `loss_fn` any other tensors too.
        loss_fn: called for each micro-batch as loss_fn(log_probs, batch), with log p(label) in fp32
        [batch, tokens - 1] on the device, aligned with labels[:, 1:] and 0 where ignored. It returns a
        scalar, or a pair of it and a dict of metrics; the step's loss is the sum over its micro-batches.
        A second call before `step` replaces the gradients of the first.
        record: keep what ran when in `timeline`.
        Raises DataError for micro-batches that cannot be trained on, ConfigError with eager updates.
        """
        if self.settings.update_mode == "eager":
            raise ConfigError(
                "update: eager updates layers during the backward pass, so their gradients are never "
                "together: forward_backward() and step() are one call",
                hint="train_step(micro_batches, lr=...), or update='deferred'",
            )
        return _output(self._forward_backward(micro_batches, loss_fn, None, record))

    def _forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_fn: LossFunction | None,
        update: UpdateSettings | None,
        record: bool,
    ) -> Step:
        batches = check_micro_batches(micro_batches, self.skeleton, extra=bool(loss_fn))
        self._has_gradients = False
        step = self.engine.forward_backward(
            batches, self.steps_done, update=update, loss_fn=loss_fn, record=record
        )
        self._has_gradients = True
        return step

    def step(
        self,
        lr: float,
        max_grad_norm: float | None | Literal[_Default.SETTING] = _Default.SETTING,
        weight_decay: float = 0.0,
        *,
        record: bool = False,
    ) -> StepOutput:
        """Clip the gradients by their global norm and update all trainable parameters.

        max_grad_norm: None or 0 turns clipping off; by default that of the settings. With `update:
        deferred` the update itself runs during the next forward_backward, or when parameters are read.
        Raises NonFiniteError, with nothing updated, when the norm is NaN or infinite.
        """
        if not self._has_gradients:
            raise ConfigError(
                "step() was called without gradients", hint="call forward_backward() before each step()"
            )
        settings = self._update_settings(lr, max_grad_norm, weight_decay)
        norm = self.engine.measure_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient norm of step {self.steps_done + 1} is {norm}; nothing was updated",
                hint="lower learning_rate, check the data, or set nonfinite: skip",
            )
        self.engine.update(settings, record=record)
        self.steps_done += 1
        self._has_gradients = False
        return StepOutput(norm)

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        lr: float,
        max_grad_norm: float | None | Literal[_Default.SETTING] = _Default.SETTING,
        weight_decay: float = 0.0,
        *,
        loss_fn: LossFunction | None = None,
        record: bool = False,
        check: Callable[[float, int], None] | None = None,
    ) -> TrainStepOutput:
        """`forward_backward` and `step` in one call, in every update mode.

        check: called with the loss and its number of tokens; what it raises leaves the update out (with
        `update: eager` it comes too late for that).

        Raises NonFiniteError when the loss or the gradient norm is not finite. Nothing has been
        updated then, unless `update: eager` met a gradient that is not finite under a loss that is: the
        error says so (`state_intact`), and the state is that of no step.
        """
        settings = self._update_settings(lr, max_grad_norm, weight_decay)
        eager = self.settings.update_mode == "eager"
        step = self._forward_backward(micro_batches, loss_fn, settings if eager else None, record)
        out = _output(step)
        if eager:
            norm = self._finish_eager(step, out, settings, record)
            if check is not None:
                check(out.loss, out.num_tokens)
        else:
            self._has_gradients = False  # of a step that is not learned from
            if not math.isfinite(out.loss):
                raise self._not_finite(f"the loss of step {self.steps_done + 1} is {out.loss}", out)
            if check is not None:
                check(out.loss, out.num_tokens)
            norm = self.engine.measure_norm()
            if not math.isfinite(norm):
                raise self._not_finite(
                    f"the gradient norm of step {self.steps_done + 1} is {norm}", out, norm
                )
            self.engine.update(settings, record=record)
        self.steps_done += 1
        return TrainStepOutput(out.loss, out.num_tokens, out.metrics, norm)

    def _finish_eager(
        self, step: Step, out: ForwardBackwardOutput, settings: UpdateSettings, record: bool
    ) -> float:
        self._has_gradients = False
        assert step.update is not None
        norm = self.engine.measure_norm()
        if step.update.stopped_at is not None:
            what = "loss" if not math.isfinite(out.loss) else "gradient norm"
            value = out.loss if what == "loss" else norm
            raise self._not_finite(f"the {what} of step {self.steps_done + 1} is {value}", out, norm, step)
        self.engine.update(settings, record=record)
        return norm

    def _not_finite(
        self, what: str, out: ForwardBackwardOutput, norm: float = math.nan, step: Step | None = None
    ) -> NonFiniteError:
        """The error, with what the step found; `step`: one of eager updates, some of which may be done."""
        done = 0
        if step is not None and step.update is not None:
            done = len(self.engine.trainable) - len(step.update.left)
        hint = "look for NaN in the model's weights, lower learning_rate, or set nonfinite: skip"
        after = "nothing was updated"
        if done:
            after = f"{done} of {len(self.engine.trainable)} layers had been updated already (update: eager)"
            hint = "load the last saved model; update: deferred finds this before any update"
        error = NonFiniteError(f"{what}; {after}", hint=hint)
        error.loss, error.grad_norm, error.num_tokens = out.loss, norm, out.num_tokens
        error.state_intact = not done
        return error

    def _update_settings(
        self, lr: float, max_grad_norm: float | None | _Default, weight_decay: float
    ) -> UpdateSettings:
        limit = self.settings.max_grad_norm if isinstance(max_grad_norm, _Default) else max_grad_norm
        if limit and self.settings.update_mode == "eager":
            raise ConfigError(
                f"max_grad_norm={limit} with update: eager, which updates layers before the norm is known",
                hint="update='deferred' clips exactly, and overlaps the updates with the next forward pass",
            )
        return UpdateSettings(self.steps_done + 1, lr, limit, weight_decay)

    def flush(self) -> None:
        """Make the updates that `update: deferred` has put off; done by itself wherever parameters are
        read through this object."""
        self.engine.flush()

    def evaluate(
        self, micro_batches: Sequence[MicroBatch], *, return_log_probs: bool = False, record: bool = False
    ) -> EvaluationOutput:
        """Mean cross-entropy over all target tokens, by a forward pass without dropout or gradients.

        micro_batches: as in `forward_backward`. Does not disturb the gradients of a step that is not
        finished. Raises DataError for micro-batches that have no target at all.
        """
        batches = check_micro_batches(micro_batches, self.skeleton)
        step = self.engine.evaluate(batches, record=record)
        log_probs = [step.log_probs[m].cpu() for m in range(len(batches))] if return_log_probs else None
        return EvaluationOutput(step.loss, step.num_tokens, log_probs)

    def take_notes(self) -> list[str]:
        """What the engine changed since the last call of what the settings ask for, and why; empty for
        nearly all steps. Once called, such notes are not logged any more."""
        engine = self.engine
        engine.logs_notes = False
        notes, engine.notes = engine.notes, []
        return notes

    @property
    def timeline(self) -> list[Span]:
        """(op, start, end) in seconds of the last calls made with record=True."""
        return self.engine.spans

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, gradient) of each trainable parameter: views into the store, in its
        dtype, valid until the next forward_backward. Raises ConfigError with eager updates, which
        keep none."""
        if self.settings.update_mode == "eager":
            raise ConfigError("update: eager keeps no gradients", hint="update='deferred'")
        for unit in self.store.units:
            for parameter in unit.trainable:
                yield parameter.name, self.store.gradient(parameter.name)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, fp32 master) of each parameter, a new tensor each, one at a time."""
        self.flush()
        for name in self.store.names():
            yield name, self.store.master(name)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: str | None = None,
        max_shard_size: str = "5GB",
        extra: Callable[[Path], None] | None = None,
    ) -> None:
        """Write a Hugging Face folder (safetensors, config, generation config); whole or absent.

        dtype: bfloat16 or float32, default the compute dtype. Written straight from the store.
        extra: writes further files (the tokenizer) into the folder before it is put in place.
        """
        self.flush()
        save_model(
            self.skeleton, self.store, Path(folder), dtype=dtype, max_shard_size=max_shard_size, extra=extra
        )

    def save_state(self, saving: Saving, *, background: bool = False) -> None:
        """Hand every unit's weights and optimizer state, as of the last step, to `saving`.

        background: while the next steps run. Else all is done when this returns.
        """
        self.engine.save(saving, background=background)

    @property
    def kept_in_fp32(self) -> list[str]:
        """Parameters that are computed with in fp32 although the model is bf16, as transformers wants it."""
        parameters = [p for unit in self.store.units for p in unit.parameters]
        return [p.name for p in parameters if p.compute_dtype != self.store.dtype]

    @property
    def is_saving(self) -> bool:
        """Whether a state is still on its way to the disk."""
        return not self.engine.lanes.disk.is_idle

    def finish_saving(self) -> None:
        """Wait for the disk. Raises what went wrong there, but for what `saving` keeps to itself."""
        self.engine.lanes.disk.drain()

    def state_was_replaced(self, steps_done: int) -> None:
        """Say that the store now holds the state after `steps_done` updates."""
        self.engine.forget()
        self.steps_done, self._has_gradients = steps_done, False

    def memory_bytes(self) -> dict[str, int]:
        """Bytes by part: host regions of the store and spilled boundaries; slots on the device."""
        return {
            **self.store.num_bytes,
            "weight_slots": self.engine.weight_slots.num_bytes,
            "gradient_slots": self.engine.gradient_slots.num_bytes,
            "boundary_slots": self.engine.boundary_slots.num_bytes,
            "boundaries": self.engine.boundary_slots.host_bytes,
        }


def _output(step: Step) -> ForwardBackwardOutput:
    return ForwardBackwardOutput(step.loss, step.num_tokens, step.metrics)


def make_optimizer(skeleton: Skeleton, settings: ModelSettings) -> Optimizer:
    """Raises ConfigError for a pattern of lr_factors that fits nothing."""
    trainable = [p.name for unit in skeleton.units for p in unit.trainable]
    check_patterns(settings.lr_factors, trainable)
    rule = group_rule(
        settings.lr_factors,
        decay_embeddings=settings.decay_embeddings,
        is_embedding=skeleton.is_embedding,
    )
    return Optimizer(
        settings.optim,
        settings.adam_beta1,
        settings.adam_beta2,
        settings.adam_epsilon,
        settings.sgd_momentum,
        settings.seed,
        tuple(segments(unit, rule) for unit in skeleton.units),
        None if settings.optimizer_threads == "auto" else settings.optimizer_threads,
    )
