"""`HorizonMixin`, which puts a Trainer on the streamed engine; `HorizonTrainer` and `HorizonSFTTrainer`.

All micro-batches of a step go through the engine together. The trainer's own `compute_loss` runs inside the
engine's loss function, once per micro-batch, against a `StreamedView` of the model.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from horizon_lm.engine.loss import TokenLoss, TokenValues
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.outputs import ForwardBackwardOutput
from horizon_lm.trainers.checkpoints import HorizonCheckpoints
from horizon_lm.trainers.refused import refuse
from horizon_lm.trainers.settings import host_of
from horizon_lm.trainers.view import MODEL_INPUTS, Answer, view_of

Inputs = dict[str, Any]


class HostOptimizer(torch.optim.Optimizer):
    """What schedulers and callbacks see of the engine's update: one group with its learning rate.

    grad_norm: norm of the last step's gradients before clipping, a scalar tensor.
    """

    def __init__(self, host: HostModel, args: TrainingArguments) -> None:
        super().__init__(
            [nn.Parameter(torch.zeros(()))], {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        )
        self.host, self.max_grad_norm, self.grad_norm = host, args.max_grad_norm, torch.zeros(())

    def step(self, closure: Any = None) -> None:
        """Update the weights; with deferred updates, during the next step."""
        group = self.param_groups[0]
        out = self.host.step(group["lr"], self.max_grad_norm or None, group["weight_decay"])
        self.grad_norm.fill_(out.grad_norm)


class HorizonMixin(HorizonCheckpoints):
    """A Trainer over a `HostModel`, which is `host`.

    Comes before the trainer's class. model: a folder, a name on the Hub, a transformers model object (it is
    consumed) or a `HostModel`. The other arguments are the trainer's; docs/guides/trl.md has those that are
    refused. Raises ConfigError for them, and the errors of `HostModel.from_pretrained`.
    """

    config_class: ClassVar[type[TrainingArguments]] = TrainingArguments
    token_values: ClassVar[tuple[str, ...]] = ()
    host: HostModel
    model: Any
    args: Any

    def __init__(self, model: Any = None, *positional: Any, **named: Any) -> None:
        given = inspect.signature(super().__init__).bind_partial(model, *positional, **named).arguments
        if given.get("args") is None:
            name = Path(str(model if isinstance(model, str) else model.config._name_or_path)).name
            given["args"] = self.config_class(f"{name}-{self._kind}")
        refuse(type(self).__name__, given)
        self.host = host_of(given["model"], given["args"])
        self._micro_batches: list[tuple[Inputs, Any, int]] = []
        super().__init__(**self._arguments({**given, "model": view_of(self.host, self.token_values)}))
        self.neftune_noise_alpha = None  # the engine adds the noise

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return what the trainer's constructor is called with."""
        return given

    # One step.

    def micro_batch(self, inputs: Inputs) -> Inputs:
        """Return what the engine computes for a batch: input_ids, labels, attention_mask, position_ids."""
        return {name: inputs[name] for name in MODEL_INPUTS if inputs.get(name) is not None}

    def training_step(self, model: Any, inputs: Inputs, num_items_in_batch: Any = None) -> torch.Tensor:
        """Keep a micro-batch; with the last one of a step, run them all."""
        model.train()
        self._micro_batches.append((inputs, num_items_in_batch, self.current_gradient_accumulation_steps))
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        out = self.forward_backward()
        self._micro_batches = []
        return torch.tensor(out.loss, device=self.args.device)

    def forward_backward(self) -> ForwardBackwardOutput:
        """Run the kept micro-batches through the engine, layer by layer."""
        batches = []
        for m, (inputs, _, _) in enumerate(self._micro_batches):
            tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            batches.append({**tensors, **self.micro_batch(inputs), "micro_batch": torch.tensor(m)})
        loss = TokenLoss(self._loss, self.token_values, self.model.temperature, 1 / self._micro_batches[0][2])
        return self.host.forward_backward(batches, loss)

    def _loss(self, values: TokenValues, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Call the trainer's loss for one micro-batch, and scale it as `Trainer.training_step` does."""
        kept, num_items, steps = self._micro_batches[int(batch["micro_batch"])]
        inputs = {k: batch[k] if isinstance(v, torch.Tensor) else v for k, v in kept.items()}
        self.model.answers = [*self.other_answers(batch), Answer(batch, values)]
        loss = self.compute_loss(self.model, inputs, num_items_in_batch=num_items)
        if self.model.answers:
            raise ConfigError(
                f"{type(self).__name__}.compute_loss did not call the model with its batch",
                hint="call model(input_ids=..., labels=...) once with the batch that it is given",
            )
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.model_accepts_loss_kwargs and num_items is not None
        return loss if scaled else loss / steps

    def other_answers(self, batch: dict[str, torch.Tensor]) -> list[Answer]:
        """Return the answers of calls without gradient that the loss makes besides its own."""
        return []

    # Seams.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = HostOptimizer(self.host, self.args)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> torch.Tensor:
        """Return the tensor that the optimizer's step fills, before the log reads it."""
        return getattr(self.optimizer, "optimizer", self.optimizer).grad_norm

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Leave devices and dtypes to the engine."""
        args = super()._build_accelerator_args(**kwargs)
        return {**args, "device_placement": False, "mixed_precision": "no"}

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Do nothing: there are no weights to move."""

    @property
    def _kind(self) -> str:
        return self.config_class.__name__.removesuffix("Config")


class HorizonTrainer(HorizonMixin, Trainer):
    """`transformers.Trainer` for causal language models, on the streamed engine. See `HorizonMixin`."""


class HorizonSFTTrainer(HorizonMixin, SFTTrainer):
    """`trl.SFTTrainer` on the streamed engine. See `HorizonMixin`."""

    config_class = SFTConfig
    token_values = ("entropy", "is_top1")
