"""HostModel: a transformers model whose weights, gradients and optimizer state live in host memory.

The handle for people who write their own loop:

    model = HostModel.from_pretrained(folder, device="cuda", dtype="bfloat16")
    out = model.train_step([{"input_ids": ids, "labels": ids}], lr=1e-5)
    model.save_pretrained("tuned")

or, to look at the gradients in between, `forward_backward` and `step`.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from horizon_lm.checkpoint.export import check_target, choose_dtype, save_model, tokenizer_saver
from horizon_lm.config import ModelSettings
from horizon_lm.config.python import model_settings
from horizon_lm.engine.engine import Engine
from horizon_lm.engine.lanes import Span, choose_lanes
from horizon_lm.engine.loss import LossFunction
from horizon_lm.engine.policies import DTYPES, store_spec
from horizon_lm.engine.saving import Saving
from horizon_lm.engine.step import Step
from horizon_lm.engine.turns import in_turn
from horizon_lm.errors import ConfigError, NonFiniteError, TornStateError
from horizon_lm.machine.device import resolve_device
from horizon_lm.memory.arena import keep_freed_memory, return_free_memory
from horizon_lm.memory.layout import lay_out
from horizon_lm.memory.preflight import check_host_memory
from horizon_lm.memory.store import HostStore
from horizon_lm.micro_batches import MicroBatches, check_micro_batches
from horizon_lm.model.consumed import Closed, check_model, refuse_use, take_over
from horizon_lm.model.loading import count_parameters, create_model, fill_store, freeze, load_model
from horizon_lm.model.pretrained import Allowed, check_has_weights
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.optim.checks import Number, finite_number
from horizon_lm.optim.groups import check_patterns, group_rule, segments
from horizon_lm.optim.optimizer import Optimizer, UpdateSettings
from horizon_lm.outputs import EvaluationOutput, ForwardBackwardOutput, StepOutput, TrainStepOutput
from horizon_lm.words import count, parameters, size

_log = logging.getLogger(__name__)


class _Default(Enum):
    """Stands for a setting that a call leaves as it is."""

    SETTING = "the setting"


class HostModel:
    """Built by `from_pretrained` or `from_config`.

    An error from a call, Ctrl-C included, leaves the state before the step or the one after it
    (`steps_done` says which), and that can be evaluated, saved and trained on. The exception is `update:
    eager`, where some layers may have been updated and others not: the error says so, and what would go on
    from such a state or save it raises TornStateError, unless with `force=True`.
    Calls from several threads take turns; from within a step (a `loss_fn`) they are refused.
    As a context manager it gives its memory back at the end (`close`).
    """

    def __init__(self, model: nn.Module, settings: ModelSettings) -> None:
        """model: a transformers model in host memory. It is consumed: its parameters move into the
        store, and the object answers with an error when it is used again."""
        check_model(model)
        self.settings = settings
        self.device = resolve_device(settings.device)
        check_has_weights(model)
        freeze(model, settings.freeze)
        self.skeleton = Skeleton(take_over(model), DTYPES[settings.dtype])
        self.skeleton.neftune_noise_alpha = settings.neftune_noise_alpha
        if settings.mlp_tile_tokens is not None:
            self.skeleton.tile_mlps(settings.mlp_tile_tokens)
        self.optimizer = make_optimizer(self.skeleton, settings)
        units, spec = self.skeleton.units, store_spec(settings, self.skeleton)
        if not settings.skip_memory_check:
            check_host_memory(units, settings, lambda other: store_spec(other, self.skeleton))
        self.store = HostStore(units, spec, pin=self.device.type == "cuda")
        self.skeleton.place_buffers(self.device)
        refuse_use(model)
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
        self._turn = threading.RLock()
        self._warned_of = ""

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | nn.Module,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "bfloat16",
        **settings: Any,
    ) -> HostModel:
        """Load a Hugging Face folder or name, or consume a transformers model object.

        settings: configuration keys of the same names (docs/configuration.md). Masters keep the
        precision of the source: an fp32 checkpoint gives fp32 masters whatever `dtype` is.
        Raises ConfigError, UnsupportedModelError, DoesNotFitError, DataError.
        """
        resolved = model_settings("HostModel.from_pretrained()", device, dtype, settings)
        if isinstance(source, nn.Module):
            check_model(source)
        elif isinstance(source, os.PathLike):
            source = Path(source)
        elif not isinstance(source, str):
            raise ConfigError(
                f"HostModel.from_pretrained(): a {type(source).__name__} is not a model",
                hint="pass a folder, a name on the Hub, or a transformers model object",
            )
        return cls(load_model_of(source, resolved), resolved)

    @classmethod
    def from_config(
        cls,
        values: Any,
        settings: ModelSettings | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "bfloat16",
        **more: Any,
    ) -> HostModel:
        """A model with random weights (by `seed`).

        values: a transformers configuration, or its values as a mapping with `model_type`. settings: all
        at once, in place of device, dtype and the others. Raises as `from_pretrained` does.
        """
        if not isinstance(values, Mapping):
            if not hasattr(values, "to_dict"):
                raise ConfigError(
                    f"HostModel.from_config(): a {type(values).__name__} is not a configuration",
                    hint="pass a transformers configuration, or a dict with model_type",
                )
            values = values.to_dict()
        if settings is None:
            settings = model_settings("HostModel.from_config()", device, dtype, more)
        elif more:
            raise ConfigError(
                f"HostModel.from_config(): settings and {', '.join(more)} are both given",
                hint="pass one or the other",
            )
        values, computes_in = dict(values), DTYPES[settings.dtype]
        if not settings.skip_memory_check:  # before the source model takes its own share
            trained, frozen = count_parameters(values, settings.freeze)
            rows = [("trained", (trained,), True, computes_in), ("frozen", (frozen,), False, computes_in)]
            whole = lay_out("all", rows, computes_in)
            # The slabs of eager updates are as large as a layer, which is not known yet.
            check_host_memory([whole], settings, lambda other: store_spec(other, None))
            settings = settings.replace(skip_memory_check=True)
        model = create_model(
            values, dtype=computes_in, seed=settings.seed, attn_implementation=settings.attn_implementation
        )
        return cls(model, settings)

    def __repr__(self) -> str:
        if isinstance(self.store, Closed):
            return f"HostModel({self.skeleton.model_type}, closed)"
        return describe_model(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back, once what is being saved is on the disk. What was not saved is lost."""
        if isinstance(self.store, Closed):
            return
        self._close()
        gc.collect()  # the engine's table of functions refers to it
        return_free_memory()

    @in_turn
    def _close(self) -> None:
        self.engine.lanes.disk.drain()
        closed: Any = Closed()
        closed.steps_done = self.steps_done
        self.store = self.engine = self.optimizer = closed

    @property
    def steps_done(self) -> int:
        """Updates so far: those that are made, and those that are before anybody can read the weights."""
        return self.engine.steps_done

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.skeleton.config

    @property
    def num_parameters(self) -> int:
        return sum(p.numel for unit in self.store.units for p in unit.parameters)

    @in_turn
    def forward_backward(
        self,
        micro_batches: MicroBatches,
        loss_fn: LossFunction | None = None,
        *,
        record: bool = False,
        force: bool = False,
    ) -> ForwardBackwardOutput:
        """Gradients of the mean loss over all target tokens of all micro-batches of a step.

        micro_batches: dicts of input_ids and labels [batch, tokens] (whole numbers, labels aligned with
        input_ids, -100 ignored), and optionally attention_mask and position_ids of that shape; with
        `loss_fn` any other tensors too. One dict (a BatchEncoding), a list or any iterable of them (a
        DataLoader); values are tensors on any device, numpy arrays or nested lists.
        loss_fn: called for each micro-batch as loss_fn(log_probs, batch), with log p(label) in fp32
        [batch, tokens - 1] on the device, aligned with labels[:, 1:] and 0 where ignored. It returns a
        scalar, or a pair of it and a dict of metrics; the step's loss is the sum over its micro-batches.
        A second call before `step` replaces the gradients of the first.
        record: keep what ran when in `timeline`. force: go on from weights that are those of no step.
        Raises DataError for micro-batches that cannot be trained on, ConfigError with eager updates,
        TornStateError for weights of no step.
        """
        if self.settings.update_mode == "eager":
            raise ConfigError(
                "update: eager updates layers during the backward pass, so their gradients are never "
                "together: forward_backward() and step() are one call",
                hint="train_step(micro_batches, lr=...), or update='deferred'",
            )
        self._refuse_torn("forward_backward()", force)
        return _output(self._forward_backward(micro_batches, loss_fn, record=record))

    def _forward_backward(
        self,
        micro_batches: MicroBatches,
        loss_fn: LossFunction | None,
        update: UpdateSettings | None = None,
        *,
        record: bool,
        ends_itself: bool = False,
    ) -> Step:
        if loss_fn is not None and not callable(loss_fn):
            raise ConfigError(
                f"loss_fn is a {type(loss_fn).__name__}, not a function",
                hint="pass a function of (log_probs, batch) that returns a scalar tensor",
            )
        if loss_fn is not None and self.settings.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor={self.settings.label_smoothing_factor:g} has no effect on a loss_fn "
                "of your own, which receives the log-probability of each target only",
                hint="label_smoothing_factor=0",
            )
        batches = check_micro_batches(micro_batches, self.skeleton, extra=loss_fn is not None)
        return self.engine.forward_backward(
            batches, update=update, loss_fn=loss_fn, record=record, ends_itself=ends_itself
        )

    @in_turn
    def step(
        self,
        lr: Number,
        max_grad_norm: Number | None | Literal[_Default.SETTING] = _Default.SETTING,
        weight_decay: Number = 0.0,
        *,
        record: bool = False,
    ) -> StepOutput:
        """Clip the gradients by their global norm and update all trainable parameters.

        lr, weight_decay: numbers, or tensors of one element, finite and at least 0. max_grad_norm: so too;
        None or 0 turns clipping off; by default that of the settings. With `update: deferred` the update
        itself runs during the next forward_backward, or when parameters are read.
        Raises ConfigError for a number that cannot be used, and NonFiniteError when the norm is NaN or
        infinite; nothing is updated then.
        """
        step = self.engine.gradients
        if step is None:
            raise ConfigError(
                "step() was called without gradients", hint="call forward_backward() before each step()"
            )
        settings = self._update_settings("step()", lr, max_grad_norm, weight_decay)
        norm = self.engine.norm_of(step)
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient norm of step {self.steps_done + 1} is {norm}; nothing was updated",
                hint="lower learning_rate, check the data, or set nonfinite: skip",
            )
        self.engine.update(step, settings, record=record)
        return StepOutput(norm)

    @in_turn
    def train_step(
        self,
        micro_batches: MicroBatches,
        lr: Number,
        max_grad_norm: Number | None | Literal[_Default.SETTING] = _Default.SETTING,
        weight_decay: Number = 0.0,
        *,
        loss_fn: LossFunction | None = None,
        record: bool = False,
        check: Callable[[float, int], None] | None = None,
        force: bool = False,
    ) -> TrainStepOutput:
        """`forward_backward` and `step` in one call, in every update mode.

        check: called with the loss and its number of tokens; what it raises leaves the update out (with
        `update: eager` it comes too late for that). It may evaluate, read and save, but not train.
        force: go on from weights that are those of no step.

        Raises NonFiniteError when the loss or the gradient norm is not finite. Nothing has been
        updated then, unless `update: eager` met a gradient that is not finite under a loss that is: the
        error says so (`state_intact`), and the state is that of no step. Raises TornStateError for such a
        state.
        """
        settings = self._update_settings("train_step()", lr, max_grad_norm, weight_decay)
        self._refuse_torn("train_step()", force)
        eager = self.settings.update_mode == "eager"
        step = self._forward_backward(
            micro_batches, loss_fn, settings if eager else None, record=record, ends_itself=True
        )
        out = _output(step)
        if eager:
            norm = self._finish_eager(step, out, settings, record)
            if check is not None:
                check(out.loss, out.num_tokens)
        else:
            if not math.isfinite(out.loss):
                raise self._not_finite(f"the loss of step {self.steps_done + 1} is {out.loss}", out)
            if check is not None:
                check(out.loss, out.num_tokens)
                self._see_gradients_of(step)
            norm = self.engine.norm_of(step)
            if not math.isfinite(norm):
                raise self._not_finite(
                    f"the gradient norm of step {self.steps_done + 1} is {norm}", out, norm
                )
            self.engine.update(step, settings, record=record)
        return TrainStepOutput(out.loss, out.num_tokens, out.metrics, norm)

    def _see_gradients_of(self, step: Step) -> None:
        if not self.engine.holds_gradients_of(step):
            raise ConfigError(
                "train_step(check=...): check trained the model, and the gradients of the step that it was "
                "to check are gone",
                hint="train after train_step() has returned; what check raises leaves an update out",
            )

    def _finish_eager(
        self, step: Step, out: ForwardBackwardOutput, settings: UpdateSettings, record: bool
    ) -> float:
        assert step.update is not None
        norm = self.engine.norm_of(step)
        if step.update.stopped_at is not None:
            what = "loss" if not math.isfinite(out.loss) else "gradient norm"
            value = out.loss if what == "loss" else norm
            raise self._not_finite(f"the {what} of step {self.steps_done + 1} is {value}", out, norm, step)
        self.engine.update(step, settings, record=record)
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

    def _update_settings(self, where: str, lr: Any, max_grad_norm: Any, weight_decay: Any) -> UpdateSettings:
        """Everything an update depends on, checked before anything is computed or put off."""
        lr = finite_number(where, "lr", lr, hint="lr=1e-5 is a usual learning rate")
        weight_decay = finite_number(where, "weight_decay", weight_decay, hint="weight_decay=0 turns it off")
        limit = self.settings.max_grad_norm if isinstance(max_grad_norm, _Default) else max_grad_norm
        if isinstance(limit, float) and limit == math.inf:
            limit = None  # as in torch.nn.utils.clip_grad_norm_
        if limit is not None:
            hint = "max_grad_norm=None turns clipping off, 1.0 is a usual limit"
            limit = finite_number(where, "max_grad_norm", limit, hint=hint)
        if limit and self.settings.update_mode == "eager":
            raise ConfigError(
                f"max_grad_norm={limit} with update: eager, which updates layers before the norm is known",
                hint="update='deferred' clips exactly, and overlaps the updates with the next forward pass",
            )
        settings = UpdateSettings(self.steps_done + 1, lr, limit, weight_decay)
        self.optimizer.check(settings)
        return settings

    def _refuse_torn(self, where: str, force: bool) -> None:
        """Raises TornStateError where the weights are those of no step."""
        torn = self.engine.torn
        if torn is not None and not force:
            raise TornStateError(
                f"{where}: the weights are those of no step: {torn}",
                hint="load the last saved model; force=True takes the weights as they are",
            )

    def _warn_of_torn(self, where: str) -> None:
        """Once for each such state: it can be looked at."""
        torn = self.engine.torn
        if torn is not None and torn != self._warned_of:
            self._warned_of = torn
            _log.warning("%s: the weights are those of no step: %s", where, torn)

    @in_turn
    def flush(self) -> None:
        """Make the updates that `update: deferred` has put off; done by itself wherever parameters are
        read through this object."""
        self.engine.flush()

    @in_turn
    def evaluate(
        self, micro_batches: MicroBatches, *, return_log_probs: bool = False, record: bool = False
    ) -> EvaluationOutput:
        """Mean cross-entropy over all target tokens, by a forward pass without dropout or gradients.

        micro_batches: as in `forward_backward`. Does not disturb the gradients of a step that is not
        finished. Raises DataError for micro-batches that have no target at all.
        """
        self._warn_of_torn("evaluate()")
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
        dtype, valid until the next forward_backward. Raises ConfigError where there are none, or of a
        step that was cut short, and with eager updates, which keep none."""
        if self.settings.update_mode == "eager":
            raise ConfigError("update: eager keeps no gradients", hint="update='deferred'")
        if not self.engine.holds_gradients:
            raise ConfigError(
                "named_gradients() was called without gradients", hint="call forward_backward() before it"
            )
        for unit in self.store.units:
            for parameter in unit.trainable:
                yield parameter.name, self.store.gradient(parameter.name)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, fp32 master) of each parameter, a new tensor each, one at a time. Raises
        ConfigError when the model is trained before all are read, as they would be of two steps."""
        steps_done = self.steps_done
        self._warn_of_torn("named_parameters()")
        for name in list(self.store.names()):
            yield name, self._master(name, steps_done)

    @in_turn
    def _master(self, name: str, steps_done: int) -> torch.Tensor:
        self.engine.flush()
        if self.steps_done != steps_done:
            raise ConfigError(
                f"the model was trained while named_parameters() was read: step {steps_done:,} at first, "
                f"{self.steps_done:,} now",
                hint="parameters = dict(model.named_parameters()) between two steps",
            )
        return self.store.master(name)

    @in_turn
    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        tokenizer: Any = None,
        extra: Callable[[Path], None] | None = None,
        force: bool = False,
    ) -> None:
        """Write a Hugging Face folder (safetensors, config, generation config); whole or absent.

        dtype: bfloat16 or float32, default the compute dtype. Written straight from the store.
        max_shard_size: of each file, as "5GB" or a number of bytes.
        tokenizer: saved with the model; a tokenizer or processor, or the folder or name of a tokenizer.
        extra: writes further files into the folder before it is put in place. force: save weights that are
        those of no step.
        Raises ConfigError, before anything is written, for values that cannot be used and for a folder that
        holds something other than a model; TornStateError for weights of no step; DoesNotFitError when the
        disk is full.
        """
        self._refuse_torn("save_pretrained()", force)
        target = check_target(folder)
        wanted = choose_dtype(dtype, max_shard_size)
        save_tokenizer = tokenizer_saver(tokenizer, self.settings.trust_remote_code)

        def write_more(staging: Path) -> None:
            save_tokenizer(staging)
            if extra is not None:
                extra(staging)

        self.engine.flush()
        save_model(
            self.skeleton, self.store, target, dtype=wanted, max_shard_size=max_shard_size, extra=write_more
        )

    @in_turn
    def save_state(self, saving: Saving, *, background: bool = False, force: bool = False) -> None:
        """Hand every unit's weights and optimizer state, as of the last step, to `saving`.

        background: while the next steps run. Else all is done when this returns. force: also weights that
        are those of no step, for which TornStateError is raised otherwise.
        """
        self._refuse_torn("save_state()", force)
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

    @in_turn
    def finish_saving(self) -> None:
        """Wait for the disk; a state that was to be written beside a step that has not come is written now.
        Raises what went wrong there, but for what `saving` keeps to itself."""
        self.engine.finish_saving()

    @in_turn
    def state_is_being_replaced(self) -> None:
        """Say that the store is about to be filled: until `state_was_replaced` it holds that of no step."""
        self.engine.is_being_replaced()

    @in_turn
    def state_was_replaced(self, steps_done: int) -> None:
        """Say that the store now holds the state after `steps_done` updates."""
        self.engine.replaced(steps_done)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes by part: host regions of the store and spilled boundaries; slots on the device."""
        return {
            **self.store.num_bytes,
            "weight_slots": self.engine.weight_slots.num_bytes,
            "gradient_slots": self.engine.gradient_slots.num_bytes,
            "boundary_slots": self.engine.boundary_slots.num_bytes,
            "boundaries": self.engine.boundary_slots.host_bytes,
        }


def load_model_of(source: str | Path | nn.Module, settings: ModelSettings) -> nn.Module:
    """The transformers model that the settings describe; a model object as it is."""
    return load_model(
        source,
        trust_remote_code=settings.trust_remote_code,
        revision=settings.model_revision,
        attn_implementation=settings.attn_implementation,
        allowed=Allowed(settings.allow_missing, settings.allow_unexpected),
        seed=settings.seed,
    )


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
        is_norm=skeleton.is_norm,
    )
    optimizer = Optimizer(
        settings.optim,
        settings.adam_beta1,
        settings.adam_beta2,
        settings.adam_epsilon,
        settings.sgd_momentum,
        settings.seed,
        tuple(segments(unit, rule) for unit in skeleton.units),
        None if settings.optimizer_threads == "auto" else settings.optimizer_threads,
    )
    optimizer.check(UpdateSettings(1, 0.0, None, 0.0))
    return optimizer


# Of `HostModel.memory_bytes`: what lies on the device.
_ON_DEVICE = ("weight_slots", "gradient_slots", "boundary_slots")


def describe_model(model: HostModel) -> str:
    """Model type, parameters, device, dtype, memory by place, and how and when updates run."""
    settings, skeleton = model.settings, model.skeleton
    trainable = sum(p.numel for unit in model.store.units for p in unit.trainable)
    numbers = parameters(model.num_parameters)
    if trainable != model.num_parameters:
        numbers += f" ({parameters(trainable).removesuffix(' parameters')} trainable)"
    kind = type(skeleton.model).__name__
    memory = model.memory_bytes()
    device = sum(memory[name] for name in _ON_DEVICE)
    parts = ", ".join(f"{n} {size(b)}" for n, b in memory.items() if b and n not in _ON_DEVICE)
    clipping = f"max_grad_norm {settings.max_grad_norm:g}" if settings.max_grad_norm else "no clipping"
    lines = [
        f"{kind} ({skeleton.model_type}), {count(skeleton.num_layers, 'layer')}, {numbers}",
        f"compute: {settings.dtype} on {model.device}",
        f"host memory: {size(sum(memory.values()) - device)} ({parts})",
        f"device memory: {size(device)} in slots" if device else "device memory: none, the host's is used",
        f"updates: {settings.optim}, {settings.update_mode}, {clipping}; "
        f"{count(model.steps_done, 'step')} done",
    ]
    return "HostModel(\n" + "".join(f"  {line}\n" for line in lines) + ")"
