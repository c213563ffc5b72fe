"""HostModel: a transformers model whose weights, gradients and optimizer state live in host memory.

The handle for people who write their own loop:

    model = HostModel.from_pretrained(folder, device="cuda", dtype="bfloat16")
    out = model.forward_backward([{"input_ids": ids, "labels": ids}])
    out = model.step(lr=1e-5, max_grad_norm=1.0)
    model.save_pretrained("tuned")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ModelSettings
from ..engine.engine import Engine, MicroBatch, UpdateSettings
from ..engine.lanes import Span, choose_lanes
from ..errors import ConfigError, DataError, NonFiniteError
from ..memory.arena import keep_freed_memory
from ..memory.layout import lay_out
from ..memory.store import HostStore
from ..model.loading import count_parameters, create_model, fill_store, load_model
from ..model.skeleton import Skeleton
from ..optim.optimizer import Optimizer
from ..plan.preflight import check_host_memory
from .export import save_model


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """loss: mean cross-entropy over all target tokens of the step (plus the router's auxiliary
    loss where the model asks for it); num_tokens: target tokens, that is labels that are not ignored."""

    loss: float
    num_tokens: int


@dataclass(frozen=True)
class StepOutput:
    """grad_norm: global L2 norm of the gradients before clipping."""

    grad_norm: float


class HostModel:
    """Built by `from_pretrained` or `from_config`. Not safe to use from several threads at once."""

    def __init__(self, model: nn.Module, settings: ModelSettings) -> None:
        """model: a transformers model in host memory. It is consumed: its parameters move into the
        store, and the object is left as a skeleton without memory."""
        self.settings = settings
        self.device = resolve_device(settings.device)
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[settings.dtype]
        self.skeleton = Skeleton(model, dtype)
        units = self.skeleton.units
        if not settings.skip_memory_check:
            check_host_memory(units, dtype, reserve_bytes=int(settings.reserve_host_gb * 1e9))
        self.store = HostStore(units, dtype, pin=self.device.type == "cuda")
        self.skeleton.place_buffers(self.device)
        fill_store(self.skeleton, self.store)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.engine = Engine(
            self.skeleton,
            self.store,
            Optimizer(settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon, settings.seed),
            self.device,
            choose_lanes(settings.lanes, self.device, settings.seed),
            slots=settings.slots,
            grad_slots=settings.grad_slots,
            loss_chunk=settings.loss_chunk_tokens,
            seed=settings.seed,
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
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[settings.dtype]
        if not settings.skip_memory_check:  # before the source model takes its own share
            whole = lay_out("all", [("all", (count_parameters(values),), True, dtype)], dtype)
            check_host_memory([whole], dtype, reserve_bytes=int(settings.reserve_host_gb * 1e9))
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
        self, micro_batches: Sequence[MicroBatch], *, record: bool = False
    ) -> ForwardBackwardOutput:
        """Gradients of the mean loss over all target tokens of all micro-batches of a step.

        micro_batches: dicts of input_ids and labels [batch, tokens] (int64, labels aligned with
        input_ids, -100 ignored), and optionally attention_mask and position_ids of that shape.
        A second call before `step` replaces the gradients of the first.
        record: keep what ran when in `timeline`.
        Raises DataError for micro-batches that cannot be trained on.
        """
        batches = [self._checked(m, batch) for m, batch in enumerate(micro_batches)]
        if not batches:
            raise DataError("forward_backward was given no micro-batch", hint="pass a list of at least one")
        if not any(bool((batch["labels"][:, 1:] != -100).any()) for batch in batches):
            raise DataError(
                "no token of this step is trained on: every label is -100",
                hint="check the labels and the mask; the first token of a row is never a target",
            )
        self._has_gradients = False
        loss, num_tokens = self.engine.forward_backward(batches, self.steps_done, record=record)
        self._has_gradients = True
        return ForwardBackwardOutput(loss, num_tokens)

    def step(
        self,
        lr: float,
        max_grad_norm: float | None = None,
        weight_decay: float = 0.0,
        *,
        record: bool = False,
    ) -> StepOutput:
        """Clip the gradients by their global norm and update all trainable parameters (AdamW).

        max_grad_norm: None or 0 turns clipping off. Raises NonFiniteError, with nothing updated,
        when the norm is NaN or infinite.
        """
        if not self._has_gradients:
            raise ConfigError(
                "step() was called without gradients", hint="call forward_backward() before each step()"
            )
        norm = self.engine.measure_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient norm of step {self.steps_done + 1} is {norm}; nothing was updated",
                hint="lower learning_rate, check the data, or set nonfinite: skip",
            )
        settings = UpdateSettings(self.steps_done + 1, lr, max_grad_norm, weight_decay)
        self.engine.update(settings, record=record)
        self.steps_done += 1
        self._has_gradients = False
        return StepOutput(norm)

    @property
    def timeline(self) -> list[Span]:
        """(op, start, end) in seconds of the last calls made with record=True."""
        return self.engine.spans

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, gradient) of each trainable parameter: views into the store, in its
        dtype, valid until the next forward_backward."""
        for unit in self.store.units:
            for parameter in unit.trainable:
                yield parameter.name, self.store.gradient(parameter.name)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, fp32 master) of each parameter, a new tensor each, one at a time."""
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
        save_model(
            self.skeleton, self.store, Path(folder), dtype=dtype, max_shard_size=max_shard_size, extra=extra
        )

    def memory_bytes(self) -> dict[str, int]:
        """Bytes by part: host regions of the store, weight and gradient slots on the device."""
        return {
            **self.store.num_bytes,
            "weight_slots": self.engine.weight_slots.num_bytes,
            "gradient_slots": self.engine.gradient_slots.num_bytes,
        }

    def _checked(self, m: int, batch: MicroBatch) -> MicroBatch:
        """The micro-batch with host int64 tensors, after looking for what would train wrongly."""
        for name in ("input_ids", "labels"):
            if name not in batch:
                raise DataError(f"micro-batch {m} has no {name}", hint=f"its keys are {sorted(batch)}")
        unknown = batch.keys() - {"input_ids", "labels", "attention_mask", "position_ids"}
        if unknown:
            raise DataError(
                f"micro-batch {m} has unknown keys {sorted(unknown)}",
                hint="input_ids, labels, attention_mask and position_ids are taken",
            )
        shape = batch["input_ids"].shape
        if len(shape) != 2 or shape[1] < 2:
            raise DataError(
                f"micro-batch {m}: input_ids of shape {tuple(shape)}",
                hint="[batch, tokens] with at least 2 tokens",
            )
        for name, value in batch.items():
            if value is not None and value.shape != shape:
                raise DataError(
                    f"micro-batch {m}: {name} of shape {tuple(value.shape)}, input_ids of {tuple(shape)}",
                    hint="all have the shape [batch, tokens]",
                )
        mask = batch.get("attention_mask")
        if mask is not None and not bool(mask.any(dim=1).all()):
            row = int(mask.any(dim=1).long().argmin())
            raise DataError(
                f"micro-batch {m}: attention_mask hides every token of row {row}",
                hint="1 stands for a token, 0 for padding; leave empty rows out",
            )
        self._check_range(m, "input_ids", batch["input_ids"], self.skeleton.embedding.num_embeddings)
        labels = batch["labels"]
        self._check_range(m, "labels", labels[labels != -100], self.skeleton.vocabulary)
        return {name: value.cpu() for name, value in batch.items() if value is not None}

    def _check_range(self, m: int, name: str, values: torch.Tensor, end: int) -> None:
        if values.dtype != torch.int64:
            raise DataError(
                f"micro-batch {m}: {name} are {values.dtype}", hint="token numbers are torch.int64"
            )
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= end):
            worst = int(values.min()) if int(values.min()) < 0 else int(values.max())
            raise DataError(
                f"micro-batch {m}: {name} hold {worst}, outside the vocabulary of {end}",
                hint="use the model's own tokenizer; -100 in labels means ignored",
            )


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device={name!r}, but torch sees no CUDA device", hint="device: cpu, or check the driver"
            )
        index = device.index if device.index is not None else torch.cuda.current_device()
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device={name!r}, but there are {torch.cuda.device_count()}", hint="device: cuda:0"
            )
        device = torch.device("cuda", index)
    return device
