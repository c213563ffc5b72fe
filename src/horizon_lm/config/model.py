"""Settings of a model in host memory: kernels, parameters, optimizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from horizon_lm.config.adapters import OF_NEW, AdapterSettings
from horizon_lm.config.base import fault, setting

# Values that `deterministic` allows. Compiled kernels are chosen by timing.
_REPEATABLE: dict[str, tuple[Any, ...]] = {
    "attn_implementation": ("sdpa", "eager"),
    "compile": (False,),
    "kernels": ("none",),
}
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
HUB_ATTENTION = re.compile(r"kernels-community/[\w.-]+(@[\w.-]+)?(:\w+)?")
HUB_KERNEL = re.compile(
    r"(?P<repository>kernels-community/[\w.-]+)@(?P<commit>[0-9a-f]{40}):(?P<layer>\w+)", re.ASCII
)


class ModelSettings(AdapterSettings):
    """The settings of `TrainConfig` that `HostModel.from_pretrained` takes as well."""

    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16",
        "Weight and compute dtype; the optimizer keeps float32 masters either way.",
        group="Model",
        resume="fixed",
    )
    attn_implementation: str = setting(
        "sdpa",
        "Attention kernel, by its transformers name; a CPU supports only sdpa and eager. A kernel of the Hub "
        "is downloaded at first use and its code executed: pin a commit.",
        group="Model",
        resume="ask",
        expects="sdpa, eager, flash_attention_2, flash_attention_3, flex_attention, or "
        "kernels-community/NAME[@COMMIT]",
        pattern=f"^({'|'.join(ATTENTION)}|{HUB_ATTENTION.pattern})$",
    )
    experts_implementation: Literal["auto", "grouped_mm", "eager", "batched_mm"] = setting(
        "auto",
        "Computation of a mixture's experts, by its transformers name: grouped_mm sorts tokens by expert, "
        "eager loops over experts, batched_mm copies the weights of each token's experts. auto is grouped_mm "
        "if the model's class has it, else eager. `horizon doctor CONFIG` and the run show which one runs.",
        group="Model",
        resume="ask",
    )
    compile: bool | Literal["max-autotune"] = setting(
        False,
        "Compile decoder layers with torch.compile, once for all of the same structure; max-autotune also "
        "times candidate kernels. The first step takes seconds to minutes longer. Layers that cannot be "
        "compiled are named and run uncompiled.",
        group="Model",
        resume="ask",
        expects="true, false or max-autotune",
    )
    kernels: Literal["none", "liger", "hub"] = setting(
        "none",
        "Kernels that replace parts of layers: liger uses the norms, MLPs and rotary embeddings of "
        "liger-kernel, hub uses those in hub_kernels. Both need a GPU.",
        group="Model",
        resume="ask",
    )
    hub_kernels: dict[str, str] = setting(
        {},
        "Kernels of the Hub by the layer that they replace, as in RMSNorm: "
        "kernels-community/NAME@COMMIT:LAYER. They are downloaded at first use and their code executed.",
        group="Model",
        resume="ask",
        expects="a mapping of layers to kernels-community/NAME@COMMIT:LAYER, with all 40 digits of a commit",
    )
    trust_remote_code: bool = setting(
        False,
        "Run Python code that ships with the model; leave it off for models you have not read.",
        group="Model",
        resume="free",
    )
    model_revision: str | None = setting(
        None,
        "Branch, tag or commit of a Hub model; a commit makes the run reproducible.",
        group="Model",
        resume="ask",
    )
    allow_missing: list[str] = setting(
        [],
        "Weights that the checkpoint may lack or hold in another shape, as regular expressions searched in "
        "their names; they start with random values, as transformers initialises them.",
        group="Model",
        resume="free",
        expects="a list of regular expressions",
    )
    allow_unexpected: list[str] = setting(
        [],
        "Weights of the checkpoint that the model may lack, as regular expressions searched in their names;"
        " they are ignored.",
        group="Model",
        resume="free",
        expects="a list of regular expressions",
    )
    neftune_noise_alpha: float | None = setting(
        None,
        "Uniform noise on embeddings in training (NEFTune), of magnitude alpha / sqrt(tokens * width), "
        "drawn for each micro-batch; null adds none. Usual values are 5 to 15.",
        group="Optimizer",
        resume="ask",
        gt=0,
    )
    seed: int = setting(
        42,
        "Seed of weight initialisation, dropout and data order.",
        group="Batch and schedule",
        resume="ask",
        ge=0,
        lt=2**63,
        expects="a whole number >= 0",
    )
    label_smoothing_factor: float = setting(
        0.0,
        "Label smoothing of the training loss: this share of it is the mean of -log p over the vocabulary, "
        "as in transformers' LabelSmoother. Evaluation does not smooth.",
        group="Optimizer",
        resume="ask",
        ge=0,
        lt=1,
    )
    optim: Literal["adamw", "adam", "sgd", "lion"] = setting(
        "adamw",
        "Update rule, with decoupled (adamw, lion) or coupled weight decay (adam, sgd).",
        group="Optimizer",
        resume="fixed",
    )
    update: Literal["auto", "sync", "deferred", "eager"] = setting(
        "auto",
        "When the optimizer runs: sync after the backward pass, deferred during the next forward pass, "
        "eager during the backward pass. Results are bitwise identical; eager cannot clip and needs no "
        "memory for gradients. auto is deferred with clipping or nonfinite: skip, else eager.",
        group="Optimizer",
        resume="free",
    )
    moment_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Dtype of the optimizer's moments; bfloat16 rounds stochastically and saves 4 bytes per parameter.",
        group="Optimizer",
        resume="fixed",
    )
    adam_beta1: float = setting(
        0.9,
        "Decay of the running mean of gradients (adamw, adam, lion).",
        group="Optimizer",
        resume="ask",
        ge=0,
        lt=1,
    )
    adam_beta2: float = setting(
        0.999,
        "Decay of the running mean of squared gradients (adamw, adam) or of lion's momentum.",
        group="Optimizer",
        resume="ask",
        ge=0,
        lt=1,
    )
    adam_epsilon: float = setting(
        1e-8,
        "Added to the denominator of the update (adamw, adam).",
        group="Optimizer",
        resume="ask",
        gt=1.2e-38,
    )
    sgd_momentum: float = setting(0.0, "Momentum of sgd.", group="Optimizer", resume="ask", ge=0, lt=1)
    max_grad_norm: float | None = setting(
        1.0,
        "Clip gradients to this global norm; 0 or null disables clipping.",
        group="Optimizer",
        resume="ask",
        ge=0,
    )
    nonfinite: Literal["raise", "skip", "rollback"] = setting(
        "raise",
        "Response to a NaN or infinite loss or gradient: end the run, skip the step's update, or return to "
        "the last checkpoint and continue with the data after the bad step.",
        group="Optimizer",
        resume="free",
    )
    decay_embeddings: bool = setting(
        True,
        "Apply weight decay to embedding tables; biases and norms are never decayed.",
        group="Optimizer",
        resume="ask",
    )
    lr_factors: dict[str, float] = setting(
        {},
        "Learning-rate factors of parameters, regular expression to factor; the first one found in a name "
        "applies.",
        group="Optimizer",
        resume="ask",
        expects="a mapping of regular expressions to numbers >= 0",
    )
    optimizer_threads: int | Literal["auto"] = setting(
        "auto",
        "Host threads of the update, never more than the cores available to this process. auto uses all of "
        "them on the CPU. On CUDA a run uses the number that `horizon doctor` measured, otherwise three "
        "fewer than all (all with update: sync).",
        group="Optimizer",
        resume="free",
        unit="threads",
        expects="a whole number >= 1, or auto",
    )

    @field_validator("optim", mode="before")
    @classmethod
    def _name_optim(cls, value: Any) -> Any:
        """Drop the implementation that transformers puts into the name; there is only one here."""
        return "adamw" if value in ("adamw_torch", "adamw_torch_fused", "adamw_hf") else value

    @field_validator("optimizer_threads")
    @classmethod
    def _check_count(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("below 1")  # reported with the field's `expects`
        return value

    @field_validator("lr_factors")
    @classmethod
    def _check_lr_factors(cls, value: dict[str, float]) -> dict[str, float]:
        if any(factor < 0 for factor in value.values()):
            raise ValueError("below 0")  # reported with the field's `expects`
        return value

    @field_validator("hub_kernels")
    @classmethod
    def _check_hub_kernels(cls, value: dict[str, str]) -> dict[str, str]:
        if any(HUB_KERNEL.fullmatch(source) is None for source in value.values()):
            raise ValueError("not a layer of a repository")  # reported with the field's `expects`
        return value

    def faults(self) -> Iterator[PydanticCustomError]:
        yield from super().faults()
        reason = "needs the norm of all gradients" if self.max_grad_norm else None
        if self.nonfinite == "skip":
            reason = reason or "skips a step if any of its gradients is not finite"
        if self.update == "eager" and reason is not None:
            culprit = "max_grad_norm" if self.max_grad_norm else "nonfinite"
            yield fault(
                f"update: eager updates layers before all gradients are known, but {culprit}: "
                f"{getattr(self, culprit)} {reason}",
                key="update",
                hint="set update=deferred or "
                + ("max_grad_norm=null" if self.max_grad_norm else "nonfinite=raise"),
            )
        for key, fixed in _REPEATABLE.items() if self.deterministic else ():
            if getattr(self, key) not in fixed:
                value = _written(getattr(self, key))
                yield fault(
                    f"deterministic=true, but {key}={value} may choose other kernels in each run",
                    key="deterministic",
                    hint=f"set {key}={_written(fixed[0])} or deterministic=false",
                )
        if self.allow_missing and self.has_adapter:
            yield fault(
                "allow_missing puts random weights in the base; an adapter neither trains nor saves them",
                key="allow_missing",
                hint="leave the key out; name a model with all its weights",
            )
        yield from self._kernel_faults()

    def _kernel_faults(self) -> Iterator[PydanticCustomError]:
        if (self.kernels == "hub") != bool(self.hub_kernels):
            yield fault(
                "kernels=hub, but hub_kernels is empty"
                if self.kernels == "hub"
                else f"hub_kernels is set, but kernels={self.kernels}",
                key="hub_kernels",
                hint="set kernels=hub and hub_kernels, or neither",
            )

    def untrained(self) -> Self:
        """Return these settings for a model that is not trained: without those of an adapter, and without
        names of trained parameters."""
        own = ("adapter", "adapter_name_or_path", *OF_NEW, "freeze", "train", "lr_factors")
        return self.replace(**{key: ModelSettings.model_fields[key].default for key in own})

    @property
    def update_mode(self) -> str:
        """Return `update` with auto resolved."""
        if self.update != "auto":
            return self.update
        return "deferred" if self.max_grad_norm or self.nonfinite == "skip" else "eager"


def _written(value: Any) -> str:
    """A value as in a configuration file."""
    return value if isinstance(value, str) else json.dumps(value)
