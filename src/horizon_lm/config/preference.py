"""Settings of the training method: supervised tuning, or preference optimisation by one of TRL's methods.

Names and defaults are those of TRL's DPOConfig, KTOConfig, ORPOConfig and CPOConfig.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import field_validator, model_validator
from pydantic_core import PydanticCustomError

from horizon_lm.config.base import Settings, fault, setting
from horizon_lm.config.data import MOST
from horizon_lm.words import count

DataKind = Literal["documents", "pairs", "labelled"]

# Losses of pairs against a reference, and those among them for which an f-divergence is defined: they
# depend on the difference of the two rewards only.
_DIFFERENCES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")
_DPO = (*_DIFFERENCES, "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
# Method -> its loss types, the default first. A method without any has one formula.
LOSS_TYPES: dict[str, tuple[str, ...]] = {
    "dpo": _DPO,
    "ipo": ("ipo",),
    "apo": ("apo_zero", "apo_down"),
    "kto": ("kto", "apo_zero_unpaired"),
    "orpo": (),
    "simpo": ("simpo",),
    "cpo": ("sigmoid", "hinge", "ipo", "simpo"),
}
_PAIRS = ("dpo", "ipo", "apo", "orpo", "simpo", "cpo")
_AGAINST_REFERENCE = ("dpo", "ipo", "apo")
_SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
# Setting -> the methods that know it. Those of `_USED_WITH` also depend on the loss types.
_BELONGS: dict[str, tuple[str, ...]] = {
    "beta": tuple(LOSS_TYPES),
    "loss_type": tuple(LOSS_TYPES),
    "loss_weights": _AGAINST_REFERENCE,
    "label_smoothing": ("dpo", "simpo", "cpo"),
    "rpo_alpha": _AGAINST_REFERENCE,
    "f_divergence_type": ("dpo", "ipo"),
    "f_alpha_divergence_coef": ("dpo", "ipo"),
    "use_weighting": _AGAINST_REFERENCE,
    "ld_alpha": _AGAINST_REFERENCE,
    "discopop_tau": ("dpo",),
    "simpo_gamma": ("simpo", "cpo"),
    "cpo_alpha": ("simpo", "cpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "ref_model_name_or_path": (*_AGAINST_REFERENCE, "kto"),
    "precompute_ref_batch_size": (*_AGAINST_REFERENCE, "kto"),
}
_GROUP = "Preferences"


class PreferenceSettings(Settings):
    """The method of a run and its settings, part of `TrainConfig`."""

    method: Literal["auto", "sft", "dpo", "ipo", "kto", "orpo", "simpo", "cpo", "apo"] = setting(
        "auto",
        "What is optimised; auto is dpo for pairs of a chosen and a rejected completion, kto for completions "
        "with a label, and sft for other data. ipo and apo are dpo with that loss_type.",
        group=_GROUP,
        resume="ask",
    )
    beta: float = setting(
        0.1,
        "Strength of the pull towards the reference (dpo, kto); weight of the odds ratio (orpo); scale of "
        "the rewards (simpo, cpo); tau of ipo.",
        group=_GROUP,
        resume="ask",
        gt=0,
    )
    loss_type: list[
        Literal[
            "sigmoid",
            "hinge",
            "ipo",
            "exo_pair",
            "robust",
            "discopop",
            "sft",
            "sigmoid_norm",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "kto",
            "apo_zero_unpaired",
            "simpo",
        ]
    ] = setting(
        [],
        "Loss of the method, or several, which are added; [] is the method's own: sigmoid, ipo, apo_zero, "
        "kto or simpo. aot and aot_unpaired sort the pairs of one micro-batch, so they depend on its size.",
        group=_GROUP,
        resume="ask",
        expects="one or a list of "
        + ", ".join(dict.fromkeys(n for names in LOSS_TYPES.values() for n in names)),
    )
    loss_weights: list[float] | None = setting(
        None,
        "Weights of several loss_type, in their order; null is 1 for each.",
        group=_GROUP,
        resume="ask",
        expects="a list of numbers, or null",
    )
    label_smoothing: float = setting(
        0.0,
        "Probability that a preference is the wrong way round (robust, aot, cpo, simpo); epsilon of exo_pair."
        " Not that of the labels, which is label_smoothing_factor.",
        group=_GROUP,
        resume="ask",
        ge=0,
        lt=1,
    )
    rpo_alpha: float | None = setting(
        None,
        "Weight of the mean -log p of the chosen completions' tokens, added to the loss, as loss_type sft "
        "with this weight; null adds none.",
        group=_GROUP,
        resume="ask",
        ge=0,
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = setting(
        "reverse_kl",
        "Divergence from the reference (f-DPO), for loss types of the difference of two rewards: "
        + ", ".join(_DIFFERENCES)
        + ".",
        group=_GROUP,
        resume="ask",
    )
    f_alpha_divergence_coef: float = setting(0.5, "Alpha of alpha_divergence.", group=_GROUP, resume="ask")
    use_weighting: bool = setting(
        False,
        "Weight pairs by how likely the model is to write them itself (WPO).",
        group=_GROUP,
        resume="ask",
    )
    ld_alpha: float | None = setting(
        None,
        "Weight of the log-probabilities of the longer completion's tokens beyond the length of the shorter "
        "(LD-DPO); null is 1.",
        group=_GROUP,
        resume="ask",
        ge=0,
        le=1,
    )
    discopop_tau: float = setting(0.05, "Temperature of discopop.", group=_GROUP, resume="ask", gt=0)
    simpo_gamma: float = setting(
        0.5, "Margin between the rewards that simpo aims at.", group=_GROUP, resume="ask", ge=0
    )
    cpo_alpha: float | None = setting(
        None,
        "Weight of the mean -log p of the chosen completions' tokens in cpo and simpo; null is 1 for cpo, 0 "
        "for simpo.",
        group=_GROUP,
        resume="ask",
        ge=0,
    )
    desirable_weight: float = setting(
        1.0, "Weight of kto's desirable completions.", group=_GROUP, resume="ask", ge=0
    )
    undesirable_weight: float = setting(
        1.0, "Weight of kto's undesirable completions.", group=_GROUP, resume="ask", ge=0
    )
    ref_model_name_or_path: str | None = setting(
        None,
        "Reference model: a folder in Hugging Face format or a Hub name, with the same tokenizer; null is "
        "the model as it is before the first step. Its log-probabilities are computed once, and it is freed "
        "before the model to train is loaded.",
        group=_GROUP,
        resume="ask",
        min_length=1,
    )
    precompute_ref_batch_size: int | None = setting(
        None,
        "Sequences in a micro-batch of the reference's pass over the data; null uses as many as have the "
        "tokens of a training micro-batch.",
        group=_GROUP,
        resume="free",
        unit="sequences",
        ge=1,
        le=MOST,
    )

    @model_validator(mode="before")
    @classmethod
    def _name_method(cls, values: Any) -> Any:
        """Read a method named as a loss type, as in LLaMA-Factory: `stage: dpo`, `pref_loss: simpo`."""
        if not isinstance(values, dict) or values.get("method", "auto") not in ("auto", "dpo"):
            return values
        named = values.get("loss_type")
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        if named in ("orpo", "simpo"):
            return {**values, "method": named, "loss_type": []}
        return values

    @field_validator("loss_type", mode="before")
    @classmethod
    def _list_losses(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else [] if value is None else value

    @property
    def is_preference(self) -> bool:
        """Whether the method learns from preferences; method auto counts as resolved before."""
        return self.method not in ("auto", "sft")

    @property
    def sides(self) -> int:
        """Documents of a sample that share a row: 2 for methods on pairs."""
        return 2 if self.method in _PAIRS else 1

    @property
    def data_kind(self) -> DataKind:
        """What a sample of the method is."""
        return "pairs" if self.method in _PAIRS else "labelled" if self.method == "kto" else "documents"

    @property
    def losses(self) -> list[tuple[str, float]]:
        """The loss types of the method with their weights; for orpo its own formula."""
        names = self.loss_type or list(LOSS_TYPES.get(self.method, ()))[:1] or [self.method]
        found = list(zip(names, self.loss_weights or [1.0] * len(names), strict=True))
        return [*found, ("sft", self.rpo_alpha)] if self.rpo_alpha else found

    @property
    def uses_reference(self) -> bool:
        return self.method in _BELONGS["ref_model_name_or_path"]

    @property
    def uses_kl(self) -> bool:
        """Whether samples have a second document, from which the KL term is estimated."""
        return self.method == "kto" and self.losses[0][0] == "kto"

    @property
    def nll_weight(self) -> float:
        """Weight of the mean -log p of chosen tokens in the methods without a reference."""
        defaults = {"orpo": 1.0, "cpo": 1.0}
        return defaults.get(self.method, 0.0) if self.cpo_alpha is None else self.cpo_alpha

    def preference_faults(self) -> Iterator[PydanticCustomError]:
        """Yield an error for each setting that another one makes useless or wrong."""
        if self.method == "auto":  # settled with the data; checked then
            return
        strange = [key for key in _BELONGS if self._is_strange(key)]
        for key in strange:
            yield fault(
                f"{key} has no effect with method: {self.method}",
                key=key,
                hint=f"leave the key out, or set method to {' or '.join(_BELONGS[key])}",
            )
        if not self.is_preference:
            return
        if "loss_type" not in strange:
            yield from self._loss_type_faults(strange)

    def _is_strange(self, key: str) -> bool:
        default = type(self).model_fields[key].default
        return getattr(self, key) != default and self.method not in _BELONGS[key]

    def _loss_type_faults(self, strange: list[str]) -> Iterator[PydanticCustomError]:
        known = LOSS_TYPES[self.method]
        unknown = [name for name in self.loss_type if name not in known]
        if unknown:
            ways = f"choose among {', '.join(known)}" if known else "leave the key out"
            yield fault(
                f"loss_type {unknown[0]} is not one of method: {self.method}", key="loss_type", hint=ways
            )
            return
        if len(self.loss_type) > 1 and self.method not in _AGAINST_REFERENCE:
            yield fault(
                f"method: {self.method} takes one loss_type, not {', '.join(self.loss_type)}",
                key="loss_type",
                hint="keep one of them",
            )
        num_types = max(1, len(self.loss_type))
        if self.loss_weights is not None and len(self.loss_weights) != num_types:
            yield fault(
                f"loss_weights has {count(len(self.loss_weights), 'number')} for "
                f"{count(num_types, 'loss type')}",
                key="loss_weights",
                hint="write one number per loss_type",
            )
            return
        yield from self._combination_faults({name for name, _ in self.losses}, strange)

    def _combination_faults(self, names: set[str], strange: list[str]) -> Iterator[PydanticCustomError]:
        def useless(key: str, users: tuple[str, ...]) -> PydanticCustomError:
            return fault(
                f"{key} has no effect with loss_type: {', '.join(sorted(names))}",
                key=key,
                hint=f"leave the key out, or set loss_type to {' or '.join(users)}",
            )

        smoothed = _SMOOTHED if self.method == "dpo" else ("sigmoid", "simpo")
        if self.label_smoothing and "label_smoothing" not in strange and not names & set(smoothed):
            yield useless("label_smoothing", smoothed)
        if "exo_pair" in names and not self.label_smoothing:
            yield fault(
                "loss_type exo_pair needs label_smoothing above 0",
                key="label_smoothing",
                hint="set label_smoothing=1e-3, which its paper recommends",
            )
        if self.use_weighting and "sft" in names:
            yield fault(
                "use_weighting weights pairs, and loss_type sft (rpo_alpha) is a mean over tokens",
                key="use_weighting",
                hint="leave one of them out",
            )
        if "robust" in names and self.label_smoothing >= 0.5:
            yield fault(
                f"loss_type robust needs label_smoothing below 0.5, not {self.label_smoothing:g}",
                key="label_smoothing",
                hint="set label_smoothing=0.1, say",
            )
        if self.f_divergence_type != "reverse_kl" and not names <= set(_DIFFERENCES):
            yield fault(
                f"f_divergence_type: {self.f_divergence_type} is not defined for loss_type: "
                f"{', '.join(sorted(names - set(_DIFFERENCES)))}",
                key="f_divergence_type",
                hint=f"leave the key out, or choose loss types among {', '.join(_DIFFERENCES)}",
            )
        if self.f_alpha_divergence_coef != 0.5 and self.f_divergence_type != "alpha_divergence":
            yield fault(
                "f_alpha_divergence_coef has no effect without f_divergence_type: alpha_divergence",
                key="f_alpha_divergence_coef",
                hint="leave the key out, or set f_divergence_type=alpha_divergence",
            )
        if self.discopop_tau != 0.05 and "discopop" not in names:
            yield useless("discopop_tau", ("discopop",))
        if self.simpo_gamma != 0.5 and "simpo" not in names and "simpo_gamma" not in strange:
            yield useless("simpo_gamma", ("simpo",))
