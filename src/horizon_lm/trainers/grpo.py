"""`HorizonGRPOTrainer` and `HorizonRLOOTrainer`.

A model resident on the device, or vLLM, generates; scoring and training stream the weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from horizon_lm.config.data import IGNORED
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.model.loading import base_of, load_model_of
from horizon_lm.preference.reference import reference_settings
from horizon_lm.trainers.base import HorizonMixin, Inputs
from horizon_lm.trainers.generation import describe_weights, named_weights, resident
from horizon_lm.trainers.settings import begins_adapter
from horizon_lm.trainers.view import evaluate, view_of

# Log-probabilities and entropies [batch, tokens of completions], and the routers' loss.
Scores = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]

# Fields of the configurations that must be unset: name -> the way out.
_FIELDS = {
    "entropy_coef": "entropy_coef=0.0; gradients flow through log-probabilities only",
    "use_adaptive_entropy": "leave it out; gradients flow through log-probabilities only",
    "cast_lm_head_to_fp32": "model_init_kwargs={'dtype': 'float32'} computes all in fp32",
    "sync_ref_model": "leave it out; the reference stays as it is loaded",
}


class HorizonRollouts(HorizonMixin):
    """Parts common to GRPO and RLOO.

    ref_model: the reference for a `beta` above 0: a `HostModel`, or a folder or name on the Hub, whose frozen
    weights take host memory as a second model. The base of a new adapter needs none.
    """

    token_values = ("entropy",)
    # Of TRL's classes.
    beta: Any
    ref_model: Any
    temperature: float
    use_vllm: bool
    vllm_generation: Any
    _metrics: Any
    _step: Any
    _current_train_step_time: Any

    def __init__(self, model: Any = None, *positional: Any, ref_model: Any = None, **named: Any) -> None:
        self._reference = ref_model
        super().__init__(model, *positional, **named)
        if self._beta:
            self.beta = self.args.beta = self._beta
            if ref_model is not None:
                self.ref_model = view_of(reference_of(ref_model, self.host), ())
            else:
                self.ref_model = view_of(self.host, (), adapter=False)
            self.ref_model.temperature = self.temperature
        if self.use_vllm:
            self.vllm_generation._iter_named_params = partial(named_weights, self.host)
            self.vllm_generation._weight_metadata = describe_weights(self.host)

    def _given(self, model: Any, positional: Any, named: Any) -> dict[str, Any]:
        given = super()._given(model, positional, named)
        has_base = given.get("peft_config") is not None or begins_adapter(given["model"])
        _refuse(type(self).__name__, given["args"], self._reference, has_base=has_base)
        return given

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Hide `beta`, for which TRL would load the reference as a model of its own."""
        args = copy.copy(given["args"])
        self._beta, args.beta = args.beta, 0.0
        given["model"].temperature = args.temperature
        return super()._arguments({**given, "args": args})

    def _generate(self, prompts: list[Any]) -> Any:
        """Generate with the whole model on the device; with vLLM it never is."""
        if self.use_vllm:
            return cast(Any, super())._generate(prompts)
        wrapped = self.model_wrapped
        with resident(self.host) as model:
            self.model_wrapped = model
            self.model.whole.append(model)
            try:
                return cast(Any, super())._generate(prompts)
            finally:
                self.model_wrapped = wrapped
                self.model.whole.clear()

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

    def calls(self, inputs: Inputs) -> list[Inputs]:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        return [_scored(ids, mask, inputs["completion_ids"].size(1))]

    @contextmanager
    def looking_ahead(self, batches: Iterable[Inputs]) -> Iterator[None]:
        """Do nothing: the completions of batches to come do not exist yet."""
        yield

    def look_ahead(self, model: Any) -> None:
        """Do nothing; see `looking_ahead`."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, ids: Any, mask: Any, logits_to_keep: int, *size: int, **asked: Any
    ) -> Scores:
        """Return the scores of completions: in a step those that the engine has, else from one pass over the
        weights for all micro-batches of `size` rows."""
        [rows] = size or [asked.get("batch_size")]
        parts = (tensor.split(rows or len(ids)) for tensor in (ids, mask))
        batches = [_scored(one, its, logits_to_keep) for one, its in zip(*parts, strict=True)]
        entropies = ("entropy",) if asked.get("compute_entropy") else ()
        found: Any = [model(**batch) for batch in batches] if model.answers else None
        if found is None:
            found = [answer.values for answer in evaluate(model, batches, entropies)]

        def scores(name: str) -> torch.Tensor:
            value = torch.cat([getattr(values, name)[:, -logits_to_keep:] for values in found]).to(ids.device)
            return value.masked_fill(mask[:, -logits_to_keep:] == 0, 0)

        log_probs = scores("log_probs")
        aux_loss = log_probs.new_zeros(()) if asked.get("compute_aux_loss") else None
        return log_probs, scores("entropy") if entropies else None, aux_loss


def _scored(input_ids: torch.Tensor, attention_mask: torch.Tensor, completion: int) -> Inputs:
    """Return a micro-batch whose targets are the unmasked ones of the last `completion` tokens.

    If all are masked (`mask_truncated_completions`), one is a target all the same, as a step needs one; its
    scores are masked.
    """
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    labels[:, :-completion] = IGNORED
    labels[0, -1] = torch.where((labels != IGNORED).any(), labels[0, -1], input_ids[0, -1])
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def _refuse(trainer: str, args: Any, ref_model: Any, *, has_base: bool) -> None:
    """Raise ConfigError for what rollouts have no equivalent of. has_base: of a new adapter."""
    for name, hint in _FIELDS.items():
        if getattr(args, name, False):
            raise ConfigError(f"{trainer}: {name}={getattr(args, name)} is not supported", hint=hint)
    if args.beta and ref_model is None and not has_base:
        raise ConfigError(
            f"{trainer}: beta={args.beta:g} needs a reference model, a second copy of the weights in memory",
            hint=f"beta=0.0 trains without it; {trainer}(..., ref_model=FOLDER) takes the host memory for "
            "it; peft_config trains a new adapter, whose base is the reference",
        )
    if ref_model is not None and not args.beta:
        raise ConfigError(
            f"{trainer}: ref_model is given, and beta=0.0 uses none", hint="leave it out, or set beta above 0"
        )


def reference_of(source: Any, host: HostModel) -> HostModel:
    """Return `source`, or load it as a HostModel with frozen weights: no gradients and no optimizer state.

    Settings are those of `host`, except for what names layers.
    """
    if isinstance(source, HostModel):
        return source
    source, settings = base_of(source, reference_settings(host.settings))
    model = load_model_of(source, settings)
    return HostModel(model.requires_grad_(False), settings)


class HorizonGRPOTrainer(HorizonRollouts, GRPOTrainer):
    """`trl.GRPOTrainer` on the streamed engine. See `HorizonRollouts`."""

    config_class = GRPOConfig


class HorizonRLOOTrainer(HorizonRollouts, RLOOTrainer):
    """`trl.RLOOTrainer` on the streamed engine. See `HorizonRollouts`."""

    config_class = RLOOConfig
