"""`HorizonDPOTrainer` and `HorizonKTOTrainer`: the reference is evaluated before training, and never a second
model in memory."""

from __future__ import annotations

import copy
import hashlib
from typing import Any, cast

from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from horizon_lm.config.data import IGNORED
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.preference.reference import weights_hash
from horizon_lm.trainers.base import HorizonMixin, Inputs
from horizon_lm.trainers.settings import tokenizer_of
from horizon_lm.trainers.view import view_of


class HorizonPreferences(HorizonMixin):
    """What the trainers with a reference share: the model as it is before training, or `ref_model`.

    Of a model with a new adapter the reference is its base, with the adapter switched off, at any time.
    ref_model: a folder, a name on the Hub or a `HostModel`. A folder or name is evaluated and freed before a
    `model` given by its folder or name is loaded. Datasets with log-probabilities of a reference keep them.
    """

    reference: tuple[str, ...]  # the columns
    ref_model: Any
    _reference_is_gone = False

    def __init__(self, model: Any = None, *positional: Any, **named: Any) -> None:
        given = self._given(model, positional, named)
        if given.get("ref_model") is not None:
            given.update(self._evaluated(given))
            self._reference_is_gone = True
        super().__init__(**given)
        if not self._is_base:
            self.ref_model = None

    def _evaluated(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the datasets with columns of the reference."""
        if given.get("processing_class") is None:
            given["processing_class"] = tokenizer_of(given["model"], given["args"])
        changes = {"model": given["ref_model"], "ref_model": None, "callbacks": None}
        if "peft_config" in given:
            changes["peft_config"] = None
        trainer = type(self)(**{**given, **changes, "args": copy.copy(given["args"])})
        if not isinstance(given["ref_model"], HostModel):
            trainer.host.close()
        names = ("train_dataset", "eval_dataset")
        return {"ref_model": None, **{name: getattr(trainer, name) for name in names}}

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        given["args"].precompute_ref_log_probs = True
        # TRL hashes a reference's state_dict, and evaluates it.
        adapter = not self._is_base
        view = view_of(
            self.host, (), lambda: _identity(self.host, given["args"], adapter=adapter), adapter=adapter
        )
        return {**super()._arguments(given), "ref_model": view}

    @property
    def _is_base(self) -> bool:
        """Whether the reference is the base of the adapter that is trained."""
        return self.begins_adapter and not self._reference_is_gone

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self.reference[0] in dataset.column_names:
            return dataset
        if self._reference_is_gone:  # TRL would take the model to train
            raise ConfigError(
                f"the dataset {name} has no column {self.reference[0]}, and ref_model computes it only when "
                "the trainer is made",
                hint="pass the dataset as eval_dataset then",
            )
        batches = DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        with self.looking_ahead(batches):
            return cast(Any, super())._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: Inputs) -> Any:
        self.look_ahead(model)
        return cast(Any, super()).compute_ref_log_probs(model, self._prepare_inputs(inputs))

    def calls(self, inputs: Inputs) -> list[Inputs]:
        return [_call(inputs)]


class HorizonDPOTrainer(HorizonPreferences, DPOTrainer):
    """`trl.DPOTrainer` on the streamed engine. See `HorizonPreferences`."""

    config_class = DPOConfig
    token_values = ("entropy", "mean_logits", "is_top1")
    reference = ("ref_chosen_logps", "ref_rejected_logps")

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["args"].use_weighting:
            given["model"].asked = (*self.token_values, "log_sum_sq_probs")
        return super()._arguments(given)


class HorizonKTOTrainer(HorizonPreferences, KTOTrainer):
    """`trl.KTOTrainer` on the streamed engine. The completions of its KL term are evaluated before a step."""

    config_class = KTOConfig
    token_values = ("entropy", "mean_logits")
    reference = ("ref_logps", "ref_KL_logps")

    def calls(self, inputs: Inputs) -> list[Inputs]:
        return [*([_call(inputs, "KL_")] if self.calculate_KL else []), _call(inputs)]


def _call(inputs: Inputs, prefix: str = "") -> Inputs:
    """Return what the model computes for a batch. prefix: that of the names in the batch."""
    ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}completion_mask"]
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(mask == 0, IGNORED),
        "attention_mask": inputs[f"{prefix}attention_mask"],
    }


def _identity(host: HostModel, args: Any, *, adapter: bool) -> bytes:
    """Hash what log-probabilities of a dataset depend on: weights, dtypes, attention and lengths."""
    names = ("max_length", "truncation_mode", "ld_alpha")
    settings = host.settings
    parts = [getattr(args, name, None) for name in names]
    parts += [settings.dtype, settings.attn_implementation, settings.kernels, host.device.type]
    return hashlib.sha256(repr([*parts, weights_hash(host, adapter=adapter)]).encode()).digest()
