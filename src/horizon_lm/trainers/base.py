"""`HorizonMixin`, which puts a Trainer on the streamed engine; `HorizonTrainer` and `HorizonSFTTrainer`.

All micro-batches of a step go through the engine together. The trainer's own `compute_loss` runs inside the
engine's loss function, once per micro-batch, against a `StreamedView` of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from horizon_lm.engine.loss import TokenLoss, TokenValues
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.outputs import ForwardBackwardOutput
from horizon_lm.trainers.checkpoints import HorizonCheckpoints
from horizon_lm.trainers.refused import refuse
from horizon_lm.trainers.settings import begins_adapter, decayed_otherwise, host_of, loaded_already
from horizon_lm.trainers.view import MODEL_INPUTS, Answer, evaluate, view_of
from horizon_lm.words import count

_log = logging.get_logger(__name__)  # where Trainer's own messages go
Inputs = dict[str, Any]
_TOKENS_AHEAD = 32_768  # tokens of an evaluation that go through the layers together


@dataclass
class MicroBatch:
    """A batch of a step. num_items: targets of the step, if counted. steps: micro-batches of the step.
    answers: of the calls without gradient."""

    inputs: Inputs
    num_items: Any
    steps: int
    answers: list[Answer] = field(default_factory=list)


class HostOptimizer(torch.optim.Optimizer):
    """What schedulers and callbacks see of the engine's update: one group with its learning rate.

    grad_norm: norm of the last step's gradients before clipping, a scalar tensor.
    """

    def __init__(self, host: HostModel, args: TrainingArguments) -> None:
        super().__init__(
            [nn.Parameter(torch.zeros(()))], {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        )
        self.host, self.max_grad_norm, self.grad_norm = host, args.max_grad_norm, torch.zeros(())

    def step(self, closure: Any = None) -> Any:
        """Update the weights; with deferred updates, during the next step."""
        group = self.param_groups[0]
        out = self.host.step(group["lr"], self.max_grad_norm or None, group["weight_decay"])
        self.grad_norm.fill_(out.grad_norm)


class HorizonMixin(HorizonCheckpoints):
    """A Trainer over a `HostModel`, which is `host`.

    Comes before the trainer's class. Its `model` is a folder, a name on the Hub, a transformers or PEFT model
    object (it is consumed) or a `HostModel`. The other arguments are the trainer's; docs/guides/trl.md has
    those that are refused. Raises ConfigError for these, and the errors of `HostModel.from_pretrained`.

    Attributes:
        host: the `HostModel`.
        begins_adapter: whether the model has an adapter that is new, so that its base is what it is before
            training.
    """

    config_class: ClassVar[type[TrainingArguments]] = TrainingArguments
    token_values: ClassVar[tuple[str, ...]] = ()
    host: HostModel
    begins_adapter: bool
    model: Any
    args: Any
    router_aux_loss_coef: float  # those with such a loss
    _metrics: dict[str, Any]  # of TRL's trainers

    def __init__(self, model: Any = None, *positional: Any, **named: Any) -> None:
        given = self._given(model, positional, named)
        peft_config = given.pop("peft_config", None)
        self.begins_adapter = peft_config is not None or begins_adapter(given["model"])
        self.host = host_of(given["model"], given["args"], peft_config)
        self._micro_batches: list[MicroBatch] = []
        self._coming: Iterator[Inputs] = iter(())
        with loaded_already(given):
            super().__init__(**self._arguments({**given, "model": view_of(self.host, self.token_values)}))
        self.neftune_noise_alpha = None  # the engine adds the noise

    def _given(self, model: Any, positional: Any, named: Any) -> dict[str, Any]:
        """Return the constructor's arguments by name. Raises ConfigError for those without equivalent."""
        given = inspect.signature(super().__init__).bind_partial(model, *positional, **named).arguments
        if given.get("args") is None:
            name = Path(str(model if isinstance(model, str) else model.config._name_or_path)).name
            kind = self.config_class.__name__.removesuffix("Config")
            given["args"] = self.config_class(f"{name}-{kind}")
        refuse(type(self).__name__, given)
        return given

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return what the trainer's constructor is called with."""
        return given

    # One step.

    def calls(self, inputs: Inputs) -> list[Inputs]:
        """Return the inputs of the calls that the loss makes of the model, for a batch: input_ids, labels,
        attention_mask, position_ids. Only the last one has a gradient."""
        return [{name: inputs[name] for name in MODEL_INPUTS if inputs.get(name) is not None}]

    def training_step(self, model: Any, inputs: Inputs, num_items_in_batch: Any = None) -> torch.Tensor:
        """Keep a micro-batch; with the last one of a step, run them all."""
        model.train()
        steps = self.current_gradient_accumulation_steps
        self._micro_batches.append(MicroBatch(inputs, num_items_in_batch, steps))
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=self.args.device)
        try:
            out = self.forward_backward()
        finally:
            self._micro_batches, self.model.answers = [], []
        if out.router_losses and hasattr(self, "_metrics"):  # TRL noted those of the view, 0
            mine = [loss / self.router_aux_loss_coef for loss in out.router_losses]
            self._metrics["train"]["aux_loss"][-len(mine) :] = mine
        return torch.tensor(out.loss, device=self.args.device)

    def forward_backward(self) -> ForwardBackwardOutput:
        """Run the kept micro-batches through the engine, layer by layer."""
        calls = [self.calls(one.inputs) for one in self._micro_batches]
        others = [call for mine in calls for call in mine[:-1]]
        answers = iter(evaluate(self.model, others, ()) if others else ())
        batches = []
        for m, (one, mine) in enumerate(zip(self._micro_batches, calls, strict=True)):
            one.answers = [next(answers) for _ in mine[:-1]]
            tensors = {k: v for k, v in one.inputs.items() if isinstance(v, torch.Tensor)}
            # Its length tells which one it is: on the device a value would have to be waited for.
            batches.append({**tensors, **mine[-1], "micro_batch": torch.zeros(m + 1, dtype=torch.uint8)})
        first = self._micro_batches[0]
        weight = self.router_weight(first.num_items, first.steps)
        return self.host.forward_backward(
            batches, TokenLoss(self._loss, self.model.asked, self.model.temperature, weight)
        )

    def _loss(self, values: TokenValues, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Call the trainer's loss for one micro-batch, and scale it as `Trainer.training_step` does."""
        one = self._micro_batches[len(batch["micro_batch"]) - 1]
        inputs = {k: batch[k] if isinstance(v, torch.Tensor) else v for k, v in one.inputs.items()}
        self.model.answers = [*one.answers, Answer(batch, values)]
        loss: Any = self.compute_loss(self.model, inputs, num_items_in_batch=one.num_items)
        if self.model.answers:
            raise ConfigError(
                f"{type(self).__name__}.compute_loss did not call the model with its batch",
                hint="call model(input_ids=..., labels=...) once with the batch that it is given",
            )
        return loss if self._is_scaled(one.num_items) else loss / one.steps

    def _is_scaled(self, num_items: Any) -> bool:
        """Whether compute_loss divides by the targets of the whole step."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # since transformers 5.19
        return bool(self.model_accepts_loss_kwargs and num_items is not None if scaled is None else scaled)

    def router_weight(self, num_items: Any, steps: int) -> float:
        """Return the factor of each micro-batch's auxiliary loss of the routers."""
        return 1 / steps

    # Evaluation.

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        loader = getattr(dataloader, "base_dataloader", dataloader)
        batches: Any = ()
        if not isinstance(loader.dataset, IterableDataset):
            # A loader of its own: persistent workers serve one iteration at a time.
            batches = DataLoader(
                loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn
            )
        with self.looking_ahead(batches):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: Inputs, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        if not prediction_loss_only:
            raise ConfigError(
                f"{type(self).__name__}: predictions are not supported",
                hint="load the saved model with transformers; streamed evaluation gives losses",
            )
        self.look_ahead(model)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    @contextmanager
    def looking_ahead(self, batches: Iterable[Inputs]) -> Iterator[None]:
        """While open, `look_ahead` evaluates `batches`, in this order, before they are asked for."""
        self._coming = iter(batches)
        try:
            yield
        finally:
            self._coming, self.model.answers = iter(()), []

    def look_ahead(self, model: Any) -> None:
        """Evaluate batches to come in one pass over the weights, if those evaluated before are used up."""
        calls: list[Inputs] = []
        while not model.answers and sum(call["input_ids"].numel() for call in calls) < _TOKENS_AHEAD:
            inputs = next(self._coming, None)
            if inputs is None:
                break
            calls += self.calls(inputs)
        if calls:
            model.answers = evaluate(model, calls)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not self.model.training:  # evaluation is without the routers' loss
            getattr(self, "_metrics", {"eval": {}})["eval"].pop("aux_loss", None)
        super().log(logs, *args, **kwargs)

    # Seams.

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self._micro_batches = []  # of a step that was cut short, as training begins anew
        if self.optimizer is None:
            self.optimizer = HostOptimizer(self.host, self.args)
            others = decayed_otherwise(self.host, self.get_decay_parameter_names(self.model))
            if others and self.args.weight_decay:
                _log.warning(
                    f"weight_decay: {count(len(others), 'parameter')} in another group than Trainer's, as "
                    f"{others[0]}; HostModel decays weights with two or more dimensions, norms apart"
                )
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        return self._get_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> torch.Tensor:
        """Return the tensor that the optimizer's step fills, before the log reads it."""
        optimizer: Any = self.optimizer
        found: torch.Tensor = getattr(optimizer, "optimizer", optimizer).grad_norm
        return found

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Leave devices and dtypes to the engine."""
        args = super()._build_accelerator_args(**kwargs)
        return {**args, "device_placement": False, "mixed_precision": "no"}

    def create_accelerator_and_postprocess(self) -> None:
        """Have no launcher's process group wrap the model, which has no weights to keep equal."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Do nothing: there are no weights to move."""


class HorizonTrainer(HorizonMixin, Trainer):
    """`transformers.Trainer` for causal language models, on the streamed engine. See `HorizonMixin`."""

    def router_weight(self, num_items: Any, steps: int) -> float:
        return 1.0 if self._is_scaled(num_items) else 1 / steps


class HorizonSFTTrainer(HorizonMixin, SFTTrainer):
    """`trl.SFTTrainer` on the streamed engine. See `HorizonMixin`."""

    config_class = SFTConfig
    token_values = ("entropy", "is_top1")
