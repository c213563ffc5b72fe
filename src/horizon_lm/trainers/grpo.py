"""`HorizonGRPOTrainer` and `HorizonRLOOTrainer`.

A model resident on the device, or vLLM, generates; scoring and training stream the weights.
"""

from __future__ import annotations

import copy
import inspect
import time
from functools import partial
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from horizon_lm.config.data import IGNORED
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.model.loading import load_model_of
from horizon_lm.outputs import ForwardBackwardOutput
from horizon_lm.trainers.base import HorizonMixin, Inputs
from horizon_lm.trainers.generation import named_weights, resident
from horizon_lm.trainers.view import evaluate, view_of

# Log-probabilities and entropies [batch, tokens of completions], and the routers' loss.
Scores = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]

# Fields of the configurations that must be unset: name -> the way out.
_FIELDS = {
    "entropy_coef": "entropy_coef=0.0; gradients flow through log-probabilities only",
    "use_adaptive_entropy": "leave it out; gradients flow through log-probabilities only",
    "cast_lm_head_to_fp32": "leave it out; the loss is computed from fp32 logits, and dtype='float32' computes "
    "all in fp32",
    "sync_ref_model": "leave it out; the reference stays as it is loaded",
}


class HorizonRollouts(HorizonMixin):
    """Parts common to GRPO and RLOO.

    ref_model: the reference for a `beta` above 0: a `HostModel`, or a folder or name on the Hub, whose frozen
    weights take host memory as a second model.
    """

    token_values = ("entropy",)

    def __init__(self, model: Any = None, *positional: Any, ref_model: Any = None, **named: Any) -> None:
        trl = super(HorizonMixin, self).__init__
        given = inspect.signature(trl).bind_partial(model, *positional, **named).arguments
        args = given.get("args")
        _refuse(type(self).__name__, self.config_class if args is None else args, ref_model)
        super().__init__(model, *positional, **named)
        if ref_model is not None:
            self.beta = self.args.beta = (self.config_class if args is None else args).beta
            self.ref_model = view_of(reference_of(ref_model, self.host), ())
            self.ref_model.temperature = self.temperature
        if self.use_vllm:
            self.vllm_generation._iter_named_params = partial(named_weights, self.host)

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Leave the reference out: TRL would load it as a model of its own."""
        args = copy.copy(given["args"])
        args.beta = 0.0
        given["model"].temperature = args.temperature
        return {**given, "args": args}

    def _generate(self, prompts: list[Any]) -> Any:
        """Generate with the whole model on the device; with vLLM it never is."""
        if self.use_vllm:
            return super()._generate(prompts)
        wrapped = self.model_wrapped
        with resident(self.host) as model:
            self.model_wrapped = model
            try:
                return super()._generate(prompts)
            finally:
                self.model_wrapped = wrapped

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Roll out if it is time to, and keep the micro-batch; count as TRL does."""
        begun = time.perf_counter()
        model.train()
        output = super().training_step(model, self._prepare_inputs(inputs), num_items_in_batch)
        self._step += 1
        self._current_train_step_time += time.perf_counter() - begun
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return output

    def micro_batch(self, inputs: Inputs) -> Inputs:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return _scored(ids, mask, inputs["completion_ids"].size(1))

    def forward_backward(self) -> ForwardBackwardOutput:
        """Also log the routers' loss, which the engine adds: TRL was told that it is 0."""
        out = super().forward_backward()
        if out.router_losses:
            coefficient = self.host.config.get_text_config().router_aux_loss_coef
            logged = self._metrics["train"]["aux_loss"]
            logged[-len(out.router_losses) :] = [loss / coefficient for loss in out.router_losses]
        return out

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *batch_size: Any, **asked: Any
    ) -> Scores:
        """Score completions: in a step by the values that the engine has computed for the micro-batch, else
        by one pass over the weights for all micro-batches of `batch_size` rows."""
        [size] = batch_size or [asked.get("batch_size")]
        parts = (tensor.split(size or len(input_ids)) for tensor in (input_ids, attention_mask))
        batches = [_scored(ids, mask, logits_to_keep) for ids, mask in zip(*parts, strict=True)]
        if model.answers:
            found = [model(**batch) for batch in batches]
        else:
            found = [answer.values for answer in evaluate(model, batches)]
        log_probs = torch.cat([values.log_probs[:, -logits_to_keep:] for values in found])
        entropy = aux_loss = None
        if asked.get("compute_entropy"):
            entropy = torch.cat([values.entropy[:, -logits_to_keep:] for values in found])
        if asked.get("compute_aux_loss"):
            aux_loss = log_probs.new_zeros(())
        return log_probs, entropy, aux_loss


def _scored(input_ids: torch.Tensor, attention_mask: torch.Tensor, completion: int) -> Inputs:
    """Return a micro-batch whose targets are the unmasked ones of the last `completion` tokens.

    If all are masked (`mask_truncated_completions`), one is a target all the same, since a step needs one; the
    loss masks it.
    """
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    labels[:, :-completion] = IGNORED
    labels[0, -1] = torch.where((labels != IGNORED).any(), labels[0, -1], input_ids[0, -1])
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def _refuse(trainer: str, args: Any, ref_model: Any) -> None:
    """Raise ConfigError for what streaming has no equivalent of. args: a configuration, or its class."""
    for name, hint in _FIELDS.items():
        if getattr(args, name, False):
            raise ConfigError(f"{trainer}: {name}={getattr(args, name)} is not supported", hint=hint)
    if args.beta and ref_model is None:
        raise ConfigError(
            f"{trainer}: beta={args.beta:g} needs a reference model, a second copy of the weights in memory",
            hint=f"beta=0.0 trains without it; {trainer}(..., ref_model=FOLDER) takes the host memory for it",
        )
    if ref_model is not None and not args.beta:
        raise ConfigError(
            f"{trainer}: ref_model is given, and beta=0.0 uses none", hint="leave it out, or set beta above 0"
        )


def reference_of(source: Any, host: HostModel) -> HostModel:
    """Return `source`, or load it as a HostModel with frozen weights: no gradients and no optimizer state.

    Settings are those of `host`.
    """
    if isinstance(source, HostModel):
        return source
    settings = host.settings.replace(freeze=[], model_revision=None)
    model = load_model_of(source, settings)
    return HostModel(model.requires_grad_(False), settings)


class HorizonGRPOTrainer(HorizonRollouts, GRPOTrainer):
    """`trl.GRPOTrainer` on the streamed engine. See `HorizonRollouts`."""

    config_class = GRPOConfig


class HorizonRLOOTrainer(HorizonRollouts, RLOOTrainer):
    """`trl.RLOOTrainer` on the streamed engine. See `HorizonRollouts`."""

    config_class = RLOOConfig
