"""HostModel: a transformers model whose weights, gradients and optimizer state live in host memory.

For custom training loops:

    model = HostModel.from_pretrained(folder, device="cuda", dtype="bfloat16")
    out = model.train_step([{"input_ids": ids, "labels": ids}], lr=1e-5)
    model.save_pretrained("tuned")

`forward_backward` and `step` do the same in two calls, with the gradients accessible in between.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from horizon_lm.checkpoint.export import choose_dtype, tokenizer_saver
from horizon_lm.checkpoint.folder import check_target
from horizon_lm.checkpoint.save import save_model
from horizon_lm.config import ModelSettings
from horizon_lm.config.python import model_settings
from horizon_lm.distributed.outcomes import in_turns, on_each
from horizon_lm.distributed.ranks import Ranks
from horizon_lm.distributed.start import join
from horizon_lm.engine.calls import in_turn
from horizon_lm.engine.disk_lane import Saving
from horizon_lm.engine.encode import encode_images
from horizon_lm.engine.engine import Engine
from horizon_lm.engine.homes import packing_of
from horizon_lm.engine.lanes import Span, choose_lanes
from horizon_lm.engine.loss import Asked, LossFunction, TokenValues, check_loss_function
from horizon_lm.engine.policies import (
    DTYPES,
    check_fits_host,
    make_optimizer,
    slots_of,
    store_spec,
    update_settings,
)
from horizon_lm.engine.results import gather_values
from horizon_lm.engine.step import Step, Update
from horizon_lm.errors import ConfigError, NonFiniteError, TornStateError
from horizon_lm.machine.determinism import prepare
from horizon_lm.machine.device import resolve_device
from horizon_lm.machine.memory import available_host_bytes
from horizon_lm.memory.arena import return_free_memory
from horizon_lm.memory.packed import check_installed
from horizon_lm.memory.preflight import check_memory
from horizon_lm.memory.shards import Shard
from horizon_lm.memory.store import HostStore
from horizon_lm.memory.whole import Whole
from horizon_lm.micro_batches import Extra, MicroBatches, check_micro_batches
from horizon_lm.model.adapters import prepare as add_adapter
from horizon_lm.model.base_cache import BaseCache
from horizon_lm.model.consumed import Closed, check_model, refuse_use, take_over
from horizon_lm.model.experts import choose_experts
from horizon_lm.model.fingerprint import Fingerprint, Fingerprinter, saved_names
from horizon_lm.model.kernels import apply_kernels, check_kernels
from horizon_lm.model.loading import base_of, create_model, fill_store, load_model_of
from horizon_lm.model.pretrained import check_has_weights
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.optim.kernel import check_available
from horizon_lm.optim.optimizer import UpdateSettings
from horizon_lm.optim.rules import Number
from horizon_lm.outputs import (
    EvaluationOutput,
    ForwardBackwardOutput,
    StepOutput,
    TrainStepOutput,
    describe_model,
    non_finite_error,
)

_log = logging.getLogger(__name__)


class _Default(Enum):
    """The default of an argument that falls back to a setting."""

    SETTING = "the setting"


class HostModel:
    """A trainable model in host memory. Built by `from_pretrained` or `from_config`.

    A failed call, Ctrl-C included, leaves the state before the step or after it (`steps_done` tells which),
    which can be evaluated, saved and trained on. The exception is `update: eager`, where only some layers
    may have been updated: the error says so, and training on or saving such a state raises TornStateError
    unless `force=True`.
    Calls from several threads are serialised; calls from within a step (a `loss_fn`) are rejected.
    As a context manager it frees its memory on exit (`close`).

    With several ranks (`torchrun`, or a process group of torch.distributed) each holds its share of the
    model, and every call is collective: all ranks make the same calls with the same arguments, the
    micro-batches of all ranks included. Rank r computes micro-batches r, r + world, ...; results are those
    of all, on every rank, and with `reduction: exact` the same bits as on one rank. A loss function is called
    on the rank that computes the micro-batch. What is raised in the middle of a step, Ctrl-C included, ends
    all ranks: the others report it, and no rank can go on.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: ModelSettings,
        *,
        host_memory: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """model: a transformers model or PeftModel in host memory. It is consumed: its parameters move into
        the store, and using the object again raises an error. host_memory: bytes that were available before
        the model was made; by default those that are now. ranks: by default those of this run
        (`distributed.start`)."""
        check_model(model)
        self.ranks = join(settings.device) if ranks is None else ranks
        shard = Shard(self.ranks.rank, self.ranks.world)
        self.settings = settings
        self.device = _device_of(settings, self.ranks)
        if settings.deterministic:
            prepare(self.device)
        check_kernels(settings, self.device)
        check_has_weights(model)
        own = take_over(model)
        choose_experts(own, settings)
        own, adapter = add_adapter(own, settings)
        packing = packing_of(settings)
        if packing:
            check_installed(packing)
        self.skeleton = Skeleton(own, DTYPES[settings.dtype], adapter=adapter, packs=bool(packing))
        self.skeleton.neftune_noise_alpha = settings.neftune_noise_alpha
        self.skeleton.patches = apply_kernels(self.skeleton.model, settings)
        if settings.mlp_tile_tokens is not None:
            self.skeleton.tile_mlps(settings.mlp_tile_tokens)
        self.optimizer = make_optimizer(self.skeleton, settings, self.device, self.ranks.core_sharers)
        units = self.skeleton.units
        saved = saved_names(units, adapter)
        spec = replace(store_spec(settings, self.skeleton, shard), saved=saved)
        if spec.resident:
            check_available(self.device, self.optimizer.rule, spec)
        if not settings.skip_memory_check:
            if host_memory is None and self.ranks.world > 1:
                host_memory = _share_of_memory(settings, self.ranks)
            check_memory(
                units,
                settings,
                lambda other: store_spec(other, self.skeleton, shard),
                device=self.device,
                slots_of=lambda other: slots_of(other, self.skeleton, self.device, shard.world),
                available=None if host_memory is None else {"host": host_memory},
            )
        self.store = HostStore(units, spec, pin_for=self.device, device=self.device)
        self.skeleton.place_buffers(self.device)
        refuse_use(model)
        self._base = None if saved is None else Fingerprinter(self.ranks.rank, self.ranks.world)
        self._fingerprint: Fingerprint | None = None
        fill_store(self.skeleton, self.store, self._base, _base_cache(settings))
        lanes = choose_lanes(settings.lanes, self.device)
        self.engine = Engine(self.skeleton, self.store, self.optimizer, lanes, settings, self.ranks)
        if settings.compile:
            self.skeleton.compile_layers(settings.compile, self.engine.ops)
        self._turn = threading.RLock()
        self._warned_of = ""

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | nn.Module,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "bfloat16",
        *,
        ranks: Ranks | None = None,
        **settings: Any,
    ) -> HostModel:
        """Load a Hugging Face folder or Hub name, or consume a transformers model object or a PeftModel.

        The folder of an adapter (adapter_config.json) loads the base that it names, and trains the adapter.
        Masters keep the precision of the source: an fp32 checkpoint gives fp32 masters whatever `dtype` is.

        Args:
            source: a folder, a name on the Hub, or a model object.
            device: auto (a GPU if available), cpu or cuda.
            dtype: of weights and computation, bfloat16 or float32.
            ranks: by default those of this run; `horizon_lm.distributed.ranks.ALONE` for a model of this
                process alone.
            **settings: configuration keys (docs/configuration.md).

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
        if not isinstance(source, nn.Module):
            source, resolved = base_of(source, resolved)
        ranks = join(resolved.device) if ranks is None else ranks
        if ranks.world == 1:
            return cls(load_model_of(source, resolved), resolved, ranks=ranks)
        memory = _share_of_memory(resolved, ranks)  # before any rank takes its share

        def load() -> HostModel:
            return cls(load_model_of(source, resolved), resolved, host_memory=memory, ranks=ranks)

        return in_turns(ranks, load)

    @classmethod
    def from_config(
        cls,
        values: Any,
        settings: ModelSettings | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "bfloat16",
        *,
        ranks: Ranks | None = None,
        **more: Any,
    ) -> HostModel:
        """Create a model with random weights (by `seed`).

        Args:
            values: a transformers configuration, or its values as a mapping with `model_type`.
            settings: replaces device, dtype and the keyword settings.
            device: as in `from_pretrained`.
            dtype: as in `from_pretrained`.
            ranks: as in `from_pretrained`.
            **more: configuration keys.
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
        values = dict(values)
        ranks = join(settings.device) if ranks is None else ranks
        host_memory = _share_of_memory(settings, ranks)  # before the model takes its share

        def check() -> None:
            if not settings.skip_memory_check:
                check_fits_host(values, settings, host_memory, Shard(ranks.rank, ranks.world))
            check_kernels(settings, _device_of(settings, ranks))

        on_each(ranks, check)

        def create() -> HostModel:
            model = create_model(
                values,
                dtype=DTYPES[settings.dtype],
                seed=settings.seed,
                attn_implementation=settings.attn_implementation,
            )
            return cls(model, settings, host_memory=host_memory, ranks=ranks)

        return in_turns(ranks, create)

    def __repr__(self) -> str:
        if isinstance(self.store, Closed):
            return f"HostModel({self.skeleton.model_type}, closed)"
        memory = self.memory_bytes()
        return describe_model(self.skeleton, self.settings, self.device, memory, self.steps_done, self.ranks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory, after a running save has reached the disk. Unsaved updates are lost."""
        if isinstance(self.store, Closed):
            return
        self._close()
        gc.collect()  # the engine's table of functions forms a cycle with it
        return_free_memory()

    @in_turn
    def _close(self) -> None:
        self.engine.lanes.disk.drain()
        closed: Any = Closed()
        closed.steps_done = self.steps_done
        self.store = self.engine = self.optimizer = closed

    @property
    def steps_done(self) -> int:
        """Updates so far, including those that will run before anyone can read the weights."""
        return self.engine.steps_done

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.skeleton.config

    @property
    def num_parameters(self) -> int:
        return sum(p.numel for unit in self.store.units for p in unit.parameters)

    @property
    def num_trained(self) -> int:
        """Parameters that steps update."""
        return sum(p.numel for unit in self.store.units for p in unit.trainable)

    @property
    def num_exported(self) -> int:
        """Parameters that `save_pretrained` writes: all, or those of the adapter."""
        saved = self.store.spec.saved
        if saved is None or self.skeleton.adapter is None:
            return self.num_parameters
        return sum(self.store.locate(name)[1].numel for name in saved)

    def base_fingerprint(self) -> Fingerprint | None:
        """Return a digest of each unit of what checkpoints leave out, as it was loaded: the base under an
        adapter, packed weights; None if they hold all.

        With several ranks the first call is collective.
        """
        if self._fingerprint is None and self._base is not None:
            self._fingerprint = self._base.of_all(self.ranks)
        return self._fingerprint

    @in_turn
    def encode_images(self, inputs: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
        """Compute the features of the images of a vision-language model, all at once, without gradients.

        Returns per image, in host memory, "features" [tokens, width] and, if the model has them,
        "deepstack_0", ...; lists of them are the `image_features` of micro-batches. With a trained projector
        (`train_projector`) features are the vision tower's, before it. With several ranks all of them must
        call this.

        Args:
            inputs: what the model's processor returned for n images: pixel_values, and if it has them
                image_grid_thw, image_sizes; other keys are ignored.

        Raises ConfigError for a model of text alone, DataError for inputs without pixels and for videos,
        UnsupportedModelError for a tower that draws random numbers.
        """
        with self.engine.at_work():
            return encode_images(self.skeleton, self.store, self.ranks, inputs)

    @in_turn
    def forward_backward(
        self,
        micro_batches: MicroBatches,
        loss_fn: LossFunction | None = None,
        *,
        record: bool = False,
        force: bool = False,
    ) -> ForwardBackwardOutput:
        """Compute gradients of the mean loss over all target tokens of all micro-batches of a step.

        A second call before `step` replaces the gradients of the first.

        Args:
            micro_batches: one dict (a BatchEncoding) or an iterable of them (a list, a DataLoader). Each
                holds input_ids and labels [batch, tokens] (integers, labels aligned with input_ids, -100
                ignored), optionally attention_mask and position_ids of that shape, and with `loss_fn` any
                other tensors. Values are tensors on any device, numpy arrays or nested lists. Micro-batches
                of vision-language models may hold `image_features`, a list of what `encode_images` returns
                for each image in the order of their placeholders, row by row (or pixel_values, which are
                encoded first), and the processor's image_grid_thw, image_sizes, token_type_ids and
                mm_token_type_ids.
            loss_fn: called per micro-batch as loss_fn(log_probs, batch), with log p(label) in fp32 [batch,
                tokens - 1] on the device, aligned with labels[:, 1:], 0 where ignored. Returns a scalar, or a
                pair of it and a dict of metrics; the step's loss is the sum over its micro-batches. A
                `TokenLoss` is called with entropies and other `TokenValues` in place of the
                log-probabilities.
            record: record the `timeline`.
            force: train on from torn weights.

        Raises DataError for micro-batches that cannot be trained on, ConfigError with eager updates,
        TornStateError for torn weights.
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
        check_loss_function(loss_fn, self.settings.label_smoothing_factor)
        extra: Extra = "refuse" if loss_fn is None else "keep"
        batches = check_micro_batches(micro_batches, self.skeleton, extra=extra, encode=self.encode_images)
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

        With `update: deferred` the update runs during the next forward_backward, or when parameters are read.
        Numbers may be one-element tensors; they are finite and at least 0.

        Args:
            lr: learning rate.
            max_grad_norm: None or 0 turns clipping off; default: the setting.
            weight_decay: decoupled from the gradient; 0 by default.
            record: record the `timeline`.

        Raises ConfigError for an invalid number, and NonFiniteError, without updating anything, if the norm
        is NaN or infinite.
        """
        step = self.engine.gradients
        if step is None:
            raise ConfigError(
                "step() was called without gradients", hint="call forward_backward() before each step()"
            )
        settings = self._update_settings("step()", lr, max_grad_norm, weight_decay)
        self.engine.agree_on(settings)
        norm = self.engine.ops.updates.norm_of(step)
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
        """Run `forward_backward` and `step` in one call, in every update mode.

        Args:
            micro_batches: as in `forward_backward`.
            lr: as in `step`.
            max_grad_norm: as in `step`.
            weight_decay: as in `step`.
            loss_fn: as in `forward_backward`.
            record: record the `timeline`.
            check: called with the loss and its number of tokens; raising skips the update (with `update:
                eager` it is too late for that). It may evaluate, read and save, but not train. With several
                ranks it is called on each, and what it raises on one ends the call on all; one that evaluates
                or reads must do so on all before it raises.
            force: train on from torn weights.

        Raises NonFiniteError if the loss or the gradient norm is not finite. Nothing has been updated then,
        unless `update: eager` met a non-finite gradient under a finite loss: the error says so
        (`state_intact`), and the weights are torn. Raises TornStateError for torn weights.
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
                on_each(self.ranks, lambda: check(out.loss, out.num_tokens))
        else:
            if not math.isfinite(out.loss):
                raise self._not_finite(f"the loss of step {self.steps_done + 1} is {out.loss}", out)
            if check is not None:
                on_each(self.ranks, lambda: check(out.loss, out.num_tokens))
                self._see_gradients_of(step)
            self.engine.agree_on(settings)
            norm = self.engine.ops.updates.norm_of(step)
            if not math.isfinite(norm):
                raise self._not_finite(
                    f"the gradient norm of step {self.steps_done + 1} is {norm}", out, norm
                )
            self.engine.update(step, settings, record=record)
        return TrainStepOutput(out.loss, out.num_tokens, out.metrics, out.router_losses, norm)

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
        norm = self.engine.ops.updates.norm_of(step)
        if step.update.stopped_at is not None:
            what = "loss" if not math.isfinite(out.loss) else "gradient norm"
            value = out.loss if what == "loss" else norm
            raise self._not_finite(
                f"the {what} of step {self.steps_done + 1} is {value}", out, norm, step.update
            )
        self.engine.update(step, settings, record=record)
        return norm

    def _not_finite(
        self, what: str, out: ForwardBackwardOutput, norm: float = math.nan, update: Update | None = None
    ) -> NonFiniteError:
        total = len(self.engine.trainable)
        done = 0 if update is None else total - len(update.left)
        return non_finite_error(what, out, norm, updated=done, total=total)

    def _update_settings(self, where: str, lr: Any, max_grad_norm: Any, weight_decay: Any) -> UpdateSettings:
        limit = self.settings.max_grad_norm if isinstance(max_grad_norm, _Default) else max_grad_norm
        settings = update_settings(where, self.settings, self.steps_done + 1, lr, limit, weight_decay)
        self.optimizer.check(settings)
        return settings

    def _refuse_torn(self, where: str, force: bool) -> None:
        """Raise TornStateError if the weights belong to no single step."""
        torn = self.engine.torn
        if torn is not None and not force:
            raise TornStateError(
                f"{where}: the weights are those of no step: {torn}",
                hint="load the last saved model; force=True takes the weights as they are",
            )

    def _warn_of_torn(self, where: str) -> None:
        """Warn once per torn state: reading it is allowed."""
        torn = self.engine.torn
        if torn is not None and torn != self._warned_of:
            self._warned_of = torn
            _log.warning("%s: the weights are those of no step: %s", where, torn)

    @in_turn
    def flush(self) -> None:
        """Run the updates that `update: deferred` postponed; reading parameters does so by itself."""
        self.engine.flush()

    @in_turn
    def evaluate(
        self,
        micro_batches: MicroBatches,
        *,
        values: Sequence[str] = (),
        temperature: float = 1.0,
        return_log_probs: bool = False,
        return_router_losses: bool = False,
        ignore_extra: bool = False,
        record: bool = False,
        adapter: bool = True,
    ) -> EvaluationOutput:
        """Compute the mean cross-entropy over all target tokens, without dropout or gradients.

        Leaves the gradients of an unfinished step alone.

        Args:
            micro_batches: as in `forward_backward`.
            values: names of the `TokenValues` to return.
            temperature: divides the logits before all else.
            return_log_probs: return the log-probability of each target.
            return_router_losses: compute the routers' auxiliary losses, which are not part of the loss.
            ignore_extra: leave aside tensors that only a loss function takes.
            record: record the `timeline`.
            adapter: false evaluates the base model alone, without its adapter.

        Raises DataError for micro-batches without any target, ConfigError for invalid values.
        """
        asked = Asked.of("evaluate()", values, temperature)
        self._warn_of_torn("evaluate()")
        extra: Extra = "ignore" if ignore_extra else "refuse"
        batches = check_micro_batches(micro_batches, self.skeleton, extra=extra, encode=self.encode_images)
        with nullcontext() if adapter else self.skeleton.without_adapter():
            step = self.engine.evaluate(batches, asked, routers=return_router_losses, record=record)
        found: list[TokenValues] = []
        if asked.values or return_log_probs:
            shapes = [batch["labels"].shape for batch in batches]
            names = sorted({"log_probs", *asked.values})
            found = gather_values(step, self.ranks, shapes, names)
        return EvaluationOutput(
            step.loss,
            step.num_tokens,
            [one.log_probs for one in found] if return_log_probs else None,
            found if asked.values else None,
            _router_losses(step),
        )

    def take_notes(self) -> list[str]:
        """Return the engine's deviations from the settings since the last call, and why; usually none.

        Once called, such notes are no longer logged.
        """
        ops = self.engine.ops
        ops.logs_notes = False
        notes, ops.notes = ops.notes, []
        return notes

    def take_remarks(self) -> list[str]:
        """Return the engine's other notes since the last call, such as compile times."""
        ops = self.engine.ops
        remarks, ops.remarks = ops.remarks, []
        return remarks

    @property
    def timeline(self) -> list[Span]:
        """(op, start, end), in seconds, of the last calls with record=True."""
        return self.engine.spans

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, gradient) of each trainable parameter.

        Gradients are views into the store in its dtype, valid until the next forward_backward; those of
        resident units lie on the device. With several ranks all of them must iterate, and gradients are new
        tensors in host memory. Raises ConfigError if there are none, after an interrupted step, and
        with eager updates, which keep none.
        """
        if self.settings.update_mode == "eager":
            raise ConfigError("update: eager keeps no gradients", hint="update='deferred'")
        if not self.engine.holds_gradients:
            raise ConfigError(
                "named_gradients() was called without gradients", hint="call forward_backward() before it"
            )
        whole, step = Whole(self.store, self.ranks), self.engine.last_step
        for unit in self.store.units:
            for parameter in unit.trainable:
                yield parameter.name, self._gradient(whole, parameter.name, step)

    @in_turn
    def _gradient(self, whole: Whole, name: str, step: Step | None) -> torch.Tensor:
        if self.engine.last_step is not step:
            raise ConfigError(
                "the model was trained while named_gradients() was read",
                hint="gradients = dict(model.named_gradients()) before the next forward_backward()",
            )
        return whole.gradient(name)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, fp32 master) of each parameter, as new tensors.

        With several ranks all of them must iterate. Raises ConfigError if the model is trained meanwhile:
        they would be of two steps.
        """
        steps_done = self.steps_done
        self._warn_of_torn("named_parameters()")
        whole = Whole(self.store, self.ranks)
        for name in list(self.store.names()):
            yield name, self._master(whole, name, steps_done)

    @in_turn
    def _master(self, whole: Whole, name: str, steps_done: int) -> torch.Tensor:
        self.engine.flush()
        if self.steps_done != steps_done:
            raise ConfigError(
                f"the model was trained while named_parameters() was read: step {steps_done:,} at first, "
                f"{self.steps_done:,} now",
                hint="parameters = dict(model.named_parameters()) between two steps",
            )
        return whole.master(name)

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
        """Write a Hugging Face folder (safetensors, config, generation config) atomically.

        For a model with an adapter, write PEFT's folder of the adapter alone (adapter_config.json,
        adapter_model.safetensors).

        Args:
            folder: a new or empty folder, or one with a model, which is replaced.
            dtype: bfloat16 or float32; default: the compute dtype.
            max_shard_size: per file, as "5GB" or bytes.
            tokenizer: saved alongside; a tokenizer or processor, or the folder or name of one.
            extra: writes further files into the folder before it is put in place.
            force: save torn weights.

        Raises ConfigError, before anything is written, for invalid values and for a folder that holds
        something other than a model; TornStateError for torn weights; DoesNotFitError if the disk is full.
        With several ranks all of them must call this; rank 0 writes.
        """
        self._refuse_torn("save_pretrained()", force)
        if self.store.spec.packing and not self.skeleton.has_adapter:
            raise ConfigError(
                f"save_pretrained(): base_dtype={self.store.spec.packing} packed the frozen weights, which "
                "cannot be saved as a model, and there is no adapter to save alone",
                hint="train an adapter (adapter: lora), or leave base_dtype out",
            )
        wanted = choose_dtype(dtype, max_shard_size)
        target, save_tokenizer = on_each(self.ranks, lambda: self._target_and_saver(folder, tokenizer))

        def write_more(staging: Path) -> None:
            save_tokenizer(staging)
            if extra is not None:
                extra(staging)

        self.engine.flush()
        save_model(
            *(self.skeleton, Whole(self.store, self.ranks, everywhere=False), target),
            dtype=wanted,
            max_shard_size=max_shard_size,
            extra=write_more,
        )

    def _target_and_saver(
        self, folder: str | os.PathLike[str], tokenizer: Any
    ) -> tuple[Path, Callable[[Path], object]]:
        """Check the folder and load the tokenizer on the rank that writes."""
        if not self.ranks.is_first:
            return Path(folder), lambda target: None
        return check_target(folder), tokenizer_saver(tokenizer, self.settings.trust_remote_code)

    @in_turn
    def save_state(self, saving: Saving, *, background: bool = False, force: bool = False) -> None:
        """Hand every unit's weights and optimizer state, as of the last step, to `saving`.

        background: while the next steps run; otherwise all is done on return. force: save torn weights, for
        which TornStateError is raised otherwise.
        """
        self._refuse_torn("save_state()", force)
        self.engine.save(saving, background=background)

    @property
    def kept_in_fp32(self) -> list[str]:
        """Parameters computed in fp32 within a bf16 model, as transformers does."""
        parameters = [p for unit in self.store.units for p in unit.parameters]
        return [p.name for p in parameters if p.compute_dtype != self.store.dtype]

    @property
    def is_saving(self) -> bool:
        """Whether a state is still being written to disk."""
        return not self.engine.lanes.disk.is_idle

    @in_turn
    def finish_saving(self) -> None:
        """Wait for the disk; write now what was to be written during the next step.

        Raises what failed there, except errors that `saving` keeps.
        """
        self.engine.finish_saving()

    @in_turn
    def state_is_being_replaced(self) -> None:
        """Mark the store as being overwritten: until `state_was_replaced` it belongs to no step."""
        self.engine.is_being_replaced()

    @in_turn
    def state_was_replaced(self, steps_done: int) -> None:
        """Declare that the store now holds the state after `steps_done` updates."""
        self.engine.replaced(steps_done)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of this rank by part.

        Host regions of the store and spilled boundaries; resident units and slots on the device.
        """
        ops = self.engine.ops
        return {
            **self.store.num_bytes,
            **self.store.device_bytes,
            **ops.slot_bytes,
            "boundary_slots": ops.boundary_slots.num_bytes,
            "boundaries": ops.boundary_slots.host_bytes,
        }


def _base_cache(settings: ModelSettings) -> BaseCache | None:
    """Where packed units are kept from run to run; None without such a folder."""
    packing, folder = packing_of(settings), settings.base_cache_dir
    return BaseCache(Path(folder), packing) if packing and folder is not None else None


def _device_of(settings: ModelSettings, ranks: Ranks) -> torch.device:
    """This rank's device."""
    return resolve_device(settings.device, ranks.local_rank if ranks.world > 1 else None)


def _share_of_memory(settings: ModelSettings, ranks: Ranks) -> int:
    """The host memory that is available to this rank: an equal part of its node's."""
    return available_host_bytes(settings.host_memory_bytes, sharers=ranks.local_world)


def _output(step: Step) -> ForwardBackwardOutput:
    return ForwardBackwardOutput(step.loss, step.num_tokens, step.metrics, _router_losses(step))


def _router_losses(step: Step) -> list[float]:
    return [float(step.router_losses[m]) for m in sorted(step.router_losses)]
