"""The model that a Trainer holds: a transformers model without weights, answered for by the engine.

Within a step a call returns what the engine computed for the micro-batch; elsewhere it evaluates.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import FusedCausalLMOutput

from horizon_lm.config.data import IGNORED
from horizon_lm.engine.loss import TokenValues
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.trainers.generation import resident

MODEL_INPUTS = ("input_ids", "labels", "attention_mask", "position_ids")
# Arguments that the engine settles itself. The last ones describe packed documents, as position_ids do.
_SETTLED = {
    *("use_cache", "fused_lm_head", "output_router_logits", "num_items_in_batch", "return_dict"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
}


@dataclass(frozen=True, eq=False)
class Answer:
    """Values of the target tokens of a model call. inputs: input_ids and labels [batch, tokens]."""

    inputs: dict[str, torch.Tensor]
    values: TokenValues

    def fits(self, input_ids: torch.Tensor, labels: torch.Tensor) -> bool:
        wanted = {"input_ids": input_ids, "labels": labels}
        return all(
            mine is theirs or mine.shape == theirs.shape and torch.equal(mine, theirs.to(mine.device))
            for mine, theirs in ((self.inputs[name], wanted[name]) for name in wanted)
        )


class StreamedView:
    """Mixed into a model's class. The modules are those of the `HostModel`; mode and device are not.

    asked: names of the `TokenValues` to compute. answers: for the calls to come; each is used once.
    identity: makes what `state_dict` holds in place of the weights, of which TRL takes a hash.
    adapter: whether the model runs with its adapter.
    whole: the `resident` model while a rollout has it open, else nothing.
    """

    host: HostModel
    asked: Sequence[str]
    temperature: float
    answers: list[Answer]
    identity: Callable[[], bytes] | None
    adapter: bool
    whole: list[Any]

    def answer(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **more: Any,
    ) -> FusedCausalLMOutput:
        """Return log-probabilities and the other values, as a model of TRL with a fused head does."""
        unknown = [name for name in more.keys() - _SETTLED - {*MODEL_INPUTS} if more[name] is not None]
        if labels is None or unknown:
            raise ConfigError(
                f"the model was called with {unknown[0]}"
                if unknown
                else "logits of all tokens were asked for",
                hint="streamed training gives log-probabilities of the labels, from "
                + ", ".join(MODEL_INPUTS),
            )
        found = next((a for a in self.answers if a.fits(input_ids, labels)), None)
        if found is None:
            if torch.is_grad_enabled():
                raise ConfigError(
                    "the loss calls the model more than once, or with other tokens than those of its batch",
                    hint="compute what needs no gradient under torch.no_grad(), before the step",
                )
            inputs = {"input_ids": input_ids, "labels": labels, **more}
            [found] = evaluate(self, [{k: inputs[k] for k in MODEL_INPUTS if inputs.get(k) is not None}])
        else:
            self.answers.remove(found)
        return _output(_to(found.values, labels.device), labels, num_items_in_batch)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the whole model on the device."""
        if self.whole:
            return self.whole[-1].generate(*args, **kwargs)
        with resident(self.host) as model:
            return model.generate(*args, **kwargs)

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        self.host.save_pretrained(Path(folder))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        if self.identity is None:
            raise ConfigError(
                "state_dict() would copy all weights", hint="iterate over trainer.host.named_parameters()"
            )
        return {"identity": torch.frombuffer(bytearray(self.identity()), dtype=torch.uint8)}

    def train(self, mode: bool = True) -> StreamedView:
        """Note the mode, which TRL reads; the engine knows by itself when it trains."""
        self.__dict__["training"] = mode
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> StreamedView:
        return self  # devices and dtypes are the engine's

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `activations` says what is recomputed."""

    gradient_checkpointing_enable = activation_checkpointing_enable

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "forward":  # TRL patches its fused head in, which `answer` replaces
            super().__setattr__(name, value)


def view_of(
    host: HostModel,
    asked: Sequence[str],
    identity: Callable[[], bytes] | None = None,
    *,
    adapter: bool = True,
) -> Any:
    """Make the view of a `HostModel`; arguments as for the class."""
    view: Any = copy.copy(host.skeleton.model)
    base: Any = type(view)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> FusedCausalLMOutput:
        return self.answer(*args, **kwargs)

    # A class of the same name: transformers looks at names and at the signature of forward.
    view.__class__ = type(base.__name__, (StreamedView, base), {"forward": forward})
    view.__dict__.update(host=host, asked=asked, temperature=1.0, answers=[], identity=identity, whole=[])
    view.__dict__["adapter"] = adapter
    view.__dict__.pop("forward", None)
    return view


def evaluate(
    view: Any, batches: Sequence[dict[str, torch.Tensor]], asked: Sequence[str] | None = None
) -> list[Answer]:
    """Evaluate micro-batches in one pass over the weights. asked: default: what the view's calls return."""
    values = ("log_probs", *(view.asked if asked is None else asked))
    found = view.host.evaluate(
        batches, values=values, temperature=view.temperature, adapter=view.adapter
    ).values
    return [Answer(batch, one) for batch, one in zip(batches, found, strict=True)]


def _to(values: TokenValues, device: torch.device) -> TokenValues:
    found: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in vars(values).items()}
    return TokenValues(**found)


def _output(values: TokenValues, labels: torch.Tensor, num_items: Any) -> FusedCausalLMOutput:
    mask = labels[:, 1:] != IGNORED
    total = mask.sum().clamp(min=1) if num_items is None else num_items
    return FusedCausalLMOutput(
        loss=-values.log_probs.sum() / total,
        label_mask=mask,
        aux_loss=torch.zeros((), device=mask.device),  # the engine adds the routers' loss
        **vars(values),
    )
